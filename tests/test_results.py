"Results: statistics against scipy and statsmodels, closed forms for the tables, and what is missing or contradictory."
import dataclasses, json, math, shutil
import numpy as np, pandas as pd, pytest
from hypothesis import given, settings, strategies as st
from scipy import stats
from sklearn.metrics import r2_score, roc_auc_score
from statsmodels.stats.contingency_tables import mcnemar
from statsmodels.stats.multitest import multipletests
from statsmodels.stats.proportion import proportion_effectsize
from distilltv import figures as F, findings as W, paper as P, published, reading as G, results as R, statistics as S
from distilltv.profiles import profile

TASKS = dict(phones="speech", match="speech", pitch="music", key="music")

def write_encoder(root, encoder, role, p, lam=None, corpus=None, n=200, seed=0, tasks=TASKS, ids=None, weights_hash="x",
                  **more):
    "A probe folder whose predictions are right with probability p[domain]; items and draws are shared by all encoders."
    rows, keep, rng = [], {}, np.random.default_rng(seed)
    for t, dom in tasks.items():
        ease = np.random.default_rng(len(t)).random((3, n))
        true = np.random.default_rng(1).integers(0, 5, n)
        pred = np.where(ease < p[dom], true, (true + 1) % 5)
        rows += [dict(encoder=encoder, role=role, lam=lam, method="linear" if lam is not None else None, corpus=corpus,
                      task=t, domain=dom, probe="linear", seed=s, view="last", layer=2,
                      metric="accuracy", score=(pred[s] == true).mean(), n_test=n, weights_hash=weights_hash, **more)
                      for s in range(3)]
        keep |= {f"{t}/id": np.array([f"{ids or 'i'}{i}" for i in range(n)]),
                 f"{t}/group": np.array([f"g{i//4}" for i in range(n)]), f"{t}/true": true, f"{t}/pred": pred}
    d = root/"probes"/encoder
    d.mkdir(parents=True)
    pd.DataFrame(rows).to_csv(d/"scores.csv", index=False)
    np.savez(d/"predictions.npz", **keep)

def test_scores_of_another_folder_do_not_replace_ones_own_results(tmp_path, monkeypatch):
    monkeypatch.setenv("DISTILLTV_HOME", str(tmp_path))
    assert G.results_folder("mini") == G.results_folder("mini", tmp_path/"mini") == tmp_path/"mini/results"
    assert G.results_folder("mini", "/colleague/runs/hub") == tmp_path/"mini/results-of-colleague-runs-hub"

def study(root, slope=.4):
    for e, r, s, m in (("logmel", "logmel", .2, .2), ("random", "random", .1, .1), ("base", "base", .3, .15),
                       ("teacher-speech", "teacher", .9, .4), ("teacher-music", "teacher", .4, .9)):
        write_encoder(root, e, r, dict(speech=s, music=m))
    for e, s, m in (("speech-both", .8, .4), ("music-both", .4, .8)):
        write_encoder(root, e, "endpoint", dict(speech=s, music=m), corpus="both")
    write_encoder(root, "ensemble-both", "ensemble", dict(speech=.55, music=.55), corpus="both")
    for lam in np.linspace(0, 1, 11):
        write_encoder(root, f"lam-{lam:.2f}-both", "merged", dict(speech=.4+slope*lam, music=.8-slope*lam),
                      lam=round(lam, 2), corpus="both")

@pytest.fixture(scope="module")
def full(tmp_path_factory):
    root = tmp_path_factory.mktemp("study")
    study(root)
    scores, hits = G.gather(root)
    return root, scores, hits, R.with_means(S.bootstrap(hits, 500), scores)

@settings(max_examples=60, deadline=None)
@given(st.integers(0, 60), st.integers(0, 60))
def test_mcnemar_is_statsmodels(b, c):
    assert S.mcnemar(b, c) == pytest.approx(min(1, mcnemar([[10, b], [c, 10]], exact=True).pvalue) if b + c else 1,
                                            abs=1e-9)

@given(st.floats(0, 1), st.floats(0, 1))
def test_cohen_h_is_statsmodels(p, q): assert S.cohen_h(p, q) == pytest.approx(proportion_effectsize(p, q), abs=1e-9)

def test_bootstrap_of_independent_items_is_the_binomial_interval():
    hits = dict(t=dict(encoder=np.array(["a"]), group=np.arange(300), correct=(np.arange(300) < 90)[None, None]))
    i = S.interval(S.bootstrap(hits, 4000)).iloc[0]
    lo, hi = stats.bootstrap(((np.arange(300) < 90).astype(float),), np.mean, method="percentile",
                             rng=np.random.default_rng(0)).confidence_interval
    assert i.estimate == pytest.approx(.3) and i.lo == pytest.approx(lo, abs=.012)
    assert i.hi == pytest.approx(hi, abs=.012)

