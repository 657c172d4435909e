"Results: statistics against scipy and statsmodels, closed forms for the tables, and what is missing or contradictory."
import json, math
import numpy as np, pandas as pd, pytest
from hypothesis import given, settings, strategies as st
from scipy import stats
from statsmodels.stats.contingency_tables import mcnemar
from statsmodels.stats.multitest import multipletests
from statsmodels.stats.proportion import proportion_effectsize
from distilltv import results as R

TASKS = dict(phones="speech", match="speech", pitch="music", key="music")

def write_encoder(root, encoder, role, p, lam=None, corpus=None, n=200, seed=0, tasks=TASKS, ids=None):
    "A probe folder whose predictions are right with probability p[domain]; items and draws are shared by all encoders."
    rows, keep, rng = [], {}, np.random.default_rng(seed)
    for t, dom in tasks.items():
        ease = np.random.default_rng(len(t)).random((3, n))
        true = np.random.default_rng(1).integers(0, 5, n)
        pred = np.where(ease < p[dom], true, (true + 1) % 5)
        rows += [dict(encoder=encoder, role=role, lam=lam, method="linear" if lam is not None else None, corpus=corpus, task=t, domain=dom, probe="linear", seed=s, view="last", layer=2,
                      metric="accuracy", score=(pred[s] == true).mean(), n_test=n, weights_hash="x") for s in range(3)]
        keep |= {f"{t}/id": np.array([f"{ids or 'i'}{i}" for i in range(n)]), f"{t}/group": np.array([f"g{i//4}" for i in range(n)]), f"{t}/true": true, f"{t}/pred": pred}
    d = root/"probes"/encoder
    d.mkdir(parents=True)
    pd.DataFrame(rows).to_csv(d/"scores.csv", index=False)
    np.savez(d/"predictions.npz", **keep)

def study(root, slope=.4):
    for e, r, s, m in (("logmel", "logmel", .2, .2), ("random", "random", .1, .1), ("base", "base", .3, .15), ("teacher-speech", "teacher", .9, .4), ("teacher-music", "teacher", .4, .9)):
        write_encoder(root, e, r, dict(speech=s, music=m))
    for e, s, m in (("speech-both", .8, .4), ("music-both", .4, .8)): write_encoder(root, e, "endpoint", dict(speech=s, music=m), corpus="both")
    write_encoder(root, "ensemble-both", "ensemble", dict(speech=.55, music=.55), corpus="both")
    for lam in np.linspace(0, 1, 11): write_encoder(root, f"lam-{lam:.2f}-both", "merged", dict(speech=.4+slope*lam, music=.8-slope*lam), lam=round(lam, 2), corpus="both")

@pytest.fixture(scope="module")
def full(tmp_path_factory):
    root = tmp_path_factory.mktemp("study")
    study(root)
    scores, hits = R.gather(root)
    return root, scores, hits, R.with_means(R.bootstrap(hits, 500), scores)

@settings(max_examples=60, deadline=None)
@given(st.integers(0, 60), st.integers(0, 60))
def test_mcnemar_is_statsmodels(b, c):
    if b + c == 0: assert R.mcnemar(b, c) == 1; return
    want = mcnemar([[10, b], [c, 10]], exact=b+c < 25, correction=True).pvalue
    assert R.mcnemar(b, c) == pytest.approx(1. if b == c else min(1, want), abs=1e-9)

@settings(max_examples=40, deadline=None)
@given(st.lists(st.floats(0, 1), min_size=1, max_size=30))
def test_benjamini_hochberg_is_statsmodels(p):
    np.testing.assert_allclose(R.benjamini_hochberg(p), multipletests(p, method="fdr_bh")[1], atol=1e-12)

@given(st.floats(0, 1), st.floats(0, 1))
def test_cohen_h_is_statsmodels(p, q): assert R.cohen_h(p, q) == pytest.approx(proportion_effectsize(p, q), abs=1e-9)

