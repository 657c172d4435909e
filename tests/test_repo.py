"""What a reader sees beside the code: the site, its links and pictures, licences, sizes, and nothing of the build
machine."""
import ast, importlib.util, json, os, re, shutil, subprocess, sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit
import nbformat, pytest, yaml

ROOT = Path(__file__).resolve().parent.parent
SITE = yaml.safe_load((ROOT/"_quarto.yml").read_text())

def tracked():
    "Files that are, or would be, in the repository."
    out = subprocess.run(["git", "-C", ROOT, "ls-files", "--cached", "--others", "--exclude-standard"],
                         capture_output=True, text=True)
    files = [ROOT/f for f in out.stdout.splitlines()] if out.returncode == 0 else []
    return [f for f in files if f.is_file()] or pytest.skip("not a git checkout")

def pages():
    "Source files of the site's pages."
    found = [p for pattern in SITE["project"]["render"] for p in ROOT.glob(pattern)]
    return sorted({p for p in found if not p.name.startswith("_") and ".ipynb_checkpoints" not in p.parts})

def prose(path):
    "A page's Markdown, code and outputs left out, except outputs that are Markdown."
    if path.suffix != ".ipynb": return re.sub(r"^```.*?^```", "", path.read_text(), flags=re.S | re.M)
    parts = []
    for c in json.loads(path.read_text())["cells"]:
        if c["cell_type"] == "markdown": parts.append("".join(c["source"]))
        parts += ["".join(o["data"]["text/markdown"]) for o in c.get("outputs", [])
                  if "text/markdown" in o.get("data", {})]
    return re.sub(r"^```.*?^```", "", "\n\n".join(parts), flags=re.S | re.M)

def everything(path):
    "A page's prose and the `#|` options of its code cells."
    cells = json.loads(path.read_text())["cells"] if path.suffix == ".ipynb" else []
    return prose(path) + "\n".join("".join(c["source"]) for c in cells if c["cell_type"] == "code")

# --- the site's sources

def strings(node):
    if isinstance(node, dict): yield from (s for v in node.values() for s in strings(v))
    elif isinstance(node, list): yield from (s for v in node for s in strings(v))
    elif isinstance(node, str): yield node

def test_paths_of_the_site_exist():
    for pattern in SITE["project"]["render"]: assert "*" in pattern or (ROOT/pattern).exists(), pattern
    named = [s for s in strings([SITE["website"], SITE["bibliography"], SITE["format"]])
             if re.search(r"\.(ipynb|qmd|md|bib|s?css|html)$", s) and "://" not in s]
    assert len(named) > 10
    assert not [s for s in named if not (ROOT/s).exists()]

def test_every_page_is_in_a_sidebar_or_in_the_gallery():
    "But Home: Quarto marks the first entry of the bar at the top whose page is in the sidebar shown."
    linked, home = set(strings(SITE["website"]["sidebar"])), SITE["website"]["navbar"]["left"][0]["href"]
    gallery = {t.removeprefix("../") for t, _ in links(ROOT/"nbs/gallery.ipynb")}
    assert [p for p in pages() if p.relative_to(ROOT).as_posix() not in linked | gallery] == [ROOT/home]

def test_cross_references_and_citations_resolve():
    "On the page itself: in a website, Quarto numbers each page's figures by themselves."
    keys = set(re.findall(r"^@\w+\{([^,]+),", (ROOT/SITE["bibliography"]).read_text(), re.M))
    for p in pages():
        labels = set(re.findall(r"\{[^}]*#((?:fig|tbl|eq|sec)-[\w-]+)",
                                prose(p))) | set(re.findall(r"#\|\s*label:\s*((?:fig|tbl)-[\w-]+)", everything(p)))
        prose_only = re.sub(r"`[^`]*`", "", prose(p))
        for ref in re.findall(r"(?<![\w.`/])@([A-Za-z][\w-]*[\w])", prose_only):
            assert ref in labels or ref in keys, (f"{p.name}: @{ref} is neither a label of this page "
                                                  "nor in the bibliography")

def test_labels_and_headings_are_unique_on_a_page():
    "Both become ids."
    for p in pages():
        for found in (re.findall(r"#\|\s*label:\s*([\w-]+)", everything(p)), re.findall(r"^#+ (.*)$", prose(p), re.M),
                      re.findall(r"^#+ .*\{#([\w-]+)\}", prose(p), re.M)):
            assert not (twice := {f for f in found
                                  if found.count(f) > 1}), f"{p.relative_to(ROOT)}: {twice} is there twice"

