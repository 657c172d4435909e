"Probes: batched training, cache keys, padding-free batches, groupings, and messages that explain."
import dataclasses, json, re
from fractions import Fraction
import numpy as np, pandas as pd, pytest, soundfile as sf, torch, torchaudio
from hypothesis import example, given, settings, strategies as st
from transformers import HubertConfig, HubertModel
from distilltv import answers as N, features as E, fit as F, frozen as Z, letters as L
from distilltv import mini as M, probe as P, tasks as T
from distilltv.audio import normalise
from distilltv.corpora import read_shard
from distilltv.encoders import hidden_states, save_encoder, weights_hash
from distilltv.merge import merge
from distilltv.files import _trim
from distilltv.runs import data_dir, root

torch.set_num_threads(1)
COST = ["seconds", "peak_mb"]     # what differs between two runs of the same
SHAPE = dict(hidden_size=24, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32, conv_dim=(8,)*7,
             num_conv_pos_embeddings=16, num_conv_pos_embedding_groups=2, feat_proj_layer_norm=False, layerdrop=0.)

def hubert(seed=0):
    torch.manual_seed(seed)
    return HubertModel(HubertConfig(**SHAPE)).eval()

@pytest.fixture
def runs(tmp_path, monkeypatch):
    monkeypatch.setenv("DISTILLTV_HOME", str(tmp_path/"runs"))
    return tmp_path/"runs"

