"""The dial, in a real browser: mouse and keyboard turn it, its numbers are the results', and it asks nobody for
anything."""
import base64, io, json, re, shutil, subprocess, time, urllib.request
from pathlib import Path
import pandas as pd, pytest

ROOT = Path(__file__).resolve().parent.parent
CHROME = next((p for p in map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome")) if p), None)

def page_html(page="dial", id="dial"):
    cells = json.loads((ROOT/f"nbs/{page}.ipynb").read_text(encoding="utf-8"))["cells"]
    return next("".join(o["data"]["text/html"]) for c in cells for o in c.get("outputs", [])
                if f'id="{id}"' in "".join(o.get("data", {}).get("text/html", "")))

def data(): return json.loads(re.search(r'id="dial-data">(.*?)</script>', page_html(), re.S)[1].replace("<\\/", "</"))

def every(d): return [*d["sweep"], *([d["ensemble"]] if d["ensemble"] else [])]

def test_numbers_are_the_results():
    "Of the eleven λ and the ensemble student: the results' table, and a run that ships."
    from distilltv.reading import gather
    from distilltv.results import with_means
    from distilltv.runs import data_dir
    from distilltv.statistics import bootstrap, interval
    scores, hits = gather(data_dir()/"results")
    table, d = interval(with_means(bootstrap(hits), scores)), data()
    assert [e["lam"] for e in d["sweep"]] == [round(.1*i, 1) for i in range(11)] and d["ensemble"]
    for e in every(d):
        assert set(e["scores"]) == set(d["tasks"]) and {"speech mean", "music mean"} < set(d["tasks"])
        for task, shown in e["scores"].items():
            assert shown == pytest.approx(table.loc[(task, e["name"]), ["estimate", "lo", "hi"]].astype(float).tolist(),
                                          abs=1e-5)
        assert (ROOT/"nbs"/e["page"]).resolve().with_suffix(".ipynb").exists(), f"{e['name']} leads to no run"

def test_examples_are_of_these_students_and_can_be_heard():
    from distilltv.runs import data_dir
    import soundfile
    made = json.loads((data_dir()/"results/dial/dial.json").read_text(encoding="utf-8"))
    scores = pd.read_csv(data_dir()/"results/scores.csv")
    d, hashes = data(), scores.drop_duplicates("encoder").set_index("encoder").weights_hash
    assert made["hashes"] == {e["name"]: hashes[e["name"]]
                              for e in every(d)}, "other students: papermill nbs/dial.ipynb out.ipynb -p make full"
    assert len({x["title"].split(":")[0] for x in d["examples"]}) >= 3
    for x in d["examples"]:
        assert set(x["answers"]) == {e["name"] for e in every(d)} and x["credit"] and "GPL" not in x["credit"]
        assert all(a["right"] == (a["heard"] == x["truth"]) for a in x["answers"].values())
        assert (x["answers"][d["sweep"][0]["name"]]["right"]
                != x["answers"][d["sweep"][-1]["name"]]["right"]), f"{x['title']} does not flip"
        wav, rate = soundfile.read(io.BytesIO(base64.b64decode(x["audio"])))
        assert rate == 16000 and abs(wav).max() > .001, x["title"]

class Browser:
    "Chromium over its debugging protocol."
    def __init__(self, folder, size):
        import websocket
        self.process = subprocess.Popen([CHROME, "--headless", "--no-sandbox", "--disable-gpu",
                                         "--remote-debugging-port=0", f"--user-data-dir={folder}",
                                         "--remote-allow-origins=*", f"--window-size={size}", "about:blank"],
                                         stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        file, until = Path(folder)/"DevToolsActivePort", time.time()+60
        while not file.exists() or not file.read_text().strip():
            assert time.time() < until, "the browser did not start"
            time.sleep(.1)
        port = file.read_text().split()[0]
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/json") as answer: tabs = json.load(answer)
        target = next(t for t in tabs if t["type"] == "page")
        self.socket, self.id, self.events = websocket.create_connection(target["webSocketDebuggerUrl"],
                                                                        timeout=60), 0, []
        for domain in ("Page", "Runtime", "Network", "Log"): self.call(f"{domain}.enable")

    def call(self, method, **params):
        self.id += 1
        self.socket.send(json.dumps(dict(id=self.id, method=method, params=params)))
        while True:
            message = json.loads(self.socket.recv())
            if message.get("id") == self.id: return message.get("result", {})
            self.events.append(message)

    def open(self, url, ready="true"):
        "Go to a page, and wait until it is loaded and an expression is true."
        self.call("Page.navigate", url=url)
        until = time.time()+60
        while not self.js(f"document.readyState === 'complete' && !!({ready})"):
            assert time.time() < until, f"{url} was not ready in a minute"
            time.sleep(.1)

    def errors(self):
        "What went wrong in the page, as its console has it."
        return [e for e in self.events if e["method"] == "Runtime.exceptionThrown"
                or (e["method"] == "Log.entryAdded" and e["params"]["entry"]["level"] == "error")]

    def js(self, code): return self.call("Runtime.evaluate", expression=code, returnByValue=True)["result"].get("value")

    def key(self, name, code, shift=False):
        for kind in ("rawKeyDown", "keyUp"):
            self.call("Input.dispatchKeyEvent", type=kind, key=name, code=name, windowsVirtualKeyCode=code,
                      modifiers=8*shift)

    def click(self, x, y):
        for kind in ("mousePressed", "mouseReleased"):
            self.call("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=1)

    def close(self):
        self.socket.close()
        self.process.terminate()
        self.process.wait(20)

@pytest.mark.skipif(not CHROME, reason="no Chromium or Chrome here")
@pytest.mark.parametrize("size", ["1200,1000", "390,800"])
def test_turning_it(tmp_path, size):
    pytest.importorskip("websocket")
    head = '<meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>dial</title>'
    (tmp_path/"dial.html").write_text(f'<!doctype html>{head}<body>{page_html()}', encoding="utf-8")
    d, b = data(), Browser(tmp_path/"profile", size)
    try:
        b.open((tmp_path/"dial.html").as_uri(), "document.querySelectorAll('.dial .task').length")

        def check(e):
            assert b.js('document.getElementById("dial-now").textContent') == ("ensemble student" if e["lam"] is None
                                                                               else f"λ = {e['lam']:.1f}")
            shown = json.loads(b.js('JSON.stringify([...document.querySelectorAll(".dial .task")]'
                                    '.map(r => [r.children[0].textContent, r.children[2].textContent]))'))
            for task, text in shown:
                value, half = map(float, text.split(" ± "))
                estimate, lo, hi = e["scores"][task]
                assert value == pytest.approx(100*estimate, abs=.051) and half == pytest.approx(50*(hi-lo), abs=.051)
            assert [t for t, _ in shown] == d["tasks"]
            said = json.loads(b.js('JSON.stringify([...document.querySelectorAll(".dial .said")]'
                                   '.map(p => p.textContent))'))
            assert [x["answers"][e["name"]]["right"] for x in d["examples"]] == [s.endswith("✓") for s in said]
            assert b.js('document.getElementById("dial-run").getAttribute("href")') == e["page"]

        sweep, last = d["sweep"], len(d["sweep"]) - 1
        sum_of = lambda e: e["scores"]["speech mean"][0] + e["scores"]["music mean"][0]
        best = max(range(len(sweep)), key=lambda i: sum_of(sweep[i]))
        check(sweep[best])
        b.js('document.getElementById("dial-lam").focus()')
        for name, code, at in (("Home", 36, 0), ("ArrowRight", 39, 1), ("ArrowRight", 39, 2), ("ArrowLeft", 37, 1),
                               ("End", 35, last)):
            b.key(name, code)
            check(sweep[at])
            assert f"{sweep[at]['lam']:.1f}" in b.js('document.getElementById("dial-lam")'
                                                     '.getAttribute("aria-valuetext")')
        box = json.loads(b.js('JSON.stringify(document.getElementById("dial-lam").getBoundingClientRect())'))
        b.click(box["x"] + 4, box["y"] + box["height"]/2)
        check(sweep[0])
        for text, e in (("All speech", sweep[last]), ("All music", sweep[0]), ("Best mean", sweep[best]),
                        ("Ensemble", d["ensemble"])):
            b.js('[...document.querySelectorAll("#dial-presets button")]'
                 f'.find(x => x.textContent === "{text}").click()')
            check(e)
            pressed = json.loads(b.js('JSON.stringify([...document.querySelectorAll('
                                      '"#dial-presets [aria-pressed=true]")].map(x => x.textContent))'))
            assert text in pressed

        assert b.js('document.querySelectorAll("audio").length') == len(d["examples"])
        assert not b.js('document.querySelectorAll("svg a").length'), "Quarto's script fails on links inside of SVG"
        assert b.js("document.documentElement.scrollWidth <= innerWidth"), "the page is wider than the screen"
        assert not b.errors()
        asked = [e["params"]["request"]["url"] for e in b.events if e["method"] == "Network.requestWillBeSent"]
        assert all(u.startswith(("file:", "data:")) for u in asked), asked
    finally: b.close()

# where the browser finds a link at its own centre
ON_TOP = """JSON.stringify([...document.querySelectorAll("SELECTOR")].map(a => {
    a.scrollIntoView({ block: "center" });
    const r = a.getBoundingClientRect(),
          at = document.elementFromPoint(r.x + r.width/2, r.y + r.height/2)?.closest("a");
    return [a.getAttribute("href"), at ? at.getAttribute("href") : null]; }))"""

@pytest.mark.skipif(not CHROME, reason="no Chromium or Chrome here")
@pytest.mark.parametrize("size", ["1200,1000", "390,800"])
def test_every_point_opens_its_run(tmp_path, size):
    pytest.importorskip("websocket")
    head = '<meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>dial</title>'
    (tmp_path/"dial.html").write_text(f'<!doctype html>{head}<body>{page_html()}', encoding="utf-8")
    b = Browser(tmp_path/"profile", size)
    try:
        b.open((tmp_path/"dial.html").as_uri(), "document.querySelectorAll('.dial .task').length")
        links = json.loads(b.js(ON_TOP.replace("SELECTOR", ".dial .plot a")))
    finally: b.close()
    assert all(href == hit for href, hit in links), [l for l in links if l[0] != l[1]]
    assert {h for h, _ in links} == {e["page"] for e in data()["sweep"]} and len(links) == 2*len(data()["sweep"])

@pytest.mark.skipif(not CHROME, reason="no Chromium or Chrome here")
def test_the_marks_of_the_headline_figure_lead_to_their_runs(tmp_path):
    pytest.importorskip("websocket")
    (tmp_path/"gallery.html").write_text('<!doctype html><meta charset="utf-8"><title>runs</title>'
                                         f'<body>{page_html("gallery", "runs-figure")}', encoding="utf-8")
    b = Browser(tmp_path/"profile", "1200,1000")
    try:
        b.open((tmp_path/"gallery.html").as_uri(), "document.querySelectorAll('#runs-figure a').length")
        links = json.loads(b.js(ON_TOP.replace("SELECTOR", "#runs-figure a")))
        assert not b.js('document.querySelectorAll("svg a").length')
    finally: b.close()
    assert all(href == hit for href, hit in links), [l for l in links if l[0] != l[1]]
    scored = pd.read_csv(ROOT/"data/mini/results/scores.csv").drop_duplicates("encoder")
    scored = scored.set_index("encoder").weights_hash
    linked = {Path(href).stem.removeprefix("probe-") for href, _ in links}
    assert (linked <= set(scored.index)
            and set(scored[list(linked)]) == set(scored)), "where marks coincide they are one encoder"
    for href, _ in links: assert (ROOT/"nbs"/href).resolve().with_suffix(".ipynb").exists(), href