def test_grouped_items_widen_the_interval_as_they_must():
    "All four items of a group agree, so there are 75 independent observations and not 300: twice the width."
    right = np.repeat(np.arange(75) < 30, 4)[None, None]
    width = lambda g: S.interval(S.bootstrap(dict(t=dict(encoder=np.array(["a"]), group=g, correct=right)),
                                             3000)).eval("hi - lo").iloc[0]
    assert width(np.arange(300)//4)/width(np.arange(300)) == pytest.approx(2, rel=.1)

def test_seeds_that_disagree_widen_the_interval():
    one = np.stack([np.arange(400) < k for k in (160, 200, 240)])[None]
    same = np.stack([np.arange(400) < 200]*3)[None]
    sd = lambda c: S.bootstrap(dict(t=dict(encoder=np.array(["a"]), group=np.arange(400), correct=c)),
                               3000).iloc[1:].std().iloc[0]
    binomial, seeds = math.sqrt(.25/400), np.std([.4, .5, .6])/math.sqrt(3)
    assert sd(same) == pytest.approx(binomial, rel=.1)
    assert sd(one) == pytest.approx(math.hypot(binomial, seeds), rel=.15)

def test_encoders_are_redrawn_together():
    c = np.random.default_rng(0).random((1, 1, 200)) < .5
    d = S.bootstrap(dict(t=dict(encoder=np.array(["a", "b"]), group=np.arange(200), correct=np.concatenate([c, c]))),
                    200)
    assert (d["t", "a"] == d["t", "b"]).all()

def test_points_over_logmel_are_differences_of_means(full):
    _, scores, _, draws = full
    for d in ("speech", "music"):
        assert (draws[f"{d} over log-mel", "logmel"] == 0).all()
        np.testing.assert_allclose(draws[f"{d} over log-mel", "base"],
                                   draws[f"{d} mean", "base"] - draws[f"{d} mean", "logmel"])
    assert not {"overall", "above random"} & set(draws.columns.unique(0))
    assert R.table(draws, scores).loc["base", "speech over log-mel"].startswith("+")

def test_a_trade_off_is_found_where_there_is_one_and_only_there(full, tmp_path):
    _, scores, hits, draws = full
    says = W.findings(draws, scores, R.paired_tests(hits, draws, scores))
    assert says[0].startswith("The dial works. From λ = 0 to 1") and "one distillation seed" in says[0]
    assert says[1].startswith("Whether merging beats the ensemble is not decided by one distillation seed.")
    assert says[2].startswith("Each student knows more than log-mel features in its own domain.")
    assert "(the student reaches " in says[2]
    assert any("speech teacher is clearly above" in s for s in says)
    assert any(s.startswith("Significantly better than the ensemble student: ")
               and "match at 7 of 11 λ (+20.7 points at λ = 1)" in s for s in says)
    assert ("\n- **The music teacher is clearly above log-mel, random, speech teacher on the music mean:** 9"
            in R.bullets(says))
    ahead = next(s for s in says if "ahead of the ensemble" in s)
    assert ahead.startswith("3 of 11 λ are ahead") and "(λ = 0.4, 0.5, 0.6)" in ahead
    study(tmp_path, slope=0.)
    s2, h2 = G.gather(tmp_path)
    assert "A trade-off is not shown" in W.findings(R.with_means(S.bootstrap(h2, 300), s2), s2)[0]

def seeded(root, gains):
    """The study with a distillation seed for each gain, by which the merge at λ = ½ differs from the ensemble in
    accuracy."""
    for e, r, s, m in (("logmel", "logmel", .2, .2), ("random", "random", .1, .1),
                       ("teacher-speech", "teacher", .9, .4), ("teacher-music", "teacher", .4, .9)):
        write_encoder(root, e, r, dict(speech=s, music=m))
    for k, gain in enumerate(gains):
        tag = f"-seed{k}" if k else ""
        for who, s, m in (("speech", .8, .4), ("music", .4, .8)):
            write_encoder(root, f"{who}{tag}-both", "endpoint", dict(speech=s, music=m), corpus="both", distil_seed=k,
                          taught_by=who)
        for times, steps in (("", 10), ("-2x", 20)):
            write_encoder(root, f"ensemble{times}{tag}-both", "ensemble", dict(speech=.6, music=.6), corpus="both",
                          distil_seed=k, steps=steps)
        for lam in (0., .5, 1.):
            p = dict(speech=.6 + gain, music=.6 + gain) if lam == .5 else dict(speech=.4 + .4*lam, music=.8 - .4*lam)
            write_encoder(root, f"lam-{lam:.2f}{tag}-both", "merged", p, lam=lam, corpus="both", distil_seed=k)
    scores, hits = G.gather(root)
    draws, each = R.with_means(S.bootstrap(hits, 400), scores), R.by_seed(hits, scores, 400)
    return scores, hits, draws, each, W.findings(draws, scores, R.paired_tests(hits, draws, scores, each=each), each)

def test_a_claim_needs_every_distillation_seed(tmp_path):
    scores, hits, draws, each, says = seeded(tmp_path/"same", (.12, .15, .18))
    assert set(scores.encoder) >= {"speech-both", "ensemble-both", "ensemble-2x-both", "lam-0.50-both"}
    assert set(each) == {0, 1, 2}
    assert scores.groupby("encoder").distil_seed.nunique()["lam-0.50-both"] == 3
    assert draws["phones", "lam-0.50-both"].iloc[0] == pytest.approx(
        scores[(scores.task == "phones") & (scores.encoder == "lam-0.50-both")].score.mean())
    assert says[1].startswith("The merge at λ = 0.5 is better than the ensemble student on both means.")
    assert "3 distillation seeds" in says[1]
    assert any(s.startswith("Against ensemble student (2x the updates): λ = 0.5 is better on speech") for s in says)
    verdicts = {c["id"]: c["verdict"] for c in W.claims(draws, scores, each)}
    assert verdicts["ensemble"] == verdicts["dial"] == verdicts["both"] == "holds"
    assert verdicts["scores"] == "not tested here"
    tests = R.paired_tests(hits, draws, scores, each=each)
    assert set(tests.distil_seed) == {"all", "0", "1", "2"}
    assert (tests[tests.distil_seed == "0"].test == "McNemar").all()
    assert tests[(tests.distil_seed == "all") & (tests.encoder == "lam-0.50-both")].holds.all()
    # better in the mean, worse with one seed
    scores, hits, draws, each, says = seeded(tmp_path/"mixed", (.25, .25, -.05))
    assert says[1].startswith("The merge at λ = 0.5 is not clearly different from the ensemble student on either mean.")
    assert {c["id"]: c["verdict"] for c in W.claims(draws, scores, each)}["ensemble"] == "does not hold"

@pytest.mark.parametrize("lost", ["lam-0.50-seed2-both", "lam-1.00-seed1-both", "ensemble-seed2-both",
                                  "speech-seed1-both"])
def test_seeds_that_are_missing_are_named_and_the_rest_goes_on(tmp_path, lost):
    seeded(tmp_path, (.15, .15, .15))
    shutil.rmtree(tmp_path/"probes"/lost)
    scores, hits = G.gather(tmp_path)
    draws, each = R.with_means(S.bootstrap(hits, 50), scores), R.by_seed(hits, scores, 50)
    tests, name = R.paired_tests(hits, draws, scores, each=each), lost.replace(f"-seed{lost.split('seed')[1][0]}", "")
    assert f"{name}: 2 of 3 distillation seeds" in R.missing(scores)
    assert W.findings(draws, scores, tests, each) and W.claims(draws, scores, each)
    of_it = tests[(tests.distil_seed == "all") & ((tests.encoder == name) | (tests.reference == name))]
    assert len(of_it) and not of_it.holds.astype(bool).any()

def test_a_single_seed_stands_for_itself_only(tmp_path):
    seeded(tmp_path, (.15, .15, .15))
    for k in (1, 2): shutil.rmtree(tmp_path/f"probes/lam-0.50-seed{k}-both")
    each = R.by_seed(hits := G.gather(tmp_path)[1], scores := G.gather(tmp_path)[0], 20)
    assert [("phones", "lam-0.50-both") in d for d in each.values()] == [True, False, False]
    draws = R.with_means(S.bootstrap(hits, 20), scores)
    assert len(W.Evidence(draws, scores, each).measured("speech", "lam-0.50-both", "ensemble-both")[2]) == 1

def test_fewer_probe_seeds_are_named(tmp_path):
    for e in "ab": write_encoder(tmp_path, e, "other", dict(speech=.5, music=.5))
    f = tmp_path/"probes/b/scores.csv"
    d = pd.read_csv(f)
    d[(d.seed < 1) | (d.task != "phones")].to_csv(f, index=False)
    scores, _ = G.gather(tmp_path)
    assert "b: 1 of 3 probe seeds, so more are not counted" in R.missing(scores)
    assert not [m for m in R.missing(scores) if m.startswith("a:")]

def test_distillation_seeds_widen_the_interval():
    c = np.stack([np.arange(400) < k for k in (160, 200, 240)])[:, None]
    one = dict(metric="accuracy", group=np.arange(400))
    sd = lambda seeds, right: S.bootstrap(dict(t=dict(one, encoder=np.array(["a"]*len(right)),
                                                      distil_seed=np.array(seeds), correct=right)),
                                                      3000).iloc[1:].std().iloc[0]
    binomial, seeds = math.sqrt(.25/400), np.std([.4, .5, .6])/math.sqrt(3)
    assert sd([0, 1, 2], c) == pytest.approx(math.hypot(binomial, seeds), rel=.15)
    assert sd([0, 1, 2], np.stack([c[1]]*3)) == pytest.approx(binomial, rel=.1)

def test_names_are_text_and_tell_encoders_apart(tmp_path):
    for name, lam in (("007", None), ("NA", None), ("nan", None)):
        write_encoder(tmp_path, name, "other", dict(speech=.5, music=.5), lam=lam)
    for folder, p, h in (("a", .4, "aaaaaaaa"), ("b", .7, "bbbbbbbb")):     # two encoders of one folder name
        write_encoder(tmp_path, "final", "other", dict(speech=p, music=p), weights_hash=h)
        (tmp_path/"probes/final").rename(tmp_path/"probes"/f"final-{folder}")
    scores, hits = G.gather(tmp_path)
    assert set(scores.encoder) == {"007", "NA", "nan", "final (aaaaaa)",
                                   "final (bbbbbb)"} == set(hits["pitch"]["encoder"])
    G.save(tmp_path/"out", scores, hits)
    s, h = G.gather(tmp_path/"out")
    assert set(s.encoder) == set(scores.encoder) == set(h["pitch"]["encoder"])
    assert S.bootstrap(h, 20)["phones", "final (aaaaaa)"].iloc[0] < S.bootstrap(h,
                                                                                20)["phones", "final (bbbbbb)"].iloc[0]

def test_paired_tests_know_who_is_better(full):
    _, scores, hits, draws = full
    t = R.paired_tests(hits, draws, scores)
    assert len(t) == 13*len(TASKS) and (t.p_adjusted >= t.p).all()
    assert t.difference.between(t.lo - 1e-9, t.hi + 1e-9).all()
    one = t[(t.encoder == "lam-1.00-both") & (t.task == "phones")].iloc[0]
    assert one.difference > .15 and one.p_adjusted < .05 and one.better > .99 and one.effect > 0
    np.testing.assert_allclose(t.p_adjusted, multipletests(t.p, method="fdr_bh")[1], atol=1e-12)
    assert (t.test == "McNemar").all()
    assert S.chances(draws, "speech mean", ["lam-1.00-both", "lam-0.00-both"]).iloc[0, 1] > .99

@pytest.mark.parametrize("lams, said", [((0., .5, 1.), "0.5"), ((.12, .121, .124), "0.121"), ((.3, 1/3), "0.33")])
def test_lams_are_told_apart(lams, said):
    info = pd.DataFrame(dict(lam=lams, role="merged"), [f"lam-{l}-both" for l in lams])
    assert R.label_of(info.index[1], info) == f"λ = {said}"
    assert len({R.label_of(e, info) for e in info.index}) == len(lams)

def test_saved_results_are_read_back_equal(full, tmp_path):
    _, scores, hits, _ = full
    G.save(tmp_path, scores, hits)
    s, h = G.gather(tmp_path)
    assert len(s) == len(scores)
    assert all((h[t]["correct"] == hits[t]["correct"]).all() and (h[t]["encoder"] == hits[t]["encoder"]).all()
               for t in hits)
    a, b = (S.bootstrap(x, 50) for x in (hits, h))
    pd.testing.assert_frame_equal(S.interval(a), S.interval(b), atol=.05)
    assert (tmp_path/"predictions.npz").stat().st_size < 100_000

def test_what_is_missing_is_named(tmp_path):
    write_encoder(tmp_path, "logmel", "logmel", dict(speech=.2, music=.2))
    write_encoder(tmp_path, "lam-0.50-both", "merged", dict(speech=.5, music=.5), lam=.5, corpus="both",
                  tasks=dict(phones="speech"))
    scores, hits = G.gather(tmp_path)
    m = R.missing(scores)
    assert "teachers: 0 of 2" in m and "merged (λ): 1 of 11" in m and "lam-0.50-both: 1 of 4 tasks" in m
    shown = R.table(R.with_means(S.bootstrap(hits, 50), scores), scores)
    assert shown.loc["lam-0.50-both", "pitch"] == "not run" and "music mean" in shown

def own_study(root, domains):
    "Somebody's runs of two domains: λ = 0 and 0.4, a merge by weights, and a task in each of the `domains`."
    tasks, p = {f"which-{d}": d for d in domains}, dict.fromkeys(domains, .6)
    for d in ("talk", "machines"): write_encoder(root, f"{d}-both", "endpoint", p, corpus="both", tasks=tasks)
    for lam in (0, .4): write_encoder(root, f"lam-{lam:.2f}-both", "merged", p, lam, "both", tasks=tasks)
    write_encoder(root, "talk-0.4-machines-0.4-both", "merged", p, corpus="both", tasks=tasks,
                  weights='{"talk": 0.4, "machines": 0.4}')
    scores, hits = G.gather(root)
    return scores, R.with_means(S.bootstrap(hits, 50), scores)

def test_a_merge_by_weights_is_no_lambda(tmp_path):
    scores, _ = own_study(tmp_path, ["machines", "talk"])
    assert "merged (λ): 2 of 11" in R.missing(scores)
    assert not [m for m in R.missing(scores, students=3) if "merged" in m]      # these have no λ
    assert not [m for m in R.missing(scores, students=1) if "ensemble" in m]

def test_the_tradeoff_is_of_the_profiles_domains(tmp_path):
    scores, draws = own_study(tmp_path, ["speech", "music", "machines", "talk"])
    fig = F.plot_tradeoff(draws, scores, domains=("talk", "machines"))
    assert fig.axes[0].get_xlabel().startswith("talk mean") and fig.axes[0].get_ylabel().startswith("machines mean")
    handles, labels = fig.axes[0].get_legend_handles_labels()
    assert "linear merge, λ = 0, 0.4" in labels
    colours = F.domain_colours(("talk", "machines"))
    students = {l: h[0].get_color() for h, l in zip(handles, labels) if "student" in l}
    assert students == {"talk student, both": colours["talk"], "machines student, both": colours["machines"]}

def test_one_tested_domain_gives_no_tradeoff_and_says_so(tmp_path, monkeypatch):
    monkeypatch.setenv("DISTILLTV_HOME", str(tmp_path))
    scores, draws = own_study(tmp_path/"own", ["machines"])
    assert F.plot_tradeoff(draws, scores, domains=("talk", "machines")) is None
    (tmp_path/"mine.toml").write_text('name = "own"\n[teachers]\ntalk = "t"\nmachines = "m"\n', encoding="utf-8")
    (tmp_path/"own/results").mkdir()
    (tmp_path/"own/results/tradeoff.png").write_text("of earlier scores", encoding="utf-8")
    W.report(tmp_path/"mine.toml")
    there = {f.name for f in (tmp_path/"own/results").iterdir()}
    assert not there & {"tradeoff.png", "tradeoff.svg", "claims.json", "paper.csv", "code.csv"}
    says = json.loads((tmp_path/"own/results/findings.json").read_text(encoding="utf-8"))
    assert "Not here yet: a trade-off, which needs a task in each of two domains." in says

def test_an_empty_folder_says_what_to_run(tmp_path):
    with pytest.raises(ValueError, match="distilltv reproduce"): G.gather(tmp_path)

def test_encoders_tested_on_different_items_are_named(tmp_path):
    write_encoder(tmp_path, "a", "other", dict(speech=.5, music=.5))
    write_encoder(tmp_path, "b", "other", dict(speech=.5, music=.5), ids="other")
    with pytest.raises(ValueError, match="'a' and 'b' were tested on different items"): G.gather(tmp_path)

def test_one_encoder_in_two_folders_is_named(tmp_path):
    write_encoder(tmp_path, "a", "other", dict(speech=.5, music=.5))
    (tmp_path/"probes/a").rename(tmp_path/"probes/older")
    write_encoder(tmp_path, "a", "other", dict(speech=.5, music=.5))
    with pytest.raises(ValueError, match="'a' was scored on"): G.gather(tmp_path)

def test_seeds_of_other_settings_are_not_averaged(tmp_path):
    "Three seeds, then other settings and one seed: what was left of the old ones is named, the longer ensemble too."
    def probe(name, role, how, seed=0, lam=None, steps=10):
        shutil.rmtree(tmp_path/"probes"/name, ignore_errors=True)
        write_encoder(tmp_path, name, role, dict(speech=.5, music=.5), lam=lam, corpus="both", distil_seed=seed,
                      steps=None if lam is not None else steps, settings=how)
    probe("logmel", "logmel", None)
    for seed, tag in enumerate(("", "-seed1", "-seed2")):
        probe(f"speech{tag}", "endpoint", "0123", seed)
        probe(f"lam-0.50{tag}", "merged", "45e6", seed, .5)
        probe(f"ensemble-2x{tag}", "ensemble", "0123", seed, steps=20)
    assert G.gather(tmp_path)[0].encoder.nunique() == 4
    probe("speech", "endpoint", "9999")
    probe("lam-0.50", "merged", "8888", 0, .5)
    left = ("ensemble-2x, ensemble-2x-seed1, ensemble-2x-seed2, lam-0.50-seed1, lam-0.50-seed2, "
            "speech-seed1, speech-seed2")
    with pytest.raises(ValueError, match=rf"remove the older folders from probes/ \({left}\)"): G.gather(tmp_path)
    for name in left.split(", "): shutil.rmtree(tmp_path/"probes"/name)
    probe("lam-0.90", "merged", "45e6", 0, .9)    # a λ of the old settings, but the newest file
    with pytest.raises(ValueError, match=r"linear merges on both: not all .* \(lam-0.50\)"): G.gather(tmp_path)

def test_the_seed_that_a_name_ends_with_is_left_out(tmp_path):
    write_encoder(tmp_path, "a-seed10-seed1-both", "endpoint", dict(speech=.5, music=.5), distil_seed=1)
    assert set(G.gather(tmp_path)[0].encoder) == {"a-seed10-both"}

@pytest.mark.parametrize("file, content", [
    ("predictions.npz", b"hello"), ("predictions.npz", b""), ("predictions.npz", b"cut"), ("predictions.npz", None),
    ("predictions.npz", dict(x=np.arange(3))), ("predictions.npz", {"pitch/id": np.array(["a"])}),
    ("predictions.npz", {"pitch/id": np.array(["a", 1], object)}), ("scores.csv", b""), ("scores.csv", b"a,b\n1,2\n"),
    ("scores.csv", b"\xff\xfe\x00"), ("scores.csv", "score"), ("scores.csv", "distil_seed"), ("not_run.csv", b"")])
def test_a_damaged_file_is_named(tmp_path, file, content):
    write_encoder(tmp_path, "a", "other", dict(speech=.5, music=.5), distil_seed=0)
    f = tmp_path/"probes/a"/file
    if content is None: f.unlink()
    elif isinstance(content, dict): np.savez(f, **content)
    elif isinstance(content, str): pd.read_csv(f).assign(**{content: "many"}).to_csv(f, index=False)
    else: f.write_bytes(f.read_bytes()[:500] if content == b"cut" else content)
    with pytest.raises(ValueError, match=f"{f} is not what a probe wrote .*: probe again, or remove its folder"):
        G.gather(tmp_path)

def test_a_folder_without_any_score_says_so(tmp_path):
    write_encoder(tmp_path, "a", "other", dict(speech=.5, music=.5))
    f = tmp_path/"probes/a/scores.csv"
    f.write_text(f.read_text().splitlines()[0] + "\n")
    with pytest.raises(ValueError, match="no task has been run there"): G.gather(tmp_path)
    row = dict(encoder="a", role="other", task="sid", domain="speech", probe="linear", seed=-1, view="",
               metric="accuracy",
               n_test=0, score=None, status="not run: VoxCeleb1 is not here: fetch it")
    pd.DataFrame([row]).to_csv(f.with_name("not_run.csv"), index=False)
    np.savez(f.with_name("predictions.npz"))
    with pytest.raises(ValueError, match="sid not run: VoxCeleb1 is not here: fetch it"): G.gather(tmp_path)

def test_paper_numbers_have_source_and_confidence():
    p = pd.read_csv(G.data_dir()/"results/paper_numbers.csv", dtype=str, keep_default_na=False)
    assert (p.source != "").all() and ((p.value == "") == (p.source == "not found")).all()
    assert (p[p.value != ""].confidence != "").all()

@pytest.fixture(scope="module")
def beside():
    "The paper's numbers beside those of the shipped run."
    scores, hits = G.gather(G.data_dir()/"results")
    return P.paper_table(R.with_means(S.bootstrap(hits, 5), scores), scores)

def test_a_row_without_a_run_says_command_audio_and_time(beside):
    t = beside
    rest = t[t.ours == "not run"]
    assert len(rest) > 90 and (t[t.ours != "not run"].ours != "").all() and (rest.command != "").all()
    run = rest[~rest.command.str.startswith("none: ")]
    assert (run.audio != "").all() and run.time.str.fullmatch(r"[\d.e+]+ (h|min)|less than a minute").all()
    assert rest[rest.command.str.startswith("none: ")].time.eq("").all()
    ic = run[(run.model == "HuBERT base (teacher)") & (run.task == "IC")].iloc[0]
    assert ic["first"] == ""
    assert ic.command == ("papermill nbs/04_probe.ipynb probe.ipynb -p profile paper -p tasks ic "
                          "-p encoder teacher-speech")
    assert ic.audio == "Fluent Speech Commands: 19 h"
    # by hand: a HuBERT Base is 14.8 GFLOP a second of audio, 19 h are 68 400 s, and an H100 did 105 TFLOP/s
    assert 68400*14.813e9/105e12 < 60 and ic.time == "less than a minute"
    assert max(len(v) for c in P.COST for v in run[c]) < 320

def test_the_counted_operations_are_those_of_the_layers():
    "Parity with a hand count: the convolutions, the projection, the positional convolution and the layers of a HuBERT."
    from transformers import HubertConfig
    c, seconds = HubertConfig(), 2.
    n, total, inward = 32000, 0, 1
    for k, stride, out in zip(c.conv_kernel, c.conv_stride, c.conv_dim):
        n = (n - k)//stride + 1
        total, inward = total + 2*n*k*inward*out, out
    d, f = c.hidden_size, c.intermediate_size
    same = n + 1    # an even kernel's padding gives a frame more, which is cut off
    total += 2*n*inward*d + 2*same*c.num_conv_pos_embeddings*d*(d//c.num_conv_pos_embedding_groups)
    total += c.num_hidden_layers*(2*n*(4*d*d + 2*d*f) + 2*2*n*n*d)
    assert abs(P.operations(c, seconds)*seconds/total - 1) < 1e-3

def test_commands_of_rows_are_accepted(beside, monkeypatch):
    """Each command's notebook takes its parameters, each distillation its settings, and each encoder is where they
    write it."""
    import nbformat
    from distilltv import distill as D, reproduce, runs
    t = beside.query("ours == 'not run' and not command.str.startswith('none')")
    made, cells = {}, {}
    monkeypatch.setattr(D, "distil",
                        lambda p, teacher, corpus, *a: (made.update({teacher: (p, corpus)}) or "folder", None))
    for first in t["first"].drop_duplicates():
        for c in filter(None, first.split("; ")):
            assert c.startswith("python -m distilltv.distill ")
            D.main(c.split()[3:])
    assert set(made) == {"speech", "music", "ensemble"} and all(p.name == "paper" for p, _ in made.values())
    merged = {c.out for c in reproduce.grid("paper", lams=(.1, .5, .8, .9)) if c.stage == "merge"}
    students = {c.out for c in reproduce.grid("paper") if c.stage == "distil"} | {"paper/students/own/music"}
    for command in t.command.drop_duplicates():
        for c in command.split(" && "):
            _, nb, _, *rest = c.split()
            given = dict(zip(rest[1::3], rest[2::3]))
            if nb not in cells:
                code = [k.source for k in nbformat.read(runs.root()/nb, 4).cells if k.cell_type == "code"
                        and ("parameters" in k.metadata.get("tags", []) or "check_parameters(" in k.source)]
                cells[nb] = [k for k in code
                             if k.startswith(("lam", "encoder"))][0], next(k for k in code if "check_parameters(" in k)
            scope = {}
            exec(cells[nb][0], scope)
            assert set(given) <= set(scope)
            scope |= {k: type(scope[k])(v) for k, v in given.items()}
            exec("from distilltv.runs import Choice, Integer, Text, check_parameters\n"
                 "from distilltv.rules import RULES\nuse_threads = lambda: None\n" + cells[nb][1], scope)
        encoder, tasks = given["encoder"].removeprefix("$DISTILLTV_HOME/"), given["tasks"]
        assert encoder in merged | students | {"teacher-speech", "teacher-music"}
        assert set(tasks.split(",")) <= set(published.PUBLISHED)

def test_what_ours_does_is_read_and_not_typed(monkeypatch, tmp_path):
    t = P.code_table().set_index("what")
    assert t.loc["batch", "ours"] == "24 for both" and t.loc["tasks in the average", "ours"].startswith("9: asr")
    monkeypatch.setattr(P, "get_profile", lambda name: dataclasses.replace(profile(name), batch=7, short="alone"))
    ours = P.code_table().set_index("what").ours
    assert ours[["batch", "audio shorter than a crop"]].tolist() == ["7 for both", "shorter crops; no padding"]
    (tmp_path/"x.csv").write_text("what,theirs,source\nbeauty,none,me\n")
    with pytest.raises(ValueError, match="nothing of ours is read for beauty"): P.code_table(tmp_path/"x.csv")

def test_report_writes_everything(full, tmp_path):
    root, *_ = full
    fig = W.report(root, tmp_path)
    assert fig.exists()
    assert {"scores.csv", "predictions.npz", "table.csv", "tests.csv", "paper.csv", "code.csv", "findings.json",
            "claims.json", "captions.json", "tradeoff.svg", "tasks.png",
            "differences.svg"} <= {f.name for f in tmp_path.iterdir()}
    assert all(list(c) == "id claim source verdict evidence where full_scale".split() and all(c.values())
               for c in json.loads((tmp_path/"claims.json").read_text(encoding="utf-8")))
    assert "lam-0.50-both" in pd.read_csv(tmp_path/"table.csv").encoder.tolist()
    assert "The dial works." in " ".join(json.loads((tmp_path/"findings.json").read_text()))
    assert "3 probe seeds" in json.loads((tmp_path/"captions.json").read_text())["tradeoff"]

# --- tasks whose answers are not just right or wrong

def write_unlike(root, encoder, role, skill, lam=None, corpus=None, n=120, **more):
    """A probe folder with transcripts, numbers and tags whose error falls with skill; the noise is shared by all
    encoders."""
    rng, keep, rows = np.random.default_rng(3), {}, []
    ids = dict(id=np.array([f"i{i}" for i in range(n)]), group=np.array([f"g{i}" for i in range(n)]))
    words = rng.integers(3, 20, n)
    edits = np.stack([rng.binomial(words, .5) for _ in range(2)])
    edits = (edits*(1-skill)).round().astype(int)
    y, noise = rng.normal(size=(n, 2)), rng.normal(size=(2, n, 2))
    said, tags = y + noise*(1.2-skill), (y > .3).astype(float)
    kept = dict(asr=dict(words=words, edits=edits), characters=dict(letters=words, edits=edits),
                emo=dict(true_values=y, values=said), mtt=dict(true_values=tags, values=said))
    rate = lambda i: edits[i].sum()/words.sum()
    score = dict(asr=rate, characters=rate, emo=lambda i: r2_score(y, said[i]),
                 mtt=lambda i: roc_auc_score(tags, said[i]))
    for t, metric, dom in (("asr", "wer", "speech"), ("characters", "cer", "speech"), ("emo", "r2", "music"),
                           ("mtt", "roc-auc", "music")):
        keep |= {f"{t}/{k}": v for k, v in dict(ids, **kept[t]).items()}
        rows += [dict(encoder=encoder, role=role, lam=lam, method="linear" if lam is not None else None, corpus=corpus,
                      task=t, domain=dom, probe="linear", seed=s, view="last", layer=2,
                      metric=metric, score=score[t](s), n_test=n, weights_hash="x", **more) for s in range(2)]
    d = root/"probes"/encoder
    d.mkdir(parents=True)
    pd.DataFrame(rows).to_csv(d/"scores.csv", index=False)
    np.savez(d/"predictions.npz", **keep)

@pytest.fixture(scope="module")
def unlike(tmp_path_factory):
    root = tmp_path_factory.mktemp("unlike")
    for e, r, k in (("logmel", "logmel", .1), ("random", "random", .05), ("teacher-speech", "teacher", .9),
                    ("teacher-music", "teacher", .7)):
        write_unlike(root, e, r, k)
    write_unlike(root, "ensemble-both", "ensemble", .5, corpus="both")
    for lam in (0., .5, 1.): write_unlike(root, f"lam-{lam:.2f}-both", "merged", .3 + .4*lam, lam=lam, corpus="both")
    scores, hits = G.gather(root)
    return root, scores, hits, R.with_means(S.bootstrap(hits, 1000), scores)

def test_estimates_are_the_scores_that_the_probes_reported(unlike):
    _, scores, hits, draws = unlike
    for (t, e), want in scores.groupby(["task", "encoder"]).score.mean().items():
        assert draws[t, e].iloc[0] == pytest.approx(want)

@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10**6))
def test_weighted_scores_are_sklearns(seed):
    rng = np.random.default_rng(seed)
    y, said, w = rng.normal(size=(30, 2)), rng.normal(size=(2, 1, 30, 2)), rng.integers(0, 4, (3, 30)).astype(float)
    got = S.weighted_score(dict(true_values=y, values=said, metric="r2"), w)
    for d in range(3):
        for e in range(2): assert got[d, e, 0] == pytest.approx(r2_score(y, said[e, 0], sample_weight=w[d]))
    tags, tied = (y > 0).astype(float), said.round(0)
    area = S.weighted_score(dict(true_values=tags, values=tied, metric="roc-auc"), np.ones((1, 30)))
    for e in range(2): assert area[0, e, 0] == pytest.approx(roc_auc_score(tags, tied[e, 0]))

