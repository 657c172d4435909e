"The grid runner on notebooks of one cell: what runs, what does not, and what a kill or a failure leaves."
import json, os, shutil, signal, subprocess, sys, time
from dataclasses import replace
from pathlib import Path
import numpy as np, pytest, soundfile as sf
from distilltv import reproduce as command
from distilltv.corpora import load_corpus
from distilltv.grid import GridRun, _check_apart, code_of, digest, fresh, grid, key, simplex, stamp, state, taken
from distilltv.profiles import profile
from distilltv.runner import Progress, RunError, alone, execute, run_stale
from distilltv.runs import root

SLOW = "import time; time.sleep(1.5)\n"
WRITE = """from pathlib import Path
out = Path('runs')/name
log = Path('runs/log'); log.parent.mkdir(exist_ok=True)
with log.open('a') as f: f.write(name + '\\n')
{code}
(out/'number.txt').write_text(str(value))
"""

def notebook(path, code, **parameters):
    "Write a notebook of a parameters cell and a code cell."
    head = "\n".join(f"{k} = {v!r}" for k, v in parameters.items())
    cell = lambda source, *tags: dict(cell_type="code", id=f"c{len(tags)}", metadata=dict(tags=list(tags)),
                                      source=source,
                                      outputs=[], execution_count=None)
    path.write_text(json.dumps(dict(nbformat=4, nbformat_minor=5,
                                    cells=[cell(head, "parameters"), cell(WRITE.format(code=code))],
        metadata=dict(kernelspec=dict(name="python3", display_name="python3", language="python")))))

@pytest.fixture
def repo(tmp_path, monkeypatch):
    "A repository of three small notebooks: `make` writes x, `square` squares it, `total` sums the squares."
    tmp_path = tmp_path/"a folder with {braces}"    # papermill would take them for parameters
    (tmp_path/"nbs").mkdir(parents=True)
    (tmp_path/"distilltv").mkdir()
    (tmp_path/"distilltv/helper.py").write_text("def square(x): return x*x\n")
    notebook(tmp_path/"nbs/make.ipynb", "value = x", name="", x=0)
    notebook(tmp_path/"nbs/square.ipynb",
             SLOW + "value = int(Path(f'runs/{of}/number.txt').read_text())**2  # import distilltv", name="", of="")
    notebook(tmp_path/"nbs/total.ipynb",
             "value = sum(int(Path(f'runs/{n}/number.txt').read_text()) for n in of.split())", name="", of="")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DISTILLTV_HOME", str(tmp_path/"runs"))
    return tmp_path

def at(notebook): return str(Path.cwd()/"nbs"/notebook)

def small(xs=(1, 2)):
    make = [GridRun("make", f"m{i}", at("make.ipynb"), dict(name=f"m{i}", x=x), f"m{i}") for i, x in enumerate(xs)]
    square = [GridRun("square", f"s{i}", at("square.ipynb"), dict(name=f"s{i}", of=f"m{i}"), f"s{i}", (f"make/m{i}",))
              for i in range(len(xs))]
    return [*make, *square,
            GridRun("total", "t", at("total.ipynb"), dict(name="t", of=" ".join(c.name for c in square)), "t",
                    tuple(c.id for c in square))]

def ran(repo):
    "Names of the runs since the last call, sorted."
    log = repo/"runs/log"
    names = sorted(log.read_text().split()) if log.exists() else []
    log.unlink(missing_ok=True)
    return names

def total(repo): return int((repo/"runs/t/number.txt").read_text())

def edit(path, old, new):
    assert old in path.read_text()
    path.write_text(path.read_text().replace(old, new))

def test_only_the_stale_runs(repo):
    assert run_stale(small()) == {} and total(repo) == 5
    assert ran(repo) == "m0 m1 s0 s1 t".split()

    began = time.time()
    assert run_stale(small()) == {} and ran(repo) == []
    def states(xs): return {r.name: state(r, {c.id: c for c in small(xs)}) for r in small(xs)}
    assert states((1, 2)) == dict.fromkeys(("m0", "m1", "s0", "s1", "t"), "up to date")
    assert states((1, 3, 5)) == dict(m0="up to date", s0="up to date", m1="stale: parameter x changed",
                                     s1="up to date", m2="to run", s2="to run",
                                     t="stale: parameter of, square/s2 changed")
    assert time.time()-began < 1

    run_stale(small((1, 3)))                                  # a parameter
    assert ran(repo) == "m1 s1 t".split() and total(repo) == 10
    edit(repo/"nbs/total.ipynb", "value = sum", "value = 1+sum")   # code
    run_stale(small((1, 3)))
    assert ran(repo) == ["t"] and total(repo) == 11
    edit(repo/"nbs/square.ipynb", "# import", "# a comment: import")
    run_stale(small((1, 3)))
    assert ran(repo) == []

    (repo/"runs/s0/number.txt").unlink()                        # a lost result; the same again leaves `total` fresh
    run_stale(small((1, 3)))
    assert ran(repo) == ["s0"]
    (repo/"runs/s0/number.txt").write_text("7")                 # a result somebody changed
    run_stale(small((1, 3)))
    assert ran(repo) == ["s0"] and total(repo) == 11

