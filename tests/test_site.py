"""The site as a reader meets it: contrast in both modes, no sideways sliding on a phone, no error in the console,
titles, captions and references.

What a browser must tell is asked on the pages that smalldocs makes, in headless Chromium; the rest is read from the
sources.
"""
import functools, http.server, importlib.util, json, re, threading
import pytest
from test_dial import CHROME, Browser
from test_repo import ROOT, SITE, pages, prose, site    # noqa: F401: the built site, a fixture

SHOWN = [p for p in pages() if (ROOT/"data/mini/runs") not in p.parents]
NAMES = {p: p.relative_to(ROOT).as_posix() for p in SHOWN}
NOTEBOOKS = [p for p in SHOWN if p.suffix == ".ipynb"]

def cells(path): return json.loads(path.read_text(encoding="utf-8"))["cells"]
def source(cell): return "".join(cell["source"])

# --- colours, from the sources

def luminance(colour):
    part = [int(colour[i:i+2], 16)/255 for i in (1, 3, 5)]
    return sum(w*(v/12.92 if v <= .04045 else ((v+.055)/1.055)**2.4) for w, v in zip((.2126, .7152, .0722), part))

def contrast(one, other):
    low, high = sorted(map(luminance, (one, other)))
    return (high+.05)/(low+.05)

def test_contrast_is_computed_as_w3c_does():
    assert contrast("#000000", "#ffffff") == pytest.approx(21)
    assert contrast("#777777", "#ffffff") == pytest.approx(4.48, abs=.01)

def variables(mode):
    "Colours that Sass is given."
    return dict(re.findall(r"^\$([\w-]+):\s*(#[0-9a-f]{6});", (ROOT/f"nbs/{mode}.scss").read_text(encoding="utf-8"),
                           re.M))

@pytest.mark.parametrize("mode, ground", [("light", "#ffffff"), ("dark", None)])
def test_colours_of_the_theme_can_be_read(mode, ground):
    v = variables(mode)
    grounds = [ground] if ground else [v["body-bg"], v["code-block-bg"], v["navbar-bg"]]
    letters = [k for k in v
               if k in ("body-color", "link-color", "text-muted", "code-color", "pre-color", "navbar-fg", "sidebar-fg",
                        "input-color")]
    assert {"link-color", "text-muted"} <= set(letters)
    assert (mode == "light" or {"pre-color", "code-color"} <= set(letters))
    for k in letters:
        for g in grounds: assert contrast(v[k], g) >= 5, f"{mode}: ${k} {v[k]} on {g}"

def test_css_and_sass_agree_in_dark_mode():
    css, v = (ROOT/"nbs/site.css").read_text(encoding="utf-8"), variables("dark")
    block = re.search(r"^\.quarto-dark \{(.*?)\}", css, re.S | re.M)[1]
    for name, k in (("--bs-body-bg", "body-bg"), ("--bs-body-color", "body-color"), ("--bs-link-color", "link-color"),
                    ("--bs-code-color", "code-color"), ("--quiet", "text-muted")):
        assert re.search(rf"{name}:\s*(#[0-9a-f]{{6}})", block)[1] == v[k], name

def test_the_font_of_formulas_ships_with_its_licence():
    css = (ROOT/"nbs/site.css").read_text(encoding="utf-8")
    file = re.search(r'@font-face \{[^}]*url\("([^"]+)"\)', css)[1]
    assert (ROOT/"nbs"/file).read_bytes()[:4] == b"wOF2" and (ROOT/"nbs"/file).stat().st_size < 300_000
    assert "SIL Open Font License" in (ROOT/"nbs/fonts/OFL.txt").read_text(encoding="utf-8")
    assert re.search(r"^math \{[^}]*STIX Two Math", css, re.M)

def test_a_domain_has_one_colour_wherever_it_is_drawn():
    "In figures, in the drawing of the method and on the dial, where the ensemble has its own as well."
    from distilltv.style import COLOUR, DOMAIN, domain_colours
    dial, method = ((ROOT/f"nbs/{f}").read_text(encoding="utf-8").lower() for f in ("dial/dial.html", "method.svg"))
    light = dict(re.findall(r"--(\w+):(#[0-9a-f]{6})", re.search(r"^\.dial \{(.*)\}$", dial, re.M)[1]))
    for d, colour in DOMAIN.items(): assert light[d] == colour.lower() and colour.lower() in method
    assert light["ensemble"] == COLOUR["ensemble"].lower() and COLOUR["merged"].lower() in method
    colours = domain_colours(["sound", "music", "birds", "speech"])
    assert list(colours) == ["sound", "music", "birds", "speech"] and colours["speech"] == DOMAIN["speech"]
    assert len({*colours.values(), *COLOUR.values()}) == 4 + len(set(COLOUR.values()))