def test_intervals_of_other_metrics_are_scipys(unlike):
    _, _, hits, _ = unlike
    h, e = hits["asr"], 2
    one = {k: v[[e]][:, :1] if k in ("edits", "values") else v[[e]] if k == "encoder" else v for k, v in h.items()}
    got = S.interval(S.bootstrap(dict(asr=one), 4000)).iloc[0]
    rate = lambda edits, words, axis: edits.sum(axis)/words.sum(axis)
    want = stats.bootstrap((one["edits"][0, 0], one["words"]), rate, paired=True, method="percentile",
                           rng=np.random.default_rng(1)).confidence_interval
    assert got.lo == pytest.approx(want.low, abs=.01) and got.hi == pytest.approx(want.high, abs=.01)
    h = hits["mtt"]
    one = dict(encoder=h["encoder"][[e]], metric="roc-auc", group=h["group"], true_values=h["true_values"][:, :1],
               values=h["values"][[e]][:, :1, :, :1])
    got = S.bootstrap(dict(mtt=one), 4000).iloc[1:].std().iloc[0]
    tag, value = one["true_values"][:, 0], one["values"][0, 0, :, 0]
    want = np.std([roc_auc_score(tag[i], value[i])
                   for i in np.random.default_rng(1).integers(0, len(tag), (600, len(tag)))])
    assert got == pytest.approx(want, rel=.12)

