"Distillation: objectives against numpy, gradients that reach the student only, and runs of one and two processes killed with SIGKILL."
import errno, io, json, os, signal, socket, sqlite3, subprocess, sys
from dataclasses import replace
import numpy as np, pandas as pd, pytest, soundfile as sf, torch
from datasets import Audio, Dataset
from torch.nn import functional as F
from torch.optim.optimizer import register_optimizer_step_pre_hook
from transformers import HubertConfig, HubertModel
from distilltv import distill, runs
from distilltv.distill import Distiller, Kept, cl_loss, distil, fit, frame_clock, heard, kd_loss, load_heads, lr_at, match_frames, validate, validation_crops
from distilltv.encoders import load_encoder, make_base, save_encoder, weights_hash
from distilltv.profiles import profile
from distilltv.scale import Crops

TINY = dict(hidden_size=48, num_hidden_layers=12, num_attention_heads=4, intermediate_size=96, conv_dim=[16]*7,
            num_conv_pos_embeddings=16, num_conv_pos_embedding_groups=4)

STILL = dict(hidden_dropout=0., attention_dropout=0., activation_dropout=0., feat_proj_dropout=0.)

def distiller(names=("speech",), loss="kd", average=False, **config):
    torch.manual_seed(0)
    teachers = {n: HubertModel(HubertConfig(**TINY | config)).eval().requires_grad_(False) for n in names}
    return Distiller(make_base(teachers[names[0]]), teachers, loss=loss, average=average)

def test_loss_equals_numpy():
    rng = np.random.default_rng(0)
    p, h = rng.normal(size=(2, 3, 2, 5, 7))
    cos = (p*h).sum(-1)/np.linalg.norm(p, axis=-1)/np.linalg.norm(h, axis=-1)
    want = np.abs(p-h).mean((1, 2, 3)) + .7*np.log1p(np.exp(-cos)).mean((1, 2))
    np.testing.assert_allclose(kd_loss(torch.tensor(p), torch.tensor(h), cosine=.7), want, rtol=1e-12)

def correlation_loss(p, h, w=.7, cross=5e-5, own=5e-6):
    "L_CL of [layers, batch, frames, dim] in numpy, with its matrices written out."
    out = []
    for l in range(len(p)):
        terms = []
        for t in range(p.shape[2]):
            zp, zh = ((x - x.mean(0))/(x.std(0, ddof=1) + 1e-5) for x in (p[l, :, t], h[l, :, t]))
            c, s = zp.T@zh/(len(zp)-1), zp.T@zp/(len(zp)-1)
            off = lambda m: sum(m[i, j]**2 for i in range(len(m)) for j in range(len(m)) if i != j)
            terms.append(((np.diag(c)-1)**2).sum()/10 + cross*off(c)/100 + own*off(s)/50_000)
        cos = (p[l]*h[l]).sum(-1)/np.linalg.norm(p[l], axis=-1)/np.linalg.norm(h[l], axis=-1)
        out.append(np.mean(terms) + w*np.log1p(np.exp(-cos)).mean())
    return np.array(out)

@pytest.mark.parametrize("dtype, rtol", [(np.float64, 1e-10), (np.float32, 1e-5)])
def test_correlation_loss_equals_numpy(dtype, rtol):
    p, h = np.random.default_rng(0).normal(1, 2, size=(2, 3, 6, 5, 7)).astype(dtype)
    for weights in (dict(), dict(cross=50., own=9e4)):    # the second makes the off-diagonal terms as large as the first
        got = cl_loss(torch.tensor(p), torch.tensor(h), cosine=.7, **weights)
        np.testing.assert_allclose(got, correlation_loss(p.astype(np.float64), h.astype(np.float64), **weights), rtol=rtol)

def test_correlation_loss_pools_time_first_and_needs_two_crops():
    p, h = torch.randn(2, 1, 4, 6, 5)
    pooled = lambda x: x.unflatten(2, (3, 2)).mean(3)
    torch.testing.assert_close(cl_loss(p, h, pool=3), cl_loss(pooled(p), pooled(h)))
    assert not torch.allclose(cl_loss(p, h, pool=3), cl_loss(p, h))
    with pytest.raises(ValueError, match="a batch of 1 is too small"): cl_loss(p[:, :1], h[:, :1])

def padded(lengths, fill=float("nan")):
    "Items of those lengths, and the batch that they make."
    items = [torch.randn(n, generator=torch.Generator().manual_seed(i)) for i, n in enumerate(lengths)]
    wav = torch.full((len(items), max(lengths)), fill)
    for row, x in zip(wav, items): row[:len(x)] = x
    return items, wav, torch.tensor(lengths)

@pytest.mark.parametrize("lengths", [(4000, 4000, 4000), (4000, 2500, 4000, 3333, 2500)])
@pytest.mark.parametrize("names, average", [(("speech",), False), (("speech", "music"), False), (("speech", "music"), True)])
def test_loss_of_a_padded_batch_is_the_mean_over_its_items(lengths, names, average):
    d = distiller(names, average=average).eval()
    items, wav, n = padded(lengths)
    got, alone = d(wav, n), [d(x[None]) for x in items]
    for k in got: torch.testing.assert_close(got[k], torch.stack([a[k] for a in alone]).mean(), rtol=1e-5, atol=1e-5)

