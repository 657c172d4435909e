"""Ship a finished `distilltv reproduce --seeds 3` as the reference run: `python .ci/reference.py`.

Copies from runs/mini to data/mini: the results of all seeds, the students, and of every executed notebook of the first
seed the parameters and the run itself, with links that work from its new place, so that each number on the site can be
followed to the run that made it. The examples of the dial are chosen anew where the students are new. Then the pages
that read the results are executed and cleaned, and README.md is made from one of them.
"""
import argparse, base64, io, json, os, posixpath, re, shutil, subprocess, sys, tempfile
from pathlib import Path
from PIL import Image
from distilltv.grid import fresh, grid, stamp
from distilltv.reading import read_table
from distilltv.runner import calibrate
from distilltv.runs import data_dir, home, root, write_json

# where a chapter stops explaining and starts to run; the results chapter is all run
OWN = dict(distil="## This run", merge="## The equation", probe="## The run")

WIDGET = "application/vnd.jupyter.widget-view+json"    # which a page could only draw with scripts from elsewhere

def run_itself(cells, stage):
    """Parameters, and the cells from the run's own heading on: without what defines the package or asks the reader,
    both are in the chapter."""
    says = ["".join(c["source"]) for c in cells]
    first = next((i for i, s in enumerate(says) if s.startswith(OWN[stage])), None) if stage in OWN else 0
    if first is None:
        sys.exit(f"no heading {OWN[stage]!r} in the notebook of stage {stage}: say in OWN what it is called now")
    setting = lambda c, s: "parameters" in c["metadata"].get("tags", []) or s.startswith("# Parameters\n")
    chapter = lambda s: s.startswith(("#| export", "#| default_exp", "#| hide", "**Exercise", "## Exercise"))
    return [c for i, (c, s) in enumerate(zip(cells, says)) if setting(c, s) or i >= first and not chapter(s)]

def notebook(run):
    "The executed notebook of a run, as a page."
    nb = json.loads(run.executed.read_text(encoding="utf-8"))
    text = json.dumps(nb["cells"], ensure_ascii=False)
    for path, name in ((str(home()), "runs"), (str(root())+"/", ""), (str(root()), ".")):
        text = text.replace(path, name)
    cells = run_itself(json.loads(text)[1:], run.stage)    # the first cell is the chapter's title
    for c in cells:
        c["metadata"] = {k: v for k, v in c["metadata"].items() if k == "tags" and v}
        if c["cell_type"] == "code": c["execution_count"] = None
        if c["cell_type"] == "markdown": c["source"] = relink("".join(c["source"]))
        # progress bars
        if c.get("outputs"):
            c["outputs"] = [o for o in c["outputs"] if o.get("name") != "stderr" and WIDGET not in o.get("data", {})]
        for o in c.get("outputs", []):
            if "execution_count" in o: o["execution_count"] = None
            if "image/png" in o.get("data", {}): o["data"]["image/png"] = smaller(o["data"]["image/png"])
    record = (json.loads((run.folder/"result.json").read_text(encoding="utf-8"))
              if (run.folder/"result.json").exists() else {})
    says = " ".join(f"-p {k} {v}" for k, v in run.parameters.items() if k != "profile")
    cost = (f"{record['seconds']:.1f} s and {record['peak_memory_mb']:.0f} MB on {record['machine']}, "
            f"commit {record['commit']}. " if record else "")
    head = (f"# Run: {run.stage} {run.name}\n\n> `{f'papermill nbs/{run.notebook} out.ipynb {says}'.strip()}`\n\n"
            f"A run of the reference experiment, as papermill left it: its parameters, and what it did. {cost}"
            "The code that is used but not shown is explained in the chapter it ran, "
            f"[nbs/{run.notebook}](../../../nbs/{run.notebook}).")
    cells.insert(0, dict(cell_type="markdown", id=nb["cells"][0]["id"], metadata={},
                         source=head.replace("{home}", "runs")))
    return dict(cells=cells, metadata=dict(kernelspec=dict(name="python3", display_name="python3", language="python")),
                nbformat=4, nbformat_minor=5)

def smaller(png):
    "A base64 PNG with a palette of 64 colours: a third of the size, and plots do not show it."
    out = io.BytesIO()
    Image.open(io.BytesIO(base64.b64decode(png))).convert("RGB").quantize(64).save(out, "PNG", optimize=True)
    return base64.b64encode(out.getvalue()).decode()