def test_modules_and_data_are_inputs(repo, monkeypatch):
    monkeypatch.setenv("DISTILLTV_DATA", str(repo/"data"))
    monkeypatch.setattr("distilltv.grid.root", lambda: repo)
    (repo/"data").mkdir()
    (repo/"data/a.txt").write_text("1")
    notebook(repo/"nbs/use.ipynb", "from distilltv import helper\nvalue = 0", name="")
    cell = GridRun("use", "u", at("use.ipynb"), dict(name="u"), "u", inputs=("{data}/a.txt",))
    keys = [key(cell, {})]
    for path, text in ((repo/"distilltv/helper.py", "def square(x): return x**2\n"), (repo/"data/a.txt", "two")):
        path.write_text(text)
        keys.append(key(cell, {}))
    assert len(set(keys)) == 3
    (repo/"distilltv/helper.py").write_text("# a square\ndef square(x):\n    return x**2\n")
    assert key(cell, {}) == keys[-1]

@pytest.mark.parametrize("after", [.5, 2.5, 4.])
def test_killed_and_started_again(repo, after):
    "SIGKILL leaves no kernel behind, and the same command ends with the same numbers."
    code = (f"import sys; sys.path[:0] = [{str(Path(__file__).parent)!r}]\n"
            "from test_reproduce import *\nrun_stale(small())")
    run = subprocess.Popen([sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": str(root_of_package())},
                           stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    time.sleep(after)
    run.send_signal(signal.SIGKILL)
    run.wait()
    done = [c for c in small() if fresh(c, {c.id: c for c in small()})]
    time.sleep(1.5)     # kernels notice within a second that their parent is gone
    ran(repo)
    assert run_stale(small()) == {} and total(repo) == 5
    assert not {c.name for c in done} & set(ran(repo))

def root_of_package(): return Path(command.__file__).parent.parent

def test_a_failure_is_named_and_the_others_go_on(repo):
    failed = run_stale(small((1, "two")))
    assert set(failed) == {"square/s1", "total/t"}
    assert "ValueError: invalid literal" in failed["square/s1"] and "runs/s1/square.ipynb" in failed["square/s1"]
    assert "An Exception was encountered" in (repo/"runs/s1/square.ipynb").read_text()
    assert failed["total/t"] == "not run, because square/s1 failed"
    assert (repo/"runs/s0/number.txt").read_text() == "1"
    ran(repo)
    assert run_stale(small((1, 2))) == {} and total(repo) == 5 and ran(repo) == "m1 s1 t".split()

def test_a_dead_kernel_is_a_failure(repo):
    notebook(repo/"nbs/make.ipynb", "import os; os._exit(9)", name="", x=0)
    failed = run_stale(small((1,)))
    assert "DeadKernelError" in failed["make/m0"] and failed["square/s0"] == "not run, because make/m0 failed"

def test_a_bare_assert_shows_its_line(repo):
    notebook(repo/"nbs/make.ipynb", "value = x\nassert value > 5", name="", x=0)
    assert "AssertionError: assert value > 5" in run_stale(small((1,)))["make/m0"]

def test_nothing_made_is_a_failure(repo):
    code = (repo/"nbs/total.ipynb").read_text().replace("(out/'number.txt')", "(out/'.hidden')")
    (repo/"nbs/make.ipynb").write_text(code.replace("of.split()", "[]").replace("of = ", "x = "))
    assert "left nothing in runs/m0" in run_stale(small((1,)))["make/m0"]

def test_leftovers_of_other_code_are_cleared_but_a_killed_run_may_continue(repo):
    run_stale(small((1,)))
    (repo/"runs/m0/checkpoint").write_text("half")
    run_stale(small((1,)))
    assert (repo/"runs/m0/checkpoint").exists()
    (repo/"runs/m0/checkpoint").write_text("half again")
    run_stale(small((9,)))
    assert not (repo/"runs/m0/checkpoint").exists()

def test_two_at_once_are_refused(repo):
    with alone(repo/"runs"), pytest.raises(RuntimeError, match="another `distilltv reproduce` is writing to"):
        run_stale(small())

def cli(*args, cwd, **env):
    return subprocess.run([sys.executable, "-c",
                           "import sys; from distilltv.reproduce import main; sys.exit(main(sys.argv[1:]))", *args],
                           cwd=cwd, text=True, capture_output=True,
                          stdin=subprocess.DEVNULL, env={**os.environ, "PYTHONPATH": str(root_of_package()), **env})

def test_command_line(tmp_path, repo):
    assert "reproduce" in cli("--help", cwd=repo).stdout
    assert "start + lam" in cli("reproduce", "--help", cwd=repo).stdout
    wrong = cli("reproduce", "--profile", "maxi", cwd=repo)
    assert wrong.returncode == 2 and "use one of mini, hub, paper, or the path" in wrong.stderr
    assert "Traceback" not in wrong.stderr
    few = cli("reproduce", "--jobs", "0", cwd=repo)
    assert few.returncode == 2 and "--jobs 0 is too few" in few.stderr
    none = cli("merge", "nothing.yaml", "out", cwd=repo)
    assert none.returncode == 2 and "nothing.yaml" in none.stderr and "Traceback" not in none.stderr

@pytest.mark.parametrize("given, says", [
    ("--slurm-partition gpu", "--slurm-partition is for jobs of a Slurm cluster: give --slurm too"),
    ("--slurm-time 3", "--slurm-time is for jobs"), ("--slurm-jobs 3", "--slurm-jobs is for jobs"),
    ("--slurm --slurm-time -2", "--slurm-time -2.0 is no number to go by"),
    ("--slurm --slurm-time nan", "--slurm-time nan is no number"), ("--slurm --slurm-jobs -1", "--slurm-jobs -1 is no"),
    ("--slurm --dry-run", "--dry-run counts with this machine: leave out --slurm"),
    ("--home ~no-such-user/x", "~no-such-user/x: there is no such user's home"),
    ("--home=", "--home is empty: name a folder, or leave it out"),
    ("--seed 3", "unrecognized arguments: --seed 3: did you mean --seeds"),
    ("--job=1", "unrecognized arguments: --job=1: did you mean --jobs")])
def test_an_option_that_would_be_passed_over_or_means_nothing_is_refused(monkeypatch, capsys, given, says):
    monkeypatch.setattr(command, "_look_first", lambda *_: pytest.fail("began"))
    with pytest.raises(SystemExit): command.main(["reproduce", *given.split()])
    assert says in capsys.readouterr().err

def test_folders_of_the_environment_mean_the_same_in_the_kernels(tmp_path, monkeypatch):
    "Which work in the repository, whatever the working directory of the command."
    folders = dict.fromkeys(("DISTILLTV_HOME", "DISTILLTV_DATA", "DISTILLTV_DATASETS", "DISTILLTV_SPEECH"), "mine")
    for name, folder in (folders | dict(DISTILLTV_MUSIC="stream:some/set")).items(): monkeypatch.setenv(name, folder)
    monkeypatch.chdir(tmp_path)
    p = profile("hub")
    command._settle(p)
    monkeypatch.chdir("/")
    assert profile("hub") == p and p.audio == dict(speech=str(tmp_path/"mine"), music="stream:some/set")
    assert all(os.environ[name] == str(tmp_path/"mine") for name in folders)

def test_a_notebook_that_gives_the_command_goes_on_as_before(tmp_path, monkeypatch):
    monkeypatch.setattr(command, "run_stale", lambda runs, jobs: dict(x=f"in {runs[0].folder}"))
    monkeypatch.setenv("DISTILLTV_DATASETS", "sets")
    monkeypatch.chdir(tmp_path)
    def now(): return dict(os.environ), os.getcwd(), signal.getsignal(signal.SIGINT)
    before = now()
    assert command.main(["reproduce", "--home", str(tmp_path/"other")]) == 1 and now() == before

def test_without_notebooks_it_says_what_to_do(tmp_path):
    "A package installed from a wheel, away from any clone."
    code = (f"import os; os.chdir({str(tmp_path)!r})\nfrom distilltv import reproduce as r\n"
            f"r.root = lambda: r.Path({str(tmp_path)!r})\nr.main(['reproduce'])")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=root_of_package())
    assert done.returncode == 2 and "clone it and give the command inside" in done.stderr

def test_checking_imports_nothing_heavy():
    code = ("import sys, distilltv.reproduce; "
            "print([m for m in ('torch', 'transformers', 'pandas', 'papermill') if m in sys.modules])")
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True,
                          cwd=root_of_package()).stdout.strip() == "[]"