@pytest.mark.parametrize("loss", ["kd", "cl"])
def test_nothing_of_the_padding_is_heard(loss):
    "Not in the loss and not in a gradient, whatever it is filled with."
    got = []
    for fill in (float("nan"), 0., 1e6):
        d = distiller(loss=loss, **STILL)
        d(*padded((4000, 2500, 4000, 2500), fill)[1:])["loss"].backward()
        got.append(torch.cat([p.grad.flatten() for p in d.parameters()]))
    assert got[0].isfinite().all() and got[0].abs().sum() > 0 and torch.equal(got[0], got[1]) and torch.equal(got[0], got[2])

def test_the_correlation_loss_pools_lengths_to_the_shortest():
    "Its items are pooled alone to the frames of the shortest, and then compared."
    d = distiller(loss="cl").eval()
    items, wav, n = padded((4000, 2500, 4000, 3333))
    pairs = [d.predict(x[None])["speech"] for x in items]
    frames = min(p.shape[2] for p, _ in pairs)
    p, h = (np.concatenate([F.adaptive_avg_pool1d(x[i].detach().flatten(0, 1).mT, frames).mT.unflatten(0, (3, 1)) for x in pairs], 1) for i in (0, 1))
    assert frames == 7 and len({x[0].shape[2] for x in pairs}) == 3
    torch.testing.assert_close(d(wav, n)["loss"].item(), correlation_loss(p.astype(np.float64), h.astype(np.float64), w=1.).mean(), rtol=1e-4, atol=0)

def test_ensemble_loss_is_the_sum_over_teachers():
    d = distiller(("speech", "music")).eval()
    out = d(torch.randn(2, 4000))
    by = {n: torch.stack([out[f"{n}_{l}"] for l in (4, 8, 12)]).mean() for n in ("speech", "music")}
    torch.testing.assert_close(out["loss"], by["speech"]+by["music"])

def test_averaged_targets_have_one_head_set():
    d = distiller(("speech", "music"), average=True).eval()
    wav = torch.randn(2, 4000)
    mean = torch.stack([d.targets(t, wav) for t in d._teachers.values()]).mean(0)
    want = kd_loss(d.heads["average"](d.student(wav).last_hidden_state), mean)
    assert list(d.heads) == ["average"]
    torch.testing.assert_close(d(wav)["loss"], want.mean())

def test_teachers_that_cannot_be_used_are_named():
    small, wide = (HubertModel(HubertConfig(**TINY | c)) for c in (dict(num_hidden_layers=2), dict(hidden_size=96)))
    with pytest.raises(ValueError, match="speech teacher has 2 layers, so layer 12"): Distiller(make_base(small), dict(speech=small))
    with pytest.raises(ValueError, match="different widths"): Distiller(make_base(wide), dict(speech=wide, music=HubertModel(HubertConfig(**TINY))), average=True)

def test_frames_are_matched_by_their_times():
    "A linear function of time, sampled at 75 frames a second, read off at 50; same clocks are cropped and untouched."
    theirs, ours = frame_clock(HubertConfig(**TINY), 24_000), frame_clock(HubertConfig(**TINY))
    assert theirs == pytest.approx((320/24_000, 200/24_000)) and ours == pytest.approx((.02, .0125))
    time = lambda clock, n: clock[1] + clock[0]*torch.arange(n, dtype=torch.double)
    got = match_frames(torch.stack([time(theirs, 150), 3-time(theirs, 150)], -1)[None, None], theirs, ours, 99)[0, 0]
    torch.testing.assert_close(got, torch.stack([time(ours, 99), 3-time(ours, 99)], -1))
    x = torch.randn(1, 1, 9, 2)
    assert torch.equal(match_frames(x, ours, ours, 7), x[:, :, :7]) and torch.equal(match_frames(x, ours, ours, 10), x)
    one_hop = tuple(torch.tensor(theirs).tolist())
    assert match_frames(torch.ones(1, 1, 1, 2), one_hop, ours, 3).shape == (1, 1, 3, 2)

def test_a_teacher_at_another_rate_hears_that_rate():
    torch.manual_seed(0)
    heard_by = HubertModel(HubertConfig(**TINY)).eval()
    heard_by.sample_rate = 24_000
    d, seen = Distiller(make_base(HubertModel(HubertConfig(**TINY))), dict(music=heard_by)), []
    heard_by.register_forward_pre_hook(lambda m, args: seen.append(args[0]))
    loss = d(torch.randn(2, 16_000))["loss"]
    assert seen[0].shape == (2, 24_000) and seen[0].std() == pytest.approx(1, abs=.01) and loss.isfinite()

def test_padding_would_leak_and_so_there_is_none():
    "With a group norm, silence behind a clip changes the frames of the clip: equal-length crops are the only clean way."
    teacher, clip = HubertModel(HubertConfig(**TINY)).eval(), torch.randn(1, 8000)
    alone = teacher.feature_extractor(clip)
    padded = teacher.feature_extractor(torch.cat([clip, torch.zeros(1, 8000)], 1))[:, :, :alone.shape[2]]
    assert (padded-alone)[:, :, :-2].abs().max() > .01

