"""After `quarto render`, which runs this (see _quarto.yml): what Quarto loads from elsewhere leaves the pages, and search finds pages to read.

To any page with an HTML output, a table for one, Quarto adds require.js and jQuery from a CDN, for widgets; the only ones here are
progress bars, which say nothing after the run. Without them the site asks nobody but its own origin, and a reader without a network sees no error.
The index of the search loses the pages of runs, near-duplicates that are found from "Every run", and the TeX source that stands
beside each formula of a page.
"""
import html, json, os, re
from pathlib import Path

REMOTE = re.compile(r"""<script\b[^>]*\bsrc="https://cdn\.jsdelivr\.net/npm/(?:requirejs|jquery|@jupyter-widgets/html-manager)@[^>]*></script>\s*"""
                    r"""|<script\b[^>]*>define\('jquery'.*?</script>\s*""", re.S)
TEX = re.compile(r"<annotation\b[^>]*>(.*?)</annotation>", re.S)

def offline(page): return REMOTE.sub("", page)

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
        if (clean := offline(page)) != page: (site/name).write_text(clean, encoding="utf-8")
    index = site/"search.json"
    if index.exists():
        entries = json.loads(index.read_text(encoding="utf-8"))
        index.write_text(json.dumps(searched(entries, pages), ensure_ascii=False), encoding="utf-8")
