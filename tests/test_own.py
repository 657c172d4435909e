"Somebody's own encoders, three domains of them: from teachers to the results, and the files and notebooks in between."
import json, os, subprocess, sys
import numpy as np, pandas as pd, pytest, soundfile as sf, torch
from transformers import HubertConfig, HubertModel
from distilltv import tasks as T
from distilltv.distill import distil
from distilltv.encoders import load_encoder, save_encoder, weights_hash
from distilltv.frozen import open_encoder
from distilltv.figures import shares
from distilltv.findings import report
from distilltv.grid import grid, merge_weights
from distilltv.merge import TaskVector, merge
from distilltv.probe import probe
from distilltv.profiles import profile
from distilltv.questions import profile_tasks
from distilltv.reading import gather
from distilltv.runs import root
from distilltv.students import find_students

torch.set_num_threads(1)
ALL = ("speech", "music", "birds")
TINY = dict(hidden_size=48, num_hidden_layers=4, num_attention_heads=4, intermediate_size=96, conv_dim=(24,)*7,
            num_conv_pos_embeddings=16, num_conv_pos_embedding_groups=4)

@pytest.fixture
def mine(tmp_path, monkeypatch):
    "The file of an experiment with three domains: random teachers, tones as audio, and a question for each domain."
    monkeypatch.setenv("DISTILLTV_HOME", str(tmp_path/"runs"))
    rows, rng = [], np.random.default_rng(0)
    for split, n in dict(train=12, valid=4, test=8).items():
        (tmp_path/"audio"/split).mkdir(parents=True)
        for i in range(n):
            tone = .3*np.sin(np.arange(8_000)*(.05 + .3*(i % 2))) + .05*rng.normal(size=8_000)
            sf.write(tmp_path/f"audio/{split}/{i}.wav", tone, 16_000)
            rows.append(dict(file=f"{split}/{i}.wav", split=split, what="low high".split()[i % 2],
                             who=f"{split}{i//2}"))
    pd.DataFrame(rows).to_csv(tmp_path/"audio/what.csv", index=False)
    text = 'name = "mine"\n[teachers]\n'
    for i, d in enumerate(ALL):
        torch.manual_seed(i)
        save_encoder(HubertModel(HubertConfig(**TINY)), tmp_path/"teachers"/d)
        text += f'{d} = "teachers/{d}"\n'
    text += "[audio]\n" + "".join(f'{d} = "audio"\n' for d in ALL)
    text += "[training]\npredict = [2, 4]\nsteps = 3\nbatch = 3\nseconds = 0.25\nlr = 1e-3\n"
    for d in ALL: text += f'[tasks.what-{d}]\ntable = "audio/what.csv"\nlabel = "what"\ngroup = "who"\ndomain = "{d}"\n'
    (tmp_path/"mine.toml").write_text(text, encoding="utf-8")
    yield tmp_path/"mine.toml"
    for d in ALL: T.TASKS.pop(f"what-{d}", None)

def papermill(notebook, executed, **parameters):
    said = [a for k, v in parameters.items() for a in ("-p", k, v)]
    env = dict(os.environ, PYTHONPATH=str(root()), DISTILLTV_THREADS="1")
    done = subprocess.run([sys.executable, "-m", "papermill", root()/"nbs"/notebook, executed, *said], env=env,
                          capture_output=True, text=True)
    assert not done.returncode, done.stderr[-3000:]

def test_three_domains_from_teachers_to_the_results(mine, tmp_path):
    p = profile(mine)
    for who in (*ALL, "ensemble"): distil(p, who)
    found = find_students(mine)
    vectors = {d: TaskVector.between(found["base"], found[d]) for d in ALL}
    merges = [r for r in grid(mine) if r.stage == "merge"]
    assert [r.parameters["weights"] for r in merges] == [said["weights"] for said in merge_weights(ALL)]
    assert len(merges) == 15
    for r in merges:
        student = merge(found["base"], vectors, r.parameters["weights"])
        student.save_pretrained(r.folder, method="linear", weights=r.parameters["weights"], corpus="both",
                                profile="mine")
    some = merges[7]
    before, weights = weights_hash(load_encoder(some.folder)), json.dumps(some.parameters["weights"])
    papermill("03_merge.ipynb", tmp_path/"03.ipynb", profile=str(mine), weights=weights, out=str(tmp_path/"again"))
    assert weights_hash(load_encoder(tmp_path/"again")) == before        # the notebook and the algebra agree

    questions = profile_tasks(p)
    folders = [str(f.parent) for f in sorted(p.folder.glob("*/both/*/config.json"))]
    encoders = [open_encoder(e, mine) for e in ("logmel", "random", "base", *(f"teacher-{d}" for d in ALL), *folders)]
    probe(encoders, questions, seeds=1, out=[p.folder/"probes"/e.info["encoder"] for e in encoders])
    names = {e.info["encoder"] for e in encoders}
    assert len(names) == len(encoders) == 6 + 4 + 15
    scores, _ = gather(p.folder)
    w = shares(scores)
    assert w.shape == (15, 3) and np.allclose(w.sum(axis=1), 1) and list(w.columns) == list(ALL)
    tradeoff = report(str(mine))
    assert tradeoff.stat().st_size > 10_000
    table = pd.read_csv(tradeoff.with_name("table.csv"))
    assert {f"{d} mean" for d in ALL} <= set(table.columns) and len(table) == len(encoders)
    assert shares(gather(tradeoff.parent)[0]).equals(w)                  # what was saved says the same

def test_the_probe_notebook_asks_the_profiles_questions(mine, tmp_path):
    papermill("04_probe.ipynb", tmp_path/"04.ipynb", profile=str(mine), encoder="teacher-birds", tasks="own", seeds="1")
    scores = pd.read_csv(profile(mine).folder/"probes/teacher-birds/scores.csv")
    assert set(scores.task) == {f"what-{d}" for d in ALL} and set(scores.taught_by) == {"birds"}