def test_targets_are_the_teacher_layers_counted_from_one():
    d = distiller()
    teacher, wav = d._teachers["speech"], torch.randn(1, 4000)
    seen = {}
    for l in (4, 8, 12): teacher.encoder.layers[l-1].register_forward_hook(lambda m, i, o, l=l: seen.update({l: o[0] if isinstance(o, tuple) else o}))
    assert torch.equal(d.targets(teacher, wav), torch.stack([seen[l] for l in (4, 8, 12)]))

def test_a_teacher_makes_no_graph_and_drops_nothing_out_while_its_student_trains():
    d = distiller().train()
    teacher, wav, seen = d._teachers["speech"], torch.randn(1, 4000), []
    teacher.encoder.layers[0].register_forward_hook(lambda m, i, o: seen.append(torch.is_inference_mode_enabled()))
    first, again = (d.targets(teacher, wav) for _ in range(2))
    assert seen == [True, True] and torch.equal(first, again) and not first.requires_grad

def test_a_teacher_is_done_before_its_student_begins():
    "Else its activations and the student's would be in memory together."
    d, order = distiller(("speech", "music")), []
    for name, m in dict(student=d.student, **d._teachers).items(): m.encoder.register_forward_hook(lambda *_, name=name: order.append(name))
    d(torch.randn(1, 4000))
    assert order == ["speech", "music", "student"]

def test_attention_of_either_kind_gives_one_loss_and_gradient():
    wav, found = torch.randn(2, 4000, generator=torch.Generator().manual_seed(0)), []
    for kind in ("sdpa", "eager"):
        d = distiller(**STILL)
        for m in (d.student, *d._teachers.values()): m.set_attn_implementation(kind)
        loss = d(wav)["loss"]
        loss.backward()
        found.append((loss, d.student.encoder.layers[0].attention.q_proj.weight.grad))
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-6)
    assert found[0][1].abs().max() > 0

def test_gradients_are_clipped_to_the_profiles_norm_and_logged_as_they_were(tmp_path):
    norms = []
    hook = register_optimizer_step_pre_hook(
        lambda o, *_: norms.append(torch.cat([q.grad.flatten() for g in o.param_groups for q in g["params"] if q.grad is not None]).norm().item()))
    try: log = fit(distiller(), batch_at, tmp_path, replace(P, clip=.05), steps=3, log_every=1)
    finally: hook.remove()
    assert len(norms) == 3 and norms == pytest.approx([.05]*3, rel=1e-3) and (log.gradient > .1).all()

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

class Named:
    "Batches with file names, such as `Crops`, not numbers at some steps."
    def __init__(self, bad): self.bad = bad
    def items(self, k, part): return batch_at(k)[part]*(float("nan") if k in self.bad else 1)
    def files(self, k): return [f"clip-{k}.flac"]
    def state(self, k): return dict(streams=[], quarantine={})
    def restore(self, *_): pass

def test_a_nan_streak_stops_with_steps_files_and_the_last_good_checkpoint(tmp_path):
    with pytest.raises(FloatingPointError, match=r"steps 3 to 5, 3 in a row.*step 5 \(clip-5\.flac\).*checkpoint\.pt is the last good one"):
        fit(distiller(), Named({3, 4, 5}), tmp_path, P, steps=9, save_every=2, log_every=1, patience=3)
    saved = torch.load(tmp_path/"checkpoint.pt", weights_only=True)
    assert saved["step"] == 4 and saved["skipped"] == [3]
    assert all(t.isfinite().all() for t in saved["module"].values())

def test_one_bad_batch_is_skipped_and_counted(tmp_path):
    d = distiller()
    log = fit(d, Named({2}), tmp_path, P, steps=4, log_every=1, patience=2)
    assert log.attrs["skipped"] == [2] and log.loss.isna().tolist() == [False, False, True, False]
    assert all(q.isfinite().all() for q in d.parameters())

def test_accumulated_pieces_make_the_same_gradient():
    from accelerate import Accelerator
    grads = []
    for pieces in (1, 2):
        d = distiller(**STILL)
        losses = distill._backward(Accelerator(), d, torch.cat([batch_at(0), batch_at(1)]), pieces)
        grads.append(torch.cat([q.grad.flatten() for q in d.parameters()]))
        assert not losses["loss"].requires_grad
    torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-7)
    with pytest.raises(ValueError, match="batch of 2 .* 3 pieces: choose a multiple of 3"): fit(distiller(), batch_at, "unused", replace(P, accumulate=3), steps=1)

def test_best_and_last_checkpoints_can_both_be_continued(tmp_path):
    scores = iter([3., 1., 2.])
    d = distiller()
    log = fit(d, batch_at, tmp_path, replace(P, validate_every=2), steps=6, save_every=3, validate=lambda: dict(valid_speech=next(scores)))
    best, last = (torch.load(tmp_path/f"{n}.pt", weights_only=True) for n in ("best", "checkpoint"))
    assert (best["step"], last["step"]) == (4, 6) and log.validation.dropna().tolist() == [3, 1, 2]
    (tmp_path/"best.pt").replace(tmp_path/"checkpoint.pt")
    again = distiller()
    fit(again, batch_at, tmp_path, replace(P, validate_every=2), steps=6, save_every=3, validate=lambda: dict(valid_speech=2.))
    assert weights_hash(again) == weights_hash(d)