def tagged(n=20, positives=1, metric="roc-auc"):
    "An encoder that ranks every item right and one that ranks all wrong, on tags of which few items have the first."
    true = (np.arange(n) < positives).astype(float)
    return dict(t=dict(encoder=np.array(["a", "b"]), metric=metric, group=np.arange(n), true_values=true[:, None],
                       values=np.stack([true, -true])[:, None, :, None]))

def test_a_draw_without_the_tag_is_left_out():
    d = S.bootstrap(tagged(), 400)
    difference = d["t", "a"] - d["t", "b"]
    assert .2 < d["t", "a"].isna().mean() < .5 and S.beats(difference) == 1 and S.bootstrap_p(difference) < .01
    both = {k: np.repeat(v, 2, -1) if k.endswith("values") else v for k, v in tagged()["t"].items()}
    both["true_values"][:, 1] = np.arange(20) % 2    # a second tag, which every draw has
    assert S.bootstrap(dict(t=both), 400).notna().all(axis=None)

@pytest.mark.parametrize("metric", ["r2:1", "weighted key score", "average precision", "mine"])
def test_what_is_redrawn_is_the_metric_that_is_named(unlike, metric):
    h = {k: v for k, v in unlike[2]["emo"].items()} | dict(metric=metric)
    if metric != "r2:1":
        with pytest.raises(ValueError, match=f"task emo: {metric} "): S.bootstrap(dict(emo=h), 5)
    else: assert S.weighted_score(h, np.ones((1, 120)))[0, 0, 0] == pytest.approx(
        r2_score(h["true_values"][:, 1], h["values"][0, 0, :, 1]))