def relink(text):
    "Links from nbs/ -> links from data/mini/runs/."
    fix = lambda m: m[0] if re.match(r"[a-z]+:|#|/",
                                     m[1]) else f"]({posixpath.normpath(posixpath.join('../../../nbs', m[1]))})"
    return re.sub(r"\]\(([^)\s]+)\)", fix, text)

# those that show what data/mini/results says
PAGES = "index use honesty gallery dial ten_minutes claims 03c_path 05_results 05c_paper 05d_findings".split()

def execute(names, **env):
    "Run notebooks in place, as their authors do, and clean them."
    bin, files = Path(sys.executable).parent, [root()/f"nbs/{n}.ipynb" for n in names]
    for f in files:
        subprocess.run([bin/"jupyter", "nbconvert", "--to", "notebook", "--execute", "--inplace", f.name], cwd=f.parent,
                       check=True, env={**os.environ, **env})
    for f in files: subprocess.run([bin/"nbdev_clean", "--fname", f], cwd=root(), check=True)

def ship_students(runs, to):
    """The students of the first seed, with the heads that the path is measured with; of the others the weights, while
    there is room."""
    for r in runs:
        if r.stage != "distil": continue
        first, ensemble = not r.parameters["seed"], r.parameters["teacher"] == "ensemble"
        if not first and (ensemble or size(to) > ROOM): continue
        folder = to/"students"/r.name
        folder.mkdir(parents=True, exist_ok=True)
        files = ["config.json", "model.safetensors", "preprocessor_config.json", "distilltv.json"]
        for f in files + ["heads.safetensors"]*(first and not ensemble): shutil.copy(r.folder/f, folder)

ROOM = 100e6    # bytes of data/mini up to which more students ship; the repository's limit is 110 MB

def size(folder): return sum(f.stat().st_size for f in folder.rglob("*") if f.is_file())

def ship_runs(runs, to):
    "The executed notebooks of the first seed, compact, since some forty of them ship; the records and seconds of all."
    shutil.rmtree(to/"runs", ignore_errors=True)
    (to/"runs").mkdir()
    records = {}
    for r in runs:
        if (r.folder/"result.json").exists():
            records[r.id] = json.loads((r.folder/"result.json").read_text(encoding="utf-8"))
        if re.search(r"-seed\d+", r.name): continue
        text = json.dumps(notebook(r), ensure_ascii=False, separators=(",", ":")) + "\n"
        (to/f"runs/{r.stage}-{r.name}.ipynb").write_text(text, encoding="utf-8")
    write_json(to/"runs/runs.json", records)
    write_json(to/"runs/seconds.json",
               dict(calibration=round(calibrate(), 4), seconds={r.id: stamp(r)["seconds"] for r in runs}))

def renew_dial(to):
    "New sounds and scores for the dial, if other students ship now."
    known = json.loads((to/"results/dial/dial.json").read_text(encoding="utf-8"))["hashes"].values()
    scores = read_table(to/"results/scores.csv")
    if set(scores[(scores.role == "merged") & (scores.distil_seed == 0)].weights_hash) <= set(known): return
    (home()/"mini/dial").mkdir(parents=True, exist_ok=True)
    subprocess.run([Path(sys.executable).parent/"papermill", "dial.ipynb", home()/"mini/dial/dial.ipynb", "-p", "make",
                    "full"], cwd=root()/"nbs", check=True)

def main():
    arguments = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    arguments.add_argument("--seeds", type=int, default=3, help="distillation seeds of the run that is shipped")
    runs, to = grid("mini", seeds=arguments.parse_args().seeds), data_dir()
    by_id = {r.id: r for r in runs}
    if stale := [r.id for r in runs if not fresh(r, by_id)]:
        sys.exit(f"not up to date, run `distilltv reproduce` first: {', '.join(stale)}")
    for f in (home()/"mini/results").iterdir():
        if f.is_file() and f.suffix not in (".ipynb", ".svg") and f.name not in ("result.json", "stamp.json"):
            shutil.copy(f, to/"results")
    ship_students(runs, to)
    renew_dial(to)
    ship_runs(runs, to)
    # from what ships, as everywhere else
    with tempfile.TemporaryDirectory() as nothing: execute(PAGES, DISTILLTV_HOME=nothing)
    subprocess.run([sys.executable, root()/".ci/readme.py"], check=True)

if __name__ == "__main__": main()
