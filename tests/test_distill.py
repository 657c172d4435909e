"""Distillation: objectives against numpy, gradients that reach the student only, and runs of one and two processes
killed with SIGKILL."""
import errno, io, json, os, shutil, signal, socket, sqlite3, subprocess, sys
from dataclasses import replace
import numpy as np, pandas as pd, pytest, soundfile as sf, torch
from datasets import Audio, Dataset
from safetensors.torch import load_file, save_file
from torch.nn import functional as F
from torch.optim.optimizer import register_optimizer_step_pre_hook
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import HubertConfig, HubertModel
from distilltv import distill, training
from distilltv.distill import base_of, crops_of, distil, load_heads, validate, validation_crops
from distilltv.encoders import load_encoder, make_base, save_encoder, weights_hash
from distilltv.grid import fresh, grid
from distilltv.objective import Distiller, cl_loss, frame_clock, kd_loss, match_frames
from distilltv.profiles import Profile, profile, record
from distilltv.runner import execute
from distilltv.students import listens_to, student_folder
from distilltv.runs import data_dir
from distilltv.scale import Crops
from distilltv.training import TargetCache, TimeLeft, fit, lr_at

TINY = dict(hidden_size=48, num_hidden_layers=12, num_attention_heads=4, intermediate_size=96, conv_dim=[16]*7,
            num_conv_pos_embeddings=16, num_conv_pos_embedding_groups=4)

STILL = dict(hidden_dropout=0., attention_dropout=0., activation_dropout=0., feat_proj_dropout=0.)

def distiller(names=("speech",), loss="kd", **config):
    torch.manual_seed(0)
    teachers = {n: HubertModel(HubertConfig(**TINY | config)).eval().requires_grad_(False) for n in names}
    return Distiller(make_base(teachers[names[0]]), teachers, loss=loss)

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
    # the second makes the off-diagonal terms as large as the first
    for weights in (dict(), dict(cross=50., own=9e4)):
        got = cl_loss(torch.tensor(p), torch.tensor(h), cosine=.7, **weights)
        np.testing.assert_allclose(got, correlation_loss(p.astype(np.float64), h.astype(np.float64), **weights),
                                   rtol=rtol)

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
@pytest.mark.parametrize("names", [("speech",), ("speech", "music"), ("speech", "music", "sound")])
def test_loss_of_a_padded_batch_is_the_mean_over_its_items(lengths, names):
    d = distiller(names).eval()
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
    assert got[0].isfinite().all() and got[0].abs().sum() > 0 and torch.equal(got[0], got[1])
    assert torch.equal(got[0], got[2])

def test_the_correlation_loss_pools_lengths_to_the_shortest():
    "Its items are pooled alone to the frames of the shortest, and then compared."
    d = distiller(loss="cl").eval()
    items, wav, n = padded((4000, 2500, 4000, 3333))
    pairs = [d.predict(x[None])["speech"] for x in items]
    frames = min(p.shape[2] for p, _ in pairs)
    p, h = (np.concatenate([F.adaptive_avg_pool1d(x[i].detach().flatten(0, 1).mT, frames).mT.unflatten(0, (3, 1))
                            for x in pairs], 1) for i in (0, 1))
    assert frames == 7 and len({x[0].shape[2] for x in pairs}) == 3
    torch.testing.assert_close(d(wav, n)["loss"].item(),
                               correlation_loss(p.astype(np.float64), h.astype(np.float64), w=1.).mean(), rtol=1e-4,
                               atol=0)

def test_ensemble_loss_is_the_sum_over_teachers():
    names = ("speech", "music", "sound")
    out = distiller(names).eval()(torch.randn(2, 4000))
    torch.testing.assert_close(out["loss"],
                               sum(torch.stack([out[f"{n}_{l}"] for l in (4, 8, 12)]).mean() for n in names))

def test_teachers_that_cannot_be_used_are_named():
    small = HubertModel(HubertConfig(**TINY | dict(num_hidden_layers=2)))
    with pytest.raises(ValueError, match="predict names layer 12, but the teacher of speech has 2"):
        Distiller(make_base(small), dict(speech=small))

def test_a_teacher_that_wants_waveforms_as_they_are_is_refused_by_name(tmp_path):
    "All crops are normalised, so what its preprocessor_config.json says cannot be done."
    folder = save_encoder(HubertModel(HubertConfig(**TINY)), tmp_path/"raw")
    file = folder/"preprocessor_config.json"
    said = json.loads(file.read_text(encoding="utf-8"))
    for wants in (True, False):
        file.write_text(json.dumps(said | dict(do_normalize=wants)), encoding="utf-8")
        teacher = load_encoder(folder)
        if wants: Distiller(make_base(teacher), dict(sound=teacher))
        else:
            with pytest.raises(ValueError, match="the sound teacher wants waveforms as they are"):
                Distiller(make_base(teacher), dict(sound=teacher))

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

def test_frames_are_matched_on_devices_without_double():
    "Such as Apple's: what is moved there is no double."
    class Moved(TorchDispatchMode):
        def __torch_dispatch__(self, f, types, args=(), kwargs=None):
            out = f(*args, **kwargs or {})
            assert not (isinstance(out, torch.Tensor) and out.is_meta and out.dtype == torch.double), f
            return out
    with Moved():
        x = match_frames(torch.ones(1, 1, 9, 2, device="meta"), (.0133, .0083), (.02, .0125), 5)
    assert x.shape == (1, 1, 5, 2)

def test_a_teacher_at_another_rate_hears_that_rate():
    torch.manual_seed(0)
    heard_by = HubertModel(HubertConfig(**TINY)).eval()
    heard_by.sample_rate = 24_000
    d, seen = Distiller(make_base(HubertModel(HubertConfig(**TINY))), dict(music=heard_by)), []
    heard_by.register_forward_pre_hook(lambda m, args: seen.append(args[0]))
    loss = d(torch.randn(2, 16_000))["loss"]
    assert seen[0].shape == (2, 24_000) and seen[0].std() == pytest.approx(1, abs=.01) and loss.isfinite()

def test_padding_would_leak_and_so_there_is_none():
    """With a group norm, silence behind a clip changes the frames of the clip: equal-length crops are the only clean
    way."""
    teacher, clip = HubertModel(HubertConfig(**TINY)).eval(), torch.randn(1, 8000)
    alone = teacher.feature_extractor(clip)
    padded = teacher.feature_extractor(torch.cat([clip, torch.zeros(1, 8000)], 1))[:, :, :alone.shape[2]]
    assert (padded-alone)[:, :, :-2].abs().max() > .01

def test_targets_are_the_teacher_layers_counted_from_one():
    d = distiller()
    teacher, wav = d._teachers["speech"], torch.randn(1, 4000)
    seen = {}
    for l in (4, 8, 12):
        hook = lambda m, i, o, l=l: seen.update({l: o[0] if isinstance(o, tuple) else o})
        teacher.encoder.layers[l-1].register_forward_hook(hook)
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
    for name, m in dict(student=d.student, **d._teachers).items():
        m.encoder.register_forward_hook(lambda *_, name=name: order.append(name))
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
        lambda o, *_: norms.append(torch.cat([q.grad.flatten() for g in o.param_groups for q in g["params"]
                                              if q.grad is not None]).norm().item()))
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
    one.feature_grad = 1.
    wav = torch.randn(1, 4000)
    grads = []
    for d in (one, tenth):
        d(wav)["loss"].backward()
        grads.append(d.student.feature_extractor.conv_layers[0].conv.weight.grad)
    torch.testing.assert_close(grads[1], grads[0]*.1, rtol=1e-3, atol=1e-7)

