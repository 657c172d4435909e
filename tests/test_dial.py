"The dial, in a real browser: mouse and keyboard turn it, its numbers are the results', and it asks nobody for anything."
import json, os, re, shutil, subprocess, time, urllib.request
from pathlib import Path
import pandas as pd, pytest

ROOT = Path(__file__).resolve().parent.parent
CHROME = next((p for p in map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome")) if p), None)

def page_html(page="dial", id="dial"):
    cells = json.loads((ROOT/f"nbs/{page}.ipynb").read_text())["cells"]
    return next("".join(o["data"]["text/html"]) for c in cells for o in c.get("outputs", []) if f'id="{id}"' in "".join(o.get("data", {}).get("text/html", "")))

def data(): return json.loads(re.search(r'id="dial-data">(.*?)</script>', page_html(), re.S)[1].replace("<\\/", "</"))

def test_numbers_are_the_results():
    "Of every encoder of the reference run the results' table; of every λ between them the mean of its rows, inside its interval."
    from distilltv.results import gather, with_means
    from distilltv.statistics import bootstrap, interval
    from distilltv.runs import data_dir
    scores, hits = gather(data_dir()/"results")
    table, run = interval(with_means(bootstrap(hits), scores)), set(scores.encoder)
    fine = pd.read_csv(data_dir()/"results/dial/scores.csv").groupby(["encoder", "task"]).score.mean()
    domain, checked, between = scores.drop_duplicates("task").set_index("task").domain, 0, 0
    for e in data()["encoders"]:
        for task, shown in e["scores"].items():
            checked += 1
            if e["name"] in run: assert shown == pytest.approx(table.loc[(task, e["name"]), ["estimate", "lo", "hi"]].astype(float).tolist(), abs=1e-5)
            else:
                of = [task] if task in domain else list(domain.index[domain == task.removesuffix(" mean")])
                assert shown[0] == pytest.approx(fine[e["name"]][of].mean(), abs=1e-5) and shown[1] <= shown[0] <= shown[2]
                between += 1
        assert e["page"] is None if e["name"] not in run else (ROOT/"nbs"/e["page"]).resolve().with_suffix(".ipynb").exists(), f"the mark of {e['name']} leads to no run"
    assert data()["lams"] == [round(.02*i, 2) for i in range(51)] and between == 40*len(data()["tasks"]) and checked > 500

def test_the_fine_grid_meets_the_reference_run():
    "The same weights at the eleven λ they share, and the same score for every task and probe seed."
    from distilltv.runs import data_dir
    made, fine, run = json.loads((data_dir()/"results/dial/dial.json").read_text()), *(pd.read_csv(data_dir()/f"results/{f}scores.csv") for f in ("dial/", ""))
    both = fine.merge(run, on=["encoder", "task", "probe", "seed", "metric"], suffixes=("", "_run"))
    assert both.encoder.nunique() == 11 and len(both) == 11*(6*3 + 1)
    assert both.score.tolist() == pytest.approx(both.score_run.tolist(), abs=1e-12)
    assert all(made["hashes"][f"{l:.2f}"] == h for l, h in zip(both.lam, both.weights_hash))
    assert len(fine) == 51*(6*3 + 1) and not any(c.endswith("+") or c == "unknown" for c in made["commits"])

class Browser:
    "Chromium over its debugging protocol."
    def __init__(self, folder, size):
        import websocket
        self.process = subprocess.Popen([CHROME, "--headless", "--no-sandbox", "--disable-gpu", "--remote-debugging-port=0", f"--user-data-dir={folder}",
                                         "--remote-allow-origins=*", f"--window-size={size}", "about:blank"], stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        file, until = Path(folder)/"DevToolsActivePort", time.time()+60
        while not file.exists() or not file.read_text().strip():
            assert time.time() < until, "the browser did not start"
            time.sleep(.1)
        port = file.read_text().split()[0]
        target = next(t for t in json.load(urllib.request.urlopen(f"http://127.0.0.1:{port}/json")) if t["type"] == "page")
        self.socket, self.id, self.events = websocket.create_connection(target["webSocketDebuggerUrl"], timeout=60), 0, []
        for domain in ("Page", "Runtime", "Network", "Log"): self.call(f"{domain}.enable")

    def call(self, method, **params):
        self.id += 1
        self.socket.send(json.dumps(dict(id=self.id, method=method, params=params)))
        while True:
            message = json.loads(self.socket.recv())
            if message.get("id") == self.id: return message.get("result", {})
            self.events.append(message)

    def js(self, code): return self.call("Runtime.evaluate", expression=code, returnByValue=True)["result"].get("value")

    def key(self, name, code, shift=False):
        for kind in ("rawKeyDown", "keyUp"): self.call("Input.dispatchKeyEvent", type=kind, key=name, code=name, windowsVirtualKeyCode=code, modifiers=8*shift)

    def click(self, x, y):
        for kind in ("mousePressed", "mouseReleased"): self.call("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=1)

    def close(self):
        self.process.terminate()
        self.process.wait(20)

@pytest.mark.skipif(not CHROME, reason="no Chromium or Chrome here")
@pytest.mark.parametrize("size", ["1200,1000", "390,800"])
def test_turning_it(tmp_path, size):
    pytest.importorskip("websocket")
    (tmp_path/"dial.html").write_text(f'<!doctype html><meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>dial</title><body>{page_html()}')
    d, b = data(), Browser(tmp_path/"profile", size)
    try:
        b.call("Page.navigate", url=(tmp_path/"dial.html").as_uri())
        until = time.time()+60
        while not b.js('document.querySelectorAll(".dial .task").length') and time.time() < until: time.sleep(.2)

        def check(k):
            assert b.js('document.getElementById("dial-now").textContent') == f"λ = {d['lams'][k]:.2f}"
            shown = json.loads(b.js('JSON.stringify([...document.querySelectorAll(".dial .task")].map(r => [r.children[0].textContent, r.children[2].textContent]))'))
            encoder = next(e for e in d["encoders"] if e["name"] == d["sweep"][k])
            for task, text in shown:
                s = encoder["scores"][task]
                value, half = map(float, text.split(" ± "))
                assert value == pytest.approx(100*s[0], abs=.051) and half == pytest.approx(50*(s[2]-s[1]), abs=.051)
            assert len(shown) == len(d["tasks"])
            said = json.loads(b.js('JSON.stringify([...document.querySelectorAll(".dial .said")].map(p => p.textContent))'))
            assert [x["right"][k] for x in d["examples"]] == [s.endswith("✓") for s in said]
            return b.js('[...document.querySelectorAll(".dial .you")].map(c => c.getAttribute("cx") + " " + c.getAttribute("cy"))[0]')

        last, middle = len(d["lams"])-1, len(d["lams"])//2
        places = [check(middle)]
        b.js('document.getElementById("dial-lam").focus()')
        b.key("ArrowRight", 39)
        places.append(check(middle+1))
        for name, code, shift, by in (("PageUp", 33, False, 5), ("ArrowRight", 39, True, 5), ("ArrowLeft", 37, True, -5), ("PageDown", 34, False, -5), ("ArrowLeft", 37, False, -1)):
            middle += by
            b.key(name, code, shift)
            check(middle+1)
        b.key("Home", 36)
        places.append(check(0))
        b.key("End", 35)
        places.append(check(last))
        box = json.loads(b.js('JSON.stringify(document.getElementById("dial-lam").getBoundingClientRect())'))
        b.click(box["x"] + 4, box["y"] + box["height"]/2)
        places.append(check(0))
        assert len(set(places)) == 4 and places[2] == places[4]

        assert b.js("document.documentElement.scrollWidth <= innerWidth"), "the page is wider than the screen"
        wrong = [e for e in b.events if e["method"] == "Runtime.exceptionThrown" or (e["method"] == "Log.entryAdded" and e["params"]["entry"]["level"] == "error")]
        assert not wrong
        asked = [e["params"]["request"]["url"] for e in b.events if e["method"] == "Network.requestWillBeSent"]
        assert all(u.startswith(("file:", "data:")) for u in asked), asked
    finally: b.close()

@pytest.mark.skipif(not CHROME, reason="no Chromium or Chrome here")
def test_the_marks_of_the_headline_figure_lead_to_their_runs(tmp_path):
    pytest.importorskip("websocket")
    (tmp_path/"gallery.html").write_text(f'<!doctype html><meta charset="utf-8"><title>runs</title><body>{page_html("gallery", "runs-figure")}')
    b = Browser(tmp_path/"profile", "1200,1000")
    try:
        b.call("Page.navigate", url=(tmp_path/"gallery.html").as_uri())
        until = time.time()+60
        while not b.js('document.querySelectorAll("#runs-figure a").length') and time.time() < until: time.sleep(.2)
        hit = json.loads(b.js("""JSON.stringify([...document.querySelectorAll("#runs-figure a")].map(a => {
            const r = a.querySelector("use").getBoundingClientRect(), at = document.elementFromPoint(r.x + r.width/2, r.y + r.height/2);
            return [a.getAttribute("href"), !!at && !!at.closest("a")]; }))"""))
    finally: b.close()
    scored = {e["name"] for e in data()["encoders"] if e["page"]}
    assert {Path(href).stem.removeprefix("probe-") for href, on_top in hit if on_top} == scored
    for href, _ in hit: assert (ROOT/"nbs"/href).resolve().with_suffix(".ipynb").exists(), href
