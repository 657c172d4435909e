"Distillation: the objective against numpy, gradients that reach the student only, and a run killed with SIGKILL."
import os, signal, subprocess, sys, textwrap
from dataclasses import replace
import numpy as np, pandas as pd, pytest, torch
from transformers import HubertConfig, HubertModel
from distilltv.distill import Distiller, fit, heard, kd_loss, lr_at
from distilltv.encoders import load_encoder, make_base, weights_hash
from distilltv.runs import profile

TINY = dict(hidden_size=48, num_hidden_layers=12, num_attention_heads=4, intermediate_size=96, conv_dim=[16]*7,
            num_conv_pos_embeddings=16, num_conv_pos_embedding_groups=4)

def distiller(names=("speech",)):
    torch.manual_seed(0)
    teachers = {n: HubertModel(HubertConfig(**TINY)).eval().requires_grad_(False) for n in names}
    return Distiller(make_base(teachers[names[0]]), teachers)

def test_loss_equals_numpy():
    rng = np.random.default_rng(0)
    p, h = rng.normal(size=(2, 3, 2, 5, 7))
    cos = (p*h).sum(-1)/np.linalg.norm(p, axis=-1)/np.linalg.norm(h, axis=-1)
    want = np.abs(p-h).mean((1, 2, 3)) + .7*np.log1p(np.exp(-cos)).mean((1, 2))
    np.testing.assert_allclose(kd_loss(torch.tensor(p), torch.tensor(h), cosine=.7), want, rtol=1e-12)

def test_loss_of_a_batch_is_the_mean_over_its_items():
    d = distiller().eval()
    wav = torch.randn(3, 4000)
    alone = torch.stack([d(w[None])["loss"] for w in wav]).mean()
    torch.testing.assert_close(d(wav)["loss"], alone, rtol=1e-5, atol=1e-5)

def test_ensemble_loss_is_the_sum_over_teachers():
    d = distiller(("speech", "music")).eval()
    out = d(torch.randn(2, 4000))
    by = {n: torch.stack([out[f"{n}_{l}"] for l in (4, 8, 12)]).mean() for n in ("speech", "music")}
    torch.testing.assert_close(out["loss"], by["speech"]+by["music"])

def test_targets_are_the_teacher_layers_counted_from_one():
    d = distiller()
    teacher, wav = d._teachers["speech"], torch.randn(1, 4000)
    seen = {}
    for l in (4, 8, 12): teacher.encoder.layers[l-1].register_forward_hook(lambda m, i, o, l=l: seen.update({l: o[0] if isinstance(o, tuple) else o}))
    assert torch.equal(d.targets(teacher, wav), torch.stack([seen[l] for l in (4, 8, 12)]))

def test_training_moves_the_student_and_its_heads_but_not_the_teacher():
    d = distiller().train()
    teacher = d._teachers["speech"]
    before = weights_hash(teacher)
    d(torch.randn(2, 4000))["loss"].backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for n, p in d.named_parameters() if "k_proj.bias" not in n)
    assert all(p.grad is None for p in teacher.parameters()) and not teacher.training
    assert weights_hash(teacher) == before and not any("teacher" in k for k in d.state_dict())

def test_feature_gradient_is_a_tenth():
    one, tenth = distiller().eval(), distiller().eval()
    one.student.feature_extractor._forward_hooks.clear()
    wav = torch.randn(1, 4000)
    grads = []
    for d in (one, tenth):
        d(wav)["loss"].backward()
        grads.append(d.student.feature_extractor.conv_layers[0].conv.weight.grad)
    torch.testing.assert_close(grads[1], grads[0]*.1, rtol=1e-3, atol=1e-7)

def test_schedule_warms_up_and_ends_near_zero():
    lr = [lr_at(k, 100, 1., .1) for k in range(100)]
    assert lr[0] == pytest.approx(.1) and max(lr) == 1 and np.argmax(lr) in (9, 10) and lr[-1] == pytest.approx(1/90)

@pytest.mark.parametrize("corpus,teacher,audio", [("speech", "music", "speech"), ("own", "music", "music"), ("own", "ensemble", "both"), ("both", "speech", "both")])
def test_heard(corpus, teacher, audio): assert heard(corpus, teacher) == audio

def batch_at(step): return torch.randn(2, 4000, generator=torch.Generator().manual_seed(step))
P = replace(profile("mini"), batch=2, seconds=.25)

def test_a_nan_stops_with_the_step_and_the_last_good_checkpoint(tmp_path):
    bad = lambda k: batch_at(k)*float("nan") if k == 3 else batch_at(k)
    with pytest.raises(FloatingPointError, match=r"step 3.*checkpoint\.pt is the last good one"):
        fit(distiller(), bad, tmp_path, P, steps=6, save_every=2, log_every=1)
    saved = torch.load(tmp_path/"checkpoint.pt", weights_only=True)
    assert saved["step"] == 2 and all(t.isfinite().all() for t in saved["module"].values())

def test_a_checkpoint_of_other_settings_is_refused(tmp_path):
    fit(distiller(), batch_at, tmp_path, P, steps=2)
    with pytest.raises(ValueError, match="belongs to a run with"): fit(distiller(), batch_at, tmp_path, P, steps=4)
    with pytest.raises(ValueError, match="belongs to a run with"): fit(distiller(), batch_at, tmp_path, P, steps=2, inputs=dict(base="other"))

CHILD = """
import os, signal, sys
sys.path.insert(0, {tests!r})
from test_distill import *
def batch(step):
    if step == int(sys.argv[2]): os.kill(os.getpid(), signal.SIGKILL)
    return batch_at(step)
torch.set_num_threads(1)
d = distiller()
log = fit(d, batch, sys.argv[1], P, steps=7, save_every=2, log_every=1)
print(weights_hash(d.student), len(log))
"""

def test_killed_with_sigkill_it_ends_with_the_same_weights(tmp_path):
    def run(folder, kill_at):
        r = subprocess.run([sys.executable, "-c", CHILD.format(tests=os.path.dirname(__file__)), str(folder), str(kill_at)], capture_output=True, text=True)
        return r.returncode, r.stdout.strip()
    assert run(tmp_path/"killed", np.random.default_rng().integers(2, 7))[0] == -signal.SIGKILL
    assert run(tmp_path/"killed", -1) == run(tmp_path/"whole", -1)