def test_a_student_is_left_as_it_was_by_its_distiller():
    "A second one scales the gradient of the convolutions once, as the first did."
    first = distiller().eval()
    again = Distiller(first.student, first._teachers).eval()
    again.heads.load_state_dict(first.heads.state_dict())
    wav, grads = torch.randn(1, 4000), []
    for d in (first, again):
        d.zero_grad()
        d(wav)["loss"].backward()
        grads.append(d.student.feature_extractor.conv_layers[0].conv.weight.grad.clone())
    assert torch.equal(*grads) and not first.student.feature_extractor._forward_hooks

def test_heads_may_have_the_names_of_methods():
    names = tuple("""pop items keys values type train eval half float double to clear update cpu apply children
                     forward""".split())
    d = distiller(names)
    assert set(d.train().eval()(torch.randn(1, 4000))) == {"loss", *(f"{n}_{l}" for n in names for l in (4, 8, 12))}
    assert {k.split(".")[0] for k in d.heads.state_dict()} == set(names)
    old = torch.nn.ModuleDict(dict(speech=distiller().heads["speech"]))      # what older versions saved
    distiller().heads.load_state_dict(old.state_dict())

def test_schedule_warms_up_and_ends_near_zero():
    lr = [lr_at(k, 100, 1., .1) for k in range(100)]
    assert lr[0] == pytest.approx(.1) and max(lr) == 1 and np.argmax(lr) in (9, 10) and lr[-1] == pytest.approx(1/90)

THREE = Profile("three", dict.fromkeys(("speech", "music", "sound"), "folder"), steps=100)
ALL = THREE.domains

@pytest.mark.parametrize("corpus, who, audio",
                         [("speech", "music", ("speech",)), ("own", "music", ("music",)), ("own", "ensemble", ALL),
                                                ("both", "speech", ALL), ("both", "ensemble", ALL)])
def test_whose_audio_a_student_listens_to(corpus, who, audio):
    assert listens_to(replace(THREE, corpus=corpus), who) == audio

@pytest.mark.parametrize("who, asked, name", [
    ("sound", {}, "both/sound"), ("sound", dict(seed=0, steps=100), "both/sound"),
    ("ensemble", dict(corpus="own"), "own/ensemble"),
    ("sound", dict(seed=2), "both/sound-seed2"), ("ensemble", dict(steps=200), "both/ensemble-2x"),
    ("ensemble", dict(steps=200, seed=1), "both/ensemble-2x-seed1"), ("sound", dict(steps=30), "both/sound-30steps")])
def test_a_student_has_a_folder_for_what_decides_it(tmp_path, monkeypatch, who, asked, name):
    monkeypatch.setenv("DISTILLTV_HOME", str(tmp_path))
    assert student_folder(THREE, who, **asked) == tmp_path/"three/students"/name
    assert student_folder(replace(THREE, seed=7), who,
                          **asked | dict(seed=0)) == student_folder(THREE, who, **asked | dict(seed=0))
    assert student_folder(replace(THREE, seed=7), who, **asked | dict(seed=None)).name.endswith("-seed7")
    assert student_folder(replace(THREE, loss="cl"), "sound", seed=3).name == "sound-cl-seed3"

def test_the_grid_and_a_run_agree_on_a_students_folder():
    runs = [r for r in grid("mini", seeds=2) if r.stage == "distil"]
    asked = [{k: r.parameters[k] for k in ("corpus", "seed", "steps") if k in r.parameters} for r in runs]
    assert [r.folder for r in runs] == [student_folder(profile("mini"), r.parameters["teacher"], **a)
                                        for r, a in zip(runs, asked)]
    assert len({r.folder for r in runs}) == 8 and any("steps" in a for a in asked)

def test_what_a_profile_lacks_is_a_sentence():
    with pytest.raises(ValueError,
                       match="teacher = 'spech' is unknown to profile three: use speech, music, sound or ensemble"):
        student_folder(THREE, "spech")
    with pytest.raises(ValueError, match="corpus = 'birds' is unknown: use both, own or one of speech, music, sound"):
        distil(THREE, "sound", corpus="birds")
    with pytest.raises(ValueError, match="profile three has no audio of sound: write a folder.*under .audio."):
        distil(replace(THREE, audio={}), "sound", corpus="sound")

def batch_at(step): return torch.randn(2, 4000, generator=torch.Generator().manual_seed(step))
# the shipped one repeats an epoch, with its targets kept
P = replace(profile("mini"), batch=2, seconds=.25, epoch=0, cache="")

class Named:
    "Batches with file names, such as `Crops`, not numbers at some steps."
    def __init__(self, bad): self.bad = bad
    def items(self, k, part): return batch_at(k)[part]*(float("nan") if k in self.bad else 1)
    def files(self, k): return [f"clip-{k}.flac"]
    def state(self, k): return dict(streams=[], quarantine={})
    def restore(self, *_): pass

def test_a_nan_streak_stops_with_steps_files_and_the_last_good_checkpoint(tmp_path):
    with pytest.raises(FloatingPointError,
                       match=r"steps 3 to 5, 3 in a row.*step 5 \(clip-5\.flac\).*checkpoint\.pt is the last good one"):
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
        losses = training._backward(Accelerator(), d, torch.cat([batch_at(0), batch_at(1)]), pieces)
        grads.append(torch.cat([q.grad.flatten() for q in d.parameters()]))
        assert not losses["loss"].requires_grad
    torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-7)
    with pytest.raises(ValueError, match="batch of 2 .* 3 pieces: choose a multiple of 3"):
        fit(distiller(), batch_at, "unused", replace(P, accumulate=3), steps=1)

def test_pieces_of_a_batch_have_another_correlation_loss_and_are_refused(tmp_path):
    with pytest.raises(ValueError, match="loss=cl compares the crops of a batch.*use accumulate=1"):
        fit(distiller(loss="cl"), lambda k: torch.cat([batch_at(k), batch_at(k+1)]), tmp_path,
            replace(P, batch=4, accumulate=2), steps=1)
    assert not list(tmp_path.iterdir())

def test_best_and_last_checkpoints_can_both_be_continued(tmp_path):
    scores = iter([3., 1., 2.])
    d = distiller()
    log = fit(d, batch_at, tmp_path, replace(P, validate_every=2), steps=6, save_every=3,
              validate=lambda: dict(valid_speech=next(scores)))
    best, last = (torch.load(tmp_path/f"{n}.pt", weights_only=True) for n in ("best", "checkpoint"))
    assert (best["step"], last["step"]) == (4, 6) and log.validation.dropna().tolist() == [3, 1, 2]
    (tmp_path/"best.pt").replace(tmp_path/"checkpoint.pt")
    again = distiller()
    fit(again, batch_at, tmp_path, replace(P, validate_every=2), steps=6, save_every=3,
        validate=lambda: dict(valid_speech=2.))
    assert weights_hash(again) == weights_hash(d)

class Toy(torch.nn.Module):
    "The smallest thing that `fit` trains."
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.w = torch.nn.Linear(4000, 3)
    def forward(self, wav): return dict(loss=self.w(wav).square().mean())

