"The grid on a real Slurm of one node: kills, cancellations, a full queue, a drained node, two drivers."
import json, os, shutil, signal, subprocess, sys, tempfile, time
from pathlib import Path
from types import SimpleNamespace
import pytest
pytest.importorskip("submitit", reason="--slurm is an extra: pip install -e .[slurm]")
from distilltv import slurm as s
from distilltv.jobs import Job, job_name, needs_of, submit
from distilltv.profiles import STAGES, profile
from distilltv.grid import GridRun, fresh

PACKAGE = Path(s.__file__).parent.parent
PATH = os.environ["PATH"] + ":/usr/sbin:/sbin"
PROGRAMS = {n: shutil.which(n, path=PATH) for n in ("slurmctld", "slurmd", "munged", "sbatch")}
LACKING = [n for n, path in PROGRAMS.items() if not path]
pytestmark = pytest.mark.skipif(bool(LACKING), reason=f"{', '.join(LACKING)} missing: apt-get install slurm-wlm munge")

CONF = """
ClusterName=test
SlurmctldHost={host}
SlurmUser={user}
SlurmdUser={user}
StateSaveLocation={at}/ctld
SlurmdSpoolDir={at}/d
SlurmctldPidFile={at}/ctld.pid
SlurmdPidFile={at}/d.pid
SlurmctldLogFile={at}/ctld.log
SlurmdLogFile={at}/d.log
SlurmctldPort=26817
SlurmdPort=26818
AuthType=auth/munge
AuthInfo=socket={at}/munge.sock,cred_expire=2
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
ReturnToService=2
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerParameters=sched_interval=1,batch_sched_delay=0
KillWait=1
MinJobAge=10
JobSubmitPlugins=lua
NodeName={host} NodeAddr=127.0.0.1 CPUs=2 RealMemory=1000 State=UNKNOWN
PartitionName=debug Nodes={host} Default=YES MaxTime=INFINITE State=UP
"""

# refuses jobs as a limit on a user's submissions does (2050 is ESLURM_ACCOUNTING_POLICY), while there is a file `full`
LIMIT = """
function slurm_job_submit(job, partition, uid)
  local f = io.open("{at}/full")
  if f then f:close() return 2050 end
  return slurm.SUCCESS
end
function slurm_job_modify(job, record, partition, uid) return slurm.SUCCESS end
return slurm.SUCCESS
"""

def sh(*args): return subprocess.run(list(map(str, args)), check=True, capture_output=True, text=True).stdout.strip()

@pytest.fixture(scope="module")
def cluster():
    "A Slurm of one node with two processors, of this user, in a temporary folder."
    at, host, user = Path(tempfile.mkdtemp(dir="/tmp")), sh("hostname", "-s"), sh("id", "-un")
    for d in ("ctld", "d"): (at/d).mkdir()
    at.chmod(0o755)
    (at/"munge.key").write_bytes(os.urandom(128))
    (at/"munge.key").chmod(0o600)
    (at/"slurm.conf").write_text(CONF.format(host=host, user=user, at=at))
    (at/"job_submit.lua").write_text(LIMIT.format(at=at))
    before = dict(os.environ)
    os.environ.update(SLURM_CONF=str(at/"slurm.conf"), PYTHONPATH=str(PACKAGE))
    files = [f"--{n}-file={at}/munge.{n}" for n in ("key", "pid", "log", "seed")]
    sh(PROGRAMS["munged"], "--force", f"--socket={at}/munge.sock", *files)
    sh(PROGRAMS["slurmctld"])
    sh(PROGRAMS["slurmd"])
    until(lambda: "idle" in sh("sinfo", "-h", "-o", "%T"))
    yield SimpleNamespace(node=host, at=at)
    subprocess.run(["scancel", "-u", user])
    for pid in ("d.pid", "ctld.pid", "munge.pid"): subprocess.run(["kill", (at/pid).read_text().strip()])
    os.environ.clear()
    os.environ.update(before)
    shutil.rmtree(at, ignore_errors=True)

