"Paths, whole files and folders, and whose they are."
import errno, json, os, shutil, subprocess, sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
import numpy as np, pytest, torch
from distilltv import files, runs
from distilltv.files import atomic_folder, cached, check_replaceable, write_atomic, write_json
from distilltv.runs import data_dir, home, root

ROOT = Path(__file__).resolve().parents[1]

def note(text): return json.dumps(dict(weights_hash="0"*64, text=text))

def write(folder, text="new"):
    with atomic_folder(folder) as t: (t/"distilltv.json").write_text(note(text), encoding="utf-8")

def put(file):
    "A file of that name, of ours where it is one of our names."
    file.parent.mkdir(parents=True, exist_ok=True)
    if file.suffix == ".pt": torch.save(dict.fromkeys("settings step log skipped module optimiser".split(), 0), file)
    else: file.write_text(SAID.get(file.name, "x"), encoding="utf-8")

def left(folder): return sorted(f.name for f in folder.iterdir())

@pytest.mark.parametrize("threads", ["abc", "0", "-1", "1.5", "1e3"])
def test_a_wrong_number_of_threads_is_named(monkeypatch, threads):
    monkeypatch.setenv("DISTILLTV_THREADS", threads)
    with pytest.raises(ValueError, match=f"DISTILLTV_THREADS={threads} is not a number of threads"): runs.use_threads()

@pytest.mark.parametrize("begun", [["log.csv"], ["checkpoint.pt"], ["best.pt", "log.csv", "notes.txt", "a/b.txt"],
                                   ["02_distill.ipynb"], ["checkpoint.pt", "slurm-1.out"]])
def test_a_training_goes_on_in_its_folder_and_no_other_writer_may_replace_it(tmp_path, begun):
    for f in begun: put(tmp_path/"u"/f)
    with pytest.raises(ValueError, match="u holds "): check_replaceable(tmp_path/"u")
    check_replaceable(tmp_path/"u", training=True)

@pytest.mark.parametrize("sealed", [False, True])
def test_what_others_put_beside_a_training_is_there_at_its_end(tmp_path, monkeypatch, sealed):
    "The same file, for a log may still be written; also where a folder cannot be renamed."
    for f in ("checkpoint.pt", "log.csv", ".DS_Store"): put(tmp_path/"u"/f)
    if sealed: no_renames_of(monkeypatch, tmp_path/"u", errno.EBUSY)
    with open(tmp_path/"u/slurm-1.out", "w") as log:
        with atomic_folder(tmp_path/"u", training=True) as t:
            (t/"distilltv.json").write_text(note("done"), encoding="utf-8")
            for f in ("a/b.txt", "02_distill.ipynb"): put(tmp_path/"u"/f)
            log.write("one, two")
    assert left(tmp_path/"u") == ["02_distill.ipynb", "a", "distilltv.json", "slurm-1.out"]
    assert (tmp_path/"u/slurm-1.out").read_text() == "one, two" and left(tmp_path/"u/a") == ["b.txt"]

@pytest.mark.parametrize("name", ["best.pt", "log.csv", "quarantine.csv"])
def test_a_file_of_another_training_is_refused_though_it_has_our_name(tmp_path, name):
    (tmp_path/name).write_text("epoch,acc\n1,.9", encoding="utf-8")
    with pytest.raises(ValueError, match=f"holds {name}, which distilltv did not write"):
        check_replaceable(tmp_path, training=True)
    put(tmp_path/"checkpoint.pt")
    with pytest.raises(ValueError, match=f"holds {name}, which distilltv did not write"):
        check_replaceable(tmp_path, training=True)

@pytest.mark.parametrize("name", [".DS_Store", "._model.safetensors", "Thumbs.db", "desktop.ini", ".nfs000000001",
                                  ".directory"])
def test_what_an_operating_system_puts_there_is_no_reason_to_refuse(tmp_path, name):
    write(tmp_path/"u"), put(tmp_path/"u"/name)
    write(tmp_path/"u", "again")
    put(tmp_path/"empty"/name)
    write(tmp_path/"empty")
    assert left(tmp_path/"u") == left(tmp_path/"empty") == ["distilltv.json"]