@pytest.mark.parametrize("most, stops", [(100., None), (.5, "steps 13 to 15, 3 in a row")])
def test_steps_that_find_a_loss_scale_are_no_streak(tmp_path, monkeypatch, most, stops):
    "Half precision begins at 2¹⁶ and halves it at each step with a gradient that is not finite, here above `most`."
    class Half(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x): return x.clone()
        @staticmethod
        def backward(ctx, g): return torch.where(g.abs() > most, torch.inf, g)
    class Narrow(Toy):
        def forward(self, wav): return dict(loss=Half.apply(super().forward(wav)["loss"]))
    def scaled(*args, real=training._accelerator):
        accelerator = real(*args)
        accelerator.scaler = torch.amp.GradScaler("cpu")
        return accelerator
    monkeypatch.setattr(training, "_accelerator", scaled)
    def skipped(): return fit(Narrow(), batch_at, tmp_path, P, steps=20, patience=3).attrs["skipped"]
    if not stops: assert skipped() == list(range(10))
    else:
        with pytest.raises(FloatingPointError, match=stops): skipped()

def test_numbers_of_numpy_and_paths_go_into_a_checkpoint_that_can_be_continued(tmp_path):
    module = Toy()
    module.settings = dict(width=np.int64(3), layers=(np.int32(1), 2))
    def go():
        return fit(module, batch_at, tmp_path, replace(P, lr=np.float64(1e-3), validate_every=2), np.int64(4),
                   dict(corpus=tmp_path, hours=np.float32(3)), validate=lambda: dict(valid=np.float64(.3)))
    whole = go()
    assert torch.load(tmp_path/"best.pt", weights_only=True)["settings"]["inputs"]["corpus"] == str(tmp_path)
    (tmp_path/"checkpoint.pt").write_bytes((tmp_path/"best.pt").read_bytes())
    pd.testing.assert_frame_equal(go(), whole)

def test_batches_prepared_ahead_and_a_compiled_model_train_the_same(tmp_path):
    plain, other, compiled = Toy(), Toy(), Toy()
    fit(plain, batch_at, tmp_path/"a", P, steps=5, save_every=2)
    fit(other, batch_at, tmp_path/"b", P, steps=5, save_every=2, prefetch=2)
    fit(compiled, batch_at, tmp_path/"c", replace(P, compile="eager"), steps=5)
    assert weights_hash(plain) == weights_hash(other)
    torch.testing.assert_close(plain.state_dict(), compiled.state_dict())
    assert list(training._ahead(str, range(2, 7), 3)) == list("23456")

# --- targets that are cached

def cached_run(folder, cache, turns=3, **config):
    "Two batches, heard in each of some epochs."
    d = distiller(**config)
    d.cache = cache
    fit(d, lambda k: batch_at(k % 2), folder, P, steps=2*turns)
    return d

def test_cached_targets_train_the_same_student_and_are_read_from_the_second_epoch_on(tmp_path):
    cache = TargetCache("float32", 1e9, tmp_path/"targets")
    plain, cached = cached_run(tmp_path/"a", None), cached_run(tmp_path/"b", cache)
    assert weights_hash(plain) == weights_hash(cached) and (cache.made, cache.read) == (2, 4)
    later = TargetCache("float32", 1e9, tmp_path/"targets")
    assert weights_hash(cached_run(tmp_path/"c", later)) == weights_hash(plain) and (later.made, later.read) == (0, 6)

def test_half_precision_gives_one_student_whether_targets_were_there_or_not(tmp_path):
    full, half = TargetCache("float32", 1e9, tmp_path/"targets"), TargetCache("float16", 1e9, tmp_path/"targets")
    one = cached_run(tmp_path/"a", full)
    two, three = cached_run(tmp_path/"b", half), cached_run(tmp_path/"c", half)
    assert weights_hash(two) == weights_hash(three) != weights_hash(one) and (half.made, half.read) == (2, 10)
    sizes = sorted(f.stat().st_size for f in (tmp_path/"targets").glob("*.npy"))
    assert len(sizes) == 4 and sizes[0]*1.9 < sizes[-1]

def test_cached_targets_stay_within_their_bound_and_the_longest_unused_go_first(tmp_path):
    d, folder = distiller(), tmp_path/"targets"
    d.cache = TargetCache("float32", 1e9, folder)
    teacher = d._teachers["speech"]
    d.targets(teacher, batch_at(0))
    size = next(folder.glob("*.npy")).stat().st_size
    d.cache.most = 3.5*size
    file = lambda k: folder/f"{d.cache.key(teacher, batch_at(k), d.layers)}.npy"
    for i, k in enumerate((1, 2, 0, 3, 0, 4)):          # 0 is used again and again
        d.targets(teacher, batch_at(k))
        os.utime(file(k), (i, i))
        held = sum(f.stat().st_size for f in folder.glob("*.npy"))
        assert held <= 3.5*size
    assert [file(k).exists() for k in range(5)] == [True, False, False, True, True]