def anchors(path):
    "Anchors that headings and explicit ids give a page."
    text, found = prose(path), set()
    for h in re.findall(r"^#+\s+(.*)$", text, re.M):
        found |= set(re.findall(r"\{#([\w-]+)", h))
        h = re.sub(r"\{[^}]*\}|[`*$]", "", h).strip().lower()
        found.add(re.sub(r"\s+", "-", re.sub(r"[^\w\s.-]", "", h)))
    return found | set(re.findall(r"\{#([\w-]+)", text))

SITE_PAGES = {p.resolve() for p in pages()}

def links(path):
    return [(m[1], bool(m[0]))
            for m in re.findall(r"(!?)\[(?:[^\[\]]|\[[^\]]*\])*\]\(([^)\s]+)\)", re.sub(r"`[^`]*`", "", prose(path)))]

@pytest.mark.parametrize("path", pages() + [ROOT/"README.md"], ids=lambda p: p.relative_to(ROOT).as_posix())
def test_links_and_pictures(path):
    for target, picture in links(path):
        if urlsplit(target).scheme:
            assert urlsplit(target).scheme in ("https", "mailto"), target
            continue
        file, _, anchor = unquote(target).partition("#")
        to = (path.parent/file).resolve() if file else path
        assert to.exists(), f"{path.name} links to {target}, which is not there"
        assert picture or path.name == "README.md" or to in SITE_PAGES, (f"{path.name} links to {target}, "
                                                                         "which is no page of the site")
        if anchor and to.suffix in (".md", ".qmd", ".ipynb"):
            assert anchor in anchors(to), f"{path.name}: no heading #{anchor} in {to.name}"

@pytest.mark.parametrize("path", [p for p in pages() if p.suffix == ".ipynb"],
                         ids=lambda p: p.relative_to(ROOT).as_posix())
def test_drawn_figures_have_alternative_text(path):
    for c in json.loads(path.read_text())["cells"]:
        if any("image/png" in o.get("data", {}) or "image/svg+xml" in o.get("data", {}) for o in c.get("outputs", [])):
            code = "".join(c["source"])
            assert "#| hide" in code or re.search(r"#\|\s*fig-alt:",
                                                  code), f"no fig-alt in the cell that draws:\n{code[:300]}"

def test_shipped_runs_hold_the_run_and_not_the_chapter():
    for f in (ROOT/"data/mini/runs").glob("*.ipynb"):
        nbformat.validate(nbformat.from_dict(json.loads(f.read_text())))
        cells = json.loads(f.read_text())["cells"]
        text = ["".join(c["source"]) for c in cells]
        assert text[0].startswith("# Run: ") and any("parameters" in c["metadata"].get("tags", [])
                                                     for c in cells), f.name
        assert any(c.get("outputs") for c in cells) and not any(t.startswith("#| export") for t in text), f.name

# --- the site, built

class Page(HTMLParser):
    def __init__(self): super().__init__(); self.ids, self.refs, self.text, self.skip = set(), [], [], 0
    def handle_starttag(self, tag, attrs):
        a = dict(attrs)
        self.skip += tag in ("script", "style", "pre", "code", "math")
        if a.get("id"): self.ids.add(a["id"])
        self.refs += [a[k] for k in ("href", "src") if a.get(k)]
    def handle_endtag(self, tag): self.skip -= tag in ("script", "style", "pre", "code", "math")
    def handle_data(self, data):
        if not self.skip: self.text.append(data)

FILTER = """
import sys
from pathlib import Path
from nbdev.cli import nbdev_filter
for f in map(Path, sys.argv[1:]): f.write_text(nbdev_filter(nb_txt=f.read_text(), printit=False))
"""

