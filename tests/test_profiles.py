"Profiles: what a file may say, what it becomes, and the sentence for everything else."
import json, os
from dataclasses import asdict, fields, replace
from pathlib import Path
import pytest
from hypothesis import given, settings, strategies as st
from distilltv.profiles import SHIPPED, Profile, profile, record, with_settings
from distilltv.runs import data_dir, home

GOOD = """
name = "mine"
[teachers]
speech = "facebook/hubert-base-ls960"
music = "./mert"
birds = "~/birds"
[audio]
speech = "audio/speech"
music = "stream:some/set:clean:train"
[student]
init = "music"
layers = 3
[training]
predict = [2, 5]
steps = 10
lr = 1
[slurm.distil]
gpus = 2
hours = 24
"""

def written(folder, text, name="mine.toml"):
    path = folder/name
    path.write_bytes(text if isinstance(text, bytes) else text.encode("utf-8"))
    return path

def test_the_shipped_profiles_hold_what_they_always_held():
    mini, hub, paper = map(profile, SHIPPED)
    d = data_dir()/"teachers"
    assert mini.teachers == dict(speech=str(d/"speech"), music=str(d/"music"))
    assert mini.audio == dict(speech="mini:speech", music="mini:music")
    assert (mini.init, mini.predict, mini.student_layers, mini.corpus) == ("speech", (4, 8, 12), 2, "both")
    assert (mini.steps, mini.batch, mini.seconds, mini.lr, mini.precision) == (2400, 6, 2.56, 1e-3, "no")
    assert (mini.epoch, mini.cache) == (240, "float16")
    assert hub.teachers == paper.teachers == dict(speech="facebook/hubert-base-ls960", music="m-a-p/MERT-v0-public")
    assert (hub.steps, hub.batch, hub.seconds, hub.lr) == (20_000, 24, 10., 2e-4)
    assert (hub.precision, hub.validate_every) == ("bf16", 1000)
    assert (paper.steps, paper.corpus, paper.seconds) == (220_000, "speech", 15.625)
    assert (paper.precision, paper.validate_every) == ("fp16", 5000)
    for p in (mini, hub, paper):
        assert (p.warmup, p.clip, p.weight_decay, p.seed) == (.07, 5., .01, 0)
        assert (p.loss, p.short, p.folder) == ("kd", "join", home()/p.name)

def test_a_file_becomes_a_profile(tmp_path):
    p = profile(written(tmp_path, GOOD))
    assert p.teachers == dict(speech="facebook/hubert-base-ls960", music=str(tmp_path/"mert"),
                              birds=str(Path.home()/"birds"))
    assert p.audio == dict(speech=str(tmp_path/"audio/speech"), music="stream:some/set:clean:train", birds="")
    assert (p.domains, p.init) == (("speech", "music", "birds"), "music")
    assert (p.student_layers, p.predict, p.steps) == (3, (2, 5), 10)
    assert p.lr == 1. and type(p.lr) is float and p.slurm == dict(distil=dict(gpus=2, hours=24)) and profile(p) is p

def test_a_path_means_the_same_from_any_folder(tmp_path, monkeypatch):
    (tmp_path/"a/local").mkdir(parents=True)
    written(tmp_path/"a", GOOD.replace('"./mert"', '"local"'))
    monkeypatch.chdir(tmp_path)
    near = profile("a/mine.toml")
    monkeypatch.chdir("/")
    assert near == profile(tmp_path/"a/mine.toml") and near.teachers["music"] == str(tmp_path/"a/local")

def test_an_environment_variable_is_part_of_the_value(tmp_path, monkeypatch):
    for folder in ("one", "two"):
        monkeypatch.setenv("DISTILLTV_SPEECH", str(tmp_path/folder))
        assert profile("hub").audio["speech"] == record(profile("hub"))["audio"]["speech"] == str(tmp_path/folder)
    monkeypatch.delenv("DISTILLTV_SPEECH")
    assert profile("hub").audio["speech"] == ""