# --- folders: only what this package wrote is replaced

FOREIGN = {"a file of theirs": ["notes.txt"], "a folder of theirs": ["thesis/notes.txt"],
           "a model of others": ["config.json", "model.safetensors", "README.md"],
           "checkpoints of others": ["checkpoint.pt", "best.pt", "config.json", "model.safetensors"],
           "a training of others": ["checkpoint.pt", "log.csv", "train.ipynb"],
           "notes of others": ["distilltv.json", "result.json", "stamp.json", "README.md"],
           "a hidden folder of theirs": [".work.tmp/a.txt"]}
BESIDE = ["notes.txt", "old/model.safetensors", "thesis.ipynb", ".ipynb_checkpoints/thesis-checkpoint.ipynb",
          ".notes.tmp", "old.ipynb/a.txt", "best.pt/a.txt", "tradeoff.svg"]    # each beside what is ours
FOREIGN |= {f"{f} beside ours": ["model.safetensors", f] for f in BESIDE}

@pytest.mark.parametrize("what", FOREIGN)
def test_a_folder_of_others_is_refused_by_name(tmp_path, what):
    for f in FOREIGN[what]:
        (tmp_path/"models"/f).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path/"models"/f).write_text("three years", encoding="utf-8")
    if what.endswith("beside ours"): (tmp_path/"models/distilltv.json").write_text(note("old"), encoding="utf-8")
    with pytest.raises(ValueError, match="models holds .*which distilltv did not write: choose another folder"):
        write(tmp_path/"models")
    assert all((tmp_path/"models"/f).read_text(encoding="utf-8") == "three years" for f in FOREIGN[what])
    assert left(tmp_path) == ["models"]

SAID = {"distilltv.json": note(""), "stamp.json": json.dumps(dict(key="1"*64)),
        "result.json": json.dumps(dict(parameters={}, inputs={}, metrics={}, versions={})),
        "log.csv": "step,loss,speech_4,gradient\n"}

@pytest.mark.parametrize("ours", [
    [], ["result.json", "02_distill.ipynb", ".ipynb_checkpoints/02_distill-checkpoint.ipynb"], ["stamp.json"],
    ["stamp.json", ".config.json.7.0123abcd-99.tmp"],
    ["distilltv.json", "config.json", "model-00001-of-00002.safetensors", "model.safetensors.index.json",
     "recipe.yaml"]])
def test_a_folder_of_ours_is_replaced(tmp_path, ours):
    (tmp_path/"u").mkdir()
    for f in ours:
        (tmp_path/"u"/f).parent.mkdir(exist_ok=True)
        (tmp_path/"u"/f).write_text(SAID.get(f, ""), encoding="utf-8")
    write(tmp_path/"u")
    assert left(tmp_path/"u") == ["distilltv.json"] and left(tmp_path) == ["u"]

def test_a_file_is_refused_and_stays(tmp_path):
    (tmp_path/"file").write_text("mine", encoding="utf-8")
    with pytest.raises(ValueError, match="file is not a folder"): write(tmp_path/"file")
    assert (tmp_path/"file").read_text(encoding="utf-8") == "mine" and left(tmp_path) == ["file"]

def test_a_hidden_folder_of_others_is_refused(tmp_path):
    (tmp_path/".u.old").mkdir()
    (tmp_path/".u.old/notes.txt").touch()
    with pytest.raises(ValueError, match=r"\.u\.old holds notes.txt"): write(tmp_path/"u")
    assert left(tmp_path) == [".u.old"]

def test_a_link_of_others_under_the_second_name_stays(tmp_path):
    write(tmp_path/"elsewhere")
    (tmp_path/".u.old").symlink_to(tmp_path/"elsewhere")
    with pytest.raises(ValueError, match=r"\.u\.old is not a folder"): write(tmp_path/"u")
    assert left(tmp_path) == [".u.old", "elsewhere"]

@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG])
def test_what_is_full_is_said_of_the_file(tmp_path, code):
    with pytest.raises(OSError, match=f"no space left to write {tmp_path}/a.csv"), write_atomic(tmp_path/"a.csv"):
        raise OSError(code, os.strerror(code))