@pytest.fixture(scope="session")
def site(tmp_path_factory):
    "The site as Quarto would see it, built by smalldocs: hidden cells taken out, the rest as stored."
    to = tmp_path_factory.mktemp("site")
    keep = [*pages(), *(ROOT/"nbs").glob("*.*css"), *(ROOT/"nbs").glob("*.bib"), *(ROOT/"nbs").glob("*.svg"),
            ROOT/"nbs/tables.html",
            *(ROOT/"nbs/fonts").glob("*"), *(ROOT/"data/mini/results").glob("*.*g"), ROOT/"_quarto.yml",
            ROOT/SITE["project"]["post-render"]]
    for f in keep:
        (to/f.relative_to(ROOT)).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(f, to/f.relative_to(ROOT))
    done = subprocess.run([sys.executable, "-c", FILTER, *map(str, to.rglob("*.ipynb"))], cwd=ROOT, capture_output=True,
                          text=True)
    assert done.returncode == 0, f"nbdev_filter failed: {done.stderr[-2000:]}"
    done = subprocess.run([str(Path(sys.executable).parent/"smalldocs"), "render", str(to)], capture_output=True,
                          text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    broken = re.findall(r"warning: (.*): (broken link .*|missing .*)", done.stdout + done.stderr)
    assert not broken, "\n".join(f"{what}, for one in {page}"
                                 for what, page in {what: page for page, what in broken}.items())
    # Quarto makes the root page of it, smalldocs does not
    assert "aliases: [/index.html]" in (ROOT/"nbs/index.ipynb").read_text()
    (to/"_site/index.html").write_text('<meta http-equiv="refresh" content="0; url=nbs/index.html">')
    return to/"_site"

def test_built_pages_are_whole(site):
    parsed = {}
    for f in site.rglob("*.html"):
        parsed[f] = Page()
        parsed[f].feed(f.read_text())
    assert len(parsed) >= len(pages())
    for f, page in parsed.items():
        for ref in page.refs:
            u = urlsplit(ref)
            if u.scheme or ref.startswith("//"): continue
            to = ((f.parent/unquote(u.path)).resolve() if u.path and not u.path.startswith("/")
                  else site/unquote(u.path.lstrip("/")) if u.path else f)
            to = to/"index.html" if to.is_dir() else to
            assert to.exists(), f"{f.relative_to(site)}: {ref} is not there"
            if u.fragment and to in parsed:
                assert u.fragment in parsed[to].ids, f"{f.relative_to(site)}: no #{u.fragment} in {to.name}"
        text = " ".join(page.text)
        assert not re.search(r"#\|\s*\w|^---\s*$", text, re.M), f"{f.name}: a raw directive or YAML is left in the page"

@pytest.mark.skipif(not shutil.which("quarto"), reason="Quarto is not installed")
def test_quarto_renders_without_warnings(tmp_path):
    done = subprocess.run(["quarto", "render", "--output-dir", tmp_path], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode == 0 and "Unable to resolve" not in done.stderr
            and "WARN" not in done.stderr), done.stderr[-4000:]
    for f in tmp_path.rglob("*.html"):
        assert not (m := elsewhere(f.read_text())), f"{f.relative_to(tmp_path)} loads {m}"
    for f in tmp_path.rglob("*.css"):
        assert not re.search(r"@import[^;]*//",
                             f.read_text(errors="replace")), f"{f.relative_to(tmp_path)} loads a font of another site"

def elsewhere(html):
    "What a page loads from other sites."
    return re.findall(r"<(?:script|img|audio|source|iframe)\b[^>]*\bsrc=[\"']((?:https?:)?//[^\"']*)",
                      html) + re.findall(r"<link\b[^>]*rel=[\"']stylesheet[\"'][^>]*href=[\"']((?:https?:)?//[^\"']*)",
                                         html)

# what Quarto 1.10 puts into the head of a page whose notebook has a table among its outputs
# (src/core/jupyter/widgets.ts)
WIDGETS = """<head><script src="site_libs/clipboard/clipboard.min.js"></script>
<script src="https://cdn.jsdelivr.net/npm/requirejs@2.3.6/require.min.js" integrity="sha384-c9c+" crossorigin="anonymous"></script>
<script src="https://cdn.jsdelivr.net/npm/jquery@3.5.1/dist/jquery.min.js" integrity="sha384-ZvpU" crossorigin="anonymous" data-relocate-top="true"></script>
<script type="application/javascript">define('jquery', [],function() {return window.jQuery;})</script>
<script src="https://cdn.jsdelivr.net/npm/@jupyter-widgets/html-manager@*/dist/embed-amd.js" crossorigin="anonymous"></script>
</head><body><script>const define = 1</script></body>"""

def test_pages_load_nothing_from_elsewhere():
    "The theme's font is switched off, and what Quarto adds for widgets is taken out after it has rendered."
    assert all("$web-font-path: false" in (ROOT/t).read_text() for layers in SITE["format"]["html"]["theme"].values()
               for t in layers if t.endswith(".scss"))
    assert SITE["format"]["html"]["html-math-method"] == "mathml"
    spec = importlib.util.spec_from_file_location("offline", ROOT/SITE["project"]["post-render"])
    spec.loader.exec_module(module := importlib.util.module_from_spec(spec))
    assert len(elsewhere(WIDGETS)) == 3 and not elsewhere(module.offline(WIDGETS))
    assert module.offline(WIDGETS).count("<script") == 2 and module.offline("<p>as it was</p>") == "<p>as it was</p>"
    for p in pages():
        for c in json.loads(p.read_text())["cells"] if p.suffix == ".ipynb" else []:
            for o in c.get("outputs", []): assert not elsewhere("".join(o.get("data", {}).get("text/html", ""))), p.name

# --- the repository

def test_sizes():
    data = [f for f in tracked() if (ROOT/"data/mini") in f.parents]
    assert sum(f.stat().st_size for f in data) <= 110e6
    assert all(f.stat().st_size <= 25e6 for f in data)

def test_nothing_of_the_build_machine():
    home = re.compile(r"(?<![\w.<-])/(?:home|root|work|Users|opt)/[\w.-]+|file:///|index-url|/tmp/\w+")
    ours = {"LICENSE", "test_repo.py", "test_notebooks.py"}
    for f in tracked():
        if f.suffix in (".py", ".md", ".toml", ".ini", ".yml", ".cff", ".json", ".csv",
                        ".qmd") and f.name not in ours and "LICENSES" not in f.parts:
            assert not (m := home.search(f.read_text(errors="replace"))), f"{f.relative_to(ROOT)}: {m[0]}"

def test_citation():
    cff = yaml.safe_load((ROOT/"CITATION.cff").read_text())
    assert {"cff-version", "message", "title", "authors"} <= set(cff)
    paper = cff["preferred-citation"]
    assert paper["doi"] == "10.21437/Interspeech.2025-747" and (paper["start"], paper["end"]) == (3858, 3862)
    assert len(paper["authors"]) == 7

def test_badges_are_true():
    shown = re.findall(r"\[!\[([^\]]*)\]\(([^)]*)\)\]\(([^)]*)\)", (ROOT/"README.md").read_text())
    assert len(shown) == 5
    flows = [re.search(r"/actions/workflows/(.*?)/badge", image)[1] for _, image, _ in shown if "/actions/" in image]
    assert flows and all((ROOT/".github/workflows"/f).exists() for f in flows)
    said = " ".join(alt for alt, *_ in shown)
    jobs = yaml.safe_load((ROOT/".github/workflows/test.yml").read_text())["jobs"]
    tested = jobs["test"]["strategy"]["matrix"]["python"]
    project = (ROOT/"pyproject.toml").read_text()
    assert f"Python {tested[0]} to {tested[-1]}" in said and f'requires-python = ">={tested[0]}"' in project
    assert re.search(r'^license = "(.*)"', project, re.M)[1] in said
    assert "Apache License" in (ROOT/"LICENSE").read_text()[:200]

def test_one_version():
    import distilltv
    assert re.search(r"^version = (.*)$", (ROOT/"settings.ini").read_text(),
                     re.M)[1] == distilltv.__version__ == yaml.safe_load((ROOT/"CITATION.cff").read_text())["version"]

def test_ci_runs_the_same_script_everywhere():
    assert "bash .ci/run" in (ROOT/".github/workflows/test.yml").read_text()
    assert os.access(ROOT/".ci/run", os.X_OK)
    assert 'pip install -e ".[dev]" && pytest' in (ROOT/"README.md").read_text()

# --- the rooms

# each module may import only those before it; a new one finds its place here
ROOMS = """style files runs profiles students audio splits corpora scale cards encoders public objective training distill
           weights parts rules saving merge geometry recipes path align frozen fit features answers adapters tasks
           questions letters mini published check probe statistics reading results figures paper findings grid
           queueing runner jobs slurm reproduce""".split()

def imports(path):
    "(module of this package, names taken from it) of each import, wherever it stands in the file."
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and (node.level == 1 or (node.module or "").split(".")[0] == "distilltv"):
            module = node.module if node.level else node.module.partition(".")[2]
            if module: yield module.split(".")[0], [a.name for a in node.names]
            else: yield from ((a.name, []) for a in node.names)
        if isinstance(node, ast.Import):
            yield from ((a.name.split(".")[1], []) for a in node.names if a.name.startswith("distilltv."))

MODULES = sorted(p for p in (ROOT/"distilltv").glob("*.py") if not p.stem.startswith("_"))

def test_every_module_has_its_place():
    assert not {p.stem for p in MODULES} - set(ROOMS)

@pytest.mark.parametrize("path", MODULES, ids=lambda p: p.stem)
def test_modules_import_only_to_their_left(path):
    "No step to the right, so no circle; and no private name of another module."
    at = ROOMS.index(path.stem)
    for module, names in imports(path):
        if module.startswith("__"): continue
        assert ROOMS.index(module) < at, f"{path.stem} imports {module}, which stands to its right"
        assert not (private := [n for n in names if n.startswith("_")
                                and not n.startswith("__")]), f"{path.stem} imports {private} from {module}"

def test_importing_the_style_costs_no_torch():
    code = "import sys, distilltv.style; print([m for m in ('torch', 'transformers') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT).stdout.strip() == "[]"

@pytest.mark.parametrize("page", sorted((ROOT/"nbs/api").glob("*.qmd")), ids=lambda f: f.stem)
def test_each_parameter_of_the_reference_has_a_meaning(page):
    rows = [line for line in page.read_text(encoding="utf-8").splitlines() if line.startswith("| `")]
    assert not [row for row in rows if row.endswith("|  |")]