def until(true, seconds=240):
    "Wait until something is so."
    end = time.monotonic()+seconds
    while not true():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(.1)

# `make` counts to `steps`, a checkpoint after each, and notes where it began; `add` sums what others have made
MAKE = """import os, time
from pathlib import Path
out = Path('runs')/name
with open('runs/log', 'a') as f: f.write(name + '\\n')
Path('runs/pids').write_text(f'{os.getppid()} {os.getpid()}')
point = out/'checkpoint.pt'
begin = int(point.read_text()) if point.exists() else 0
with open('runs/begun', 'a') as f: f.write(f'{name} {begin}\\n')
for k in range(begin, steps):
    time.sleep(.1)
    point.write_text(str(k+1))
    while Path('runs/hold').exists() and k+1 >= steps//2: time.sleep(.05)
(out/'number.txt').write_text(str(int(x)))
point.unlink(missing_ok=True)
"""
ADD = """from pathlib import Path
with open('runs/log', 'a') as f: f.write(name + '\\n')
total = sum(int(Path('runs', n, 'number.txt').read_text()) for n in of.split())
Path('runs', name, 'number.txt').write_text(str(total))
"""

def notebook(path, code, **parameters):
    head = "\n".join(f"{k} = {v!r}" for k, v in parameters.items())
    def cell(source, *tags):
        said = dict(cell_type="code", id=f"c{len(tags)}", metadata=dict(tags=tags), source=source)
        return dict(**said, outputs=[], execution_count=None)
    cells = [cell(head, "parameters"), cell(code)]
    kernel = dict(name="python3", display_name="python3", language="python")
    path.write_text(json.dumps(dict(nbformat=4, nbformat_minor=5, cells=cells, metadata=dict(kernelspec=kernel))))

@pytest.fixture
def repo(cluster, tmp_path, monkeypatch):
    "A repository of two small notebooks."
    for d in ("nbs", "distilltv", "runs"): (tmp_path/d).mkdir()
    (tmp_path/"settings.ini").touch()
    notebook(tmp_path/"nbs/make.ipynb", MAKE, name="", x=0, steps=1)
    notebook(tmp_path/"nbs/add.ipynb", ADD, name="", of="")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DISTILLTV_HOME", str(tmp_path/"runs"))
    yield tmp_path
    subprocess.run(["scancel", "-u", sh("id", "-un")])
    until(lambda: not any(j.alive for j in s.queue().values()))

def at(notebook): return str(Path("nbs", notebook).absolute())
def make(name, x=1, steps=1):
    return GridRun("distil", name, at("make.ipynb"), dict(name=name, x=x, steps=steps), name)
def add(name, *of, stage="probe"):
    names, ids = " ".join(c.name for c in of), tuple(c.id for c in of)
    return GridRun(stage, name, at("add.ipynb"), dict(name=name, of=names), name, ids)

NEEDS = {stage: needs_of(profile("mini"), stage) for stage in STAGES}
def driver(runs, limit=0): return s.Driver(runs, NEEDS, limit, settle=1.)
def rounds(d, until=lambda: False):
    "Go round until all is over, or something is so."
    end = time.monotonic()+240
    while d.step() and not until():
        assert time.monotonic() < end, (d.failed, [c.id for c in d.todo], s.queue())
        time.sleep(.2)
    return d.failed

def lines(file): return sorted(Path("runs", file).read_text().split("\n")[:-1]) if Path("runs", file).exists() else []
def number(name): return int(Path("runs", name, "number.txt").read_text())
def jobs_of(runs): return {s.latest(c).job for c in runs}
def running(cell):
    attempt = s.latest(cell)
    return bool(attempt) and attempt.name in s.queue() and s.queue()[attempt.name].state == "RUNNING"

def halfway(cell):
    "Whether a run of eight steps waits in its middle."
    point = cell.folder/"checkpoint.pt"
    return point.exists() and point.read_text() == "4"