def test_grid_passes_only_parameters_the_notebooks_have():
    import papermill
    for cell in grid("mini"):
        path = root()/"nbs"/cell.notebook
        known = papermill.inspect_notebook(str(path))
        assert set(cell.parameters) <= set(known), f"{cell.id} passes {set(cell.parameters)-set(known)} to {path.name}"

# --- what makes which run stale

STAGES = dict(distil="speech", merge="lam-0.50", probe="logmel", results="all")
# module -> the stages whose runs become stale with it; what only shows results repeats the stage `results` alone
STALE = {m: "results" for m in "style statistics reading results figures paper findings".split()}

@pytest.fixture
def tree(tmp_path, monkeypatch):
    "A copy of the package and its notebooks, whose code the keys are made of."
    shutil.copytree(root()/"distilltv", tmp_path/"distilltv", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(root()/"nbs", tmp_path/"nbs")
    monkeypatch.setattr("distilltv.grid.root", lambda: tmp_path)
    monkeypatch.setenv("DISTILLTV_DATA", str(tmp_path/"nothing"))
    return tmp_path

def stale_after(tree, path, change):
    "The stages whose keys a change of a file changes; the file is put back."
    runs = {r.id: r for r in grid("mini")}
    keys = lambda: {s: key(runs[f"{s}/{n}"], runs) for s, n in STAGES.items()}
    before, text = keys(), path.read_text(encoding="utf-8")
    path.write_text(change(text), encoding="utf-8")
    after = keys()
    path.write_text(text, encoding="utf-8")
    return " ".join(s for s in STAGES if before[s] != after[s])

def test_each_module_makes_exactly_its_runs_stale(tree):
    stages = {}
    for path in sorted((tree/"distilltv").glob("*.py")):
        stages[path.stem] = stale_after(tree, path, lambda text: text + "\n_edited = 1\n")
    assert {m: s for m, s in stages.items() if m in STALE} == STALE
    expected = dict(runs="distil merge probe results", profiles="distil merge probe results",
                    objective="distil probe results", training="distil results",
                    rules="merge", merge="merge",
                    features="probe results", fit="probe results")
    assert {m: stages[m] for m in expected} == expected
    assert not any(stages[m] for m in "grid runner reproduce slurm queueing public path align".split()), stages

def test_a_figure_or_a_comment_in_a_chapter_makes_nothing_stale_and_a_line_of_code_does(tree):
    for stage, nb in dict(distil="02_distill", merge="03_merge", probe="04_probe").items():
        path = tree/f"nbs/{nb}.ipynb"
        def with_cell(source):
            def change(text):
                nb = json.loads(text)
                nb["cells"].append(dict(cell_type="code", id="new", metadata={}, outputs=[], execution_count=None,
                                        source=[source]))
                return json.dumps(nb)
            return change
        assert stale_after(tree, path, with_cell("#| fig-alt: \"a line\"\nplt.plot([1, 2])")) == ""
        assert stale_after(tree, path, with_cell("# a comment")) == ""
        assert stale_after(tree, path, with_cell("lam = 7")) == stage

def test_profile_audio_and_teachers_are_in_the_key(tmp_path, monkeypatch):
    for d in ("a", "b", "c"):
        (tmp_path/d).mkdir()
        (tmp_path/d/"x.wav").write_bytes(b"one")
    text = ('name = "three"\n[teachers]\na = "./a"\nb = "./b"\nc = "./c"\n[audio]\na = "./a"\nb = "${OTHER}"\n'
            'c = "./c"\n[training]\nsteps = 7\n[slurm.distil]\nhours = 2\n')
    (tmp_path/"three.toml").write_text(text, encoding="utf-8")
    monkeypatch.setenv("OTHER", str(tmp_path/"b"))
    runs = {r.id: r for r in grid(tmp_path/"three.toml", seeds=2)}
    def now(run="distil/a"): return key(runs[run], runs)
    keys = [now()]
    def changed():
        keys.append(now())
        return keys[-1] != keys[-2]
    (tmp_path/"c/x.wav").write_bytes(b"other")
    assert changed()                        # audio, and another's teacher
    monkeypatch.setenv("OTHER", str(tmp_path/"c"))
    assert changed()                        # an environment variable that the profile names
    (tmp_path/"three.toml").write_text(text.replace("steps = 7", "steps = 8"), encoding="utf-8")
    assert changed()                        # a value of the profile
    (tmp_path/"three.toml").write_text(text.replace("steps = 7", "steps = 8").replace("hours = 2", "hours = 3"),
                                       encoding="utf-8")
    assert not changed()                    # what decides no result
    before = now("distil/b")                # whose audio, not its teacher, lies in the folder c
    for text in ("file,label\n", "file,label\nx.wav,high\n"):
        (tmp_path/"c/labels.csv").write_text(text, encoding="utf-8")
        assert now("distil/b") == before    # labels beside the audio are not heard
    (tmp_path/"c/metadata.csv").write_text("id,file,start,end,split\n", encoding="utf-8")
    assert now("distil/b") != before        # a table of segments is

def test_a_profiles_question_makes_probes_stale_and_no_student(tmp_path):
    (tmp_path/"q").mkdir()
    far = tmp_path/"far.wav"    # named by its whole path
    (tmp_path/"q/t.csv").write_text("file,split,what,who\n", encoding="utf-8")
    text = ('name = "one"\n[teachers]\na = "x/y"\n'
            '[tasks.high]\ntable = "q/t.csv"\nlabel = "what"\ngroup = "who"\ndomain = "a"\n')
    def keys():
        runs = {r.id: r for r in grid(tmp_path/"one.toml")}
        return [key(runs[r], runs) for r in ("distil/a", "probe/logmel")]
    (tmp_path/"one.toml").write_text(text, encoding="utf-8")
    seen, two = [keys()], f"file,split,what,who\n{far},test,b,c\n../near.wav,test,b,c\n"
    for change in (lambda: (tmp_path/"q/t.csv").write_text("file,split,what,who\na.wav,test,b,c\n", encoding="utf-8"),
                   lambda: (tmp_path/"q/a.wav").write_bytes(b"new"),
                   lambda: (tmp_path/"q/t.csv").write_text(two, encoding="utf-8"),
                   lambda: far.write_bytes(b"new"), lambda: (tmp_path/"near.wav").write_bytes(b"new"),
                   lambda: (tmp_path/"one.toml").write_text(text.replace('"who"', '"day"'), encoding="utf-8"),
                   lambda: (tmp_path/"one.toml").write_text(text[:text.index("[tasks")], encoding="utf-8")):
        change()
        seen.append(keys())
    student, probe = zip(*seen)
    assert len(set(student)) == 1 and len(set(probe)) == 8

def test_what_a_corpus_reads_is_what_makes_a_student_stale(tmp_path):
    "Recordings elsewhere that its table names count; a hidden folder is neither read nor counted."
    a = tmp_path/"a"
    a.mkdir()
    (tmp_path/"one.toml").write_text('name = "one"\n[teachers]\na = "x/y"\n[audio]\na = "./a"\n', encoding="utf-8")
    def now():
        runs = {r.id: r for r in grid(tmp_path/"one.toml")}
        return key(runs["distil/a"], runs)
    sf.write(a/"x.wav", np.full(8000, .1), 16000)
    before = now()
    (a/".more").mkdir()
    for f in (a/".more/y.wav", a/".z.wav"): shutil.copy(a/"x.wav", f)
    assert now() == before and list(load_corpus(str(a))["id"]) == ["x"]
    (a/"metadata.csv").write_text("id,file,start,end,split\n1,../far.wav,0,9,train\n", encoding="utf-8")
    before = now()
    (tmp_path/"far.wav").write_bytes(b"new")
    assert now() != before

def test_a_stale_run_says_what_has_changed(tree, tmp_path, monkeypatch):
    "A module, a place, a file, a value, a version, a parameter or its results; of a stamp without parts, no more."
    (tmp_path/"a").mkdir()
    sf.write(tmp_path/"a/x.wav", np.full(8000, .1), 16000)
    mine = tmp_path/"one.toml"
    mine.write_text('name = "one"\n[teachers]\na = "x/y"\n[audio]\na = "./a"\n[training]\nsteps = 7\n')
    monkeypatch.setenv("DISTILLTV_HOME", str(tmp_path/"runs"))
    runs = {r.id: r for r in grid(mine)}
    run, weights = runs["distil/a"], runs["distil/a"].folder/"model.safetensors"
    for change, says in ((lambda: edit(tree/"distilltv/training.py", "import ", "import sys, "), "training.py"),
                         (lambda: edit(mine, "x/y", "x/z"), "teacher a"),
                         (lambda: sf.write(tmp_path/"a/y.wav", np.full(8000, .1), 16000), "audio a"),
                         (lambda: edit(mine, "steps = 7", "steps = 8\nlr = 1e-3"), "profile lr, profile steps"),
                         (lambda: weights.write_text("other"), "its results"),
                         (lambda: monkeypatch.setattr("distilltv.profiles.version_of", lambda _: "0"),
                          "version accelerate, version datasets, version numpy and 4 more")):
        execute(run, runs, lambda run: weights.write_text("made"))
        assert state(run, runs) == "up to date"
        change()
        assert state(run, runs) == f"stale: {says} changed"
    execute(run, runs, lambda run: weights.write_text("made"))
    other = replace(run, parameters=run.parameters | dict(seed=7))
    assert state(other, runs) == "stale: parameter seed changed"
    told = json.loads((run.folder/"stamp.json").read_text())
    (run.folder/"stamp.json").write_text(json.dumps({k: v for k, v in told.items() if k != "parts"}))
    assert state(run, runs) == "up to date" and state(other, runs) == "stale"

@pytest.mark.parametrize("name, out", [("voice-seed1", "else"), ("other", "students/voice-seed1")])
def test_runs_that_would_share_a_name_or_folder_are_refused(name, out):
    "As those of the domains `voice` and `voice-seed1` would, with two seeds."
    runs = [GridRun("distil", n, "x.ipynb", dict(teacher=t), o)
            for n, t, o in (("voice-seed1", "voice", "students/voice-seed1"), (name, "voice-seed1", out))]
    with pytest.raises(ValueError, match=rf"distil/voice-seed1 \(voice\) and distil/{name} \(voice-seed1\); rename"):
        _check_apart(runs)

def test_two_profile_files_of_one_name_do_not_replace_each_others_runs(tmp_path, monkeypatch, capsys):
    "A copy that was edited is refused by name; the same file, edited or moved, and an equal copy are not."
    monkeypatch.setenv("DISTILLTV_HOME", str(tmp_path/"runs"))
    mine, big = tmp_path/"mine.toml", tmp_path/"big.toml"
    text = 'name = "mine"\n[teachers]\na = "mini:speech"\n[audio]\na = "mini:speech"\n[training]\nsteps = 2\n'
    mine.write_text(text, encoding="utf-8")
    def do(file):
        execute(grid(file)[0], {}, lambda run: (run.folder/"heads.safetensors").write_text(file.name))
        return (tmp_path/"runs/mine/students/both/a/heads.safetensors").read_text()
    assert do(mine) == "mine.toml"
    big.write_text(text, encoding="utf-8")
    assert taken(grid(big)[0]) == ""
    big.write_text(f"{text}lr = 1e-3\n", encoding="utf-8")
    with pytest.raises(RunError, match=f"runs/mine holds runs of {mine}.*give {big} another"): do(big)
    assert command.main(["check", str(big)]) == 1 and f"holds runs of {mine}" in capsys.readouterr().out
    with pytest.raises(SystemExit): command.main(["reproduce", "--profile", str(big)])
    assert f"holds runs of {mine}" in capsys.readouterr().err and (tmp_path/"runs/mine").exists()
    mine.write_text(f"{text}lr = 1e-4\n", encoding="utf-8")
    assert do(mine) == "mine.toml"
    mine.rename(tmp_path/"elsewhere.toml")
    assert do(tmp_path/"elsewhere.toml") == "elsewhere.toml"

def test_what_a_profile_asks_is_asked_of_every_encoder(tmp_path):
    def asked(line):
        text = f'name = "one"\n{line}\n[teachers]\na = "x/y"\n[tasks.high]\n'
        text += 'table = "t.csv"\nlabel = "what"\ngroup = "who"\ndomain = "a"\n'
        (tmp_path/"one.toml").write_text(text, encoding="utf-8")
        return {r.parameters.get("tasks") for r in grid(tmp_path/"one.toml") if r.stage == "probe"}
    assert asked("") == asked('ask = "all"') == {None}      # as ever, so what was run before stays up to date
    assert asked('ask = "own"') == {"own"} and asked('ask = "high,pitch"') == {"high,pitch"}

def test_a_student_is_stale_with_what_it_reads_and_nothing_else(tmp_path, monkeypatch):
    for d in ("a", "b", "c", "heard"):
        (tmp_path/d).mkdir()
        (tmp_path/d/"x").write_bytes(b"one")
    text = ('name = "three"\n[teachers]\na = "./a"\nb = "./b"\nc = "${C}"\n'
            '[audio]\na = "./heard"\nb = "stream:x:y:train"\nc = "${STREAM}"\n'
            '[student]\ninit = "a"\n[training]\ncorpus = "own"\n')
    (tmp_path/"three.toml").write_text(text, encoding="utf-8")
    monkeypatch.setenv("C", str(tmp_path/"c"))
    monkeypatch.setenv("STREAM", "stream:z:y:train")
    runs = {r.id: r for r in grid(tmp_path/"three.toml")}
    asked = ["distil/a", "distil/b", "distil/c", "distil/ensemble", "probe/logmel", "probe/teacher-b",
             "probe/teacher-c"]
    last = {r: key(runs[r], runs) for r in asked}
    def stale():
        now = {r: key(runs[r], runs) for r in asked}
        found = [r for r in asked if now[r] != last[r]]
        last.update(now)
        return found
    (tmp_path/"b/x").write_bytes(b"other weights")
    assert stale() == ["distil/b", "distil/ensemble", "probe/teacher-b"]
    monkeypatch.setenv("C", str(tmp_path/"b"))               # another place for a teacher
    assert stale() == ["distil/c", "distil/ensemble", "probe/teacher-c"]
    monkeypatch.setenv("STREAM", "stream:elsewhere:y:train")
    assert stale() == ["distil/c", "distil/ensemble"]        # a stream holds out nothing, so the others do not read it
    monkeypatch.setenv("STREAM", f"stream:{tmp_path}/shards")
    (tmp_path/"shards").mkdir()
    assert stale() == ["distil/c", "distil/ensemble"]
    (tmp_path/"shards/train-0.parquet").write_bytes(b"more")  # of a stream in a folder of this disk
    assert stale() == ["distil/c", "distil/ensemble"]
    (tmp_path/"a/x").write_bytes(b"other start")             # the teacher of θ₀
    assert stale() == ["distil/a", "distil/b", "distil/c", "distil/ensemble"]
    (tmp_path/"heard/y.WAV").write_bytes(b"more")            # all are validated on files, whoever hears them
    assert stale() == ["distil/a", "distil/b", "distil/c", "distil/ensemble"]

def test_grid_and_notebook_name_a_merge_alike(tmp_path):
    from distilltv.cards import merged_name
    (tmp_path/"three.toml").write_text('name = "three"\n[teachers]\na = "x/a"\nb = "x/b"\nc = "x/c"\n',
                                       encoding="utf-8")
    for r in [r for r in grid(tmp_path/"three.toml", seeds=2) + grid("mini") if r.stage == "merge"]:
        said = r.parameters["weights"] if "weights" in r.parameters else r.parameters["lam"]
        seed = f"-seed{r.parameters['seed']}" if r.parameters["seed"] else ""
        # the folder that 03_merge.ipynb writes by itself
        assert r.out.split("/")[-1] == merged_name("linear", said) + seed

def test_audio_behind_a_link_counts(tmp_path):
    (tmp_path/"store").mkdir()
    (tmp_path/"store/a.ogg").write_bytes(b"1")
    (tmp_path/"d").mkdir()
    (tmp_path/"d/m.csv").write_text("id")
    (tmp_path/"d/audio").symlink_to(tmp_path/"store")
    (tmp_path/"store/again").symlink_to(tmp_path/"d")    # a circle ends
    before = digest(tmp_path/"d")
    (tmp_path/"store/a.ogg").write_bytes(b"2")
    assert digest(tmp_path/"d") != before

# --- the grid of any experiment

def test_grid_of_three_domains_and_two_seeds(tmp_path):
    (tmp_path/"three.toml").write_text('name = "three"\n[teachers]\na = "x/a"\nb = "x/b"\nc = "x/c"\n',
                                       encoding="utf-8")
    runs = grid(tmp_path/"three.toml", seeds=2)
    names = {s: [r.name for r in runs if r.stage == s] for s in STAGES}
    assert names["distil"] == ("a b c ensemble ensemble-3x a-seed1 b-seed1 c-seed1 ensemble-seed1 "
                               "ensemble-3x-seed1").split()
    longer = next(r for r in runs if r.name == "ensemble-3x")
    assert longer.parameters["steps"] == 3*20_000 and longer.out == "three/students/both/ensemble-3x"
    assert longer.parameters["profile"] == str(tmp_path/"three.toml")
    assert len(names["merge"]) == 2*len(simplex("abc", 4)) == 30 and "a-0.25-b-0.25-c-0.5-seed1" in names["merge"]
    one = next(r for r in runs if r.name == "a-0.25-b-0.25-c-0.5-seed1" and r.stage == "merge")
    assert one.needs == ("distil/a-seed1", "distil/b-seed1", "distil/c-seed1")
    assert one.parameters["weights"] == dict(a=.25, b=.25, c=.5)
    assert len(set(r.out for r in runs)) == len(runs) and len(names["probe"]) == 3 + 3 + 10 + 30

def test_weights_that_round_alike_keep_their_folders():
    outs = [r.out for r in grid("mini", lams=(.125, .1251, .12)) if r.stage == "merge"]
    assert len(set(outs)) == 3

def test_what_somebody_else_put_into_a_run_folder_stays(repo):
    run_stale(small((1,)))
    (repo/"runs/m0/notes.txt").write_text("mine")
    run_stale(small((9,)))
    assert (repo/"runs/m0/notes.txt").read_text() == "mine" and (repo/"runs/m0/number.txt").read_text() == "9"
    assert "notes.txt" not in stamp(small((9,))[0])["files"]

def test_a_note_beside_a_result_costs_nothing(repo):
    "It makes nothing stale, and where the result must be made again, the folder is refused before it is touched."
    run = GridRun("merge", "d", "03_merge.ipynb", dict(x=1), "d")
    after = GridRun("probe", "p", at("make.ipynb"), {}, "p", ("merge/d",))
    def merge(run):
        for name in ("model.safetensors", "recipe.yaml", "result.json"): (run.folder/name).write_text("{}")
    def there(): return {f.name: f.read_bytes() for f in run.folder.iterdir()}
    execute(run, {}, merge)
    before, needed = key(after, {run.id: run}), there()
    (run.folder/"notes.txt").write_text("mine")
    assert fresh(run, {}) and key(after, {run.id: run}) == before
    with pytest.raises(RunError, match="d holds notes.txt"):
        execute(replace(run, parameters=dict(x=2)), {}, lambda run: pytest.fail("began"))
    assert there() == needed | {"notes.txt": b"mine"}
    (run.folder/"model.safetensors").write_text("another")
    assert not fresh(run, {}) and key(after, {run.id: run}) != before

@pytest.mark.parametrize("ends", [True, False])
def test_what_came_while_a_run_went_on_stays(repo, ends):
    "Also after a run that was killed; of a stage's own notebook only what it writes is removed, when the key changes."
    def how(run):
        (run.folder/"mine").mkdir(exist_ok=True)
        for name in ("scores.csv", "make.ipynb", "notes.txt", "scores-mine.csv"): (run.folder/name).write_text("x")
        if not ends: raise KeyboardInterrupt
    def again(x, how):
        try: execute(GridRun("probe", "p", at("make.ipynb"), dict(x=x), "p"), {}, how)
        except KeyboardInterrupt: pass
    again(1, how)
    again(2, lambda run: (run.folder/"predictions.npz").write_text("{}"))
    left = {f.name for f in (repo/"runs/p").iterdir()}
    assert left == {"mine", "notes.txt", "scores-mine.csv", "predictions.npz", "stamp.json"}

BROKEN = ("[]", "null", "3", '"x"', '{"found": 5}', '{"made": "x", "parts": 5}', '{"files": [{}]}', '{"key": []}',
          "["*10**5)

@pytest.mark.parametrize("text", BROKEN, ids=range(len(BROKEN)))
def test_a_broken_stamp_is_none(repo, text):
    run = small((1,))[0]
    run.folder.mkdir(parents=True)
    (run.folder/"stamp.json").write_text(text)
    (run.folder/"notes.txt").write_text("mine")
    assert stamp(run) == {} and not fresh(run, {})
    execute(run, {}, lambda run: (run.folder/"number.txt").write_text("1"))
    assert fresh(run, {}) and stamp(run)["files"] == ["number.txt"]

def test_a_name_may_be_any_bytes(tmp_path):
    (tmp_path/os.fsdecode(b"\xff.wav")).write_bytes(b"1")
    one = digest(tmp_path)
    (tmp_path/os.fsdecode(b"\xff.wav")).rename(tmp_path/os.fsdecode(b"\xfe.wav"))
    assert digest(tmp_path) != one != "absent"
    for name in (os.fsdecode(b"a\xff.toml"), "a\nb.toml"):
        said = cli("new", name, cwd=tmp_path)
        assert said.returncode == 2 and "characters that cannot be shown" in said.stderr

def test_a_terminal_of_few_letters(tmp_path):
    for env in (dict(LC_ALL="C", PYTHONCOERCECLOCALE="0", PYTHONUTF8="0"), dict(PYTHONIOENCODING="ascii")):
        said = cli("status", "--home", "runs", cwd=tmp_path, **env)
        assert said.returncode == 0 and r"lam-0.30 (to run) \u2026" in said.stdout, said.stderr

def test_a_profile_beside_which_the_command_is_given(tmp_path):
    "A path is relative to where one is, also when teachers are looked at before anything runs."
    (tmp_path/"mine.toml").write_text('name = "mine"\n[teachers]\na = "./nothing"\n[audio]\na = "mini:speech"\n',
                                      encoding="utf-8")
    said = cli("reproduce", "--profile", "mine.toml", "--home", "runs", cwd=tmp_path)
    assert said.returncode == 2 and str(tmp_path/"nothing") in said.stderr and not (tmp_path/"runs").exists()

def test_time_left_is_a_rehearsal(repo):
    runs = small((1, 2, 3, 4))
    for r in runs:
        r.folder.mkdir(parents=True)
        (r.folder/"stamp.json").write_text(json.dumps(dict(key="another", made="another",
                                                           seconds=dict(make=10, square=30, total=5)[r.stage])))
    p = Progress(runs, 2)
    # two kernels: four of each stage in two turns, then the total
    assert p.time_left() == pytest.approx(2*10 + 2*30 + 5)
    p.start(runs[0])
    p.done(runs[0])
    p.took[runs[0].id] = 20.                                       # this machine takes twice as long today
    assert p.time_left() == pytest.approx(2*(2*10 + 2*30 + 5))
    p.close()

def test_time_left_of_a_profile_of_few_steps(tmp_path, monkeypatch):
    "Four steps take seconds, and what opening their notebook took says nothing about hours of probes."
    (tmp_path/"few.toml").write_text('name = "few"\n[teachers]\na = "x/a"\nb = "x/b"\n'
                                     '[training]\nsteps = 4\nbatch = 2\n', encoding="utf-8")
    monkeypatch.setenv("DISTILLTV_HOME", str(tmp_path/"runs"))
    p = Progress(grid(tmp_path/"few.toml"), 2)
    p.pace = 1.                                                    # as if this were the reference machine
    first, student = p.time_left(), p.runs[0]
    p.start(student)
    p.done(student)
    p.took[student.id] = 30.                                       # twice as long as expected
    assert 5*60 < first < p.time_left() < 2.1*first < 60*60        # the probes' and merges' time, by the shipped record
    p.close()

def test_time_left_of_a_distillation_by_its_own_steps(tmp_path, monkeypatch):
    (tmp_path/"one.toml").write_text('name = "one"\n[teachers]\na = "x/a"\n[training]\nsteps = 1000\n',
                                     encoding="utf-8")
    monkeypatch.setenv("DISTILLTV_HOME", str(tmp_path/"runs"))
    student = next(r for r in grid(tmp_path/"one.toml") if r.stage == "distil")
    def log(step):
        student.folder.mkdir(parents=True, exist_ok=True)
        (student.folder/"log.csv").write_text(f"step,loss\n{step-1},1.0\n", encoding="utf-8")
    p = Progress([student], 1)
    p.pace = 1.
    log(600)                                                       # of an earlier run, which this one continues
    p.start(student)
    p.began[student.id] -= 300
    log(900)
    assert p.time_left() == pytest.approx(100, rel=.05)            # a second a step
    log(400)                                                       # it began afresh
    assert p.time_left() == pytest.approx(.75*600, rel=.05)
    # so far it has loaded, which says little of its steps
    log(2)
    assert p.time_left() < p.expected[student.id] + 5*300 < 300/2*1000
    p.close()

# --- the command's output

def test_status_names_four_of_a_stage_or_all(monkeypatch, capsys, tmp_path):
    monkeypatch.setenv("DISTILLTV_HOME", str(tmp_path))
    monkeypatch.setattr("distilltv.slurm.state", lambda *_: "stale")
    def merges(*more):
        assert command.main(["status", *more]) == 0
        return next(line for line in capsys.readouterr().out.splitlines() if line.startswith("merge"))
    assert merges().count("(stale)") == 4 and merges().endswith(" …")
    assert merges("--all").count("(stale)") == 11 and "…" not in merges("--all")

def test_a_dry_run_says_what_would_be_done_and_does_nothing(monkeypatch, capsys, tmp_path):
    monkeypatch.setenv("DISTILLTV_HOME", str(tmp_path/"runs"))
    monkeypatch.setattr("distilltv.runner.calibrate", lambda: 1.)
    monkeypatch.chdir(tmp_path)
    assert command.main(["reproduce", "--dry-run", "--jobs", "3"]) == 0
    *lines, left = capsys.readouterr().out.splitlines()
    runs, order = grid("mini"), [line.split()[0] for line in lines]
    assert sorted(order) == sorted(r.id for r in runs) and all(" about " in line for line in lines)
    assert all(order.index(n) < order.index(r.id) for r in runs for n in r.needs)
    assert left == str(Progress(runs, 3)) and left.startswith(f"{len(runs)} of {len(runs)} runs left, about ")
    assert not (tmp_path/"runs").exists()

def test_distil_is_that_of_the_module(monkeypatch, capsys):
    given = []
    with pytest.raises(SystemExit): command.main(["distil", "--step", "2"])    # no option is taken for another
    assert "unrecognized arguments: --step 2" in capsys.readouterr().err
    monkeypatch.setattr("distilltv.distill.main", given.append)
    assert command.main(["distil", "--teacher", "music"]) == 0 and given == [["--teacher", "music"]]
    with pytest.raises(SystemExit): command.main(["--help"])
    assert "distilltv distil --help" in capsys.readouterr().out

@pytest.mark.parametrize("text", ["<<<<<<< HEAD", "{}", "[]", '{"cells": [1]}'])
@pytest.mark.parametrize("called", ["status", "reproduce"])
def test_a_notebook_with_a_conflict_is_named_before_anything_runs(repo, monkeypatch, capsys, text, called):
    (repo/"nbs/square.ipynb").write_text(text)
    monkeypatch.setattr(command, "grid", lambda *a: small())
    with pytest.raises(SystemExit): command.main([called])
    assert "square.ipynb is not a notebook" in capsys.readouterr().err and not (repo/"runs").exists()

def test_a_reader_that_goes_away_ends_the_command_quietly(tmp_path):
    read, write = os.pipe()
    os.close(read)
    code = f"import sys; from distilltv.reproduce import main; sys.exit(main(['new', {str(tmp_path/'mine.toml')!r}]))"
    done = subprocess.run([sys.executable, "-c", code], stdout=write, stderr=subprocess.PIPE, text=True, cwd=root())
    os.close(write)
    assert (done.returncode, done.stderr) == (141, "")