WRONG = {  # what is written -> the sentence
    "nothing =": "mine.toml is not TOML",
    "a = " + "["*5000: "is not TOML",
    "name = 'x'": "teachers is missing",
    "[teachers]\na = 'b'": "name is missing",
    "name = 'x'\nteachers = 3": "teachers is not a table: write .teachers.",
    "name = 'x'\n[teachers]": "teachers is not a table with",
    "name = '../x'\n[teachers]\na = 'b'": "cannot be a folder's name",
    "name = 'mini'\n[teachers]\na = 'b'": "name = 'mini' is a shipped profile's",
    "name = 'Hub'\n[teachers]\na = 'b'": "name = 'Hub' is a shipped profile's",
    "name = 'cache'\n[teachers]\na = 'b'": "name = 'cache' is .* a folder of this package",
    "name = 'x'\n[teachers]\na = 'b'\n[audio]\na = '${NO_SUCH}/data'": r"\$\{NO_SUCH\} is not set: set this",
    "name = 'x'\nsteps = 3\n[teachers]\na = 'b'": "steps is unknown: it belongs under .training.",
    "name = 'x'\n[teacher]\na = 'b'\n[teachers]\na = 'b'": "teacher is unknown: did you mean teachers",
    "name = 'x'\n[teachers]\nensemble = 'b'": "'ensemble' has a meaning of its own",
    "name = 'x'\n[teachers]\naverage = 'b'": "'average' has a meaning of its own",
    **{f"name = 'x'\n[teachers]\n{d} = 'b'": f"'{d}' has a meaning of its own"
       for d in "mixed paper Hub students results voice-seed1 voice-2x voice-30steps voice-cl ensemble-2x".split()},
    "name = 'x'\n[teachers]\na = '~no-such-user/b'": "~no-such-user/b: there is no such user's home",
    "name = 'x'\n[teachers]\na = 'b'\n[audio]\na = '~no-such-user/b'": "~no-such-user/b: there is no such user's home",
    "name = 'x'\n[teachers]\n'a/b' = 'b'": "domain 'a/b' cannot be a folder's name",
    "name = 'x'\n[teachers]\nA = 'b'\na = 'b'": "capitals only",
    "name = 'x'\n[teachers]\na = 3": "the teacher of a is 3",
    "name = 'x'\n[teachers]\na = 'b'\n[audio]\nc = 'd'": "audio names 'c', which has no teacher",
    "name = 'x'\n[teachers]\na = 'b'\n[student]\ninit = 'c'": "init = 'c' is not among the teachers: use one of a",
    "name = 'x'\n[teachers]\na = 'b'\n[student]\nwidth = 100\nheads = 3": "width = 100 cannot be shared",
    "name = 'x'\n[teachers]\na = 'b'\n[student]\nlayer = 3": "student.layer is unknown: did you mean layers",
    "name = 'x'\n[teachers]\na = 'b'\n[training]\ncorpus = 'c'": "corpus = 'c' is unknown: use both, own or one of a",
    "name = 'x'\n[teachers]\na = 'b'\n[training]\nsteps = 1.5": "steps = 1.5 is not a whole number",
    "name = 'x'\n[teachers]\na = 'b'\n[training]\nsteps = true": "steps = True is not a whole number",
    "name = 'x'\n[teachers]\na = 'b'\n[training]\nlr = nan": "lr = nan is not a number",
    "name = 'x'\n[teachers]\na = 'b'\n[training]\nlr = inf": "lr = inf is not a number",
    "name = 'x'\n[teachers]\na = 'b'\n[training]\nwarmup = 7": "warmup = 7.0 is not a number in .0, 1.",
    "name = 'x'\n[teachers]\na = 'b'\n[student]\nlayers = 0": "student.layers = 0 is not a whole number",
    "name = 'x'\n[teachers]\na = 'b'\n[training]\npredict = [0, 4]": r"predict = \[0, 4\] is not a list",
    "name = 'x'\n[teachers]\na = 'b'\n[training]\npredict = []": "predict = .. is not a list of teacher layers",
    "name = 'x'\n[teachers]\na = 'b'\n[training]\npredict = [8, 4]": "in rising order",
    "name = 'x'\n[teachers]\na = 'b'\n[training]\nprecision = 'fp8'":
        "precision = 'fp8' is not one of 'no', 'bf16', 'fp16'",
    "name = 'x'\n[teachers]\na = 'b'\n[training]\nloss = ['kd']": "loss = .'kd'. is not one of",
    "name = 'x'\n[teachers]\na = 'b'\n[slurm.distill]\ngpus = 1": "slurm.distill is no stage: did you mean distil",
    "name = 'x'\n[teachers]\na = 'b'\n[tasks.who]\ntable = 'a.csv'\nlabel = 'who'\ngroup = 'day'":
        "tasks.who.domain is missing",
    "name = 'x'\n[teachers]\na = 'b'\n[tasks.who]\nlabels = 'who'": "tasks.who.labels is unknown: did you mean label",
    "name = 'x'\n[teachers]\na = 'b'\n[tasks.who]\ntable = 3\nlabel = 'who'\ngroup = 'day'\ndomain = 'a'":
        "tasks.who.table = 3 is not text",
    "name = 'x'\n[teachers]\na = 'b'\n[tasks]\nwho = 3": "tasks.who is not a table with table, label, group, domain",
    "name = 'x'\n[teachers]\na = 'b'\n[tasks.all]\ntable = 'a.csv'\nlabel = 'who'\ngroup = 'day'\ndomain = 'a'":
        "tasks.all has a name that asks for several tasks",
    "name = 'x'\n[teachers]\na = 'b'\n[tasks.a]\ntable = 'a.csv'\nlabel = 'who'\ngroup = 'day'\ndomain = 'a'":
        "tasks.a has a name that asks for several tasks",
    "name = 'x'\n[teachers]\na = 'b'\n[tasks.own]\ntable = 'a.csv'\nlabel = 'who'\ngroup = 'day'\ndomain = 'a'":
        "tasks.own has a name that asks for several tasks",
    "name = 'x'\nask = 'own'\n[teachers]\na = 'b'": "ask = 'own', but it has no question: add one as .tasks.NAME.",
    "name = 'x'\nask = 3\n[teachers]\na = 'b'": "ask = 3 is not text",
    "name = 'x'\n[teachers]\na = 'b'\n[slurm.distil]\ngpu = 1": "slurm.distil.gpu is unknown: did you mean gpus",
    "name = 'x'\n[teachers]\na = 'b'\n[slurm.distil]\ngpus = -1": "slurm.distil.gpus = -1 is not a whole number",
}