def again(cell):
    "Wait until the run's job is back in the queue, and spare it the two minutes that Slurm lets such a job wait."
    name = s.latest(cell).name
    until(lambda: s.queue()[name].state == "PENDING")
    number = s.queue()[name].number
    until(lambda: f"slurmstepd: [{number}." not in sh("ps", "-eo", "args"))    # the node has cleared up
    sh("scontrol", "update", f"jobid={number}", "starttime=now")

def test_a_job_given_from_within_a_job_takes_nothing_of_it(tmp_path, monkeypatch):
    "And the queue is asked by number, as a user in a container may have no name."
    for name, does in dict(sbatch=f"env > {tmp_path}/env; echo Submitted batch job 4711", srun="",
                           squeue=f"echo $* > {tmp_path}/asked").items():
        (tmp_path/name).write_text(f"#!/bin/sh\n{does}\n")
        (tmp_path/name).chmod(0o755)
    outer = dict(SLURM_JOB_ID="99", SLURM_MEM_PER_CPU="4000", SLURM_CPU_BIND="quiet,mask_cpu:0x3", SLURMD_NODENAME="n")
    said = outer | dict(SLURM_CONF="/etc/its.conf", PATH=f"{tmp_path}:{PATH}", DISTILLTV_HOME=str(tmp_path))
    for name, value in said.items(): monkeypatch.setenv(name, value)
    run = make("a")
    assert submit(Job(job_name(), (run,), {run.id: run}, NEEDS["distil"], str(tmp_path), str(tmp_path))) == "4711"
    seen = (tmp_path/"env").read_text()
    assert "SLURM_CONF=/etc/its.conf" in seen and not any(f"{n}=" in seen for n in outer)
    assert s.queue() == {} and f"-u {os.getuid()} " in (tmp_path/"asked").read_text()

def test_a_grid(repo):
    "Needs come first, small runs share a job, nothing runs twice, and what fails names its notebook and its log."
    a, b, wrong = make("a", 2), make("b", 3), make("wrong", "two")
    sums = [add(f"sum{i}", a, b) for i in range(2)]
    runs = [a, b, wrong, *sums, add("never", wrong), add("total", *sums, stage="results")]
    failed = rounds(driver(runs))
    assert set(failed) == {"distil/wrong", "probe/never"}
    assert failed["probe/never"] == "not run, because distil/wrong failed"
    assert "ValueError: invalid literal" in failed["distil/wrong"] and "runs/wrong/make.ipynb" in failed["distil/wrong"]
    log = Path(failed["distil/wrong"].split("log ")[-1])
    assert log.exists() and "ended" not in log.read_text()
    assert number("total") == 10 and lines("log") == sorted(["a", "b", "wrong", "sum0", "sum1", "total"])
    assert len(jobs_of(sums)) == 1 and len(jobs_of(runs[:5])) == 4
    shown = s.states(runs)
    assert shown["distil/a"] == "up to date" and shown["probe/never"] == "to run"
    assert shown["distil/wrong"].startswith("failed, ValueError")

    rest = [c for c in runs if c.id not in failed]
    assert rounds(driver(rest)) == {} and len(lines("log")) == 6

def test_a_killed_job_continues_from_its_checkpoint(repo):
    (repo/"runs/hold").touch()
    a = make("a", 7, steps=8)
    d = driver([a])
    rounds(d, lambda: halfway(a))
    job, kernel = map(int, (repo/"runs/pids").read_text().split())
    os.kill(job, signal.SIGKILL)
    until(lambda: not Path(f"/proc/{kernel}").exists())    # a kernel looks every second whether its parent is there
    (repo/"runs/hold").unlink()
    assert rounds(d) == {} and number("a") == 7
    assert lines("begun") == ["a 0", "a 4"] and s.latest(a).number == 2