def test_bootstrap_of_independent_items_is_the_binomial_interval():
    hits = dict(t=dict(encoder=np.array(["a"]), group=np.arange(300), correct=(np.arange(300) < 90)[None, None]))
    i = R.interval(R.bootstrap(hits, 4000)).iloc[0]
    lo, hi = stats.bootstrap(((np.arange(300) < 90).astype(float),), np.mean, method="percentile", rng=np.random.default_rng(0)).confidence_interval
    assert i.estimate == pytest.approx(.3) and i.lo == pytest.approx(lo, abs=.012) and i.hi == pytest.approx(hi, abs=.012)

def test_grouped_items_widen_the_interval_as_they_must():
    "All four items of a group agree, so there are 75 independent observations and not 300: twice the width."
    right = np.repeat(np.arange(75) < 30, 4)[None, None]
    width = lambda g: R.interval(R.bootstrap(dict(t=dict(encoder=np.array(["a"]), group=g, correct=right)), 3000)).eval("hi - lo").iloc[0]
    assert width(np.arange(300)//4)/width(np.arange(300)) == pytest.approx(2, rel=.1)

def test_seeds_that_disagree_widen_the_interval():
    one = np.stack([np.arange(400) < k for k in (160, 200, 240)])[None]
    same = np.stack([np.arange(400) < 200]*3)[None]
    sd = lambda c: R.bootstrap(dict(t=dict(encoder=np.array(["a"]), group=np.arange(400), correct=c)), 3000).iloc[1:].std().iloc[0]
    binomial, seeds = math.sqrt(.25/400), np.std([.4, .5, .6])/math.sqrt(3)
    assert sd(same) == pytest.approx(binomial, rel=.1) and sd(one) == pytest.approx(math.hypot(binomial, seeds), rel=.15)

def test_encoders_are_redrawn_together():
    c = np.random.default_rng(0).random((1, 1, 200)) < .5
    d = R.bootstrap(dict(t=dict(encoder=np.array(["a", "b"]), group=np.arange(200), correct=np.concatenate([c, c]))), 200)
    assert (d["t", "a"] == d["t", "b"]).all()

def test_overall_is_0_at_logmel_and_1000_at_the_best_teacher(full):
    _, scores, hits, draws = full
    k = R.scale(draws, scores)
    assert draws["overall", "logmel"].iloc[0] == pytest.approx(0)
    want = np.mean([1000*(draws[t, "base"].iloc[0] - draws[t, "logmel"].iloc[0])/(max(draws[t, f"teacher-{d}"].iloc[0] for d in ("speech", "music")) - draws[t, "logmel"].iloc[0]) for t in TASKS])
    assert draws["overall", "base"].iloc[0] == pytest.approx(want) and set(k.index) == set(TASKS)

def test_a_task_where_teachers_do_not_beat_logmel_has_no_scale(tmp_path):
    write_encoder(tmp_path, "logmel", "logmel", dict(speech=.9, music=.2))
    for t in ("speech", "music"): write_encoder(tmp_path, f"teacher-{t}", "teacher", dict(speech=.5, music=.5))
    scores, hits = R.gather(tmp_path)
    d = R.bootstrap(hits, 10)
    assert set(R.scale(d, scores).index) == {"pitch", "key"} and len(R.scale(d, scores, "random")) == 0
    assert "above random" not in R.with_means(d, scores)

def test_above_random_is_0_at_random_weights(full):
    _, scores, _, draws = full
    assert draws["above random", "random"].iloc[0] == pytest.approx(0) and draws["above random", "base"].iloc[0] > 0

def test_a_trade_off_is_found_where_there_is_one_and_only_there(full, tmp_path):
    _, scores, _, draws = full
    says = R.findings(draws, scores)
    assert "The trade-off is there." in says[0] and any("speech teacher is clearly above" in s for s in says)
    beat = next(s for s in says if "beat the ensemble" in s)
    assert beat.startswith("3 of 11 λ beat") and "(λ = 0.4, 0.5, 0.6)" in beat
    study(tmp_path, slope=0.)
    s2, h2 = R.gather(tmp_path)
    assert "A trade-off is not shown" in R.findings(R.with_means(R.bootstrap(h2, 300), s2), s2)[0]

def test_paired_tests_know_who_is_better(full):
    _, scores, hits, draws = full
    t = R.paired_tests(hits, draws, scores)
    assert len(t) == 13*len(TASKS) and (t.p_adjusted >= t.p).all() and t.difference.between(t.lo - 1e-9, t.hi + 1e-9).all()
    one = t[(t.encoder == "lam-1.00-both") & (t.task == "phones")].iloc[0]
    assert one.difference > .15 and one.p_adjusted < .05 and one.better > .99 and one.h > 0

def test_saved_results_are_read_back_equal(full, tmp_path):
    _, scores, hits, _ = full
    R.save(tmp_path, scores, hits)
    s, h = R.gather(tmp_path)
    assert len(s) == len(scores) and all((h[t]["correct"] == hits[t]["correct"]).all() and (h[t]["encoder"] == hits[t]["encoder"]).all() for t in hits)
    a, b = (R.bootstrap(x, 50) for x in (hits, h))
    pd.testing.assert_frame_equal(R.interval(a), R.interval(b), atol=.05)
    assert (tmp_path/"predictions.npz").stat().st_size < 100_000

def test_what_is_missing_is_named(tmp_path):
    write_encoder(tmp_path, "logmel", "logmel", dict(speech=.2, music=.2))
    write_encoder(tmp_path, "lam-0.50-both", "merged", dict(speech=.5, music=.5), lam=.5, corpus="both", tasks=dict(phones="speech"))
    scores, hits = R.gather(tmp_path)
    m = R.missing(scores)
    assert "teachers: 0 of 2" in m and "merged (λ): 1 of 11" in m and "lam-0.50-both: 1 of 4 tasks" in m
    shown = R.table(R.with_means(R.bootstrap(hits, 50), scores), scores)
    assert shown.loc["lam-0.50-both", "pitch"] == "not run" and "music mean" in shown

def test_an_empty_folder_says_what_to_run(tmp_path):
    with pytest.raises(ValueError, match="distilltv reproduce"): R.gather(tmp_path)

def test_encoders_tested_on_different_items_are_named(tmp_path):
    write_encoder(tmp_path, "a", "other", dict(speech=.5, music=.5))
    write_encoder(tmp_path, "b", "other", dict(speech=.5, music=.5), ids="other")
    with pytest.raises(ValueError, match="'a' and 'b' were tested on different items"): R.gather(tmp_path)

def test_one_encoder_in_two_folders_is_named(tmp_path):
    write_encoder(tmp_path, "a", "other", dict(speech=.5, music=.5))
    (tmp_path/"probes/a").rename(tmp_path/"probes/older")
    write_encoder(tmp_path, "a", "other", dict(speech=.5, music=.5))
    with pytest.raises(ValueError, match="'a' was scored on"): R.gather(tmp_path)

def test_paper_numbers_have_source_and_confidence():
    p = pd.read_csv(R.data_dir()/"results/paper_numbers.csv", dtype=str, keep_default_na=False)
    assert (p.source != "").all() and ((p.value == "") == (p.source == "not found")).all() and (p[p.value != ""].confidence != "").all()

def test_report_writes_everything(full, tmp_path, capsys):
    root, *_ = full
    fig = R.report(root, tmp_path)
    assert fig.exists() and {"scores.csv", "predictions.npz", "table.csv", "tests.csv", "paper.csv", "findings.json", "captions.json", "tradeoff.svg", "tasks.png", "differences.svg"} <= {f.name for f in tmp_path.iterdir()}
    said = capsys.readouterr().out
    assert "lam-0.50-both" in said and "trade-off is there" in said and str(fig) in said
    assert "3 probe seeds" in json.loads((tmp_path/"captions.json").read_text())["tradeoff"]
