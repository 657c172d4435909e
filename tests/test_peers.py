"What we hand to others' tools works in the real ones, each in an environment of its own; skipped where there is none."
import json, os, subprocess, sys
from pathlib import Path
import numpy as np, pytest, torch

ROOT = Path(__file__).resolve().parent.parent
STUDENT = ROOT/"data/mini/students/speech"
MADE_BY = dict(S3PRL="the lines in nbs/appendix/a5_distill_benchmark.ipynb",
               XARES='python -m venv xares && xares/bin/pip install xares==0.1.3 -e .')

def peer(name):
    "The Python that `DISTILLTV_PEER_<name>` names, or a skip that says how to make one."
    python = os.environ.get(f"DISTILLTV_PEER_{name}")
    return python or pytest.skip(f"set DISTILLTV_PEER_{name} to the Python of an environment made by: {MADE_BY[name]}")

def run(python, code, *args):
    "What that Python says last, as JSON; a failure shows the end of what it wrote."
    env = os.environ | dict(PYTHONPATH=str(ROOT), OMP_NUM_THREADS="1", HF_HUB_OFFLINE="1")
    done = subprocess.run([python, "-W", "ignore", "-c", code, *map(str, args)], cwd=ROOT, env=env, capture_output=True,
                          text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.strip().splitlines()[-1])

def wavs():
    g = torch.Generator().manual_seed(0)
    return [torch.randn(n, generator=g) for n in (16000, 16000, 9000)]

# --- s3prl

OPENED = """
import json, sys, numpy as np, torch
from s3prl import hub
from s3prl.upstream.interfaces import Featurizer
upstream = hub.hf_hubert_custom(ckpt=sys.argv[1]).eval()
featurizer = Featurizer(upstream, "hidden_states", upstream_device="cpu")
heard = torch.load(sys.argv[2], weights_only=True)
with torch.no_grad(): states = [upstream([w])["hidden_states"] for w in heard]
np.savez(sys.argv[3], **{f"{i}-{l}": h[0].numpy() for i, s in enumerate(states) for l, h in enumerate(s)})
print(json.dumps([featurizer.output_dim, featurizer.downsample_rate, featurizer.layer_num]))
"""

def test_s3prl_opens_a_saved_student(tmp_path):
    "A model folder of ours is all that s3prl's `hf_hubert_custom` needs, and it hears the same."
    python = peer("S3PRL")
    from distilltv.frozen import open_encoder
    from distilltv.adapters import S3prlUpstream
    encoder = open_encoder(str(STUDENT))
    torch.save(wavs(), tmp_path/"wavs.pt")
    assert run(python, OPENED, STUDENT, tmp_path/"wavs.pt",
               tmp_path/"heard.npz") == [encoder.dim, encoder.hop, encoder.depth]
    theirs, ours = np.load(tmp_path/"heard.npz"), S3prlUpstream(encoder)
    for i, w in enumerate(wavs()):
        # `transformers` 4 and 5 take the last one after and before the final norm
        for l, h in enumerate(ours([w])["hidden_states"][:-1]):
            np.testing.assert_allclose(theirs[f"{i}-{l}"], h[0].numpy(), atol=1e-4, err_msg=f"clip {i}, layer {l}")

EXPERT = """
import torch
from torch import nn
from torch.nn.utils.rnn import pad_sequence
from s3prl.downstream.model import UtteranceLevel
class DownstreamExpert(nn.Module):
    def __init__(self, upstream_dim, upstream_rate, **_):
        super().__init__()
        assert upstream_rate == 320
        self.model, self.seen = UtteranceLevel(upstream_dim, 2, pooling="MeanPooling"), []
    def get_dataloader(self, split):
        g = torch.Generator().manual_seed(0)
        t = torch.arange(16000)/16000
        return [([torch.sin(2*torch.pi*f*t[:n]) + .1*torch.randn(n, generator=g)
                  for f, n in ((200, 16000), (2000, 9000))], [0, 1])]
    def forward(self, split, features, labels, records, **_):
        said, _ = self.model(pad_sequence(features, batch_first=True), torch.tensor([len(f) for f in features]))
        records["right"] += (said.argmax(-1) == torch.tensor(labels)).tolist()
        return nn.functional.cross_entropy(said, torch.tensor(labels))
    def log_records(self, split, records, **_): self.seen.append(sum(records["right"])/len(records["right"]))
"""