def test_one_group_has_no_interval(tmp_path):
    study(tmp_path)
    for f in tmp_path.glob("probes/*/predictions.npz"):
        z = dict(np.load(f))
        np.savez(f, **z | {f"{t}/group": np.full(200, "all") for t in TASKS})
    scores, hits = G.gather(tmp_path)
    draws = R.with_means(S.bootstrap(hits, 50), scores)
    tests, shown = R.paired_tests(hits, draws, scores), R.table(draws, scores)
    assert shown.loc["teacher-speech", "speech mean"].endswith(" ± ?") and shown.stack().str.endswith(" ± ?").all()
    assert tests[["lo", "hi", "p", "p_adjusted", "better"]].isna().all(axis=None) and not tests.holds.any()
    assert W.findings(draws, scores, tests)[0].startswith("A trade-off is not shown by these runs.")
    assert "points [?]" in W.findings(draws, scores, tests)[0]
    for draw in (F.plot_tradeoff, F.plot_tasks): F.plt.close(draw(draws, scores))

def test_less_is_better_is_turned_in_scale_and_differences(unlike):
    _, scores, hits, draws = unlike
    k = R.scale(draws, scores, ("asr", "emo"))
    assert k.best["asr"] < k.zero["asr"] and k.best["emo"] > k.zero["emo"]
    assert not {"speech mean", "music mean", R.OVERALL} & set(draws.columns.unique(0))
    t = R.paired_tests(hits, draws, scores).set_index(["task", "encoder"])
    for task in ("asr", "characters", "emo", "mtt"):
        up, down = t.loc[task, "lam-1.00-both"], t.loc[task, "lam-0.00-both"]
        assert up.difference > 0 > down.difference and up.better > .9 > .1 > down.better
        assert up.effect > 0 > down.effect and up.test == "paired bootstrap"
    shown = R.table(draws, scores)
    assert {"asr (wer ↓)", "characters (cer ↓)", "emo (r2)", "mtt (roc-auc)"} <= set(shown.columns)