@pytest.mark.parametrize("file", ["site.css", "dark.scss", "light.scss", "dial/dial.html"])
def test_lines_of_style_and_script_are_short(file):
    assert not [l for l in (ROOT/"nbs"/file).read_text(encoding="utf-8").splitlines() if len(l) > 120]

# --- words

@pytest.mark.parametrize("path", [p for p in NOTEBOOKS if re.match(r"0\d_", p.name)], ids=NAMES.get)
def test_a_chapter_begins_with_its_idea(path):
    "Before the first line that imports there is a paragraph, not only a title."
    before = ""
    for c in cells(path):
        if c["cell_type"] == "markdown": before += source(c)
        elif re.search(r"^(from|import) ", source(c), re.M) and "#| hide" not in source(c): break
    assert len(re.sub(r"^[#>].*$", "", before, flags=re.M).split()) >= 25

def title(path):
    if path.suffix == ".ipynb":
        return re.search(r"^# (.+)$", "\n".join(source(c) for c in cells(path) if c["cell_type"] == "markdown"),
                         re.M)[1]
    text = path.read_text(encoding="utf-8")
    return (re.search(r'^title: "?(.+?)"?$', text, re.M) or re.search(r"^# (.+)$", text, re.M))[1]

def test_titles_begin_with_a_capital_and_are_told_apart():
    titles = {p: title(p) for p in SHOWN}
    assert not [t for t in titles.values() if not t[0].isupper()]
    assert len(set(titles.values())) == len(titles)

@pytest.mark.parametrize("path", NOTEBOOKS, ids=NAMES.get)
def test_a_page_says_in_a_line_what_it_is_about(path):
    assert re.search(r"^# .+\n+> \S", "\n".join(source(c) for c in cells(path) if c["cell_type"] == "markdown"), re.M)

def uncaptioned(path):
    "Cells that show a table without a caption."
    for c in cells(path):
        text, rule = source(c), r"^\|[-:| ]+\|$"
        if "#| hide" in text: continue
        if c["cell_type"] == "code":
            data = [o.get("data", {}) for o in c.get("outputs", [])]
            frames = [d for d in data if "<table" in "".join(d.get("text/html", ""))
                      and 'class="dial"' not in "".join(d["text/html"])]
            text = "\n".join("".join(d.get("text/markdown", "")) for d in data)
            if frames and "tbl-cap" not in source(c): yield source(c)
        text = re.sub(r"^```.*?^```", "", text, flags=re.S | re.M)
        if len(re.findall(rule, text, re.M)) > len(re.findall(r"^: ", text, re.M)) and "tbl-cap" not in source(c):
            yield source(c)

@pytest.mark.parametrize("path", NOTEBOOKS, ids=NAMES.get)
def test_every_table_has_a_caption(path):
    assert not (bare := [s[:200] for s in uncaptioned(path)]), "\n\n".join(bare)

METHODS = {"TIES": "yadav2023ties", "DARE": "yu2024dare", "Fisher": "matena2022fisher", "RegMean": "jin2023regmean",
           "Barlow Twins": "zbontar2021barlow",
           "DistilHuBERT": "chang2022distilhubert", "HuBERT": "hsu2021hubert", "MERT": "li2024mert",
           "SUPERB": "yang2021superb", "MARBLE": "yuan2023marble"}

def test_every_method_has_its_reference_and_is_cited():
    bib = (ROOT/SITE["bibliography"]).read_text(encoding="utf-8")
    text = "\n".join(prose(p) for p in NOTEBOOKS)
    for name, key in METHODS.items():
        if not re.search(rf"\b{name}\b", text): continue
        assert len(re.findall(rf"^@\w+\{{{key},", bib, re.M)) == 1, f"{key} is not once in the bibliography"
        assert f"@{key}" in text, f"{name} is named and never cited"