@pytest.fixture
def corpus(tmp_path):
    "Two classes of tones in one shard: 48 short clips of several lengths, half an octave apart."
    rng, parts, rows, at = np.random.default_rng(0), [], [], 0
    for i in range(48):
        n = 6000 + 320*(i % 5) + 17
        hz = 300 if i % 2 else 900
        parts.append((.3*np.sin(2*np.pi*hz*np.arange(n)/16000) + .01*rng.standard_normal(n)).astype(np.float32))
        rows.append(dict(id=f"n{i}", file="a.flac", start=at, end=at+n,
                         split=("train", "train", "valid", "test")[i//2 % 4], kind="note", bank="b", source="s",
                         license="CC0",
                         velocity="1", program=str(i), family=("low", "high")[i % 2], pitch=str(i % 2), key="",
                         piece=""))
        at += n
    (tmp_path/"music").mkdir()
    sf.write(tmp_path/"music/a.flac", np.concatenate(parts), 16000)
    pd.DataFrame(rows).to_csv(tmp_path/"music/metadata.csv", index=False)
    return tmp_path

def toy(n=120, d=6, layers=1, seed=0):
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(layers, n, d, generator=g)
    return x, (x[-1, :, :3] + .3*torch.randn(n, 3, generator=g)).argmax(-1)

def framed(x, y, seed=0):
    "Items of two to six frames, of which the last tells the class, the others are noise; `nan` where there is none."
    g = torch.Generator().manual_seed(seed)
    frames = torch.randn(*x.shape[:2], 6, x.shape[-1], generator=g)
    n = torch.randint(2, 7, (x.shape[1],), generator=g)
    for i, k in enumerate(n): frames[:, i, k-1], frames[:, i, k:] = x[:, i], torch.nan
    return frames

@pytest.mark.parametrize("layers, hidden, attend",
                         [(1, 0, False), (4, 0, False), (1, 16, False), (3, 16, False), (1, 0, True), (3, 0, True)])
def test_batched_probes_equal_probes_trained_one_by_one(layers, hidden, attend):
    x, y = toy(layers=layers)
    if attend: x = framed(x, y)
    kw = dict(xv=x, yv=y, classes=3, steps=60, batch=32, hidden=hidden, attend=attend)
    lrs, seeds = (3e-3, 3e-2), (4, 5)
    both = F.fit_probes(x, y, lrs=lrs, seeds=seeds, **kw)
    for s, seed in enumerate(seeds):
        for r, lr in enumerate(lrs):
            one = F.fit_probes(x, y, lrs=(lr,), seeds=(seed,), **kw)
            for k, q in both["p"].items(): torch.testing.assert_close(q[s, r], one["p"][k][0, 0], atol=2e-5, rtol=1e-4)
            assert both["valid"][s, r] == one["valid"][0, 0]

def test_one_copy_equals_torch_adamw():
    x, y = toy()
    ours = F.fit_probes(x, y, x, y, 3, lrs=(1e-2,), seeds=(7,), steps=20, batch=120, every=20)
    g = torch.Generator().manual_seed(7)
    W, b = (torch.randn(6, 3, generator=g)*.01).requires_grad_(), torch.zeros(3, requires_grad=True)
    opt = torch.optim.AdamW([W, b], 1e-2, weight_decay=1e-2)
    for _ in range(20):
        o = torch.randperm(120, generator=g)
        opt.zero_grad(); torch.nn.functional.cross_entropy(x[0, o] @ W + b, y[o]).backward(); opt.step()
    torch.testing.assert_close(ours["p"]["W"][0, 0], W.detach(), atol=1e-5, rtol=1e-4)

@pytest.mark.parametrize("layers", [1, 3])
def test_attention_starts_as_the_mean_and_weights_frames_by_a_softmax(layers):
    x, y = toy(n=40, layers=layers)
    f, g = framed(x, y), torch.Generator().manual_seed(1)
    W, b, q = torch.randn(2, 1, 6, 3, generator=g), torch.zeros(2, 1, 1, 3), torch.zeros(2, 1, 6)
    a = torch.randn(2, 1, layers, generator=g) if layers > 1 else None
    torch.testing.assert_close(F.logits(f[:, None], W, b, a, q=q), F.logits(f.nanmean(2)[:, None], W, b, a), atol=1e-5,
                               rtol=1e-4)
    q = torch.randn(2, 1, 6, generator=g)
    for s in range(2):
        h = f[0] if a is None else torch.einsum("lntd,l->ntd", f, a[s, 0].softmax(0))
        for i in range(40):
            there = h[i][~h[i, :, 0].isnan()]
            want = ((there @ q[s, 0]).softmax(0) @ there) @ W[s, 0]
            torch.testing.assert_close(F.logits(f[:, None], W, b, a, q=q)[s, 0, i], want, atol=1e-5, rtol=1e-4)

def test_attention_finds_the_frame_that_a_mean_hides():
    g = torch.Generator().manual_seed(0)
    y = torch.randint(0, 2, (300,), generator=g)
    x = .1*torch.randn(1, 300, 8, 4, generator=g)
    at = torch.randint(0, 7, (300,), generator=g)
    for i, t in enumerate(at): x[0, i, t, 0], x[0, i, t, 1], x[0, i, t+1, 1] = 2., 2.*y[i] - 1, 1 - 2.*y[i]
    parts = lambda v: (v[:, :200], y[:200], v[:, 200:], y[200:], 2)
    assert F.fit_probes(*parts(x.mean(2)),
                        seeds=(0,))["valid"].max() < .75 < .95 < F.fit_probes(*parts(x), seeds=(0,),
                                                                              attend=True)["valid"].max()

def test_project_pool_classify_is_one_matrix():
    "The reference probe, Linear - mean - Linear, is the linear map that we train on the mean."
    h, p, c = torch.randn(9, 6).double(), torch.nn.Linear(6, 5).double(), torch.nn.Linear(5, 3).double()
    W, b = c.weight @ p.weight, c.weight @ p.bias + c.bias
    torch.testing.assert_close(c(p(h).mean(0)), W @ h.mean(0) + b)

def test_the_learned_sum_finds_the_layer_with_the_answer():
    x, y = toy(n=300, layers=3)
    fit = F.fit_probes(x, y, x, y, 3, lrs=(3e-2,), seeds=(0,), steps=200)
    assert fit["p"]["a"][0, 0].argmax() == 2 and fit["valid"].item() > .8

@settings(max_examples=30, deadline=None)
@given(st.integers(1, 40), st.lists(st.tuples(st.integers(0, 12000), st.integers(1, 4000)), min_size=1, max_size=5))
def test_pool_is_the_mean_of_frames_whose_centre_is_inside(frames, spans):
    h = torch.randn(2, frames, 3)
    lo, hi = np.array([a for a, _ in spans]), np.array([a + b for a, b in spans])
    got = E.pool(h, lo, hi)
    for i, (a, b) in enumerate(zip(lo, hi)):
        inside = [t for t in range(frames) if a <= 320*t
                  + 200 < b] or [min(range(frames), key=lambda t: abs(320*t + 200 - (a+b)/2))]
        torch.testing.assert_close(got[:, i], h[:, inside].mean(1))

def test_probes_hear_in_single_precision_whatever_a_training_run_has_set(monkeypatch):
    def precision(): return torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    heard, real = [], Z.hidden_states
    monkeypatch.setattr(Z, "hidden_states", lambda *a: (heard.append(precision()), real(*a))[1])
    before = precision()
    torch.set_float32_matmul_precision("high")
    try:
        Z.open_encoder("random")(torch.randn(1, 16000))
        assert set(heard) == {("highest", False)} and precision() == ("high", before[1])
    finally: torch.set_float32_matmul_precision(before[0])

def test_pool_knows_when_the_frames_of_another_rate_are():
    "At 24 kHz the frames are centred on 16 kHz samples 133.3, 346.7 and 560."
    h, clock = torch.tensor([[[1.], [3.], [10.]]]), dict(hop=Fraction(640, 3), window=Fraction(800, 3))
    assert E.pool(h, [0, 0, 346], [346, 347, 900], **clock).flatten().tolist() == [1., 2., 6.5]
    assert E.pool(h, [0, 0], [214, 216], hop=320, window=430).flatten().tolist() == [1., 1.]
    assert E.pool(h, [215], [536], hop=320, window=430).flatten().tolist() == [2.]

def of_24_khz():
    model = hubert()
    model.sample_rate = 24_000
    return model

def test_a_model_of_24_khz_hears_24_khz(runs, corpus, tmp_path):
    e, wav = Z.open_encoder(str(save_encoder(of_24_khz(), tmp_path/"t24"))), normalise(torch.randn(2, 9000))
    as_taught = normalise(torchaudio.functional.resample(wav, 16_000, 24_000))    # what a student's teacher heard
    assert torch.equal(e(wav), hidden_states(hubert(), as_taught))
    assert (e.sample_rate, e.hop, e.window) == (16_000, Fraction(640, 3), Fraction(800, 3))
    table, usual = M.notes(corpus), Z.Transformer(hubert())
    assert E.features_key(e, table, corpus) != E.features_key(usual, table, corpus)
    x = E.features(e, table, corpus)
    assert not np.allclose(x, E.features(usual, table, corpus), atol=1e-2)
    frames = E.frame_features(e, table, corpus)
    np.testing.assert_allclose(np.nanmean(frames[0], 1), x[-1], atol=1e-4)
    def score(*how):
        d = P.probe(Z.Transformer(*how), "pitch", seeds=2, root=str(corpus))
        return round(d[d.probe == "linear"].score.mean(), 3)
    quick = P.quick_probe(of_24_khz(), "pitch", root=str(corpus)).score[0]
    assert quick == score(of_24_khz()) == score(hubert(), 24_000)

@pytest.mark.parametrize("normal", [True, False])
def test_an_encoder_hears_waveforms_as_it_wants_them(runs, corpus, tmp_path, monkeypatch, normal):
    model, table = hubert(), M.notes(corpus)
    model.do_normalize = normal
    e, heard = Z.open_encoder(str(save_encoder(model, tmp_path/"t"))), []
    monkeypatch.setattr(Z, "hidden_states", lambda *a: (heard.append(a[1]), hidden_states(*a))[1])
    E.extract(e, table, corpus), L._frames(e, table.iloc[0], corpus)
    assert len(heard) > 2 and all((abs(w.std() - 1) < .01) == normal for wav in heard for w in wav)
    assert (E.features_key(e, table, corpus) == E.features_key(Z.Transformer(hubert()), table, corpus)) == normal

def test_batches_are_free_of_padding(runs, corpus):
    e, table = Z.check_encoder(Z.Transformer(hubert())), M.notes(corpus)
    together = E.extract(e, table, corpus)
    alone = np.concatenate([E.extract(e, table.iloc[[i]], corpus) for i in range(len(table))], 1)
    np.testing.assert_allclose(together, alone, atol=1e-4)

def test_cache_is_keyed_by_weights_and_audio_and_survives_damage(runs, corpus):
    a, b, table = Z.Transformer(hubert(0)), Z.Transformer(hubert(1)), M.notes(corpus)
    fa, fb = E.features(a, M.notes(corpus), corpus), E.features(b, M.notes(corpus), corpus)
    assert not np.allclose(fa, fb) and E.features_key(a, table, corpus) != E.features_key(b, table, corpus)
    f = runs/"cache"/f"{E.features_key(a, table, corpus)}.npy"
    f.write_bytes(f.read_bytes()[:200])
    np.testing.assert_array_equal(E.features(a, M.notes(corpus), corpus), fa)
    before = E.features_key(a, table, corpus)
    x, _ = sf.read(corpus/"music/a.flac"); x[0] += .1
    sf.write(corpus/"music/a.flac", x, 16000)
    assert E.features_key(a, table, corpus) != before

def test_a_shard_that_is_written_again_is_heard_again(runs, corpus):
    e, file = Z.LogMel(), corpus/"music/a.flac"
    before, x = E.features(e, M.notes(corpus), corpus), read_shard(file)
    sf.write(file, x[::-1], 16000)
    np.testing.assert_array_equal(read_shard(file), x[::-1])
    assert not np.allclose(E.features(e, M.notes(corpus), corpus), before)

def test_same_weights_in_another_class_of_name_share_a_key():
    class Renamed(Z.Transformer): pass
    assert Z.Transformer(hubert()).hash == Renamed(hubert()).hash

def test_same_weights_in_another_configuration_have_a_key_of_their_own(corpus):
    usual, table = hubert(), M.notes(corpus)
    other = HubertModel(HubertConfig(**usual.config.to_dict() | dict(hidden_act="relu")))
    other.load_state_dict(usual.state_dict())
    a, b = Z.Transformer(usual), Z.Transformer(other)
    assert a.hash == b.hash and E.features_key(a, table, corpus) != E.features_key(b, table, corpus)

def test_mert_folders_open_without_their_code(tmp_path):
    hubert().save_pretrained(tmp_path/"mert")
    f = tmp_path/"mert/config.json"
    f.write_text(json.dumps(json.loads(f.read_text())
                            | dict(model_type="mert_model", sample_rate=16000,
                                   auto_map=dict(AutoModel="modeling_MERT.MERTModel"))))
    (tmp_path/"mert/modeling_MERT.py").write_text("raise SystemExit('this code must never run')")
    assert Z.open_encoder(str(tmp_path/"mert")).hash == Z.Transformer(hubert()).hash

def test_cache_is_bounded(runs, corpus):
    for s in range(3): E.features(Z.Transformer(hubert(s)), M.notes(corpus), corpus, most=2e6)
    size = lambda: sum(f.stat().st_size for f in (runs/"cache").glob("*.npy"))
    _trim(runs/"cache", 1)
    assert len(list((runs/"cache").glob("*.npy"))) == 1 and size() < 2e6

@pytest.mark.parametrize("note", ["", "[]", "[[", '{"0": 3}', '{"0": null, "1": [1, 2]}', '{"0": [1, 1, null]}'])
def test_a_damaged_note_of_hashes_is_as_if_it_were_not_there(runs, tmp_path, note):
    names = [str(i) for i in range(257)]
    for n in names: (tmp_path/n).write_text(n)
    hashes = E.audio_hashes(names, tmp_path)
    known, = (runs/"cache/hashes").iterdir()
    known.write_text(note)
    assert E.audio_hashes(names, tmp_path) == hashes and set(json.loads(known.read_text())) == set(names)

def test_a_solvable_task_is_solved_and_predictions_are_kept(runs, corpus, tmp_path):
    d = P.probe(Z.open_encoder("logmel"), "instrument,pitch", seeds=3, root=str(corpus), out=tmp_path/"out")
    linear = d[d.probe == "linear"]
    assert (linear.score == 1).all() and set(linear.seed) == {0, 1, 2} and (d[d.probe == "knn"].score == 1).all()
    z = np.load(tmp_path/"out/predictions.npz", allow_pickle=False)
    assert z["pitch/pred"].shape == (3, linear.n_test.iloc[0]) and (z["pitch/pred"] == z["pitch/true"]).all()
    assert pd.read_csv(tmp_path/"out/scores.csv").columns.tolist() == P.COLUMNS
    assert (tmp_path/"out/result.json").exists()
    again = P.probe("logmel", "instrument,pitch", seeds=3, root=str(corpus))
    pd.testing.assert_frame_equal(d.drop(columns=COST), again.drop(columns=COST))

def test_scores_of_other_tasks_stay_and_each_is_written_when_it_is_done(runs, corpus, tmp_path, monkeypatch):
    def probe(tasks, e="logmel", to="out"): return P.probe(e, tasks, seeds=1, root=str(corpus), out=tmp_path/to)
    def there(at="out"):
        with np.load(tmp_path/at/"predictions.npz") as z: kept = {k.split("/")[0] for k in z}
        scores = pd.read_csv(tmp_path/at/"scores.csv", dtype=str).set_index("task").drop(columns=COST)
        assert set(scores.index) == kept
        return scores
    probe("pitch")
    first = there()
    assert set(probe("instrument").task) == {"instrument"}       # what is asked for is returned
    pd.testing.assert_frame_equal(there().loc[["pitch"]], first)
    whole = P.check_leakage
    monkeypatch.setattr(P, "check_leakage", lambda t, root: whole(t, root) if t.name == "pitch" else 1/0)
    other = Z.Transformer(hubert())
    with pytest.raises(ZeroDivisionError): probe("pitch,instrument", other, "other")
    assert set(there("other").index) == {"pitch"} and not (tmp_path/"other/result.json").exists()
    with pytest.raises(ValueError, match="out holds the scores of other weights, logmel-8, not"): probe("pitch", other)
    (tmp_path/"out/scores.csv").write_text("no table")
    probe("pitch")
    pd.testing.assert_frame_equal(there(), first)

def test_a_row_names_what_it_was_made_from(runs, corpus, tmp_path):
    d = P.probe("logmel", "pitch", seeds=1, root=str(corpus), out=tmp_path/"out")
    assert d.commit.notna().all() and d.versions.str.contains("torch ").all() and (d.peak_mb > 10).all()
    assert (d.weights_hash == "logmel-80").all()
    rewrite(corpus, end=lambda m: m.end.astype(int) - 320)
    again = P.probe("logmel", "pitch", seeds=1, root=str(corpus))
    assert again.data_hash[0] != d.data_hash[0] == pd.read_csv(tmp_path/"out/scores.csv").data_hash[0]

def test_frames_are_those_that_are_averaged(runs, corpus):
    e, table = Z.Transformer(hubert()), M.notes(corpus)
    frames = E.frame_features(e, M.notes(corpus), corpus)
    assert frames.shape[:2] == (1, len(table))
    assert set(np.isfinite(frames[0, ..., 0]).sum(1)) == set((table.hi - table.lo - 400)//320 + 1)
    np.testing.assert_allclose(np.nanmean(frames[0], 1), E.features(e, M.notes(corpus), corpus)[-1], atol=1e-4)
    assert E.frame_features(e, M.notes(corpus), corpus, "sum").shape[0] == 3
    np.testing.assert_array_equal(E.frame_features(e, M.notes(corpus), corpus), frames)      # from the cache
    with pytest.raises(ValueError, match="the frames of 48 segments would take .* use the head `linear`"):
        E.frame_features(e, M.notes(corpus), corpus, largest=1e4)

def test_an_attentive_probe_solves_a_solvable_task(runs, corpus):
    d = P.probe(Z.open_encoder("logmel"), "instrument", seeds=2, root=str(corpus), head="attentive")
    assert d.encoder[0] == "logmel@attentive" and (d.score == 1).all() and set(d.probe) == {"attentive", "knn"}
    with pytest.raises(ValueError, match="head 'deep' is unknown; use linear, mlp, attentive"):
        P.score_task(Z.LogMel(), "pitch", root=str(corpus), head="deep")

@pytest.mark.parametrize("change",
                         [lambda m: m.encoder.layers[0].feed_forward.output_dense.weight.data.mul_(3),
                          lambda m: torch.nn.init.zeros_(m.feature_projection.projection.weight)])
@pytest.mark.parametrize("of", [E.features, E.frame_features])
def test_weights_changed_after_wrapping_do_not_meet_cached_features(runs, corpus, change, of):
    e = Z.Transformer(hubert())
    of(e, M.notes(corpus), corpus)
    of(e, M.notes(corpus), corpus)
    change(e.model)
    with pytest.raises(ValueError,
                       match="does not compute the features that the cache holds under its hash .* wrap it again"):
        of(e, M.notes(corpus), corpus)

def rewrite(corpus, **change):
    m = pd.read_csv(corpus/"music/metadata.csv", dtype=str, keep_default_na=False)
    for c, f in change.items(): m[c] = f(m)
    m.to_csv(corpus/"music/metadata.csv", index=False)
    T.forget_tables()

def test_bad_tables_are_named(corpus):
    rewrite(corpus, split=lambda m: m.split.replace("valid", "train"))
    with pytest.raises(ValueError, match="valid split of table notes is empty"): T.task_table("pitch", str(corpus))

def test_a_group_in_two_splits_is_named(corpus):
    rewrite(corpus, program=lambda m: "0",
            split=lambda m: m.split.replace("test", "valid").where(m.id != "n47", "test").where(m.id != "n46", "test"),
            pitch=lambda m: (m.id.str[1:].astype(int) % 4).astype(str))
    with pytest.raises(ValueError, match="'0/[0-3]' .column note. is in several"): T.task_table("pitch", str(corpus))

def test_labels_only_in_test_or_missing_are_set_apart(corpus):
    rewrite(corpus, family=lambda m: m.family.where(m.id != "n47", "unheard of").where(m.id != "n0", ""))
    t = T.task_table("instrument", str(corpus))
    assert t[~t.usable].id.tolist() == ["n0", "n47"]

def test_what_a_label_makes_unusable_is_counted_in_the_status(runs, corpus):
    rewrite(corpus, family=lambda m: m.family.where(m.id != "n47", "unheard of").where(m.id != "n0", ""))
    d = P.probe("logmel", "instrument", seeds=1, root=str(corpus))
    assert (d.status == "2 of 48 rows have no label, or one that training lacks").all() and (d.n_test == 11).all()

def test_labels_that_are_not_there_at_all(corpus):
    m = pd.read_csv(corpus/"music/metadata.csv")
    m.drop(columns="family").to_csv(corpus/"music/metadata.csv", index=False)
    T.forget_tables()
    with pytest.raises(ValueError, match="task instrument: table notes has no column family"):
        T.task_table("instrument", str(corpus))
    m.assign(family=np.nan).to_csv(corpus/"music/metadata.csv", index=False)
    T.forget_tables()
    with pytest.raises(ValueError, match="no family in the test and train and valid split is labelled"):
        T.task_table("instrument", str(corpus))

def test_nan_is_no_label(corpus):
    load = lambda root: M.notes(root).assign(family=lambda d: d.family.where(d.id != "n0", np.nan))
    t = dataclasses.replace(T.find_task("instrument"), load=load)
    assert M.notes(corpus).id[0] == "n0" and not t.split(corpus).usable[0]

def test_a_task_that_the_recording_chain_gives_away_is_refused(corpus):
    rewrite(corpus, bank=lambda m: m.family)
    with pytest.raises(T.Leak, match="bank, velocity alone predict family"): T.check_leakage("instrument", str(corpus))

def test_a_leak_costs_the_task_not_the_run(runs, corpus):
    rewrite(corpus, bank=lambda m: m.family, pitch=lambda m: (m.id.str[1:].astype(int)//2 % 2).astype(str))
    d = P.probe("logmel", "instrument,pitch", seeds=1, root=str(corpus))
    assert d[d.task == "instrument"].score.isna().all()
    assert d.status[0].startswith("not run: task instrument: bank, velocity alone predict")
    assert d[d.task == "pitch"].score.notna().all()

def leaky(monkeypatch, table, **task):
    "Leakage of a task with the columns `label` and `c`."
    load = lambda root: table.assign(id=range(len(table)), g=range(len(table)))
    monkeypatch.setitem(T.TASKS, "leaky", T.Task("leaky", "music", load, "label", "g", ("c",), **task))
    return T.leakage("leaky", "nowhere")

def test_leakage_by_hand(monkeypatch):
    splits = ["train"]*4 + ["valid"] + ["test"]*4
    t = pd.DataFrame(dict(label=list("aaab") + ["a"] + list("aabb"), c=list("xxxy") + ["x"] + list("xzyy"),
                          split=splits))
    l = leaky(monkeypatch, t)                    # `z` was never heard: the usual `a`, which is right
    assert (l["majority"], l["chain"], l["n"]) == (.5, 1., 4)
    # what the question is about may be known to both guesses: then `c` adds nothing
    assert leaky(monkeypatch, t.assign(d=t.c), about=("d",))["majority"] == 1.
    # folds: every item is guessed once
    l = leaky(monkeypatch, t.assign(split="train", fold=[0, 1, 2, 0, 1, 2, 0, 1, 2]), folds=3)
    assert l["n"] == 9

def test_leakage_of_numbers_and_tags(monkeypatch):
    splits = ["train"]*4 + ["valid"] + ["test"]*4
    t = pd.DataFrame(dict(label=["1|0", "1|0", "0|1", "0|1", "1|0", "1|0", "0|1", "1|0", "0|1"], c=list("xxyyxxyxy"),
                          split=splits))
    tags, blind = leaky(monkeypatch, t, answer=N.Tags(), metric="roc-auc"), leaky(monkeypatch, t.assign(c="x"),
                                                                                  answer=N.Tags(), metric="roc-auc")
    assert (tags["majority"], tags["chain"]) == (.5, 1.) and blind["chain"] == .5
    numbers = leaky(monkeypatch, t, answer=N.Numbers(), metric="r2")
    assert (numbers["majority"], numbers["chain"]) == (0., 1.)
    with pytest.raises(T.Leak, match="c alone predict label at 1.00, the majority at 0.00"):
        T.check_leakage("leaky", "nowhere")

@pytest.mark.parametrize("change, message", [
    (dict(sample_rate=24000), "wants 24000 Hz"), (dict(hop=None), "no whole number `hop`"),
    (dict(hop=160), "about 32[0-9] samples"), (dict(dim=12), "says dim = 12 and returns 80")])
def test_the_contract_explains(change, message):
    e = Z.LogMel()
    for k, v in change.items(): setattr(e, k, v)
    with pytest.raises(ValueError, match=message): Z.check_encoder(e)

@pytest.mark.parametrize("change, message", [
    (lambda h: h[0], r"expected \[layers, 2, frames, dim\]"),
    (lambda h: h.bfloat16(), "returns torch.bfloat16, expected"),
    (lambda h: h.numpy(), "returns float32, expected a tensor"), (lambda h: [h], "returns list, expected a tensor"),
    (lambda h: h.repeat(2, 1, 1, 1), "says depth = 1 and returns 2 layers"),
    (lambda h: h[:, :, ::2], "its hop is about 64[0-9] samples")])
def test_a_call_that_gives_something_else_is_explained(runs, corpus, change, message):
    "Before anything is computed, whoever hands the encoder over."
    class Other(Z.LogMel):
        def __call__(self, wav): return change(super().__call__(wav))
    with pytest.raises(ValueError, match=message): Z.check_encoder(Other())
    with pytest.raises(ValueError, match=message): P.probe(Other(), "pitch", root=str(corpus))

class Own(torch.nn.Module):
    "The least that is an encoder: a module with the three attributes, here of two layers."
    sample_rate, hop, dim = 16_000, 320, 80
    def forward(self, wav): return Z.LogMel()(wav).repeat(2, 1, 1, 1)

def test_a_module_with_the_three_attributes_is_an_encoder(runs, corpus):
    d = P.quick_probe(Own(), "pitch", root=str(corpus))
    assert (d.score == d.logmel).all()
    with pytest.raises(ValueError, match="encoder Own has no `depth`, the number of its layers"):
        P.probe(Own(), "pitch", root=str(corpus), view="sum", head="attentive")

@pytest.mark.parametrize("arguments, message", [
    (dict(encoder=[]), "no encoder is named"), (dict(tasks=[]), "no task is named"),
    (dict(tasks="pitch,pitch"), "task 'pitch' is named 2 times"),
    (dict(tasks=["pitch", T.find_task("pitch")]), "task 'pitch' is named 2 times"),
    (dict(encoder=["logmel", "logmel"]), "encoder 'logmel' is named more than once"),
    (dict(seeds=0), "seeds = 0 is not a whole number of at least 1"), (dict(seeds=1.5), "seeds = 1.5 is not"),
    (dict(seed=-1), "seed = -1 is not a whole number of at least 0"),
    (dict(encoder=["logmel", "random"], out="zw"), "out names zw for 2 encoders; give each a folder"),
    (dict(encoder=["logmel", "random"], out=["z"]), "out names z for 2"),
    (dict(encoder=["logmel", "random"], out=["z", "z"]), "out names z, z for 2"),
    (dict(out=["z", "w"]), "out names z, w for 1")])
def test_what_cannot_be_asked_is_said_before_anything_is_written(runs, tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=message): P.probe(**dict(encoder="logmel", tasks="pitch") | arguments)
    assert not list(tmp_path.iterdir())

def test_tasks_are_asked_for_by_name_or_as_they_are(runs, corpus):
    t = dataclasses.replace(T.find_task("pitch"), name="pitch-10", steps=10)
    d = P.probe("logmel", [t, "pitch"], seeds=1, root=str(corpus))
    assert set(d.task) == {"pitch-10", "pitch"} and T.task_names(t) == ["pitch-10"]

def test_any_transformers_audio_model_opens(tmp_path):
    from transformers import Wav2Vec2Config, Wav2Vec2Model
    Wav2Vec2Model(Wav2Vec2Config(**SHAPE)).save_pretrained(tmp_path/"w2v")
    e = Z.open_encoder(str(tmp_path/"w2v"))
    assert (e.hop, e.dim, e.depth) == (320, 24, 3) and e.info["role"] == "other"

MADE = dict(role="student", corpus="both", seed=0, steps=9)

@pytest.mark.parametrize("folder, record, name, role", [
    ("runs/x/students/both/paper", MADE | dict(teacher="paper"), "paper-both", "endpoint"),
    ("runs/x/students/both/mini-seed1", MADE | dict(teacher="mini", seed=1), "mini-seed1-both", "endpoint"),
    ("runs/x/students/both/base", MADE | dict(teacher="base"), "base-both", "endpoint"),
    ("runs/x/students/both/teachers", MADE | dict(teacher="teachers"), "teachers-both", "endpoint"),
    ("runs/teachers/students/both/a", MADE | dict(teacher="a"), "a-both", "endpoint"),
    ("runs/base/students/both/ensemble-2x", MADE | dict(teacher="ensemble"), "ensemble-2x-both", "ensemble"),
    ("runs/teachers/base", dict(role="base"), "base", "base"), ("runs/x/base", None, "base", "base"),
    ("runs/x/students/both/a", None, "a", "endpoint"), ("runs/x/teachers/a", None, "teacher-a", "teacher"),
    ("runs/unified", dict(lam=.4, corpus="both"), "lam-0.40-both", "merged"),
    ("runs/unified", dict(lam=.4, rule="ties"), "ties-lam-0.40", "merged"),
    ("runs/unified", dict(lam=.4, rule="task_arithmetic"), "lam-0.40", "merged"),
    ("runs/unified", None, "unified", "other"),
    ("mine/base", None, "base", "other"), ("mine/ensemble", None, "ensemble", "other"),
    ("mine/teachers", None, "teachers", "other"), ("mine/copy", MADE | dict(teacher="a"), "copy-both", "endpoint")])
def test_name_and_role_are_those_of_the_record_else_of_the_place(runs, tmp_path, folder, record, name, role):
    (tmp_path/folder).mkdir(parents=True)
    if record: (tmp_path/folder/"distilltv.json").write_text(json.dumps(record))
    found = Z._provenance(tmp_path/folder)
    assert (found["name"], found["role"]) == (name, role)

@pytest.mark.skipif(not (data_dir()/"results/scores.csv").exists(), reason="the mini results are not here")
def test_what_ships_is_called_as_in_the_results(runs):
    keys = ["encoder", "role", "taught_by", "distil_seed"]
    scored = pd.read_csv(data_dir()/"results/scores.csv", dtype=str)[keys].fillna("")
    scored = set(scored.itertuples(index=False, name=None))
    for f in data_dir().rglob("distilltv.json"):
        i = Z._provenance(f.parent)
        name = i["name"].replace(f"-seed{i['distil_seed']}", "")
        assert (name, i["role"], i["taught_by"] or "", str(i["distil_seed"] or 0)) in scored, f

@pytest.mark.parametrize("text, says", [
    ("{", "is not JSON"), ("[]", "is not a JSON table"),
    ('{"lam": "0.5x"}', "the weight '0.5x', which is no number"),
    ('{"lam": NaN}', "the weight nan, which is no number"), ('{"weights": {"a": 1, "b": []}}', r"the weight \[\]")])
def test_a_damaged_record_is_named(runs, tmp_path, text, says):
    folder = save_encoder(hubert(), tmp_path/"it")
    (folder/"distilltv.json").write_text(text)
    with pytest.raises(ValueError, match=f"it/distilltv.json .*{says}"): Z.open_encoder(str(folder))

@pytest.mark.parametrize("name", ["base", "random"])
def test_a_profile_without_its_own_start_says_what_makes_it(runs, tmp_path, name):
    "Another profile's would be scored under its name."
    (tmp_path/"mine.toml").write_text('name = "mine"\n[teachers]\nbird = "a/b"\n')
    with pytest.raises(ValueError, match=f"encoder '{name}': .*mine.toml has no θ₀ in .*mine/base yet; run nbs/02_dis"):
        Z.open_encoder(name, str(tmp_path/"mine.toml"))
    assert Z.open_encoder("base").info["role"] == "base"

@pytest.mark.parametrize("kind", ["Bert", "Whisper"])
def test_a_model_that_does_not_hear_waveforms_is_refused_by_its_type(tmp_path, kind):
    import transformers
    small = dict(hidden_size=16, d_model=16, num_hidden_layers=1, encoder_layers=1, decoder_layers=1, vocab_size=50,
                 num_attention_heads=2, encoder_attention_heads=2, decoder_attention_heads=2, intermediate_size=16,
                 encoder_ffn_dim=16, decoder_ffn_dim=16, pad_token_id=0, bos_token_id=1, eos_token_id=2,
                 decoder_start_token_id=1)
    model = getattr(transformers, f"{kind}Model")(getattr(transformers, f"{kind}Config")(**small))
    model.save_pretrained(tmp_path/"it")
    for use in (lambda: Z.open_encoder(str(tmp_path/"it")), lambda: P.quick_probe(model)):
        with pytest.raises(ValueError, match=f"a model of type '{kind.lower()}' has no convolutions"): use()

def test_an_encoder_in_a_folder_with_a_comma_is_one(tmp_path):
    (tmp_path/"a,b/model").mkdir(parents=True)
    assert Z.encoder_names(f"{tmp_path}/a,b/model") == [f"{tmp_path}/a,b/model"]
    assert Z.encoder_names("logmel, random") == ["logmel", "random"]

def test_parameters_of_the_notebook_that_look_like_numbers_are_names():
    "`papermill -p view 3` hands over a number."
    cells = json.loads((root()/"nbs/04_probe.ipynb").read_text(encoding="utf-8"))["cells"]
    code, said = ["".join(c["source"]) for c in cells if c["cell_type"] == "code"], {}
    given, check = (next(c for c in code if has in c) for has in ('encoder = ""', "check_parameters(globals()"))
    exec(f"{given}\nview, encoder = 3, 7\n{check}", said)
    assert (said["view"], said["encoder"]) == ("3", "7")

@pytest.mark.parametrize("name", ["no-such-thing", "/no/such/folder", "teacher-Speech"])
def test_an_unknown_encoder_is_named(name):
    with pytest.raises(ValueError, match="no config.json.*base, teacher-speech or teacher-music"): Z.open_encoder(name)

def test_unknown_tasks_and_views_are_named():
    with pytest.raises(ValueError, match="task 'tempo' is unknown; use all, own, more, paper, a domain, or some of"):
        P.probe("logmel", "tempo")
    with pytest.raises(ValueError, match="layer from 0 to 0"): Z.choose_view(Z.LogMel(), "3")
    assert Z.choose_view(Z.LogMel()) == "last"

def test_knn_votes_and_breaks_ties_by_nearness():
    x, y = torch.tensor([[1., 0], [1., .1], [0, 1.], [.1, 1.]]), torch.tensor([0, 0, 1, 1])
    assert F.knn(x, y, torch.tensor([[1., .05], [.05, 1.]]), k=2).tolist() == [0, 1]
    assert F.knn(x, y, torch.tensor([[1., .4]]), k=4).tolist() == [0]

def test_match_finds_the_same_content_in_another_voice():
    g = torch.Generator().manual_seed(0)
    content = torch.randn(30, 8, generator=g)
    df = pd.DataFrame([dict(label=str(i), voice=v, lang="fr", split="train" if i < 10 else "test") for v in "ab"
                       for i in range(30)])
    x = torch.cat([content, 3*content + 5])   # another voice: another colour and loudness, same content
    assert F.match(x, df).all() and len(F.match(x, df)) == 40
    assert F.match(torch.randn(60, 8, generator=g), df).mean() < .3

@pytest.mark.skipif(not (data_dir()/"speech/metadata.csv").exists(), reason="the mini corpus is not here")
@pytest.mark.parametrize("task", T.task_names("all") + T.task_names("more"))
def test_shipped_tasks_are_grouped_and_leak_nothing(task):
    t, df = T.TASKS[task], T.task_table(task)
    assert (df.groupby(t.group).split.nunique() == 1).all()
    assert (df.split == "test").sum() >= 80 and df.usable.mean() > .95
    T.check_leakage(task)

shipped = pytest.mark.skipif(not (data_dir()/"drums/metadata.csv").exists(), reason="the mini corpus is not here")

@shipped
def test_detection_hides_nothing_but_the_question(runs):
    d = M.detection(data_dir())
    alone, both = d[d.with_file == ""], d[d.with_file != ""]
    for s in ("train", "valid", "test"):
        n = d[d.split == s].content.value_counts()
        assert n.nunique() == 1 and set(n.index) == {"speech", "music", "both"}
    where = lambda t, *c: sorted(map(tuple, t[list(c)].to_numpy()))
    assert where(alone, "file",
                 "start") == sorted(where(both, "file", "start") + where(both, "with_file", "with_start"))
    assert both.groupby(["split", "heard"]).size().groupby("split").agg(np.ptp).max() <= 1
    assert set(both.speech_db) == set(M.SNRS)
    # a corpus that mixes one voice only would give the mixtures away
    T.check_leakage("speech-music-both")
    l = T.leakage("speech-music-both")
    assert abs(l["chain"] - l["majority"]) < .02 and .6 < l["majority"] < .7

def test_detection_that_mixes_one_voice_only_is_refused():
    rows = [dict(content=c, heard="speech", performer="a" if c == "both" else "bc"[i % 2], source="s",
                 pair=f"{s}{i}{c}", id=f"{s}{i}{c}", split=s) for s in ("train", "valid", "test") for i in range(6)
                 for c in ("speech", "both")]
    task = dataclasses.replace(T.find_task("speech-music-both"), load=lambda root: pd.DataFrame(rows))
    with pytest.raises(T.Leak, match="source, performer alone predict content at 1.00, the majority at 0.50"):
        T.check_leakage(task, "nowhere")

def test_mixtures_and_single_windows_in_one_table(runs, corpus):
    clean = M.notes(corpus).iloc[:6].reset_index(drop=True)
    one = clean.assign(with_file="", with_start=0, snr=0.)
    two = clean.assign(with_file=clean.file[::-1].to_numpy(), with_start=clean.start[::-1].to_numpy(),
                       snr=[-10., 0, 10]*2)
    w, audio = E.windows(pd.concat([one, two], ignore_index=True), corpus)
    assert len(w) == 12
    at = np.cumsum([0, *(w.end - w.start)])
    cut = {r[0]: audio[a:b].astype(float) for r, a, b in zip(w.rows, at, at[1:])}
    for i, snr in enumerate(two.snr):
        x, z = cut[i], cut[6+i]
        # the windows hardly correlate, and a mixture that would clip is made quieter
        scale = np.dot(z, x)/np.dot(x, x)
        assert 10*np.log10(np.mean((scale*x)**2)/np.mean((z - scale*x)**2)) == pytest.approx(snr, abs=1.5)
    keys = {E.features_key(Z.LogMel(), pd.concat([one, two.assign(snr=v)], ignore_index=True), corpus)
            for v in ([-10., 0, 10]*2, [10., 0, -10]*2, [0.]*6)}
    assert len(keys) == 3

@shipped
def test_drum_kits_of_a_maker_share_a_fold():
    d = M.drums(data_dir())
    assert (d.groupby("maker").fold.nunique() == 1).all() and (d.groupby("kit").maker.nunique() == 1).all()
    assert d.maker.nunique() >= 7
    assert set(d.drum) == {"kick", "snare", "tom", "hat", "cymbal"} and (d.groupby("fold").drum.nunique() == 5).all()
    assert d.id.is_unique

@shipped
def test_test_notes_are_another_bank_and_unheard_pairs():
    n = M.notes(data_dir())
    test, train = n[n.split == "test"], n[n.split != "test"]
    assert not set(test.bank) & set(train.bank) and not set(test.note) & set(train.note)

def test_a_hidden_layer_solves_what_a_linear_probe_cannot():
    x = torch.tensor([[0., 0], [0, 1], [1, 0], [1, 1]]).repeat(50, 1)[None]*2 - 1
    y = ((x[0, :, 0] > 0) ^ (x[0, :, 1] > 0)).long()
    assert F.fit_probes(x, y, x, y, 2, seeds=(0,))["valid"].max() <= .75
    assert F.fit_probes(x, y, x, y, 2, seeds=(0,), hidden=32)["valid"].max() == 1

@given(st.floats(-20, 20))
def test_mixtures_have_the_stated_ratio(snr):
    g = np.random.default_rng(0)
    x, y = .01*g.standard_normal(4000), .02*np.sin(np.arange(4000))
    z = E.mix(x, y, snr)
    if np.abs(z).max() < .98: assert 10*np.log10(np.mean(x**2)/np.mean((z-x)**2)) == pytest.approx(snr, abs=1e-6)
    assert np.abs(z).max() <= .99 + 1e-9

def test_mixed_windows_have_their_own_cache_key(runs, corpus):
    clean = M.notes(corpus)
    e, keys = Z.LogMel(), set()
    for t in (clean, M.mixed(clean.copy(), clean, 0.), M.mixed(clean.copy(), clean, 5.)):
        keys.add(E.features_key(e, t, corpus))
    assert len(keys) == 3
    t = M.mixed(clean.copy(), clean.iloc[::-1].reset_index(drop=True), 0.)
    assert not np.allclose(E.windows(t, corpus)[1], E.windows(clean, corpus)[1])

def test_another_view_or_head_has_another_name(runs, corpus):
    e = Z.open_encoder("logmel")
    assert P.probe(e, "pitch", seeds=1, root=str(corpus), view="0").encoder.iloc[0] == "logmel@0"
    d = P.probe(e, "pitch", seeds=1, root=str(corpus), head="mlp")
    assert d.encoder.iloc[0] == "logmel@mlp" and d.probe.iloc[0] == "mlp" and d.score.iloc[0] == 1

def test_encoders_probed_together_score_as_one_by_one(runs, corpus, tmp_path):
    "Same features, same seeds: the scores of three encoders of one shape, and one of another, are those of each alone."
    encoders = [Z.Transformer(hubert(s)) for s in range(3)] + [Z.open_encoder("logmel")]
    for i, e in enumerate(encoders[:3]): e.info = dict(encoder=f"e{i}", role="other")
    folders = [tmp_path/str(i) for i in range(4)]
    together = P.probe(encoders, "pitch,instrument", root=str(corpus), out=folders)
    alone = pd.concat([P.probe(e, "pitch,instrument", root=str(corpus)) for e in encoders], ignore_index=True)
    pd.testing.assert_frame_equal(together.drop(columns=COST), alone.drop(columns=COST), atol=1e-6)
    assert [pd.read_csv(f/"scores.csv").encoder.iloc[0] for f in folders] == ["e0", "e1", "e2", "logmel"]

@pytest.mark.parametrize("layers, hidden, kind",
                         [(1, 0, "classify"), (3, 0, "classify"), (1, 8, "classify"), (1, 0, "tags"),
                          (2, 0, "numbers")])
def test_probes_of_several_encoders_equal_their_own(layers, hidden, kind):
    (a, y), (b, _) = toy(layers=layers), toy(layers=layers, seed=1)
    if kind != "classify": y = torch.nn.functional.one_hot(y, 3).float()
    x, kw = torch.stack([a, b]), dict(classes=3, lrs=(3e-3, 3e-2), seeds=(4, 5), steps=60, batch=32, hidden=hidden,
                                      kind=kind)
    both = F.fit_probes(x, y, x, y, **kw)
    for e in range(2):
        one = F.fit_probes(x[e], y, x[e], y, **kw)
        for k in one["p"]: torch.testing.assert_close(both["p"][k][e], one["p"][k], atol=2e-5, rtol=1e-4)
        torch.testing.assert_close(both["valid"][e], one["valid"])

@pytest.mark.parametrize("copies", [True, False])
def test_logits_are_those_of_each_copy(copies):
    g = torch.Generator().manual_seed(0)
    x, W, b = torch.randn(1, 2, 5, 6, generator=g), torch.randn(2, 3, 6, 4,
                                                                generator=g), torch.randn(2, 3, 1, 4, generator=g)
    x = x if copies else x[:, :1]
    said = F.logits(x, W, b)
    for s in range(2):
        for r in range(3): torch.testing.assert_close(said[s, r], x[0, s if copies else 0] @ W[s, r] + b[s, r])

class Means:
    "An encoder whose frame is the mean of the samples that it sees, at its own rate."
    def __init__(self, hop, window, rate=16_000):
        self.own, self.rate = (window, hop), rate
        self.hop, self.window = (Fraction(16_000*n, rate) for n in (hop, window))
    def __call__(self, wav): return Z.at_rate(wav, self.rate, False).unfold(1, *self.own).mean(-1)[None, ..., None]

@given(st.integers(510, 90000), st.floats(.2, 3),
       st.sampled_from([Z.LogMel(), Means(320, 430), Means(320, 400, 24_000), Means(500, 700, 22_050)]))
@example(41653, 1., Means(320, 400, 24_000))    # half a sample more would be a frame more
@settings(max_examples=60, deadline=None)
def test_long_clips_are_heard_in_pieces_without_losing_a_frame(samples, longest, e):
    wav = torch.randn(1, samples, generator=torch.Generator().manual_seed(0))
    atol = 1e-4 if getattr(e, "rate", 16_000) == 16_000 else .01    # a resampled piece is another at its ends
    torch.testing.assert_close(E.hear(e, wav, longest), e(wav), atol=atol, rtol=1e-4)

def test_two_encoders_of_one_folder_name_are_two(runs, corpus, tmp_path):
    for n in "ab": hubert(ord(n)).save_pretrained(tmp_path/n/"final")
    both = [Z.open_encoder(str(tmp_path/n/"final")) for n in "ab"]
    assert both[0].info["encoder"] == f"final-{both[0].hash[:8]}"
    d = P.probe(both, "pitch", seeds=1, root=str(corpus), out=[tmp_path/"out"/e.info["encoder"] for e in both])
    assert d.encoder.nunique() == 2 and len(list((tmp_path/"out").glob("*/scores.csv"))) == 2
    with pytest.raises(ValueError, match=f"holds the scores of other weights, {both[0].hash[:8]}, not"):
        P.probe(both[1], "pitch", seeds=1, root=str(corpus), out=tmp_path/"out"/both[0].info["encoder"])
    for e in both: e.info["encoder"] = "final"
    with pytest.raises(ValueError, match="two encoders of different weights are called 'final'"):
        P.probe(both, "pitch", seeds=1, root=str(corpus))

def test_a_domain_means_its_default_tasks():
    assert T.task_names("speech") + T.task_names("music") == T.task_names("all")
    assert len(T.task_names("speech")) >= 4 <= len(T.task_names("music"))
    assert T.task_names("sound,pitch".split(",")[1:]) == ["pitch"]
    with pytest.raises(ValueError, match="task 'sound' is unknown"): T.task_names("sound")

def test_names_like_numbers_and_missing_values_stay_text(corpus):
    rewrite(corpus, program=lambda m: "007", family=lambda m: m.family.replace("low", "NA"),
            pitch=lambda m: m.id.str[1:])
    d = T.task_table("instrument", str(corpus))
    assert set(d.label) == {"NA", "high"} and d.usable.all() and set(d.program) == {"007"}

@shipped
def test_words_are_those_of_the_transcript():
    w = pd.read_csv(data_dir()/"speech/words.csv", dtype=dict(id=str, word=str), keep_default_na=False)
    m = pd.read_csv(data_dir()/"speech/metadata.csv", dtype=str, keep_default_na=False).set_index("id")
    assert (w.end > w.start).all() and (w.end <= w.id.map(m.end.astype(int) - m.start.astype(int))).all()
    for i, d in w.groupby("id"):
        said = re.findall(r"[^\W\d_]+", m.text[i].lower().replace("+", ""))
        assert d.start.is_monotonic_increasing and iter_in(d.word, said)
    d = T.task_table("words")
    assert (d.split == "test").sum() >= 300 and d.usable.all()

def iter_in(some, all_):
    "Whether `some` are among `all_` in this order."
    rest = iter(all_)
    return all(x in rest for x in some)

@shipped
def test_chords_hold_their_notes_and_no_note_is_in_two_splits():
    d, n = T.task_table("chord"), M.notes(data_dir()).set_index("note")
    parts = {s: set("+".join(g.notes).split("+")) for s, g in d.groupby("split")}
    assert not parts["train"] & parts["test"] and not parts["train"] & parts["valid"]
    assert not parts["valid"] & parts["test"]
    for r in d.itertuples():
        root, quality = r.chord.split(":")
        classes = {(int(p.split("/")[1]) - int(root)) % 12 for p in r.notes.split("+")}
        assert classes == {0, 4 if quality == "major" else 3, 7}
    assert (d.split == "test").sum() >= 300 and d[d.split == "train"].chord.value_counts().min() >= 20

def test_three_windows_are_mixed_at_one_level(runs, corpus):
    d = M.notes(corpus).iloc[:6].reset_index(drop=True)
    t = d.assign(with_file=d.file, with_start=d.start[::-1].to_numpy(), also_file=d.file,
                 also_start=np.roll(d.start, 1), snr=0.)
    w, audio = E.windows(t, corpus)
    cut = lambda table: [a.astype(float) for a in np.split(E.windows(table, corpus)[1], len(table))]
    same = t.assign(end=t.start + 4000)
    x, y = cut(d.assign(end=d.start + 4000)), cut(d.assign(start=same.with_start, end=same.with_start + 4000))
    z = cut(d.assign(start=same.also_start, end=same.also_start + 4000))
    w, audio = E.windows(same, corpus)
    for i, a in zip([r[0] for r in w.rows], np.split(audio.astype(float), len(same))):
        want = E.mix(x[i]/32768, [y[i]/32768, z[i]/32768], 0.)
        np.testing.assert_allclose(a/32768, want, atol=1e-4)
    assert len({E.features_key(Z.LogMel(), v, corpus)
                for v in (t, t.drop(columns=["also_file", "also_start"]), t.assign(also_start=t.start))}) == 3

def test_students_of_one_run_and_their_merges_have_the_same_settings(tmp_path):
    "Seed and teacher apart; another learning rate, a merge with such a student, and a student that is gone differ."
    base = save_encoder(hubert(0), tmp_path/"base", role="base")
    def student(name, seed, lr=.1):
        return save_encoder(hubert(seed), tmp_path/name, teacher=name, seed=seed, lr=lr, steps=5, corpus="both",
                            base_hash=weights_hash(hubert(0)))
    def settings(folder): return Z.open_encoder(str(folder)).info["settings"]
    def merged(name, lam, **students):
        merge(base, students, dict(zip(students, (lam, 1-lam)))).save_pretrained(tmp_path/name, lam=lam, corpus="both")
        return settings(tmp_path/name)
    speech, music, other = student("speech", 1), student("music", 2), student("other", 1, lr=.2)
    assert settings(speech) == settings(music) != settings(other) and settings(base) is None
    one = merged("one", 1, speech=speech, music=music)
    assert one == merged("half", .5, speech=speech, music=music) != merged("mixed", .5, speech=other, music=music)
    student("speech", 3)    # another student lies there now
    assert settings(tmp_path/"half") is None