def test_the_authors_nine_have_an_overall_of_their_own():
    tasks, roles = [*R.NINE, "sid", "pitchid"], (("logmel", "logmel"), ("teacher-speech", "teacher"), ("x", "merged"))
    scores = pd.DataFrame([dict(encoder=e, role=r, task=t, domain="speech", metric="wer" if t == "asr" else "accuracy")
                           for e, r in roles for t in tasks])
    level = {"logmel": .2, "teacher-speech": .8, "x": .5}
    d = pd.DataFrame({(t, e): [1-v if t == "asr" else v if t in R.NINE or e != "x" else .2]*3 for t in tasks
                      for e, v in level.items()})
    m = R.with_means(d, scores)
    assert m[R.OVERALL, "x"].iloc[0] == pytest.approx(500)
    assert m[R.OVERALL, "teacher-speech"].iloc[0] == pytest.approx(1000)
    assert m[R.OVERALL, "logmel"].iloc[0] == pytest.approx(0)
    assert R.OVERALL not in R.with_means(d.drop(columns=["er"], level=0), scores)

def test_effect_and_p_of_a_paired_difference():
    rng = np.random.default_rng(0)
    words, a, b = np.ones(200), rng.normal(0, 1, 200), rng.normal(.25, 1, 200)
    h = dict(t=dict(encoder=np.array(["a", "b"]), metric="wer", group=np.arange(200), words=words,
                    edits=np.stack([a, b])[:, None]))
    draws = S.bootstrap(h, 4000)
    d, want = draws["t", "b"] - draws["t", "a"], b - a
    assert S.cohen_dz(d, 200) == pytest.approx(want.mean()/want.std(), rel=.05)
    assert S.bootstrap_p(d) == pytest.approx(stats.ttest_rel(b, a).pvalue, abs=.02)
    assert S.bootstrap_p(-d) == S.bootstrap_p(d)
    assert S.bootstrap_p(pd.Series([0.]*101)) == 1