def script(name):
    "A script of .ci as a module."
    spec = importlib.util.spec_from_file_location(name, ROOT/f".ci/{name}.py")
    spec.loader.exec_module(module := importlib.util.module_from_spec(spec))
    return module

@pytest.mark.parametrize("source, name",
                         [("import os\nfrom pathlib import Path", "Imports"),
                          ("#| export\ndef _a(): pass\nclass _B: pass", "Helper: _a, _B"),
                                          ("check_parameters(globals(), lam=1)", "Checking the parameters"),
                                          ("import os\nos.getcwd()", None), ("def a(): pass", None),
                                          ("%%bash\nls", None)])
def test_what_is_folded(source, name): assert script("fold").name_of(source) == name

@pytest.mark.parametrize("path", [p for p in NOTEBOOKS if re.match(r"0|a\d", p.name)], ids=NAMES.get)
def test_boxes_of_imports_and_helpers_are_folded_with_a_name(path):
    notebook = json.loads(path.read_text(encoding="utf-8"))
    assert not (open_ := [name for _, name in script("fold").unfolded(notebook)]), f"run `python .ci/fold.py`: {open_}"
    for c in notebook["cells"]:
        assert (not c["metadata"].get("code-fold")
                or c["metadata"].get("code-summary")), f"without a name:\n{''.join(c['source'])}"

# --- where things are

def test_one_search_box_and_home_marked_on_home_alone():
    web = SITE["website"]
    assert web["search"] is True and all("search" not in s for s in web["sidebar"])
    home = web["navbar"]["left"][0]["href"]
    assert home.endswith("index.ipynb") and home not in json.dumps(web["sidebar"])
    assert [s["id"] for s in web["sidebar"]][:2] == ["overview", "chapters"]
    numbered = [c["text"] for c in web["sidebar"][1]["contents"] if "text" in c]
    assert [t[0] for t in numbered] == list("0123456")

def test_search_finds_pages_to_read():
    page = (r'<math>…<annotation encoding="application/x-tex">\theta_0 &lt; 1</annotation></math>'
            r'<math><annotation encoding="application/x-tex">a</annotation></math>')
    entries = [dict(href="nbs/a.html#x", title="A", text="the start θ0 < 1\\theta_0 < 1 of a student"),
               dict(href="data/mini/runs/merge-lam-0.50.html", title="Run", text="…")]
    assert script("offline").searched(entries,
                                      {"nbs/a.html": page}) == [dict(href="nbs/a.html#x", title="A",
                                                                     text="the start θ0 < 1 of a student")]

def test_a_page_has_its_own_title_and_description_and_asks_nobody():
    module = script("offline")
    page = ('<title>contributing – Distilltv</title><meta name="description" content="of the site">'
            '<h1 class="title">Contributing</h1>'
            '<blockquote class="blockquote">\n<p>From <em>one</em> "line"</p></blockquote>')
    assert module.described(page).startswith('<title>Contributing – Distilltv</title><meta name="description" '
                                             'content="From one &quot;line&quot;">')
    bare = '<title>Home</title><meta name="description" content="of the site"><h1>Home</h1><p>' + 700*"x" + "</p>"
    assert module.described(bare) == bare
    for source in ("https://cdnjs.cloudflare.com/ajax/libs/require.js/2.3.6/require.min.js",
                   "https://cdnjs.cloudflare.com/ajax/libs/jquery/3.5.1/jquery.min.js",
                   "https://cdn.jsdelivr.net/npm/requirejs@2.3.6/require.min.js"):
        assert module.offline(f'<p>a</p><script src="{source}" integrity="x"></script>') == "<p>a</p>"

def test_the_promises_name_tests_that_are_there():
    held = re.findall(r'"(tests/\w+\.py)::(\w+)"', "\n".join(source(c) for c in cells(ROOT/"nbs/promises.ipynb")))
    assert len(held) >= 12
    for file, name in held: assert f"def {name}(" in (ROOT/file).read_text(encoding="utf-8"), f"{file} has no {name}"

# --- in a browser

