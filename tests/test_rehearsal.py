"The experiment of the `hub` profile, whole, on local checkpoints in the hub's layout; and the script for a GPU."
import json, os, subprocess, sys
from dataclasses import replace
from pathlib import Path
import numpy as np, pandas as pd, soundfile as sf, torch
from transformers import HubertConfig, HubertModel
from distilltv.grid import grid
from test_tasks import MAKERS

ROOT = Path(__file__).resolve().parent.parent
REAL = bool(os.environ.get("DISTILLTV_REAL_SIZE"))    # HuBERT Base as it is, 95 million weights
NARROW = dict(hidden_size=48, num_attention_heads=4, intermediate_size=96, conv_dim=(24,)*7,
              num_conv_pos_embeddings=16, num_conv_pos_embedding_groups=4)

def checkpoint(folder, seed, **config):
    "A model of random weights as the hub keeps it: twelve layers, `pytorch_model.bin`, old names of the weight norm."
    torch.manual_seed(seed)
    model = HubertModel(HubertConfig(**{} if REAL else NARROW, num_hidden_layers=12))
    folder.mkdir(parents=True)
    old = {"parametrizations.weight.original0": "weight_g", "parametrizations.weight.original1": "weight_v"}
    state = model.state_dict()
    for new, name in old.items(): state = {k.replace(new, name): v for k, v in state.items()}
    torch.save(state, folder/"pytorch_model.bin")
    (folder/"config.json").write_text(json.dumps(model.config.to_dict() | config))
    rate = dict(feature_extractor_type="Wav2Vec2FeatureExtractor", sampling_rate=16000, do_normalize=True)
    (folder/"preprocessor_config.json").write_text(json.dumps(rate))

def recordings(folder, form, rate):
    "Some seconds of tones, with a part that validates."
    for part in ("train", "dev"):
        for i in range(4):
            (folder/part).mkdir(parents=True, exist_ok=True)
            hz, n = 200*(i+1), 2*rate
            noise = np.random.default_rng(i).standard_normal(n)
            sf.write(folder/f"{part}/{i}.{form}", .2*np.sin(2*np.pi*hz*np.arange(n)/rate) + .02*noise, rate)

PROFILE = """
name = "hub-rehearsal"
[teachers]
speech = "./hub/hubert-base-ls960"
music = "./hub/MERT-v0-public"
[audio]
speech = "./audio/LibriSpeech"
music = "./audio/music"
[student]
init = "speech"
layers = 2
[training]
predict = [4, 8, 12]
steps = 4
batch = 2
seconds = 1.0
lr = 2e-4
"""

def rehearse(folder):
    "Teachers, audio, published data sets and the profile; the runs of a small grid."
    checkpoint(folder/"hub/hubert-base-ls960", 1)
    mert = dict(model_type="mert_model", sample_rate=16000, feature_extractor_cqt=False, deepnorm=False)
    checkpoint(folder/"hub/MERT-v0-public", 2, **mert, auto_map={"AutoModel": "modeling_MERT.MERTModel"})
    recordings(folder/"audio/LibriSpeech", "flac", 16000)
    recordings(folder/"audio/music", "ogg", 44100)
    for name in ("speech_commands", "nsynth"): MAKERS[name](folder/"datasets")
    (folder/"hub-rehearsal.toml").write_text(PROFILE)
    return runs_of(folder/"hub-rehearsal.toml")

def runs_of(profile):
    "Two students, their merge, its probe on two published tasks, the results: each stage of the grid, and no more."
    wanted = "distil/speech", "distil/music", "merge/lam-0.50", "probe/lam-0.50-both", "results/all"
    runs = [r for r in grid(str(profile), lams=(.5,)) if r.id in wanted]
    probes = tuple(r.id for r in runs if r.stage == "probe")
    def smaller(r):
        few = dict(r.parameters, tasks="ks,instcls", seeds=1)
        if r.stage == "probe": return replace(r, parameters=few)
        return replace(r, needs=probes) if r.stage == "results" else r
    return [smaller(r) for r in runs]

def test_from_distilling_to_the_results_page(rehearsed):
    "Every run of the grid went well, and left what it should."
    made = rehearsed/"local/hub-rehearsal"
    table = pd.read_csv(made/"results/table.csv", dtype=str)
    assert len(table) == 1 and (made/"results/findings.json").exists() and (made/"results/05_results.ipynb").exists()
    student = json.loads((made/"students/both/music/distilltv.json").read_text())
    assert student["steps"] == 4
    for stamp in made.rglob("stamp.json"): # the runner knows every name that a notebook writes
        files = [f.name for f in stamp.parent.iterdir() if f.is_file() and f != stamp]
        assert json.loads(stamp.read_text())["files"] == sorted(files)
    if REAL and "DISTILLTV_RECORD" in os.environ:
        Path(os.environ["DISTILLTV_RECORD"]).write_text(costs(made), encoding="utf-8")

def costs(made):
    "Seconds of each run in their order, and the most memory of those that note it, as JSON."
    rows = []
    for file in sorted(made.rglob("stamp.json"), key=lambda f: f.stat().st_mtime):    # as they ended
        found = file.with_name("result.json")
        memory = json.loads(found.read_text(encoding="utf-8"))["peak_memory_mb"] if found.exists() else None
        seconds = json.loads(file.read_text(encoding="utf-8"))["seconds"]
        rows.append(dict(run=str(file.parent.relative_to(made)), seconds=seconds, peak_memory_mb=memory))
    return json.dumps(rows, indent=1) + "\n"

def test_the_gpu_script_has_no_typing_errors(tmp_path):
    "Every check runs on a CPU with tiny shapes."
    out = tmp_path/"gpu.json"
    command = [sys.executable, ROOT/".ci/gpu", "--rehearse", out]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    found = json.loads(out.read_text())
    assert found["failed"] == {} and found["card"]["name"].startswith("none") and found["seconds"] > 0
    names = "product steps student peer teachers loop resume overflow features lambdas mini".split()
    checks = found["checks"]
    assert list(checks) == names and checks["resume"]["same"] and checks["overflow"]["handled"]
