"Notebooks, package, README and site agree, run, and take their parameters seriously."
import json, os, re, shutil, subprocess, sys
from pathlib import Path
import pytest

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOKS = sorted(p for p in (ROOT/"nbs").rglob("*.ipynb")
                   if not any(d.startswith((".", "_")) for d in p.relative_to(ROOT).parts))
BIN = Path(sys.executable).parent
ids = lambda p: p.relative_to(ROOT).as_posix() if isinstance(p, Path) else None

def load(path): return json.loads(path.read_text())
def source(cell): return "".join(cell["source"])
def code_cells(path): return [c for c in load(path)["cells"] if c["cell_type"] == "code"]

def tool(*args, cwd=ROOT, **env):
    return subprocess.run([str(BIN/args[0]), *map(str, args[1:])], cwd=cwd, text=True, stdin=subprocess.DEVNULL,
                          stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env={**os.environ, **env})

# --- in step

@pytest.fixture(scope="module")
def copy(tmp_path_factory):
    "A copy of notebooks and package, exported and cleaned again."
    to = tmp_path_factory.mktemp("copy")
    for d in ("nbs", "distilltv"): shutil.copytree(ROOT/d, to/d, ignore=shutil.ignore_patterns("__pycache__", ".*"))
    for f in ("settings.ini", "pyproject.toml"): shutil.copy(ROOT/f, to)
    for command in ("nbdev_export", "nbdev_clean"):
        done = tool(command, cwd=to)
        assert done.returncode == 0, done.stdout
    return to

def test_package_is_exported(copy):
    made, here = ({p.name: p.read_text() for p in (d/"distilltv").glob("*.py")} for d in (copy, ROOT))
    assert set(made) == set(here), "modules without a notebook, or notebooks not exported"
    assert not (stale := [n for n in here if made[n] != here[n]]), f"run nbdev_export: {stale}"

@pytest.mark.parametrize("path", NOTEBOOKS, ids=ids)
def test_notebook_is_clean(copy, path):
    assert (copy/path.relative_to(ROOT)).read_text() == path.read_text(), f"run nbdev_clean --fname {ids(path)}"

@pytest.mark.parametrize("script", ["readme.py", "api.py"])
def test_made_pages_are_up_to_date(script):
    "README.md comes from nbs/index.ipynb, nbs/api from the docstrings."
    done = subprocess.run([sys.executable, ROOT/".ci"/script, "--check"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr

# --- executed, and fit to be published

@pytest.mark.parametrize("path", NOTEBOOKS, ids=ids)
def test_notebook_is_executed_without_noise(path):
    outputs = [o for c in code_cells(path) for o in c["outputs"]]
    assert outputs or not code_cells(path), "no outputs: run the notebook and save it"
    assert not [o for o in outputs if o["output_type"] == "error"], "an output is an error"
    text = json.dumps(outputs)
    assert not re.search(r"Warning:|\[IPKernelApp\]|it/s\]|s/it\]|step/s\]|jupyter.widget-view",
                         text), "warnings or progress bars in outputs"
    assert "widgets" not in json.loads(path.read_text())["metadata"], ("the state of progress bars is left in the "
                                                                       "metadata: delete `widgets` there")
    assert not re.search(r"(?<![\w.])/(home|root|tmp|work|Users|opt|data)/\w",
                         re.sub(r'"image/[a-z+]*": ("[^"]*"|\[[^\]]*\])', "", text)), "an absolute path in outputs"

TAKE_PARAMETERS = [p for p in NOTEBOOKS if re.match(r"0[2-6]_", p.name)
                   or any("parameters" in c["metadata"].get("tags", []) for c in code_cells(p))]

@pytest.mark.parametrize("path", TAKE_PARAMETERS, ids=ids)
def test_parameters_are_tagged_and_checked(path):
    cells = code_cells(path)
    at = [i for i, c in enumerate(cells) if "parameters" in c["metadata"].get("tags", [])]
    assert len(at) == 1, "exactly one cell carries the tag `parameters` that papermill looks for"
    assert any("check_parameters(globals()" in source(c)
               for c in cells[at[0]:at[0]+2]), "check_parameters follows at once"
    import papermill
    for name, p in papermill.inspect_notebook(str(path)).items():
        assert p["help"], f"{name} has no help for --help-notebook"

def test_notebooks_run():
    "Every notebook runs from top to bottom (`nbdev_test`, as a contributor runs it)."
    done = tool("nbdev_test", "--n_workers", min(2, os.cpu_count()), "--do_print", "--timing", OMP_NUM_THREADS="1")
    assert done.returncode == 0, done.stdout[-6000:]

def test_the_distillation_chapter_runs_with_few_steps(tmp_path):
    "`nbdev_test` leaves its run of minutes out (`slow`), so here it is with six steps, figure and record included."
    done = tool("papermill", "nbs/02_distill.ipynb", tmp_path/"out.ipynb", "-p", "steps", 6, "-p", "teacher", "music",
                "--no-progress-bar",
                DISTILLTV_HOME=str(tmp_path), OMP_NUM_THREADS="1")
    assert done.returncode == 0, done.stdout[-3000:]
    assert json.loads((tmp_path/"mini/students/both/music-6steps/distilltv.json").read_text())["steps"] == 6

def test_prose_numbers_are_computed(tmp_path):
    "The pages whose numbers come from the results show what those results say today."
    for name in ("index", "honesty"):
        path = ROOT/f"nbs/{name}.ipynb"
        done = tool("jupyter", "nbconvert", "--to", "notebook", "--execute", "--output-dir", tmp_path, path)
        assert done.returncode == 0, done.stdout[-3000:]
        shown = lambda p: [o.get("data", {}).get("text/markdown") for c in code_cells(p) for o in c["outputs"]]
        assert shown(tmp_path/path.name) == shown(path), (f"{name}.ipynb shows old numbers: run and save it, "
                                                          "then .ci/readme.py")

# --- papermill

def merge(tmp_path, *args):
    return tool("papermill", "nbs/03_merge.ipynb", tmp_path/"out.ipynb", *args, "--no-progress-bar",
                DISTILLTV_HOME=str(tmp_path), OMP_NUM_THREADS="1")

def test_the_lam_on_the_command_line_is_the_lam_used(tmp_path):
    done = merge(tmp_path, "-p", "lam", "0.4")
    assert done.returncode == 0, done.stdout[-3000:]
    folder = tmp_path/"mini/merged/both/linear-lam-0.40"
    assert json.loads((folder/"distilltv.json").read_text())["lam"] == .4

    # and the README's five lines open it
    block = next(b for b in re.findall(r"```python\n(.*?)```", (ROOT/"README.md").read_text(), re.S)
                 if "last_hidden_state" in b)
    code = block.replace("runs/mini/merged/both/linear-lam-0.40", str(folder)) + "\nprint(list(frames.shape))"
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True,
                           env={**os.environ, "HF_HUB_OFFLINE": "1"})
    assert shown.stdout.strip() == "[1, 49, 192]", shown.stderr[-2000:]

@pytest.mark.parametrize("args, says",
                         [(("-p", "lamda", "0.4"), "unknown parameter 'lamda'"),
                          (("-p", "lam", "abc"), "lam = 'abc' is not a number")])
def test_a_wrong_parameter_is_refused(tmp_path, args, says):
    done = merge(tmp_path, *args)
    assert done.returncode != 0 and says in done.stdout and "Valid parameters are lam: a number" in done.stdout
    assert not (tmp_path/"mini").exists()
