"""After `quarto render`, which runs this (see _quarto.yml): what Quarto loads from elsewhere leaves the pages, each
page says what it is about, and search finds pages to read.

To any page with an HTML output, a table for one, Quarto adds require.js and jQuery from a CDN, for widgets; the only
ones here are progress bars, which say nothing after the run. Without them the site asks nobody but its own origin, and
a reader without a network sees no error. A notebook's second line becomes the description that search engines show,
and a Markdown file's heading its title, where Quarto takes the words of the whole site and the name of the file. The
index of the search loses the pages of runs, near-duplicates that are found from "Every run", and the TeX source that
stands beside each formula of a page.
"""
import html, json, os, re
from pathlib import Path

# versions of Quarto differ in the host: cdn.jsdelivr.net, cdnjs.cloudflare.com
REMOTE = re.compile(r"""<script\b[^>]*\bsrc="https://cdn[^">]*"""
                    r"""/(?:requirejs|require\.js|jquery|@jupyter-widgets/html-manager)[@/][^>]*></script>\s*"""
                    r"""|<script\b[^>]*>define\('jquery'.*?</script>\s*""", re.S)
TEX = re.compile(r"<annotation\b[^>]*>(.*?)</annotation>", re.S)

HEADING, TITLE = re.compile(r"<h1\b[^>]*>(.*?)</h1>", re.S), re.compile(r"<title>(.*?)( – [^<]*)?</title>", re.S)
SUBTITLE = re.compile(r"""<h1\b[^>]*>.{0,600}?(?:<div class="description">|<blockquote[^>]*>\s*<p>)"""
                      r"""\s*(.*?)\s*</(?:div|p)>""", re.S)
ABOUT = re.compile(r'(<meta name="description" content=")[^"]*(">)')

def offline(page): return REMOTE.sub("", page)

def plain(text): return " ".join(re.sub(r"<[^>]+>", "", text).split())

def described(page):
    "The page with its own heading as title, and with its own second line, if there is one, as description."
    if heading := HEADING.search(page):
        page = TITLE.sub(lambda m: f"<title>{plain(heading[1])}{m[2] or ''}</title>", page, count=1)
    if said := SUBTITLE.search(page):
        page = ABOUT.sub(lambda m: m[1] + plain(TEX.sub("", said[1])).replace('"', "&quot;") + m[2], page, count=1)
    return page

def searched(entries, pages):
    "Entries of the index without runs and without TeX; `pages` gives the HTML of a page by its address."
    out = []
    for e in entries:
        address = e["href"].split("#")[0]
        if address.startswith("data/mini/runs/"): continue
        tex = {html.unescape(t) for t in TEX.findall(pages.get(address, ""))}
        for t in sorted(tex, key=len, reverse=True):
            if re.search(r"[\\^_{}]", t): e = e | {"text": e["text"].replace(t, "")}    # a bare letter may be a word's
        out.append(e)
    return out

if __name__ == "__main__":
    site = Path(os.environ["QUARTO_PROJECT_OUTPUT_DIR"])
    pages = {f.relative_to(site).as_posix(): f.read_text(encoding="utf-8") for f in site.rglob("*.html")}
    for name, page in pages.items():
        if (clean := described(offline(page))) != page: (site/name).write_text(clean, encoding="utf-8")
    index = site/"search.json"
    if index.exists():
        entries = json.loads(index.read_text(encoding="utf-8"))
        index.write_text(json.dumps(searched(entries, pages), ensure_ascii=False), encoding="utf-8")