def test_a_job_that_dies_thrice_has_failed(repo):
    notebook(repo/"nbs/make.ipynb", "import os, signal; os.kill(os.getppid(), signal.SIGKILL)", name="", x=0, steps=1)
    a = make("a")
    why = rounds(driver([a]))["distil/a"]
    assert why.startswith("3 jobs ended without a result") and "runs/a/make.ipynb" in why and s.latest(a).number == 3

def test_a_job_whose_time_is_up_goes_back_into_the_queue(repo):
    "Slurm's warning, sent by hand: the job puts itself back, under the same number."
    (repo/"runs/hold").touch()
    a = make("a", 7, steps=8)
    d = driver([a])
    rounds(d, lambda: halfway(a))
    subprocess.run(["scancel", "--signal=USR2", s.latest(a).job])
    again(a)
    until(lambda: not Path("/proc", (repo/"runs/pids").read_text().split()[1]).exists())
    (repo/"runs/hold").unlink()
    assert rounds(d) == {} and number("a") == 7
    assert lines("begun") == ["a 0", "a 4"] and s.latest(a).number == 1

DRIVE = """import sys
sys.path[:0] = [{tests!r}]
from test_slurm import *
sys.exit(bool(s.drive({runs}, NEEDS, every=.2, settle=30.)))
"""
def other_driver(runs):
    code = DRIVE.format(tests=str(Path(__file__).parent), runs=runs)
    quiet = subprocess.DEVNULL
    with open("driver.log", "ab") as log:
        return subprocess.Popen([sys.executable, "-c", code], stdin=quiet, stdout=quiet, stderr=log)

def test_a_killed_driver_finds_its_jobs(repo):
    (repo/"runs/hold").touch()
    runs = [a := make("a", 2, steps=2), add("sum", a)]
    first = other_driver("[a := make('a', 2, steps=2), add('sum', a)]")
    until(lambda: s.latest(a) and s.latest(a).job)
    first.kill()
    first.wait()
    until(lambda: running(a))
    assert s.states(runs)["distil/a"].startswith("running, job")
    (repo/"runs/hold").unlink()
    assert rounds(driver(runs)) == {} and number("sum") == 2
    assert lines("log") == ["a", "sum"] and {s.latest(c).number for c in runs} == {1}

def test_a_driver_killed_between_claim_and_submission(repo):
    a = make("a", 4)
    assert s.claim(a, s.Attempt(1, "distilltv-never-submitted", s.key(a, {})))
    assert rounds(driver([a])) == {} and number("a") == 4 and s.latest(a).number == 2

def test_two_drivers(repo):
    text = "[a := make('a', 2, steps=9), add('sum', a)]"
    drivers = [other_driver(text) for _ in range(2)]
    for d in drivers: assert d.wait(240) == 0, Path("driver.log").read_text()[-2000:]
    assert number("sum") == 2 and lines("log") == ["a", "sum"]
    assert len(list(Path("runs/slurm-jobs").rglob("000[0-9].json"))) == 2

def test_a_job_of_older_parameters_is_replaced(repo):
    (repo/"runs/hold").touch()
    old, new = make("a", 2, steps=2), make("a", 5, steps=2)
    rounds(driver([old]), lambda: running(old))
    d = driver([new])
    d.step()
    (repo/"runs/hold").unlink()
    assert rounds(d) == {} and number("a") == 5 and fresh(new, {})

def test_cancelled_from_outside(repo):
    "Who cancels a job means it: the run counts as missing, and the next command continues it."
    (repo/"runs/hold").touch()
    a = make("a", 7, steps=8)
    d = driver([a, add("sum", a)])
    rounds(d, lambda: halfway(a))
    job = s.latest(a).job
    subprocess.run(["scancel", job])
    failed = rounds(d)
    assert f"job {job} was cancelled" in failed["distil/a"]
    assert failed["probe/sum"] == "not run, because distil/a failed"
    (repo/"runs/hold").unlink()
    assert rounds(driver([a])) == {} and lines("begun") == ["a 0", "a 4"] and number("a") == 7