# text whose contrast with what lies behind it is below 4.5, first of each kind
FAINT = """(() => {
  const rgb = s => {
    const m = s.match(/[\\d.]+/g).map(Number), k = s.startsWith("color(srgb") ? 255 : 1;
    return [k*m[0], k*m[1], k*m[2], m[3] ?? 1];
  };
  const light = c => [.2126, .7152, .0722].reduce((s, w, i) => {
    const v = c[i]/255;
    return s + w*(v <= .04045 ? v/12.92 : ((v + .055)/1.055)**2.4);
  }, 0);
  const over = (a, b) => [0, 1, 2].map(i => a[i]*a[3] + b[i]*(1 - a[3])).concat(1);
  const ground = e => {
    const found = [];
    for (let n = e; n; n = n.parentElement) {
      found.push(rgb(getComputedStyle(n).backgroundColor));
      if (found.at(-1)[3] === 1) break;
    }
    return found.reverse().reduce((g, c) => over(c, g), [255, 255, 255, 1]);
  };
  const seen = {}, walk = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (walk.nextNode()) {
    const e = walk.currentNode.parentElement, box = e.getBoundingClientRect(), style = getComputedStyle(e);
    if (!walk.currentNode.data.trim() || !box.width || style.visibility === "hidden"
        || e.closest("script, style, svg, .visually-hidden")) continue;
    const g = ground(e), c = rgb(style.color);
    for (let n = e; n; n = n.parentElement) c[3] *= +getComputedStyle(n).opacity;
    const [low, high] = [light(over(c, g)), light(g)].sort((a, b) => a - b), ratio = (high + .05)/(low + .05);
    if (ratio < 4.5)
      seen[e.tagName + "." + e.className] ??= ratio.toFixed(2) + " " + walk.currentNode.data.trim().slice(0, 30);
  }
  return JSON.stringify(seen);
})()"""

@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    if not CHROME: pytest.skip("no Chromium or Chrome here")
    pytest.importorskip("websocket")
    b = Browser(tmp_path_factory.mktemp("profile"), "1280,1000")
    yield b
    b.close()

@pytest.fixture(scope="module")
def address(site):    # noqa: F811
    "The built site over HTTP: Quarto's own script does nothing on a page that is opened as a file."
    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *args): pass
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=site))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()

@pytest.mark.parametrize("mode", ["light", "dark"])
@pytest.mark.parametrize("path", SHOWN, ids=NAMES.get)
def test_a_page_on_a_phone(browser, address, path, mode):
    "390 pixels wide: nothing slides sideways, everything can be read, nothing fails."
    browser.events.clear()
    # smalldocs draws formulas with a script of another site
    browser.call("Network.setBlockedURLs", urls=["https://*"])
    browser.call("Emulation.setEmulatedMedia", features=[dict(name="prefers-color-scheme", value=mode)])
    browser.call("Emulation.setDeviceMetricsOverride", width=390, height=844, deviceScaleFactor=1, mobile=True)
    browser.open(f"{address}/{path.relative_to(ROOT).with_suffix('.html').as_posix()}",
                 "document.querySelector('main')")
    assert browser.js("document.querySelectorAll('.skip-link').length >= 1 && "
                      "!!document.querySelector(document.querySelector('.skip-link').getAttribute('href'))")
    assert browser.js("document.documentElement.scrollWidth") <= 390
    assert json.loads(browser.js(FAINT)) == {}
    assert browser.js("[...document.querySelectorAll('a')]"
                      ".every(a => typeof a.href === 'string')"), "Quarto's script fails on links inside of SVG"
    failed = [e for e in browser.errors() if "Failed to load resource" not in json.dumps(e)
              and "ERR_BLOCKED" not in json.dumps(e)]
    assert not failed, failed

def test_in_a_table_of_results_words_stand_left_and_numbers_right(browser, address):
    browser.call("Emulation.setDeviceMetricsOverride", width=1280, height=1000, deviceScaleFactor=1, mobile=False)
    browser.open(f"{address}/nbs/05_results.html", "document.querySelector('table.dataframe .words')")
    cells = json.loads(browser.js("JSON.stringify([...document.querySelectorAll('table.dataframe tbody td')].map("
                                  "c => [c.textContent.trim(), getComputedStyle(c).textAlign]))"))
    sides = {side: {text for text, s in cells if s == side and text} for side in ("left", "right")}
    assert "chord" in sides["left"] and not any(re.search(r"[a-z]{2}", t.replace("NaN", "")) for t in sides["right"])
    assert len(sides["right"]) > 50 and not any(re.fullmatch(r"[-+]?\d+\.\d+", t) for t in sides["left"])