@pytest.mark.parametrize("damage",
                         [lambda b: b[:len(b)//2], lambda b: b"", lambda b: b"<html>",
                          lambda b: b[:-900] + bytes([b[-900] ^ 1]) + b[-899:]],
                         ids=["cut", "empty", "another", "one bit"])
def test_damaged_targets_are_computed_again(tmp_path, damage):
    d = distiller()
    d.cache = TargetCache("float32", 1e9, tmp_path/"targets")
    teacher = d._teachers["speech"]
    first = d.targets(teacher, batch_at(0))
    file = next((tmp_path/"targets").glob("*.npy"))
    file.write_bytes(damage(whole := file.read_bytes()))
    assert torch.equal(d.targets(teacher, batch_at(0)), first) and d.cache.made == 2 and file.read_bytes() == whole
    assert torch.equal(d.targets(teacher, batch_at(0)), first) and d.cache.made == 2

def test_cached_targets_are_keyed_by_all_that_decides_them(tmp_path, monkeypatch):
    "Weights, configuration, attention, sampling rate, layers, numbers, samples, libraries."
    cache, layers = TargetCache("float32", 1e9, tmp_path), (4, 8, 12)
    def teacher(rate=16_000, seed=0, **config):
        torch.manual_seed(seed)
        t = HubertModel(HubertConfig(**TINY | config)).eval()
        t.sample_rate = rate
        return t
    relu = teacher(hidden_act="relu")
    relu.load_state_dict(teacher().state_dict())        # the same weights in another configuration
    eager = teacher()
    eager.set_attn_implementation("eager")
    keys = [cache.key(t, batch_at(0), layers) for t in (teacher(), relu, eager, teacher(24_000), teacher(seed=1))]
    keys += [cache.key(teacher(), batch_at(1), layers), cache.key(teacher(), batch_at(0), (4, 8)),
             TargetCache("float16", 1, tmp_path).key(teacher(), batch_at(0), layers)]
    with torch.autocast("cpu", torch.bfloat16): keys.append(cache.key(teacher(), batch_at(0), layers))
    with monkeypatch.context() as m:
        m.setattr(training, "version_of", lambda name: "1.0")
        keys.append(cache.key(teacher(), batch_at(0), layers))
    assert len(set(keys)) == 10 and cache.key(teacher(), batch_at(0), layers) == keys[0]

def test_what_cannot_be_cached_is_a_sentence(tmp_path):
    with pytest.raises(ValueError, match="cache = 'half' is unknown; use float32 or float16"): TargetCache("half", 1)
    with pytest.raises(ValueError, match="cache=float32 keeps what is heard again, and with epoch=0 nothing is"):
        distil(replace(P, cache="float32"), "speech", out=tmp_path)
    with pytest.raises(ValueError, match="do not fit float16: use cache=float32"):
        TargetCache("float16", 1e9, tmp_path)(distiller()._teachers["speech"], batch_at(0), (4,),
                                              lambda: torch.full((1, 2, 3, 4), 1e6))
    assert not list(tmp_path.glob("*.npy"))
    d = distiller()
    d.cache = TargetCache("float32", 1e9, tmp_path/"targets")
    assert fit(d, Named({2}), tmp_path/"run", P, steps=4, patience=2).attrs["skipped"] == [2] and d.cache.made == 3

def test_runs_of_several_precisions_in_one_process(tmp_path):
    "In either order, and again with one module: half precision trains about the same, and single precision to the bit."
    def run(precision, d):
        return fit(d, batch_at, tmp_path/str(len(list(tmp_path.iterdir()))), replace(P, precision=precision), steps=3,
                   log_every=1)
    trained = {}
    for precision in ("bf16", "no", "bf16", "no"):
        d = distiller(**STILL)
        log = run(precision, d)
        again = trained.setdefault(precision, (weights_hash(d), log))
        assert again[0] == weights_hash(d)
    half, single = trained["bf16"][1], trained["no"][1]
    np.testing.assert_allclose(half.loss, single.loss, rtol=.02)
    assert (half.loss != single.loss).any()
    one, fresh = distiller(**STILL), distiller(**STILL)
    run("bf16", one)
    fresh.load_state_dict(one.state_dict())
    run("no", one), run("no", fresh)
    assert weights_hash(one) == weights_hash(fresh)

def test_a_tracker_that_is_not_installed_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(training.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="pip install trackio"):
        fit(distiller(), batch_at, tmp_path, replace(P, log_with="trackio"), steps=1)

def test_tensorboard_holds_what_the_log_holds(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    log = fit(distiller(), batch_at, tmp_path/"run", replace(P, log_with="tensorboard"), steps=3, log_every=1,
              inputs=dict(corpus="both"))
    board = EventAccumulator(str(tmp_path/"run-logs/distilltv")).Reload()
    assert set(board.Tags()["scalars"]) == set(log.columns) - {"step"}
    for k in board.Tags()["scalars"]:
        np.testing.assert_allclose([(s.step, s.value) for s in board.Scalars(k)], list(zip(log.step, log[k])),
                                   rtol=1e-6)

def test_trackio_holds_what_the_log_holds(tmp_path):
    pytest.importorskip("trackio",
                        reason="trackio brings many packages along and is not installed: pip install trackio")
    code = ("import sys; sys.path.insert(0, sys.argv[1]); from pathlib import Path; import test_distill as t\n"
            "t.fit(t.distiller(), t.batch_at, Path(sys.argv[2]), t.replace(t.P, log_with='trackio'), "
            "steps=3, log_every=1)")
    env = dict(os.environ, TRACKIO_DIR=str(tmp_path/"board"), HF_HUB_OFFLINE="1")
    done = subprocess.run([sys.executable, "-c", code, os.path.dirname(__file__), str(tmp_path/"run")], env=env,
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    with sqlite3.connect(tmp_path/"board/distilltv.db") as board:
        rows = board.execute("select step, metrics from metrics order by step").fetchall()
    log = pd.read_csv(tmp_path/"run/log.csv")
    assert [s for s, _ in rows] == log.step.tolist()
    np.testing.assert_allclose([json.loads(m)["loss"] for _, m in rows], log.loss, rtol=1e-6)

def test_a_full_disk_is_named_and_loses_nothing(tmp_path, monkeypatch):
    real = torch.save
    def full(state, f):
        if state["step"] > 2: raise OSError(errno.ENOSPC, "No space left on device")
        real(state, f)
    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(OSError, match=r"no space left.*checkpoint\.pt.*free some"):
        fit(distiller(), batch_at, tmp_path, P, steps=4, save_every=2)
    monkeypatch.undo()
    d, whole = distiller(), distiller()
    fit(d, batch_at, tmp_path, P, steps=4, save_every=2)
    fit(whole, batch_at, tmp_path/"whole", P, steps=4, save_every=2)
    assert weights_hash(d) == weights_hash(whole) and not list(tmp_path.glob(".*.tmp"))

OTHERS = None, {"model": {}}, torch.zeros(3), [1], {"settings": 5}

@pytest.mark.parametrize("saved", OTHERS, ids=["half a file", "a model", "a tensor", "a list", "settings of others"])
def test_a_damaged_checkpoint_is_named(tmp_path, saved):
    torch.save(saved, tmp_path/"checkpoint.pt")
    if saved is None: (tmp_path/"checkpoint.pt").write_bytes(b"half a file")
    with pytest.raises(ValueError, match=r"checkpoint\.pt is no checkpoint of ours, or is damaged"):
        fit(distiller(), batch_at, tmp_path, P, steps=2)

def test_a_checkpoint_of_another_architecture_is_named(tmp_path):
    fit(distiller(), batch_at, tmp_path, P, steps=2)
    with pytest.raises(ValueError, match=r"checkpoint\.pt holds another architecture"):
        fit(distiller(hidden_size=96), batch_at, tmp_path, P, steps=2)

def test_a_checkpoint_keeps_the_loss_scaler(tmp_path):
    "Of half precision; on a machine without GPU the scaler is one of the CPU."
    from types import SimpleNamespace
    def session(scale):
        d = distiller()
        scaler = torch.amp.GradScaler("cpu", init_scale=scale)
        return SimpleNamespace(scaler=scaler, is_main_process=True, device=torch.device("cpu"),
                               process_index=0), d, torch.optim.AdamW(d.parameters())
    (one, d, optimiser), (two, e, other) = session(2.**9), session(2.**16)
    one.scaler.scale(d(batch_at(0))["loss"]).backward()
    next(d.parameters()).grad.fill_(torch.inf)
    one.scaler.step(optimiser), one.scaler.update()
    training._save(tmp_path, True, False, one, batch_at, d, optimiser,
                   dict(settings=dict(steps=2), step=1, log=[], skipped=[0]))
    assert training._resume(tmp_path/"checkpoint.pt", dict(steps=2), e, other, two, batch_at) == (1, [], [0])
    assert two.scaler.state_dict() == one.scaler.state_dict() and two.scaler.get_scale() == 2.**8

def test_a_checkpoint_of_another_corpus_is_refused(tmp_path):
    "Also if it lies in the same place; one that has moved is the same."
    def corpus(folder, n):
        (tmp_path/folder).mkdir()
        for i in range(n): sf.write(tmp_path/folder/f"{i}.wav", noise(i), 16_000)
        return Crops([tmp_path/folder], 2, .25).hash
    assert corpus("a", 2) == corpus("b", 2) != corpus("c", 3)
    fit(distiller(), batch_at, tmp_path, P, steps=2, inputs=dict(audio=corpus("d", 2)))
    with pytest.raises(ValueError, match="belongs to a run with"):
        fit(distiller(), batch_at, tmp_path, P, steps=2, inputs=dict(audio=corpus("e", 1)))

def test_a_checkpoint_of_other_audio_of_the_same_names_and_lengths_is_refused(tmp_path):
    def go(folder, first=0):
        (tmp_path/folder).mkdir(exist_ok=True)
        for i in range(3): sf.write(tmp_path/folder/f"{i}.wav", noise(first+i), 16_000)
        return fit(distiller(), Crops([tmp_path/folder], 2, .25), tmp_path/"run", P, steps=2)
    go("a"), go("b")      # the same audio in another place goes on
    with pytest.raises(ValueError, match="checkpoint.pt belongs to a run with audio_contents = "): go("b", first=9)

def test_gradients_are_those_of_the_profile_whatever_the_environment_says(tmp_path, monkeypatch):
    "`accelerate launch` sets such variables."
    whole = fit(distiller(), batch_at, tmp_path/"a", P, steps=2, log_every=1)
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4")
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "nothing")
    for name in ("WORLD_SIZE", "RANK"): monkeypatch.setenv(name, "")
    assert fit(distiller(), batch_at, tmp_path/"b", P, steps=2, log_every=1).equals(whole)

@pytest.mark.parametrize("kind", ["DEEPSPEED", "MEGATRON_LM", "FSDP"])
def test_a_launcher_that_divides_the_student_is_refused(tmp_path, monkeypatch, kind):
    monkeypatch.setenv(f"ACCELERATE_USE_{kind}", "true")
    with pytest.raises(ValueError, match=f"ACCELERATE_USE_{kind} is set, but here each process trains the whole"):
        fit(Toy(), batch_at, tmp_path, P, steps=2)

@pytest.mark.parametrize("seed", [4295, 2**32-1])
def test_any_seed_of_a_profile_trains(tmp_path, seed):
    assert len(fit(Toy(), batch_at, tmp_path, replace(P, seed=seed), steps=2, log_every=1)) == 2

def test_time_left_counts_what_is_computed_once():
    "While targets are made, once they are read, with validations, and where an earlier run has left them."
    clock = TimeLeft(1000, once=100, check_every=200)
    for _ in range(10): clock.step(.5, making=.3)
    clock.check(20.)
    assert clock.seconds(9) == pytest.approx(990*.2 + 90*.3 + 5*20) and clock.text(9) == "5 min 25 s"
    for _ in range(200): clock.step(.2)
    assert clock.seconds(209) == pytest.approx(790*.2 + 4*20) and clock.seconds(999) == 0
    short = TimeLeft(10, once=100)
    short.step(1., making=.5)
    assert short.seconds(0) == pytest.approx(9*1.)
    short.step(.1, making=.05)
    assert short.seconds(1) == pytest.approx(8*.1)     # the first step, which warms up, counts only while it is alone
    late = TimeLeft(30, check_every=20)
    for _ in range(3): late.step(1.)
    late.check(5.)
    # a validation comes at the end too
    assert late.seconds(19) == pytest.approx(10*1. + 5.) and late.seconds(29) == 0
    for k, says in ((0, "0 s"), (59, "59 s"), (60, "1 min 00 s"), (3725, "1 h 02 min")):
        clock = TimeLeft(2)
        clock.step(k)
        assert clock.text(0) == says

def test_scale_profiles_want_audio_of_yours():
    "Named by the domain, not by the variable: any profile may lack it. For the shipped ones the variable is named too."
    p = replace(P, name="hub", audio=dict(speech="mini:speech"))
    with pytest.raises(ValueError, match="profile hub has no audio of music: write a folder.*or into DISTILLTV_MUSIC"):
        crops_of(p, p.domains)

def test_a_checkpoint_of_other_settings_is_refused_by_name(tmp_path, monkeypatch):
    "Whatever decides the result: the profile, the objective, what goes in, and the libraries that compute."
    def go(says=None, p=P, steps=2, **more):
        d = distiller()
        d.settings |= more.pop("settings", {})
        if says is None: return fit(d, batch_at, tmp_path, p, steps, **more)
        with pytest.raises(ValueError, match=f"checkpoint.pt belongs to a run with {says}: go on with the old values"):
            fit(d, batch_at, tmp_path, p, steps, **more)
    go()
    go("steps = 2, not 4", steps=4)
    go("inputs.base = None, not 'other'", inputs=dict(base="other"))
    go(r"layers = \[4, 8, 12\], not \[1, 2\]", settings=dict(layers=[1, 2]))
    for name, old, new in (("lr", .001, .005), ("warmup", .07, .9), ("clip", 5., .1), ("weight_decay", .01, 5.),
                           ("seed", 0, 1), ("batch", 2, 4),
                           ("seconds", .25, .5), ("precision", "no", "bf16"), ("short", "join", "alone"),
                           ("epoch", 0, 9), ("validate_every", 0, 1)):
        go(f"{name} = {old!r}, not {new!r}", replace(P, **{name: new}))
    go("clip = 5.0, not 1.0; lr = 0.001, not 0.1; seed = 0, not 3; and 1 more",
       replace(P, lr=.1, clip=1., seed=3, warmup=.5))
    go(p=replace(P, log_with="tensorboard", slurm=dict(distil=dict(hours=1))))   # neither decides anything
    monkeypatch.setattr(training, "record",
                        lambda p: (r := record(p)) | dict(versions=r["versions"] | dict(torch="1.0")))
    go(f"versions.torch = '{torch.__version__.partition('+')[0]}.*', not '1.0'")

def test_the_command_takes_the_notebooks_parameters(monkeypatch, capsys):
    seen = []
    monkeypatch.setattr(distill, "distil", lambda *a: seen.append(a) or ("folder", None))
    distill.main("--profile mini --teacher ensemble --corpus own --steps 3 --seed 1 --out here "
                 "--set loss=cl accumulate=2".split())
    assert seen == [(replace(profile("mini"), loss="cl", accumulate=2), "ensemble", "own", 3, 1, "here")]
    assert capsys.readouterr().out == "folder\n"
    distill.main([])
    assert seen[1] == (profile("mini"), "speech", "", 0, None, "")
    distill.main("--set lr=0.5 seed=2 --set batch=4".split())
    assert seen[2][0] == replace(profile("mini"), lr=.5, seed=2, batch=4)
    for wrong in (["--set", "los=cl"], ["--set", "lr"], ["--profile", "nowhere.toml"]):
        with pytest.raises(SystemExit): distill.main(wrong)
    said = capsys.readouterr().err
    assert "los is no setting; use one of name, " in said and "lr = '' cannot be read as float" in said
    assert "nowhere.toml is not a file" in said
    def stopped(*_): raise KeyboardInterrupt
    monkeypatch.setattr(distill, "distil", stopped)
    with pytest.raises(SystemExit) as e: distill.main([])
    assert e.value.code == 130 and capsys.readouterr().err.strip() == "stopped; the same command continues from here"

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
    if world > 1:
        os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world), LOCAL_WORLD_SIZE=str(world),
                          MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    # as in a new process: nothing may depend on it
    for seed in (random.seed, np.random.seed, torch.manual_seed): seed(os.getpid())
    p = replace(P, batch=4, seconds=job["seconds"])
    crops = Deadly(job["audio"], p.batch, p.seconds, short=job["short"], epoch=job["epoch"])
    if rank == 0: crops.kill_at = job["kill_at"]
    d = distiller(loss=job["loss"], **STILL if job["still"] else {{}})
    if job["epoch"]: d.cache = TargetCache("float32", 3e5, job["folder"] + "/targets")
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
    """Train in new processes, forked from one that has imported everything and done nothing: exit code, and the
    weights by process."""
    env = dict(os.environ, OMP_NUM_THREADS="1", ACCELERATE_USE_CPU="true", HF_HUB_OFFLINE="1")
    command = [sys.executable, "-c", SERVER.format(tests=os.path.dirname(__file__))]
    log = tmp_path_factory.mktemp("server")/"stderr"
    with open(log, "w+") as says, subprocess.Popen(command, env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                                                   stderr=says, text=True) as server:
        def train(folder, *audio, world, kill_at=-1, **job):
            job = dict(loss="kd", still=False, seconds=.25, short="join", epoch=0) | job
            given = dict(folder=str(folder), audio=[str(a) for a in audio], world=world, kill_at=int(kill_at))
            server.stdin.write(json.dumps(job | given)+"\n")
            server.stdin.flush()
            code = int(server.stdout.readline())
            if code: return code, None
            return code, [torch.load(folder/f"weights-{r}.pt", weights_only=True) for r in range(world)]
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
        Dataset.from_dict(dict(audio=audio)).cast_column("audio",
                                                         Audio(decode=False)).to_parquet(folder/f"train-{s}.parquet")
    return f"stream:{folder}"

@pytest.mark.parametrize("world", [1, 2])
def test_killed_with_sigkill_it_ends_with_the_same_weights(tmp_path, train, stream, world):
    assert train(tmp_path/"killed", stream, world=world,
                 kill_at=np.random.default_rng().integers(2, 7))[0] == -signal.SIGKILL
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
    """Recordings of 1.1 s and 2.3 s, and of 5 s: in crops of two seconds, halves and wholes of the first and wholes of
    the second."""
    folder = tmp_path_factory.mktemp("two")
    for name, lengths in dict(short=(1.1, 2.3, 1.1, 2.3), long=(5., 5.)).items():
        (folder/name).mkdir()
        for i, s in enumerate(lengths):
            sf.write(folder/f"{name}/{i}.wav", np.random.default_rng(i).normal(0, .1, int(16_000*s)), 16_000)
    return folder/"short", folder/"long"

ALONE = dict(short="alone", seconds=2., epoch=3)

def test_batches_of_several_lengths_in_two_processes_and_killed(tmp_path, train, two_corpora):
    "Two epochs with cached targets, in a space too small for all of them."
    jobs = dict(world=2, still=True, **ALONE)
    assert train(tmp_path/"killed", *two_corpora, kill_at=np.random.default_rng().integers(2, 7),
                 **jobs)[0] == -signal.SIGKILL
    (_, killed), (_, whole) = (train(tmp_path/d, *two_corpora, **jobs) for d in ("killed", "whole"))
    assert len({weights_hash(w) for w in killed + whole}) == 1
    assert_close_runs(train(tmp_path/"one", *two_corpora, **jobs | dict(world=1))[1], whole)

# --- at real size

def test_the_command_distils_checkpoints_of_real_size(tmp_path):
    """θ₀ of HuBERT Base, taught by MERT v0-public: random weights in the hub's own format, the hub profile, the command
    as a user types it (but for bfloat16, which few CPUs have)."""
    torch.manual_seed(0)
    mert = dict(model_type="mert_model", architectures=["MERTModel"], sample_rate=16_000, feature_extractor_cqt=False,
                attention_relax=-1.0,
                auto_map=dict(AutoConfig="configuration_MERT.MERTConfig", AutoModel="modeling_MERT.MERTModel"))
    old = lambda k: k.replace("parametrizations.weight.original0",
                              "weight_g").replace("parametrizations.weight.original1", "weight_v")
    model, file = HubertModel(HubertConfig()), tmp_path/"pytorch_model.bin"
    torch.save({old(k): v for k, v in model.state_dict().items()}, file)
    for name, more in dict(hubert={}, mert=mert).items():
        (tmp_path/name).mkdir()
        (tmp_path/name/file.name).hardlink_to(file)
        (tmp_path/name/"config.json").write_text(json.dumps(model.config.to_dict() | more))
        extractor = dict(feature_extractor_type="Wav2Vec2FeatureExtractor", sampling_rate=16_000, do_normalize=True)
        (tmp_path/name/"preprocessor_config.json").write_text(json.dumps(extractor))
    for split in ("train-clean-100", "dev-clean"):
        (tmp_path/"audio"/split).mkdir(parents=True)
        for i in range(2):
            sf.write(tmp_path/f"audio/{split}/{i}.flac", np.random.default_rng(i).normal(0, .1, 30_000), 16_000)
    (tmp_path/"audio/train-clean-100/9.wav").write_text("Dear Sir or Madam")
    env = dict(os.environ, OMP_NUM_THREADS="2", ACCELERATE_USE_CPU="true", HF_HUB_OFFLINE="1",
               DISTILLTV_HOME=str(tmp_path/"runs"), DISTILLTV_SPEECH=str(tmp_path/"audio"))
    command = ("-m distilltv.distill --profile hub --teacher music --corpus speech --steps 2 "
               "--set batch=2 seconds=.5 short=alone precision=no validate_every=0")
    done = subprocess.run([sys.executable, *command.split(), f"teachers.speech={tmp_path}/hubert",
                           f"teachers.music={tmp_path}/mert"], env=env, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    folder = tmp_path/"runs/hub/students/speech/music-2steps"
    record, log = json.loads((folder/"result.json").read_text()), pd.read_csv(folder/"log.csv")
    plain = HubertModel.from_pretrained(folder)
    assert done.stdout.strip() == str(folder) and sum(p.numel() for p in plain.parameters()) == 23_491_200
    assert weights_hash(plain) != record["inputs"]["base"] == weights_hash(load_encoder(tmp_path/"runs/hub/base"))
    assert log.step.tolist() == [0, 1] and {"music_4", "music_8", "music_12", "gradient"} <= set(log)
    assert log.notna().all(axis=None)
    found, asked = record["metrics"], record["parameters"]
    assert found["quarantined_files"] == 1 and found["audio_seconds"] == 2 and found["valid_speech"] > 0
    assert (asked["short"], asked["corpus"]) == ("alone", "speech")
    assert list(pd.read_csv(folder/"quarantine.csv").path) == [str(tmp_path/"audio/train-clean-100/9.wav")]

def test_a_saved_base_of_another_shape_is_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("DISTILLTV_HOME", str(tmp_path))
    save_encoder(HubertModel(HubertConfig(**TINY)), tmp_path/"teacher")
    p = replace(P, name="hub", init="speech", teachers=P.teachers | dict(speech=str(tmp_path/"teacher")))
    assert base_of(p).config.hidden_size == 48
    torch.manual_seed(1)
    save_encoder(HubertModel(HubertConfig(**TINY)), tmp_path/"another")
    another = replace(p, teachers=p.teachers | dict(speech=str(tmp_path/"another")))
    for changed, says in ((replace(p, student_layers=3), "layers = 2, not 3"),
                          (replace(p, student_width=96), "width = 0, not 96"), (another, "teacher_hash = '")):
        with pytest.raises(ValueError, match=f"hub/base holds another θ₀, with {says}"): base_of(changed)
    (tmp_path/"hub/base/distilltv.json").write_text("{")
    with pytest.raises(ValueError, match="hub/base/distilltv.json is not JSON"): base_of(p)
    monkeypatch.setenv("DISTILLTV_HOME", str(tmp_path/"wide"))
    wide = base_of(replace(p, student_width=96, student_heads=2)).config
    assert (wide.hidden_size, wide.num_attention_heads) == (96, 2)

def test_a_base_belongs_to_its_teachers_weights_and_not_to_their_place(tmp_path, monkeypatch):
    """A teacher that has moved is the same; another one in the same place is not. The mini profile has its θ₀ shipped,
    unless its teacher is another."""
    monkeypatch.setenv("DISTILLTV_HOME", str(tmp_path))
    save_encoder(HubertModel(HubertConfig(**TINY)), tmp_path/"a/teacher")
    p = Profile("three", dict(sound=str(tmp_path/"a/teacher")), licence="CC-BY-4.0")
    first = weights_hash(base_of(p))
    (tmp_path/"a").rename(tmp_path/"b")
    moved = replace(p, teachers=dict(sound=str(tmp_path/"b/teacher")))
    assert weights_hash(base_of(moved)) == first and base_of(moved).distilltv["licence"] == "CC-BY-4.0"
    save_encoder(HubertModel(HubertConfig(**TINY | dict(hidden_size=96))), tmp_path/"b/teacher")
    with pytest.raises(ValueError, match="three/base holds another θ₀, with teacher_hash"): base_of(moved)
    assert weights_hash(base_of(profile("mini"))) == weights_hash(load_encoder(data_dir()/"base"))
    assert not (tmp_path/"mini").exists()
    other = replace(profile("mini"), init="music")
    assert (weights_hash(base_of(other)) == weights_hash(load_encoder(tmp_path/"mini/base"))
            != weights_hash(load_encoder(data_dir()/"base")))

@pytest.fixture(scope="module")
def tiny_three(tmp_path_factory):
    "A profile of three domains: tiny teachers, noise to train on, noise to validate on."
    top = tmp_path_factory.mktemp("three")
    for i, d in enumerate(ALL):
        torch.manual_seed(i)
        save_encoder(HubertModel(HubertConfig(**TINY)), top/f"teachers/{d}")
        for j, split in enumerate(("train", "dev-clean")):
            (top/f"audio/{d}/{split}").mkdir(parents=True)
            for k in range(3): sf.write(top/f"audio/{d}/{split}/{k}.wav", noise(100*i+10*j+k), 16_000)
    return Profile("three", {d: str(top/f"teachers/{d}") for d in ALL}, {d: str(top/f"audio/{d}") for d in ALL},
                   steps=4, batch=3, seconds=.25, lr=1e-3)

def test_students_of_three_domains(tmp_path, monkeypatch, tiny_three):
    "Each endpoint and the ensemble; the heads beside a student give the loss that was recorded, and its parts."
    monkeypatch.setenv("DISTILLTV_HOME", str(tmp_path))
    p, hashes = replace(tiny_three, validate_every=2), set()
    for who, domains in {**{d: (d,) for d in ALL}, "ensemble": ALL}.items():
        folder, log = distil(p, who)
        assert folder == tmp_path/f"three/students/both/{who}" and set(load_heads(folder)) == set(domains)
        hashes.add(weights_hash(student := load_encoder(folder)))
        assert student.distilltv["base_hash"] == weights_hash(base_of(p)) and "licence" not in student.distilltv
        again = Distiller(student, {d: load_encoder(p.teachers[d]) for d in domains}, p.predict)
        again.heads.load_state_dict(load_heads(folder).state_dict())
        want, found = json.loads((folder/"result.json").read_text())["metrics"], validate(again, validation_crops(p))
        assert set(found) == {f"valid_{a}" + (f"/{d}_{l}" if l else "") for a in ALL for d in domains
                              for l in (0, 4, 8, 12)}
        for k, v in found.items(): assert v == pytest.approx(want[k], rel=1e-3)
        for a in ALL:
            assert found[f"valid_{a}"] == pytest.approx(sum(found[f"valid_{a}/{d}_{l}"] for d in domains
                                                            for l in (4, 8, 12))/3)
        assert set(found) | {"validation", "gradient"} <= set(log) and log["valid_sound"].notna().tolist()[-1]
        assert log.validation.dropna().iloc[-1] == pytest.approx(np.mean([log[f"valid_{a}"].iloc[-1] for a in ALL]))
    assert len(hashes) == 4

def test_a_teacher_that_is_refused_leaves_nothing_behind(tmp_path, monkeypatch, tiny_three):
    monkeypatch.setenv("DISTILLTV_HOME", str(tmp_path/"home"))
    raw = load_encoder(tiny_three.teachers["sound"])
    raw.do_normalize = False
    p = replace(tiny_three, teachers=tiny_three.teachers | dict(sound=str(save_encoder(raw, tmp_path/"raw"))))
    for who in ("sound", "ensemble"):
        with pytest.raises(ValueError, match="the sound teacher wants waveforms as they are"): distil(p, who)
    with pytest.raises(ValueError, match="speech has 12 layers|layers = 13"):
        distil(replace(p, predict=(4, 13)), "speech")
    monkeypatch.setattr(training.importlib.util, "find_spec", lambda name: None)
    for change, says in ((dict(short="alone", batch=4), "4 crops cannot be divided .* 3 corpora .* a multiple of 3"),
                         (dict(loss="cl", accumulate=2), "use accumulate=1"),
                         (dict(log_with="trackio"), "pip install trackio"),
                         (dict(cache="float16"), "set epoch to a number of steps"),
                         (dict(batch=2), "batch = 2 is fewer than the 3 corpora .*: choose at least 3"),
                         (dict(batch=1, loss="cl", corpus="sound"), "batch = 1 is too small for loss = cl"),
                         (dict(precision="fp16"), "precision = fp16 needs a GPU"),
                         (dict(attention="flash_attention_2"), "pip install flash-attn"),
                         (dict(compile="nonsense"), "compile = 'nonsense' is no backend of torch.compile"),
                         (dict(seconds=.02), "seconds = 0.02 is too short for the teacher of speech")):
        with pytest.raises(ValueError, match=says): distil(replace(tiny_three, **change), "ensemble")
    (tmp_path/"mine").mkdir()
    (tmp_path/"mine/notes.txt").touch()
    for out, says in ((tmp_path/"mine", "mine holds notes.txt"), ("~no-such-user/x", "no such user's home")):
        with pytest.raises(ValueError, match=says): distil(replace(tiny_three, steps=10**6), "sound", out=out)
    assert not list((tmp_path/"home").glob("three/**/*")) and len(list((tmp_path/"mine").iterdir())) == 1

def test_a_seed_is_one_thing_and_is_recorded_as_used(tmp_path, monkeypatch, tiny_three):
    """From the profile, from a call or from `--set`: the same student, in a folder of its own; records say what was
    used."""
    monkeypatch.setenv("DISTILLTV_HOME", str(tmp_path))
    monkeypatch.setattr(distill, "get_profile", lambda name: tiny_three)
    def made(folder):
        return (json.loads((folder/"distilltv.json").read_text()),
                json.loads((folder/"result.json").read_text())["parameters"])
    ways = [distil(tiny_three, "sound", seed=3, out=tmp_path/"a")[0],
            distil(replace(tiny_three, seed=3), "sound", out=tmp_path/"b")[0]]
    for out, more in dict(c=["--seed", "3"], d=["--set", "seed=3", "lr=1e-3"]).items():
        distill.main(["--teacher", "sound", "--out", str(tmp_path/out), *more])
        ways.append(tmp_path/out)
    assert len({made(f)[0]["weights_hash"] for f in ways}) == 1
    plain, _ = distil(tiny_three, "sound")
    assert plain.name == "sound" and made(plain)[0]["weights_hash"] != made(ways[0])[0]["weights_hash"]
    other, _ = distil(replace(tiny_three, lr=9e-3, warmup=.5, clip=1.), "sound", seed=3, out=tmp_path/"e")
    for f, seed, lr in ((plain, 0, 1e-3), *((w, 3, 1e-3) for w in ways), (other, 3, 9e-3)):
        for record in made(f):
            assert (record["seed"], record["lr"], record["steps"], record["predict"]) == (seed, lr, 4, [4, 8, 12])
    assert [made(other)[1][k] for k in ("warmup", "clip", "batch", "seconds")] == [.5, 1, 3, .25]
    assert distil(tiny_three, "sound", seed=3)[0].name == "sound-seed3"

@pytest.fixture
def tiny_one(tiny_three):
    "Its third domain alone."
    return Profile("one", *(dict(sound=t["sound"]) for t in (tiny_three.teachers, tiny_three.audio)), steps=2, batch=3,
                   seconds=.25)

@pytest.fixture
def trained(monkeypatch):
    "Steps of each training; the code is of a known commit, `trained.commit`."
    class Trained(list): commit = "0123456789ab"
    seen = Trained()
    for module in ("distill", "encoders"): monkeypatch.setattr(f"distilltv.{module}.commit", lambda: seen.commit)
    def counted(*a, **k):
        seen.append(a[4])
        return fit(*a, **k)
    monkeypatch.setattr(distill, "fit", counted)
    return seen

def spoil(file): save_file({k: x+1 for k, x in load_file(file).items()}, file, dict(format="pt"))

def test_a_finished_student_is_not_trained_again(tmp_path, monkeypatch, tiny_one, trained, capsys):
    monkeypatch.setenv("DISTILLTV_HOME", str(tmp_path/"home"))
    for name in ("moved", "more"): shutil.copytree(tiny_one.audio["sound"], tmp_path/name)
    sf.write(tmp_path/"more/train/new.wav", noise(7), 16_000)
    moved, more = (replace(tiny_one, licence="MIT", audio=dict(sound=str(tmp_path/d))) for d in ("moved", "more"))
    folder, log = distil(tiny_one, "sound")
    for p in (tiny_one, moved):
        again, read = distil(p, "sound")
        assert again == folder and trained == [2]
        pd.testing.assert_frame_equal(read, log)
        assert f"{folder} is up to date; delete the folder to distil again" in capsys.readouterr().err
    def trains(p=tiny_one, **asked):
        before = len(trained)
        distil(p, "sound", out=folder, **asked)
        return len(trained) > before
    for damage in (lambda: spoil(folder/"model.safetensors"), (folder/"heads.safetensors").unlink,
                   (folder/"log.csv").unlink, (folder/"result.json").unlink,
                   lambda: (folder/"distilltv.json").write_text("[]"),
                   lambda: (folder/"model.safetensors").write_bytes(b"half")):
        damage()
        assert trains()
    assert not trains() and trains(steps=1) and trains(seed=3) and trains(replace(tiny_one, lr=.1)) and trains(more)
    monkeypatch.setattr(distill, "record", lambda p: record(p) | dict(versions=dict(torch="1.0")))
    assert trains(more)
    monkeypatch.setattr(distill, "record", record)
    for trained.commit in ("ba9876543210", "ba9876543210+", "unknown"):      # the last two name no code
        assert trains(more) and trains(more) == (trained.commit != "ba9876543210")

def test_validation_that_streams_have_none_of_is_said(tmp_path, monkeypatch, tiny_one, stream):
    monkeypatch.setenv("DISTILLTV_HOME", str(tmp_path))
    p = replace(tiny_one, audio=dict(sound=stream), validate_every=1)
    with pytest.warns(UserWarning, match="validate_every = 1 is not used, as nothing of a stream is held out"):
        assert "validation" not in distil(p, "sound")[1]

def test_reproduce_adopts_a_student_made_by_hand_and_trains_a_stale_one(tmp_path, monkeypatch, tiny_one, trained):
    monkeypatch.setenv("DISTILLTV_HOME", str(tmp_path/"home"))
    shutil.copytree(tiny_one.audio["sound"], tmp_path/"audio")
    text = (f"name = 'mine'\n[teachers]\nsound = {tiny_one.teachers['sound']!r}\n[audio]\nsound = 'audio'\n"
            "[training]\nsteps = 2\nbatch = 3\nseconds = 0.25\n")
    (tmp_path/"mine.toml").write_text(text, encoding="utf-8")
    runs = {r.id: r for r in grid(tmp_path/"mine.toml")}
    run = runs["distil/sound"]
    def trains():
        before = len(trained)
        execute(run, runs, how=lambda r: distil(r.profile, "sound"))
        assert fresh(run, runs)
        return len(trained) > before
    distil(profile(tmp_path/"mine.toml"), "sound")
    assert not trains()                                               # made by hand
    os.utime(tmp_path/"audio/train/0.wav", (0, 0))              # other audio, by the same name and as long
    assert trains()
    (tmp_path/"mine.toml").write_text(text + "lr = 1e-3", encoding="utf-8")
    assert trains()
    spoil(run.folder/"heads.safetensors")
    assert not fresh(run, runs) and trains()                          # a result that somebody changed
    (run.folder/"stamp.json").unlink()
    assert not trains()
    (run.folder/"stamp.json").unlink()
    (tmp_path/"mine.toml").write_text(text, encoding="utf-8")
    assert trains()                                                   # made by hand, of other values

def test_two_runs_side_by_side_share_a_cache_that_is_bounded(tmp_path, tiny_three):
    """Students of one seed need each other's targets; each is what it would be alone, and the folder stays within its
    bound."""
    p = replace(tiny_three, epoch=3, steps=9, cache="float16", cache_gb=5e-5)
    code = ("import sys; sys.path.insert(0, sys.argv[1]); from test_distill import *\n"
            "distil(Profile(**json.loads(sys.argv[2])), 'ensemble', out=sys.argv[3])")
    from dataclasses import asdict
    def start(home, out):
        env = dict(os.environ, OMP_NUM_THREADS="1", HF_HUB_OFFLINE="1", DISTILLTV_HOME=str(home))
        return subprocess.Popen([sys.executable, "-c", code, os.path.dirname(__file__), json.dumps(asdict(p)), out],
                                env=env, stderr=subprocess.DEVNULL)
    runs = [start(tmp_path/"alone", tmp_path/"one"), start(tmp_path/"shared", tmp_path/"two"),
            start(tmp_path/"shared", tmp_path/"three")]
    assert [r.wait(1800) for r in runs] == [0, 0, 0]
    assert len({weights_hash(load_encoder(tmp_path/f)) for f in ("one", "two", "three")}) == 1
    assert sum(f.stat().st_size for f in (tmp_path/"shared/cache/targets").iterdir()) <= 5e4

def test_a_student_without_heads_is_a_sentence(tmp_path, tiny_three):
    folder, _ = distil(tiny_three, "sound", out=tmp_path/"sound")
    (folder/"heads.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="no heads.safetensors.*02_distill"): load_heads(folder)