def test_what_came_while_it_was_written_is_refused(tmp_path):
    with pytest.raises(ValueError, match="holds notes.txt"):
        with atomic_folder(tmp_path/"u") as t:
            (t/"distilltv.json").touch()
            (tmp_path/"u").mkdir()
            (tmp_path/"u/notes.txt").touch()
    assert left(tmp_path) == ["u"] and left(tmp_path/"u") == ["notes.txt"]

@pytest.mark.parametrize("there", [True, False])
def test_a_link_is_followed(tmp_path, there):
    (tmp_path/"disk").mkdir()
    if there: (tmp_path/"disk/big").mkdir()
    (tmp_path/"link").symlink_to(tmp_path/"disk/big")
    for text in ("one", "two"):
        write(tmp_path/"link", text)
        assert (tmp_path/"link").is_symlink()
        assert (tmp_path/"disk/big/distilltv.json").read_text(encoding="utf-8") == note(text)
    assert left(tmp_path) == ["disk", "link"] and left(tmp_path/"disk") == ["big"]

def test_a_file_behind_a_link_is_written(tmp_path):
    (tmp_path/"disk").mkdir()
    (tmp_path/"link.json").symlink_to(tmp_path/"disk/a.json")
    write_json(tmp_path/"link.json", dict(a="ü"))
    assert (tmp_path/"link.json").is_symlink()
    assert json.loads((tmp_path/"disk/a.json").read_text(encoding="utf-8")) == dict(a="ü")

def no_renames_of(monkeypatch, folder, code):
    replace, u = os.replace, str(folder)
    def refuse(a, b):
        if u in (str(a), str(b)): raise OSError(code, os.strerror(code))
        replace(a, b)
    monkeypatch.setattr(files, "_exchange", lambda a, b: False)
    monkeypatch.setattr(os, "replace", refuse)
    return u

@pytest.mark.parametrize("code", [errno.EXDEV, errno.EBUSY, errno.EROFS])
def test_a_folder_that_cannot_be_renamed_is_filled(tmp_path, monkeypatch, code):
    "As a container's mount point or lower layer: every rename of the folder itself fails."
    write(tmp_path/"u", "old")
    (tmp_path/"u/recipe.yaml").touch()
    u = no_renames_of(monkeypatch, tmp_path/"u", code)
    copy2 = shutil.copy2
    def full(a, b):
        if Path(a).name == "model.safetensors": raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return copy2(a, b)
    with monkeypatch.context() as patch, pytest.raises(OSError, match="no space left"):
        patch.setattr(shutil, "copy2", full)
        with atomic_folder(u) as t:
            for f in ("config.json", "model.safetensors"): (t/f).write_text("new", encoding="utf-8")
    assert left(tmp_path) == ["u"] and left(tmp_path/"u") == ["distilltv.json", "recipe.yaml"]
    with atomic_folder(u) as t:
        for f in ("distilltv.json", "model.safetensors"): (t/f).write_text("new", encoding="utf-8")
    assert left(tmp_path) == ["u"] and left(tmp_path/"u") == ["distilltv.json", "model.safetensors"]
    assert (tmp_path/"u/distilltv.json").read_text(encoding="utf-8") == "new"

MOUNTS = """
cd {0} && mkdir -p lower/lam upper work merged mp && echo '{2}' > lower/lam/distilltv.json
mount -t overlay overlay -o lowerdir={0}/lower,upperdir={0}/upper,workdir={0}/work merged &&
  mount -t tmpfs none mp || exit 77
mkdir sealed sealed/out && mount -t tmpfs none sealed && mkdir sealed/out && mount -t tmpfs none sealed/out &&
  mount -o remount,ro sealed || exit 77
for out in merged/lam mp sealed/out; do
  {1} -c 'import sys; from distilltv.runs import atomic_folder
with atomic_folder(sys.argv[1]) as t: (t/"distilltv.json").write_text("new", encoding="utf-8")' $out || exit 1
  [ "$(ls -A $out)" = distilltv.json ] && [ "$(cat $out/distilltv.json)" = new ] || exit 2
done
"""

