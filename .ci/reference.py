"""Ship a finished `distilltv reproduce` as the reference run: `python .ci/reference.py`.

Copies from runs/mini to data/mini: the results, the three students, and of every executed notebook the parameters and the
run itself, with links that work from its new place, so that each number on the site can be followed to the run that made it.
The examples of the dial are chosen anew where the students are new. Then the pages that read the results are executed and cleaned, and README.md is made from one of them.
"""
import base64, io, json, os, posixpath, re, shutil, subprocess, sys, tempfile
from pathlib import Path
import pandas as pd
from PIL import Image
from distilltv.reproduce import fresh, grid
from distilltv.runs import data_dir, home, root, write_json

# where a chapter stops explaining and starts to run; the results chapter is all run
OWN = dict(distil="## This run", merge="## The merge", probe="## The run")

WIDGET = "application/vnd.jupyter.widget-view+json"    # which a page could only draw with scripts from elsewhere

def run_itself(cells, stage):
    "Parameters, and the cells from the run's own heading on: without what defines the package or asks the reader, both are in the chapter."
    says = ["".join(c["source"]) for c in cells]
    first = next((i for i, s in enumerate(says) if s.startswith(OWN[stage])), None) if stage in OWN else 0
    if first is None: sys.exit(f"no heading {OWN[stage]!r} in the notebook of stage {stage}: say in OWN what it is called now")
    setting = lambda c, s: "parameters" in c["metadata"].get("tags", []) or s.startswith("# Parameters\n")
    chapter = lambda s: s.startswith(("#| export", "#| default_exp", "#| hide", "**Exercise", "## Exercise"))
    return [c for i, (c, s) in enumerate(zip(cells, says)) if setting(c, s) or i >= first and not chapter(s)]

def notebook(cell):
    "The executed notebook of a cell, as a page."
    nb = json.loads(cell.executed.read_text())
    text = json.dumps(nb["cells"], ensure_ascii=False)
    for path, name in ((str(home()), "runs"), (str(root())+"/", ""), (str(root()), ".")): text = text.replace(path, name)
    cells = run_itself(json.loads(text)[1:], cell.stage)    # the first cell is the chapter's title
    for c in cells:
        c["metadata"] = {k: v for k, v in c["metadata"].items() if k == "tags" and v}
        if c["cell_type"] == "code": c["execution_count"] = None
        if c["cell_type"] == "markdown": c["source"] = relink("".join(c["source"]))
        if c.get("outputs"): c["outputs"] = [o for o in c["outputs"] if o.get("name") != "stderr" and WIDGET not in o.get("data", {})]  # progress bars
        for o in c.get("outputs", []):
            if "execution_count" in o: o["execution_count"] = None
            if "image/png" in o.get("data", {}): o["data"]["image/png"] = smaller(o["data"]["image/png"])
    record = json.loads((cell.folder/"result.json").read_text()) if (cell.folder/"result.json").exists() else {}
    says = " ".join(f"-p {k} {v}" for k, v in cell.parameters.items() if k != "profile")
    cost = f"{record['seconds']:.0f} s and {record['peak_memory_mb']:.0f} MB on {record['machine']}, commit {record['commit']}. " if record else ""
    head = (f"# Run: {cell.stage} {cell.name}\n\n> `{f'papermill nbs/{cell.notebook} out.ipynb {says}'.strip()}`\n\n"
            f"A run of the reference experiment, as papermill left it: its parameters, and what it did. {cost}"
            f"The code that is used but not shown is explained in the chapter it ran, [nbs/{cell.notebook}](../../../nbs/{cell.notebook}).")
    cells.insert(0, dict(cell_type="markdown", id=nb["cells"][0]["id"], metadata={}, source=head.replace("{home}", "runs")))
    return dict(cells=cells, metadata=dict(kernelspec=dict(name="python3", display_name="python3", language="python")), nbformat=4, nbformat_minor=5)

def smaller(png):
    "A base64 PNG with a palette of 64 colours: a third of the size, and plots do not show it."
    out = io.BytesIO()
    Image.open(io.BytesIO(base64.b64decode(png))).convert("RGB").quantize(64).save(out, "PNG", optimize=True)
    return base64.b64encode(out.getvalue()).decode()

def relink(text):
    "Links from nbs/ -> links from data/mini/runs/."
    fix = lambda m: m[0] if re.match(r"[a-z]+:|#|/", m[1]) else f"]({posixpath.normpath(posixpath.join('../../../nbs', m[1]))})"
    return re.sub(r"\]\(([^)\s]+)\)", fix, text)

PAGES = "index use honesty gallery dial ten_minutes claims 03c_path 05_results".split()    # those that show what data/mini/results says

def execute(names, **env):
    "Run notebooks in place, as their authors do, and clean them."
    bin, files = Path(sys.executable).parent, [root()/f"nbs/{n}.ipynb" for n in names]
    for f in files: subprocess.run([bin/"jupyter", "nbconvert", "--to", "notebook", "--execute", "--inplace", f.name], cwd=f.parent, check=True, env={**os.environ, **env})
    for f in files: subprocess.run([bin/"nbdev_clean", "--fname", f], cwd=root(), check=True)

def main():
    cells = grid("mini")
    by_id = {c.id: c for c in cells}
    if stale := [c.id for c in cells if not fresh(c, by_id)]: sys.exit(f"not up to date, run `distilltv reproduce` first: {', '.join(stale)}")
    to = data_dir()
    for f in (home()/"mini/results").iterdir():
        if f.is_file() and f.suffix not in (".ipynb", ".svg") and f.name not in ("result.json", "stamp.json"): shutil.copy(f, to/"results")
    for c in cells:
        if c.stage == "distil":
            (to/"students"/c.name).mkdir(parents=True, exist_ok=True)
            files = ["config.json", "model.safetensors", "preprocessor_config.json", "distilltv.json"]
            for f in files + ["heads.safetensors"]*(c.name != "ensemble"): shutil.copy(c.folder/f, to/"students"/c.name) # the ensemble has no path to measure
    known = json.loads((to/"results/dial/dial.json").read_text())["hashes"].values()
    if not set(pd.read_csv(to/"results/scores.csv").query("role == 'merged'").weights_hash) <= set(known):  # other students: other examples
        (home()/"mini/dial").mkdir(parents=True, exist_ok=True)
        subprocess.run([Path(sys.executable).parent/"papermill", "dial.ipynb", home()/"mini/dial/dial.ipynb", "-p", "make", "full"], cwd=root()/"nbs", check=True)
    shutil.rmtree(to/"runs", ignore_errors=True)
    (to/"runs").mkdir()
    records = {}
    for c in cells:
        # compact, since some forty of them ship
        (to/f"runs/{c.stage}-{c.name}.ipynb").write_text(json.dumps(notebook(c), ensure_ascii=False, separators=(",", ":")) + "\n")
        if (c.folder/"result.json").exists(): records[c.id] = json.loads((c.folder/"result.json").read_text())
    write_json(to/"runs/runs.json", records)
    with tempfile.TemporaryDirectory() as nothing: execute(PAGES, DISTILLTV_HOME=nothing)    # from what ships, as everywhere else
    subprocess.run([sys.executable, root()/".ci/readme.py"], check=True)

if __name__ == "__main__": main()