def test_a_full_queue(repo, cluster):
    "Neither our own limit nor Slurm's loses a run."
    runs, most = [make(f"a{i}", i) for i in range(3)], []
    (cluster.at/"full").touch()
    d = driver(runs, limit=2)
    for _ in range(2): d.step()
    assert d.said.startswith("the queue is full") and "limit" in d.said
    assert {s.latest(r).job for r in runs if s.latest(r)} <= {""}
    (cluster.at/"full").unlink()
    rounds(d, lambda: most.append(sum(j.alive for j in s.queue().values())))
    assert d.failed == {} and max(most) == 2 and lines("log") == ["a0", "a1", "a2"]
    assert {s.latest(c).number for c in runs} == {1}

def test_a_drained_node_and_a_lost_one(repo, cluster):
    node = lambda state: sh("scontrol", "update", f"nodename={cluster.node}", f"state={state}", "reason=test")
    (repo/"runs/hold").touch()
    a, b = make("a", 2, steps=8), make("b", 3)
    d = driver([a])
    rounds(d, lambda: halfway(a))
    node("drain")                                  # what runs goes on, what waits waits
    late = driver([b])
    rounds(late, lambda: s.states([b])["distil/b"].startswith("waiting"))
    assert running(a)
    node("down")                                   # what ran goes back into the queue
    again(a)
    until(lambda: not Path("/proc", (repo/"runs/pids").read_text().split()[1]).exists())
    (repo/"runs/hold").unlink()
    node("resume")
    assert rounds(d) == {} and rounds(late) == {} and number("a") == 2
    assert [line for line in lines("begun") if line[0] == "a"] == ["a 0", "a 4"] and s.latest(a).number == 1

def test_a_wrong_partition_is_named(repo):
    needs = {"distil": needs_of(profile("mini"), "distil", partition="gpus")}
    says = "sbatch refused a job .*partition.*look at --slurm-partition"
    with pytest.raises(RuntimeError, match=says): s.Driver([make("a")], needs).step()

def outcome(runs):
    "The results' table, the predictions behind it, and all weights, as bytes."
    made = {name: (runs[-1].folder/name).read_bytes() for name in ("table.csv", "predictions.npz")}
    return made | {r.id: (r.folder/"model.safetensors").read_bytes() for r in runs if r.stage in ("distil", "merge")}

def test_the_table_is_that_of_a_local_run(cluster, rehearsed, tmp_path, monkeypatch):
    """Distilling, merging, probing and the results, on this machine and through Slurm: byte for byte the same.
    `DISTILLTV_RECORD` names a file to keep the report in."""
    from test_rehearsal import ROOT, runs_of
    monkeypatch.setenv("DISTILLTV_DATASETS", str(rehearsed/"datasets"))
    monkeypatch.chdir(ROOT)
    runs = runs_of(rehearsed/"hub-rehearsal.toml")
    monkeypatch.setenv("DISTILLTV_HOME", str(rehearsed/"local"))
    here = outcome(runs)
    monkeypatch.setenv("DISTILLTV_HOME", str(tmp_path/"slurm"))
    assert s.drive(runs, NEEDS, every=.5) == {}
    there, text = outcome(runs), (tmp_path/"slurm/slurm-jobs/report.json").read_text()
    report = json.loads(text)
    assert here == there and len(here) == 5
    assert [r["id"] for r in report["runs"]] == [r.id for r in runs] and report["processors"] == {cluster.node: 2}
    times = {r["id"]: (r["submitted"], r["began"], r["ended"]) for r in report["runs"]}
    assert all(sorted(t) == list(t) for t in times.values())
    assert all(times[n][2] <= times[r.id][0] for r in runs for n in r.needs)    # submitted when its needs were there
    assert {r["state"] for r in report["runs"]} == {"done"}
    if "DISTILLTV_RECORD" in os.environ: Path(os.environ["DISTILLTV_RECORD"]).write_text(text, encoding="utf-8")