class Toy(torch.nn.Module):
    "The smallest thing that `fit` trains."
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.w = torch.nn.Linear(4000, 3)
    def forward(self, wav): return dict(loss=self.w(wav).square().mean())

def test_batches_prepared_ahead_and_a_compiled_model_train_the_same(tmp_path):
    plain, other, compiled = Toy(), Toy(), Toy()
    fit(plain, batch_at, tmp_path/"a", P, steps=5, save_every=2)
    fit(other, batch_at, tmp_path/"b", P, steps=5, save_every=2, prefetch=2)
    fit(compiled, batch_at, tmp_path/"c", replace(P, compile="eager"), steps=5)
    assert weights_hash(plain) == weights_hash(other)
    torch.testing.assert_close(plain.state_dict(), compiled.state_dict())
    assert list(distill._ahead(str, range(2, 7), 3)) == list("23456")

# --- targets that are kept

def kept_run(folder, kept, turns=3, **config):
    "Two batches, heard in each of some epochs."
    d = distiller(**config)
    d.kept = kept
    fit(d, lambda k: batch_at(k % 2), folder, P, steps=2*turns)
    return d

def test_kept_targets_train_the_same_student_and_are_read_from_the_second_epoch_on(tmp_path):
    kept = Kept("float32", 1e9, tmp_path/"targets")
    plain, cached = kept_run(tmp_path/"a", None), kept_run(tmp_path/"b", kept)
    assert weights_hash(plain) == weights_hash(cached) and (kept.made, kept.read) == (2, 4)
    later = Kept("float32", 1e9, tmp_path/"targets")
    assert weights_hash(kept_run(tmp_path/"c", later)) == weights_hash(plain) and (later.made, later.read) == (0, 6)

def test_half_precision_gives_one_student_whether_targets_were_there_or_not(tmp_path):
    full, half = Kept("float32", 1e9, tmp_path/"targets"), Kept("float16", 1e9, tmp_path/"targets")
    one = kept_run(tmp_path/"a", full)
    two, three = kept_run(tmp_path/"b", half), kept_run(tmp_path/"c", half)
    assert weights_hash(two) == weights_hash(three) != weights_hash(one) and (half.made, half.read) == (2, 10)
    sizes = sorted(f.stat().st_size for f in (tmp_path/"targets").glob("*.npy"))
    assert len(sizes) == 4 and sizes[0]*1.9 < sizes[-1]

def test_kept_targets_stay_within_their_bound_and_the_longest_unused_go_first(tmp_path):
    d, folder = distiller(), tmp_path/"targets"
    d.kept = Kept("float32", 1e9, folder)
    teacher = d._teachers["speech"]
    d.targets(teacher, batch_at(0))
    size = next(folder.glob("*.npy")).stat().st_size
    d.kept.most = 3.5*size
    file = lambda k: folder/f"{d.kept.key(teacher, batch_at(k), d.layers)}.npy"
    for i, k in enumerate((1, 2, 0, 3, 0, 4)):          # 0 is used again and again
        d.targets(teacher, batch_at(k))
        os.utime(file(k), (i, i))
        held = sum(f.stat().st_size for f in folder.glob("*.npy"))
        assert held <= 3.5*size
    assert [file(k).exists() for k in range(5)] == [True, False, False, True, True]