def test_machines_share_the_work(unlike, tmp_path):
    "Folders of probes, and results that were saved from them, join to what one machine would have had."
    root, scores, hits, _ = unlike
    for e in scores.encoder.unique():
        to = tmp_path/("one" if e.startswith("lam") else "two")/"probes"/e
        shutil.copytree(root/"probes"/e, to)
    saved = G.gather(tmp_path/"two")
    G.save(tmp_path/"three", *saved)
    # columns that the others lack
    more = pd.read_csv(tmp_path/"one/probes/lam-0.50-both/scores.csv").assign(commit="abc", peak_memory_mb=1.)
    more.to_csv(tmp_path/"one/probes/lam-0.50-both/scores.csv", index=False)
    for both in ((tmp_path/"one", tmp_path/"two"), (tmp_path/"three", tmp_path/"one")):
        s, h = G.gather(*both)
        a, b = (S.bootstrap(x, 50) for x in (hits, h))
        pd.testing.assert_frame_equal(S.interval(a).sort_index()[["estimate"]],
                                      S.interval(b).sort_index()[["estimate"]])
        assert len(s) == len(scores) and "commit abc" in F.how_made(s)
    with pytest.raises(ValueError, match="'ensemble-both' was scored on asr in more than one folder"):
        G.gather(tmp_path/"two", tmp_path/"three")
    z = dict(np.load(tmp_path/"one/probes/lam-0.50-both/predictions.npz"))
    np.savez(tmp_path/"one/probes/lam-0.50-both/predictions.npz", **z | {"asr/words": z["asr/words"] + 1})
    with pytest.raises(ValueError, match="task asr: .*'lam-0.50-both' were tested on different items"):
        G.gather(tmp_path/"one", tmp_path/"two")