def test_layers_and_mount_points_of_a_container(tmp_path):
    if not shutil.which("unshare"): pytest.skip("only Linux has mount namespaces")
    script = MOUNTS.format(tmp_path, sys.executable, note("old"))
    done = subprocess.run(["unshare", "-m", "bash", "-c", script], capture_output=True, text=True,
                          env=os.environ | dict(PYTHONPATH=str(ROOT)))
    if done.returncode == 77 or "unshare" in done.stderr: pytest.skip("this user may not mount")
    assert done.returncode == 0, done.stderr

def test_threads_write_one_file(tmp_path):
    with ThreadPoolExecutor(3) as pool: list(pool.map(lambda i: write_json(tmp_path/"a.json", [i]*99), range(300)))
    assert len(set(json.loads((tmp_path/"a.json").read_text(encoding="utf-8")))) == 1 and left(tmp_path) == ["a.json"]

def test_a_cache_leaves_arrays_of_others(tmp_path):
    ones, old = (lambda: np.ones(9)), tmp_path/f"{'0'*32}.npy"
    for f in (tmp_path/"theirs.npy", old): np.save(f, ones())
    cached(tmp_path/f"{'1'*40}.npy", len, ones, 1)
    assert left(tmp_path) == [f"{'1'*40}.npy", "theirs.npy"]

def test_a_cache_that_cannot_be_written_costs_a_warning(tmp_path, monkeypatch):
    kept, closed = tmp_path/f"{'0'*32}.npy", tmp_path/"file"/"x.npy"
    cached(kept, len, lambda: np.ones(9), 1e9)
    monkeypatch.setattr(os, "utime", lambda *a: (_ for _ in ()).throw(PermissionError(1, "closed")))
    assert len(cached(kept, len, lambda: pytest.fail("made again"), 1e9)) == 9
    closed.parent.touch()
    with pytest.warns(UserWarning, match="file cannot be written to .* with DISTILLTV_HOME"):
        assert len(cached(closed, len, lambda: np.ones(9), 1e9)) == 9