@pytest.mark.parametrize("damage", [lambda b: b[:len(b)//2], lambda b: b"", lambda b: b"<html>", lambda b: b[:-900] + bytes([b[-900] ^ 1]) + b[-899:]],
                         ids=["cut", "empty", "another", "one bit"])
def test_damaged_targets_are_computed_again(tmp_path, damage):
    d = distiller()
    d.kept = Kept("float32", 1e9, tmp_path/"targets")
    teacher = d._teachers["speech"]
    first = d.targets(teacher, batch_at(0))
    file = next((tmp_path/"targets").glob("*.npy"))
    file.write_bytes(damage(whole := file.read_bytes()))
    assert torch.equal(d.targets(teacher, batch_at(0)), first) and d.kept.made == 2 and file.read_bytes() == whole
    assert torch.equal(d.targets(teacher, batch_at(0)), first) and d.kept.made == 2

def test_kept_targets_are_keyed_by_all_that_decides_them(tmp_path):
    "Weights, configuration, attention, sampling rate, layers, numbers, samples."
    kept, layers = Kept("float32", 1e9, tmp_path), (4, 8, 12)
    def teacher(rate=16_000, seed=0, **config):
        torch.manual_seed(seed)
        t = HubertModel(HubertConfig(**TINY | config)).eval()
        t.sample_rate = rate
        return t
    relu = teacher(hidden_act="relu")
    relu.load_state_dict(teacher().state_dict())        # the same weights in another configuration
    eager = teacher()
    eager.set_attn_implementation("eager")
    keys = [kept.key(t, batch_at(0), layers) for t in (teacher(), relu, eager, teacher(24_000), teacher(seed=1))]
    keys += [kept.key(teacher(), batch_at(1), layers), kept.key(teacher(), batch_at(0), (4, 8)), Kept("float16", 1, tmp_path).key(teacher(), batch_at(0), layers)]
    with torch.autocast("cpu", torch.bfloat16): keys.append(kept.key(teacher(), batch_at(0), layers))
    assert len(set(keys)) == 9 and kept.key(teacher(), batch_at(0), layers) == keys[0]

def test_what_cannot_be_kept_is_a_sentence(tmp_path):
    with pytest.raises(ValueError, match="cache = 'half' is unknown; use float32 or float16"): Kept("half", 1)
    with pytest.raises(ValueError, match="cache=float32 keeps what is heard again, and with epoch=0 nothing is"): distil(replace(P, cache="float32"), "speech", out=tmp_path)
    with pytest.raises(ValueError, match="do not fit float16: use cache=float32"):
        Kept("float16", 1e9, tmp_path)(distiller()._teachers["speech"], batch_at(0), (4,), lambda: torch.full((1, 2, 3, 4), 1e6))
    assert not list(tmp_path.glob("*.npy"))
    d = distiller()
    d.kept = Kept("float32", 1e9, tmp_path/"targets")
    assert fit(d, Named({2}), tmp_path/"run", P, steps=4, patience=2).attrs["skipped"] == [2] and d.kept.made == 3

def test_half_precision_trains_about_the_same(tmp_path):
    from accelerate.state import AcceleratorState
    logs = []
    for precision in ("no", "bf16"):
        AcceleratorState._reset_state()
        logs.append(fit(distiller(**STILL), batch_at, tmp_path/precision, replace(P, precision=precision), steps=3, log_every=1))
    AcceleratorState._reset_state()
    np.testing.assert_allclose(logs[1].loss, logs[0].loss, rtol=.02)
    assert (logs[1].loss != logs[0].loss).any()

def test_a_tracker_that_is_not_installed_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(distill.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="pip install trackio"): fit(distiller(), batch_at, tmp_path, replace(P, log_with="trackio"), steps=1)

def test_tensorboard_holds_what_the_log_holds(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    log = fit(distiller(), batch_at, tmp_path/"run", replace(P, log_with="tensorboard"), steps=3, log_every=1, inputs=dict(corpus="both"))
    board = EventAccumulator(str(tmp_path/"run-logs/distilltv")).Reload()
    assert set(board.Tags()["scalars"]) == set(log.columns) - {"step"}
    for k in board.Tags()["scalars"]: np.testing.assert_allclose([(s.step, s.value) for s in board.Scalars(k)], list(zip(log.step, log[k])), rtol=1e-6)

def test_trackio_holds_what_the_log_holds(tmp_path):
    pytest.importorskip("trackio", reason="trackio brings many packages along and is not installed: pip install trackio")
    code = ("import sys; sys.path.insert(0, sys.argv[1]); from pathlib import Path; import test_distill as t\n"
            "t.fit(t.distiller(), t.batch_at, Path(sys.argv[2]), t.replace(t.P, log_with='trackio'), steps=3, log_every=1)")
    env = dict(os.environ, TRACKIO_DIR=str(tmp_path/"board"), HF_HUB_OFFLINE="1")
    done = subprocess.run([sys.executable, "-c", code, os.path.dirname(__file__), str(tmp_path/"run")], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    with sqlite3.connect(tmp_path/"board/distilltv.db") as board: rows = board.execute("select step, metrics from metrics order by step").fetchall()
    log = pd.read_csv(tmp_path/"run/log.csv")
    assert [s for s, _ in rows] == log.step.tolist()
    np.testing.assert_allclose([json.loads(m)["loss"] for _, m in rows], log.loss, rtol=1e-6)

def test_a_full_disk_is_named_and_loses_nothing(tmp_path, monkeypatch):
    real = torch.save
    def full(state, f):
        if state["step"] > 2: raise OSError(errno.ENOSPC, "No space left on device")
        real(state, f)
    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(OSError, match=r"no space left.*checkpoint\.pt.*free some"): fit(distiller(), batch_at, tmp_path, P, steps=4, save_every=2)
    monkeypatch.undo()
    d, whole = distiller(), distiller()
    fit(d, batch_at, tmp_path, P, steps=4, save_every=2)
    fit(whole, batch_at, tmp_path/"whole", P, steps=4, save_every=2)
    assert weights_hash(d) == weights_hash(whole) and not list(tmp_path.glob(".*.tmp"))

def test_a_damaged_checkpoint_is_named(tmp_path):
    (tmp_path/"checkpoint.pt").write_bytes(b"half a file")
    with pytest.raises(ValueError, match=r"checkpoint\.pt is no checkpoint of ours, or is damaged"): fit(distiller(), batch_at, tmp_path, P, steps=2)

def test_a_checkpoint_of_another_architecture_is_named(tmp_path):
    fit(distiller(), batch_at, tmp_path, P, steps=2)
    with pytest.raises(ValueError, match=r"checkpoint\.pt holds another architecture"): fit(distiller(hidden_size=96), batch_at, tmp_path, P, steps=2)

def test_a_checkpoint_keeps_the_loss_scaler(tmp_path):
    "Of half precision; on a machine without GPU the scaler is one of the CPU."
    from types import SimpleNamespace
    def session(scale):
        d = distiller()
        scaler = torch.amp.GradScaler("cpu", init_scale=scale)
        return SimpleNamespace(scaler=scaler, is_main_process=True, device=torch.device("cpu"), process_index=0), d, torch.optim.AdamW(d.parameters())
    (one, d, optimiser), (two, e, other) = session(2.**9), session(2.**16)
    one.scaler.scale(d(batch_at(0))["loss"]).backward()
    next(d.parameters()).grad.fill_(torch.inf)
    one.scaler.step(optimiser), one.scaler.update()
    distill._save(tmp_path, True, False, one, batch_at, d, optimiser, dict(settings=dict(steps=2), step=1, log=[], skipped=[0]))
    assert distill._resume(tmp_path/"checkpoint.pt", dict(steps=2), e, other, two, batch_at) == (1, [], [0])
    assert two.scaler.state_dict() == one.scaler.state_dict() and two.scaler.get_scale() == 2.**8

def test_a_checkpoint_of_another_corpus_is_refused(tmp_path):
    "Also if it lies in the same place; one that has moved is the same."
    def corpus(folder, n):
        (tmp_path/folder).mkdir()
        for i in range(n): sf.write(tmp_path/folder/f"{i}.wav", noise(i), 16_000)
        return Crops([tmp_path/folder], 2, .25).hash
    assert corpus("a", 2) == corpus("b", 2) != corpus("c", 3)
    fit(distiller(), batch_at, tmp_path, P, steps=2, inputs=dict(audio=corpus("d", 2)))
    with pytest.raises(ValueError, match="belongs to a run with"): fit(distiller(), batch_at, tmp_path, P, steps=2, inputs=dict(audio=corpus("e", 1)))

def test_scale_profiles_want_audio_of_yours():
    with pytest.raises(ValueError, match="profile hub has no music corpus: set DISTILLTV_MUSIC"): distill.crops_of(replace(P, name="hub", audio=dict(speech="mini:speech")), "both")

def test_a_checkpoint_of_other_settings_is_refused(tmp_path):
    fit(distiller(), batch_at, tmp_path, P, steps=2)
    with pytest.raises(ValueError, match="belongs to a run with"): fit(distiller(), batch_at, tmp_path, P, steps=4)
    with pytest.raises(ValueError, match="belongs to a run with"): fit(distiller(), batch_at, tmp_path, P, steps=2, inputs=dict(base="other"))

def test_the_command_takes_the_notebooks_parameters(monkeypatch, capsys):
    seen = []
    monkeypatch.setattr(distill, "distil", lambda *a: seen.append(a) or ("folder", None))
    distill.main("--profile mini --teacher average --corpus own --steps 3 --seed 1 --out here --set loss=cl accumulate=2".split())
    assert seen == [(replace(profile("mini"), loss="cl", accumulate=2), "average", "own", 3, 1, "here")] and capsys.readouterr().out == "folder\n"
    with pytest.raises(SystemExit, match="los is no setting; use one of name, .*loss"): distill.main(["--set", "los=cl"])

# --- killed, and in two processes

SERVER = """
import json, multiprocessing, os, random, signal, sys
sys.path.insert(0, {tests!r})
from test_distill import *
from distilltv.scale import Crops

class Deadly(Crops):
    "Crops that end their process at a step."
    kill_at = -1
    def items(self, step, part):
        if step == self.kill_at: os.kill(os.getpid(), signal.SIGKILL)
        return super().items(step, part)

def train(rank, world, port, job):
    if world > 1: os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world), LOCAL_WORLD_SIZE=str(world), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    for seed in (random.seed, np.random.seed, torch.manual_seed): seed(os.getpid())    # as in a new process: nothing may depend on it
    p = replace(P, batch=4, seconds=job["seconds"])
    crops = Deadly(job["audio"], p.batch, p.seconds, short=job["short"], epoch=job["epoch"])
    if rank == 0: crops.kill_at = job["kill_at"]
    d = distiller(loss=job["loss"], **STILL if job["still"] else {{}})
    if job["epoch"]: d.kept = Kept("float32", 3e5, job["folder"] + "/targets")
    log = fit(d, crops, job["folder"], p, steps=7, save_every=2, log_every=1)
    torch.save(d.state_dict(), f"{{job['folder']}}/weights-{{rank}}.pt")

torch.set_num_threads(1)
fork = multiprocessing.get_context("fork")
for line in sys.stdin:
    job, port = json.loads(line), free_port()
    workers = [fork.Process(target=train, args=(r, job["world"], port, job)) for r in range(job["world"])]
    for w in workers: w.start()
    workers[0].join()
    if workers[0].exitcode: [w.kill() for w in workers]    # the machine is gone, not one process
    for w in workers: w.join()
    print(workers[0].exitcode, flush=True)
"""

def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]

@pytest.fixture(scope="module")
def train(tmp_path_factory):
    "Train in new processes, forked from one that has imported everything and done nothing: exit code, and the weights by process."
    env = dict(os.environ, OMP_NUM_THREADS="1", ACCELERATE_USE_CPU="true", HF_HUB_OFFLINE="1")
    server = subprocess.Popen([sys.executable, "-c", SERVER.format(tests=os.path.dirname(__file__))], env=env, stdin=subprocess.PIPE,
                              stdout=subprocess.PIPE, stderr=open(tmp_path_factory.mktemp("server")/"stderr", "w+"), text=True)
    def train(folder, *audio, world, kill_at=-1, **job):
        job = dict(loss="kd", still=False, seconds=.25, short="join", epoch=0) | job
        server.stdin.write(json.dumps(job | dict(folder=str(folder), audio=[str(a) for a in audio], world=world, kill_at=int(kill_at)))+"\n")
        server.stdin.flush()
        code = int(server.stdout.readline())
        return code, [torch.load(folder/f"weights-{r}.pt", weights_only=True) for r in range(world)] if code == 0 else None
    yield train
    server.stdin.close()
    server.wait(60)

def noise(i): return np.random.default_rng(i).normal(0, .1, 6000)

@pytest.fixture(scope="module")
def stream(tmp_path_factory):
    "Two Parquet shards of short noises, one of them broken."
    folder = tmp_path_factory.mktemp("stream")
    def wav(i):
        f = io.BytesIO()
        sf.write(f, noise(i), 16_000, format="WAV")
        return f.getvalue() if i != 3 else f.getvalue()[:1000]
    for s in range(2):
        audio = [dict(path=f"{i}.wav", bytes=wav(i)) for i in range(8*s, 8*s+8)]
        Dataset.from_dict(dict(audio=audio)).cast_column("audio", Audio(decode=False)).to_parquet(folder/f"train-{s}.parquet")
    return f"stream:{folder}"

@pytest.mark.parametrize("world", [1, 2])
def test_killed_with_sigkill_it_ends_with_the_same_weights(tmp_path, train, stream, world):
    assert train(tmp_path/"killed", stream, world=world, kill_at=np.random.default_rng().integers(2, 7))[0] == -signal.SIGKILL
    (_, killed), (_, whole) = (train(tmp_path/d, stream, world=world) for d in ("killed", "whole"))
    assert len({weights_hash(w) for w in killed + whole}) == 1
    listed = [(tmp_path/d/"quarantine.csv").read_text() for d in ("killed", "whole")]
    assert listed[0] == listed[1] and "3.wav" in listed[0]

@pytest.mark.parametrize("loss", ["kd", "cl"])
def test_two_processes_train_what_one_trains(tmp_path, train, loss):
    "At the same global batch; each of the two hears half of it."
    (tmp_path/"audio").mkdir()
    for i in range(8): sf.write(tmp_path/f"audio/{i}.wav", noise(i), 16_000)
    (_, one), (_, two) = (train(tmp_path/str(n), tmp_path/"audio", world=n, loss=loss, still=True) for n in (1, 2))
    assert_close_runs(one, two, loss)

def assert_close_runs(one, two, loss="kd"):
    flat = lambda s: torch.cat([v.flatten() for v in s.values()])
    start = flat(distiller(loss=loss, **STILL).state_dict())
    moved, apart = (flat(one[0])-start).norm(), (flat(one[0])-flat(two[0])).norm()
    assert weights_hash(two[0]) == weights_hash(two[1]) and apart < 1e-3*moved, (float(apart), float(moved))

@pytest.fixture(scope="module")
def two_corpora(tmp_path_factory):
    "Recordings of 1.1 s and 2.3 s, and of 5 s: in crops of two seconds, halves and wholes of the first and wholes of the second."
    folder = tmp_path_factory.mktemp("two")
    for name, lengths in dict(short=(1.1, 2.3, 1.1, 2.3), long=(5., 5.)).items():
        (folder/name).mkdir()
        for i, s in enumerate(lengths): sf.write(folder/f"{name}/{i}.wav", np.random.default_rng(i).normal(0, .1, int(16_000*s)), 16_000)
    return folder/"short", folder/"long"

ALONE = dict(short="alone", seconds=2., epoch=3)

def test_batches_of_several_lengths_in_two_processes_and_killed(tmp_path, train, two_corpora):
    "Two epochs with targets that are kept, in a space too small for all of them."
    jobs = dict(world=2, still=True, **ALONE)
    assert train(tmp_path/"killed", *two_corpora, kill_at=np.random.default_rng().integers(2, 7), **jobs)[0] == -signal.SIGKILL
    (_, killed), (_, whole) = (train(tmp_path/d, *two_corpora, **jobs) for d in ("killed", "whole"))
    assert len({weights_hash(w) for w in killed + whole}) == 1
    assert_close_runs(train(tmp_path/"one", *two_corpora, **jobs | dict(world=1))[1], whole)

# --- at real size

def test_the_command_distils_checkpoints_of_real_size(tmp_path):
    "θ₀ of HuBERT Base, taught by MERT v0-public: random weights in the hub's own format, the hub profile, the command as a user types it (but for bfloat16, which few CPUs have)."
    torch.manual_seed(0)
    mert = dict(model_type="mert_model", architectures=["MERTModel"], sample_rate=16_000, feature_extractor_cqt=False, attention_relax=-1.0,
                auto_map=dict(AutoConfig="configuration_MERT.MERTConfig", AutoModel="modeling_MERT.MERTModel"))
    old = lambda k: k.replace("parametrizations.weight.original0", "weight_g").replace("parametrizations.weight.original1", "weight_v")
    model, file = HubertModel(HubertConfig()), tmp_path/"pytorch_model.bin"
    torch.save({old(k): v for k, v in model.state_dict().items()}, file)
    for name, more in dict(hubert={}, mert=mert).items():
        (tmp_path/name).mkdir()
        (tmp_path/name/file.name).hardlink_to(file)
        (tmp_path/name/"config.json").write_text(json.dumps(model.config.to_dict() | more))
        (tmp_path/name/"preprocessor_config.json").write_text(json.dumps(dict(feature_extractor_type="Wav2Vec2FeatureExtractor", sampling_rate=16_000, do_normalize=True)))
    for split in ("train-clean-100", "dev-clean"):
        (tmp_path/"audio"/split).mkdir(parents=True)
        for i in range(2): sf.write(tmp_path/f"audio/{split}/{i}.flac", np.random.default_rng(i).normal(0, .1, 30_000), 16_000)
    (tmp_path/"audio/train-clean-100/9.wav").write_text("Dear Sir or Madam")
    env = dict(os.environ, OMP_NUM_THREADS="2", ACCELERATE_USE_CPU="true", HF_HUB_OFFLINE="1", DISTILLTV_HOME=str(tmp_path/"runs"), DISTILLTV_SPEECH=str(tmp_path/"audio"))
    command = "-m distilltv.distill --profile hub --teacher music --corpus speech --steps 2 --set batch=2 seconds=.5 short=alone precision=no validate_every=0"
    done = subprocess.run([sys.executable, *command.split(), f"teachers.speech={tmp_path}/hubert", f"teachers.music={tmp_path}/mert"], env=env, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    folder = tmp_path/"runs/hub/students/speech/music"
    record, log, plain = json.loads((folder/"result.json").read_text()), pd.read_csv(folder/"log.csv"), HubertModel.from_pretrained(folder)
    assert done.stdout.strip() == str(folder) and sum(p.numel() for p in plain.parameters()) == 23_491_200
    assert weights_hash(plain) != record["inputs"]["base"] == weights_hash(load_encoder(tmp_path/"runs/hub/base"))
    assert log.step.tolist() == [0, 1] and {"music_4", "music_8", "music_12", "gradient"} <= set(log) and log.notna().all(axis=None)
    found, asked = record["metrics"], record["parameters"]
    assert found["quarantined_files"] == 1 and found["audio_seconds"] == 2 and found["valid_speech"] > 0 and (asked["short"], asked["corpus"]) == ("alone", "speech")
    assert list(pd.read_csv(folder/"quarantine.csv").path) == [str(tmp_path/"audio/train-clean-100/9.wav")]

def test_a_saved_base_of_another_shape_is_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("DISTILLTV_HOME", str(tmp_path))
    save_encoder(HubertModel(HubertConfig(**TINY)), tmp_path/"teacher")
    p = replace(P, name="hub", init="speech", teachers=P.teachers | dict(speech=str(tmp_path/"teacher")))
    assert distill.base_of(p).config.hidden_size == 48
    for change, says in ((dict(student_layers=3), "'layers': 2.*not.*'layers': 3"), (dict(student_width=96), "'width': 0.*not.*'width': 96"), (dict(init="music"), "'copied_from': 'speech teacher'")):
        with pytest.raises(ValueError, match=f"hub/base holds another θ₀, with .*{says}"): distill.base_of(replace(p, **change))
    monkeypatch.setenv("DISTILLTV_HOME", str(tmp_path/"wide"))
    wide = distill.base_of(replace(p, student_width=96, student_heads=2)).config
    assert (wide.hidden_size, wide.num_attention_heads) == (96, 2)

def test_the_heads_beside_a_student_give_the_loss_that_was_recorded(tmp_path, monkeypatch):
    monkeypatch.setenv("DISTILLTV_HOME", str(tmp_path))
    save_encoder(HubertModel(HubertConfig(**TINY)), tmp_path/"teacher")
    for split in ("train", "dev-clean"):
        (tmp_path/"audio"/split).mkdir(parents=True)
        for i in range(3): sf.write(tmp_path/f"audio/{split}/{i}.wav", noise(i), 16_000)
    p = replace(P, name="hub", init="speech", teachers=dict.fromkeys(("speech", "music"), str(tmp_path/"teacher")),
                audio=dict(speech=str(tmp_path/"audio")))
    for teacher, heads in dict(speech=["speech"], ensemble=["speech", "music"], average=["average"]).items():
        folder, _ = distil(p, teacher, "speech", steps=2)
        teachers = {n: load_encoder(tmp_path/"teacher") for n in (heads if teacher == "speech" else ("speech", "music"))}
        again = Distiller(load_encoder(folder), teachers, p.predict, average=teacher == "average")
        again.heads.load_state_dict(load_heads(folder).state_dict())
        want = json.loads((folder/"result.json").read_text())["metrics"]["valid_speech"]
        assert set(load_heads(folder)) == set(heads) and validate(again, validation_crops(p))["valid_speech"] == pytest.approx(want, rel=1e-3)
    (folder/"heads.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="no heads.safetensors.*02_distill"): load_heads(folder)