# s3prl's runner imports what the hub's client dropped in its release 1, so its environment holds `transformers` 4,
# where one class that we import has its older name; nothing else differs
TRAINED = """
import json, sys, transformers
import huggingface_hub, torchaudio, datasets
for _ in range(2):
    t = sys.modules["transformers"]
    if not hasattr(t, "PreTrainedConfig"): t.PreTrainedConfig = t.PretrainedConfig
    import distilltv.features
from argparse import Namespace
import s3prl.downstream, torch
from s3prl import hub
from s3prl.downstream.runner import Runner
from distilltv.frozen import open_encoder
from distilltv.adapters import S3prlUpstream
hub.distilltv = lambda ckpt, **_: S3prlUpstream(open_encoder(ckpt))
s3prl.downstream.__path__.append(sys.argv[2])
torch.manual_seed(0)
args = Namespace(init_ckpt=None, upstream="distilltv", upstream_ckpt=sys.argv[1], upstream_model_config=None,
                 upstream_refresh=False, upstream_trainable=False, upstream_feature_selection="hidden_states",
                 upstream_layer_selection=None, upstream_feature_normalize=False,
                 downstream="tones", device="cpu", seed=0, expdir=sys.argv[2], push_to_hf_hub=False)
config = dict(runner=dict(total_steps=20, gradient_clipping=1, gradient_accumulate_steps=1, log_step=100, eval_step=20,
                          save_step=100, max_keep=1, eval_dataloaders=["test"]),
              optimizer=dict(name="TorchOptim", torch_optim_name="Adam", lr=1e-2))
runner = Runner(args, config)
runner.train()
print(json.dumps(dict(right=runner.downstream.model.seen, layers=runner.featurizer.model.layer_num,
                      moved=float(runner.featurizer.model.weights.abs().sum()))))
"""

def test_s3prl_runner_trains_on_our_upstream(tmp_path):
    "Its own Featurizer, Runner and head learn two tones of unequal length from what `S3prlUpstream` gives them."
    (tmp_path/"tones").mkdir()
    (tmp_path/"tones/__init__.py").touch(), (tmp_path/"tones/expert.py").write_text(EXPERT)
    found = run(peer("S3PRL"), TRAINED, STUDENT, tmp_path)
    assert found["right"] == [1.] and found["layers"] == 3 and found["moved"] > 0

def test_a_step_equals_s3prls(tmp_path):
    """The benchmark of distillation asserts that hidden states and losses agree with s3prl's HuBERT and distiller from
    the same weights."""
    command = [Path(sys.executable).parent/"papermill", ROOT/"nbs/appendix/a5_distill_benchmark.ipynb",
               tmp_path/"out.ipynb", "-p", "peer", peer("S3PRL"), "-p", "rounds", "1"]
    done = subprocess.run(list(map(str, command)), cwd=ROOT, capture_output=True, text=True,
                          env=os.environ | dict(PYTHONPATH=str(ROOT), OMP_NUM_THREADS="1"))
    assert done.returncode == 0, done.stderr[-3000:]

# --- X-ARES

CHECKED = """
import json, sys, torch
from xares.audio_encoder_checker import check_audio_encoder
from distilltv.frozen import open_encoder
from distilltv.adapters import XaresEncoder
good = XaresEncoder(open_encoder(sys.argv[1]))
bad = XaresEncoder(open_encoder(sys.argv[1]))
bad.output_dim += 1
print(json.dumps([check_audio_encoder(good), check_audio_encoder(bad)]))
"""

def test_xares_accepts_our_encoder():
    "X-ARES' own checker passes our wrapper, and would not pass one that says a wrong width."
    assert run(peer("XARES"), CHECKED, STUDENT) == [True, False]