def test_a_file_is_whole_or_absent(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        with write_atomic(tmp_path/"a") as tmp:
            tmp.write_text("half", encoding="utf-8")
            raise KeyboardInterrupt
    assert left(tmp_path) == []

# --- where things are

def asked(what, cwd, **env):
    command = f"from distilltv import runs; print(runs.{what})"
    return subprocess.run([sys.executable, "-c", command], cwd=cwd, env=os.environ | env, capture_output=True,
                          text=True, check=True).stdout.strip()

def repository(folder, *files):
    folder.mkdir()
    for f in ("x", *files):
        (folder/f).parent.mkdir(exist_ok=True)
        (folder/f).write_text("[DEFAULT]\nlib_name = other\n", encoding="utf-8")
    git = ["git", "-C", str(folder), "-c", "user.email=a@b", "-c", "user.name=n"]
    for command in (["init", "-q"], ["add", "-A"], ["commit", "-qm", "x"]): subprocess.run([*git, *command], check=True)
    return folder

def test_another_project_is_not_taken_for_this_one(tmp_path):
    other = repository(tmp_path/"other", "settings.ini", "nbs/00_runs.ipynb")
    here = asked("commit()", ROOT, PYTHONPATH=str(ROOT))
    assert asked("commit()", other, PYTHONPATH=str(ROOT)) in (here, here.rstrip("+"), here.rstrip("+")+"+") != ""
    inside = asked("commit()", other, PYTHONPATH=str(ROOT), GIT_DIR=str(other/".git"))     # in a hook of that project
    assert inside.rstrip("+") == here.rstrip("+")
    assert asked("data_dir()", other, PYTHONPATH=str(ROOT), DISTILLTV_DATA="") == str(ROOT/"data/mini")

def test_an_installed_package_records_no_commit_of_others(tmp_path):
    "Neither that of the working directory, nor that of a repository whose environment it is installed into."
    thesis = repository(tmp_path/"thesis")
    shutil.copytree(ROOT/"distilltv", thesis/".venv/distilltv", ignore=shutil.ignore_patterns("__pycache__"))
    assert asked("commit()", thesis, PYTHONPATH=str(thesis/".venv")) == "unknown"
    # the clone around the working directory
    assert asked("root()", ROOT/"nbs", PYTHONPATH=str(thesis/".venv")) == str(ROOT)
    assert asked("root()", thesis, PYTHONPATH=str(thesis/".venv")) == str(thesis)

def test_home_is_what_was_asked_for(tmp_path, monkeypatch):
    for name, f in (("DISTILLTV_HOME", home), ("DISTILLTV_DATA", data_dir)):
        monkeypatch.setenv(name, "~/runs")
        assert f() == Path.home()/"runs"
        monkeypatch.chdir(tmp_path)
        monkeypatch.setenv(name, f"relative-{name}")
        assert f() == tmp_path/f"relative-{name}"
        monkeypatch.chdir("/")
        assert f() == tmp_path/f"relative-{name}"       # as it was when the first was written
        monkeypatch.setenv(name, "~no-such-user/runs")
        with pytest.raises(ValueError, match=f"{name}=~no-such-user/runs: there is no such user's home"): f()
        for said in ('"/data/runs"', "'/data'", "$HOME/runs"):     # as env files give them
            monkeypatch.setenv(name, said)
            with pytest.raises(ValueError, match=f"{name}=.*without quotes and"): f()
        monkeypatch.setenv(name, f" {tmp_path}/o'brien\r")
        assert f() == tmp_path/"o'brien"
        monkeypatch.setenv(name, "\r")
        assert f() == root()/dict(DISTILLTV_HOME="runs", DISTILLTV_DATA="data/mini")[name]

@pytest.mark.parametrize("world, rank, writes", [(None, "1", True), ("", "", True), ("1", "1", True), ("2", "0", True),
                                                 ("2", "1", False)])
def test_the_first_process_writes_the_result_whatever_a_launcher_has_left(tmp_path, monkeypatch, world, rank, writes):
    for name, said in dict(WORLD_SIZE=world, RANK=rank).items():
        monkeypatch.delenv(name, raising=False)
        if said is not None: monkeypatch.setenv(name, said)
    with runs.Run(tmp_path): pass
    assert (tmp_path/"result.json").exists() == writes

def test_text_is_utf8_in_any_locale(tmp_path):
    code = ("import sys; from distilltv.runs import atomic_folder, root, write_json; "
            "write_json(sys.argv[1], dict(a='\\u03b8')); print(ascii(str(root())))")
    env = os.environ | dict(PYTHONPATH=str(ROOT), LC_ALL="C", PYTHONUTF8="0", PYTHONCOERCECLOCALE="0")
    done = subprocess.run([sys.executable, "-X", "warn_default_encoding", "-W", "error::EncodingWarning:distilltv.runs",
                           "-W", "error::EncodingWarning:distilltv.files", "-c", code, str(tmp_path/"a.json")],
                          env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path/"a.json").read_text(encoding="utf-8")) == dict(a="θ")

def test_what_a_killed_process_left_is_removed_by_the_next(tmp_path):
    "A file and a folder that were being written; names of others and of running processes stay."
    code = ("import os, signal, sys\nfrom distilltv.runs import atomic_folder, write_atomic\n"
            "with atomic_folder(sys.argv[1] + '/model') as a, write_atomic(sys.argv[1] + '/log.csv') as b:\n"
            "    (a/'config.json').write_text('{}'); b.write_text('half')\n"
            "    os.kill(os.getpid(), signal.SIGKILL)")
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], cwd=root())
    left = {f.name for f in tmp_path.iterdir()}
    assert len(left) == 2 and all(n.endswith(".tmp") for n in left)
    stay = {f".x.{files._machine()}-{os.getppid()}.tmp", ".notes.tmp", f".y.{files._machine()}-later.tmp"}
    for name in stay: (tmp_path/name).write_text("theirs")
    with write_atomic(tmp_path/"other.txt") as tmp: tmp.write_text("whole")
    assert {f.name for f in tmp_path.iterdir()} == stay | {"other.txt"}