def test_what_was_not_run_is_a_state(unlike, tmp_path):
    root, scores, _, _ = unlike
    shutil.copytree(root/"probes", tmp_path/"probes")
    row = dict(encoder="logmel", role="logmel", task="sid", domain="speech", probe="linear", seed=-1, metric="accuracy",
               n_test=0, status="not run: VoxCeleb1 is not in datasets: fetch it")
    pd.DataFrame([row]).to_csv(tmp_path/"probes/logmel/not_run.csv", index=False)
    pd.DataFrame([dict(row, encoder="only", task=t)
                  for t in ("sid", "asr")]).to_csv((tmp_path/"probes/only").mkdir()
                                                   or tmp_path/"probes/only/not_run.csv", index=False)
    pd.DataFrame(columns=scores.columns).to_csv(tmp_path/"probes/only/scores.csv", index=False)
    np.savez(tmp_path/"probes/only/predictions.npz")
    scores, hits = G.gather(tmp_path)
    draws = R.with_means(S.bootstrap(hits, 50), scores)
    t = R.table(draws, scores)
    assert (t.sid == "not run").all() and (t.loc["only"] == "not run").all() and not t.isin(["0.0 ± 0.0"]).any().any()
    assert "sid not run: VoxCeleb1 is not in datasets: fetch it" in R.missing(scores)
    assert "sid" not in F.how_made(scores)
    assert len(R.paired_tests(hits, draws, scores)) == 12 and W.findings(draws, scores) == []
    G.save(tmp_path/"out", scores, hits)
    assert G.gather(tmp_path/"out")[0].score.isna().sum() == 3

# --- learning curves

def test_learning_curves_are_read_from_the_logs(tmp_path):
    for s, cols in (("speech", ["speech_4", "speech_12"]), ("ensemble", ["speech_4", "music_4"])):
        d = tmp_path/f"students/both/{s}"
        d.mkdir(parents=True)
        pd.DataFrame({"step": [0, 10], "loss": [2., 1.], "validation": [None, 1.],
                      **{c: [2., 1.5] for c in cols}}).to_csv(d/"log.csv", index=False)
    held_out = ("valid_esc_50", "valid_esc_50/speech_4")    # the loss on a domain of that name, and a part of it
    log = tmp_path/"students/both/speech/log.csv"
    pd.read_csv(log).assign(**dict.fromkeys(held_out, 1.)).to_csv(log, index=False)
    c = G.learning(tmp_path)
    assert set(map(tuple, c[["student", "teacher", "layer"]].to_numpy())) == {("speech", "speech", 4),
                                                                              ("speech", "speech", 12),
                                                                              ("ensemble", "speech", 4),
                                                                              ("ensemble", "music", 4)}
    assert c[(c.student == "ensemble") & (c.teacher == "music")].loss.tolist() == [2., 1.5]
    assert len(G.learning(tmp_path/"students")) == 0
    assert len(F.plot_learning(c).axes) == 2