@pytest.mark.parametrize("text", WRONG, ids=lambda t: t.replace("\n", " ")[-40:])
def test_what_a_file_cannot_say_is_a_sentence(tmp_path, text):
    with pytest.raises(ValueError, match=WRONG[text]) as e: profile(written(tmp_path, text))
    assert str(tmp_path/"mine.toml") in str(e.value) and "\n" not in str(e.value)

def test_what_is_no_profile_is_a_sentence(tmp_path):
    for name, says in (("maxi", "use one of mini, hub, paper, or the path of a .toml"),
                       (tmp_path/"no.toml", "is not a file.*`distilltv new .*no.toml`"),
                       (tmp_path, "the path of a .toml file"),
                       ("~no-such-user/x.toml", "no such user's home; write the path in full")):
        with pytest.raises(ValueError, match=says): profile(name)
    written(tmp_path, GOOD)
    with pytest.raises(ValueError, match="mine' is unknown: did you mean .*mine.toml\\?$"): profile(tmp_path/"mine")
    with pytest.raises(ValueError, match="not UTF-8"): profile(written(tmp_path, "name = 'ü'".encode("latin-1")))
    with pytest.raises(ValueError, match="larger than a profile"): profile(written(tmp_path, "#"*2**21))
    with pytest.raises(ValueError, match="seed = -1"): replace(profile(), seed=-1)

def test_the_record_holds_every_value_but_what_decides_no_result(tmp_path):
    p = profile(written(tmp_path, GOOD))
    names = {f.name for f in fields(Profile)} - {"slurm", "cache_gb", "log_with", "licence", "tasks", "ask"}
    assert set(record(p)) == names | {"versions"} and json.loads(json.dumps(record(p))) == record(p)
    assert record(replace(p, slurm={}, cache_gb=1., log_with="tensorboard", licence="MIT", ask="paper")) == record(p)
    for change in (dict(steps=11), dict(seed=1), dict(predict=(1,)), dict(audio=dict(speech="/x")),
                   dict(precision="bf16")):
        assert record(replace(p, **change)) != record(p)
    # wherever the repository lies
    assert record(profile())["teachers"] == dict(speech="mini:speech", music="mini:music")

def test_settings_are_read_as_the_type_of_their_field(tmp_path):
    p = with_settings(profile(), ["loss=cl", "steps=5", "lr=1", "predict=2,3", f"teachers.music={tmp_path}",
                                  "audio.speech="])
    assert (p.loss, p.steps, p.lr, p.predict) == ("cl", 5, 1., (2, 3))
    assert (p.teachers["music"], p.audio["speech"]) == (str(tmp_path), "")
    for wrong, says in (("los=cl", "los is no setting; use one of name"),
                        ("steps=x", "steps = 'x' cannot be read as int"), ("steps=0", "steps = 0 is not"),
                        ("teachers.birds=x", "teachers.birds is no setting"), ("slurm=x", "slurm is no setting")):
        with pytest.raises(ValueError, match=says): with_settings(profile(), [wrong])

values = st.recursive(st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=9),
                      lambda v: st.lists(v, max_size=3) | st.dictionaries(st.text(max_size=5), v, max_size=3),
                      max_leaves=8)

@settings(max_examples=300, deadline=None)
@given(st.dictionaries(st.sampled_from([f.name for f in fields(Profile)]), values))
def test_any_value_of_any_field_is_taken_or_refused(changes):
    start = asdict(profile())
    try: p = Profile(**start | changes)
    except ValueError as e: assert "\n" not in str(e).replace(repr(changes.get("name")), "")
    else: assert record(p) == json.loads(json.dumps(record(p)))

_lines = st.sampled_from([*GOOD.splitlines(), "[", "a.b.c = 1", "name = 3", "= 2", '"""', "[[teachers]]", "[slurm]",
                          "x = 1979-05-27", "steps = 1_0", 'audio = "x"', "\ufeff", "\0"])

@settings(max_examples=300, deadline=None)
@given(st.lists(_lines, max_size=30) | st.binary(max_size=80))
def test_any_file_is_a_profile_or_a_sentence(tmp_path_factory, lines):
    path = written(tmp_path_factory.getbasetemp(), lines if isinstance(lines, bytes) else "\n".join(lines), "any.toml")
    try: profile(path)
    except ValueError as e: assert str(e).startswith(str(path))
