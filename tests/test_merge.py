"Merge: the algebra against closed forms, files in and out, and everything that must be refused."
import copy, json, multiprocessing, os, pickle, shutil, signal, subprocess, sys, time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
import numpy as np, pytest, torch, yaml
from hypothesis import HealthCheck, given, settings, strategies as st
from safetensors.torch import load_file, save_file
from transformers import AutoModel, HubertConfig, HubertForCTC, HubertModel, WavLMConfig, WavLMModel
from distilltv.geometry import geometry
from distilltv.cards import licence_line, merged_name
from distilltv.merge import Student, TaskVector, as_student, load_student, merge
from distilltv.saving import add_scores, save_all
from distilltv.profiles import Profile
from distilltv.students import find_students, settings_of
from distilltv.recipes import domain_weights, merge_recipe
from distilltv.path import Dial
from distilltv.rules import RULES, apply_rule
from distilltv.weights import Checkpoint
from distilltv.parts import ByName, part, parts
from distilltv import encoders
from distilltv.runs import atomic_folder

ROOT = Path(__file__).resolve().parents[1]
G, V = ("encoder.pos_conv_embed.conv.parametrizations.weight.original" + i for i in "01")
lams = st.floats(-3, 3, allow_nan=False).map(lambda x: round(x, 6))

TINY = dict(hidden_size=48, num_hidden_layers=2, num_attention_heads=4, intermediate_size=96, conv_dim=(24,)*7,
            num_conv_pos_embeddings=16, num_conv_pos_embedding_groups=4, feat_proj_layer_norm=False, mask_time_prob=0.)

def tiny(seed, **kw):
    torch.manual_seed(seed)
    m = HubertModel(HubertConfig(**(TINY | kw)))
    for p in m.parameters(): p.data += .02*torch.randn_like(p) # norms and biases must differ as well
    return m

def save(folder, model, **record):
    model.save_pretrained(folder)
    if record: (folder/"distilltv.json").write_text(json.dumps(record))
    return folder

def edit(folder, change):
    "Apply `change` to the folder's tensors, in place."
    f = folder/"model.safetensors"
    tensors = load_file(f)
    change(tensors)
    save_file(tensors, f, {"format": "pt"})

@pytest.fixture(scope="session")
def trio(tmp_path_factory):
    top = tmp_path_factory.mktemp("trio")
    save(top/"base", tiny(0))
    h = Checkpoint(top/"base").hash
    for i, d in enumerate(("speech", "music", "environment")): save(top/d, tiny(i+1), base_hash=h)
    return top

@pytest.fixture
def mine(trio, tmp_path): # a private copy, to break
    for d in ("base", "speech", "music"): shutil.copytree(trio/d, tmp_path/d)
    return tmp_path

def algebra(top):
    base = load_student(top/"base")
    return base, *(TaskVector.between(base, load_student(top/d)) for d in ("speech", "music"))

def numbers(x): return np.concatenate([np.asarray(x[n], np.float64).ravel() for n in x.names])

def saves(top, out, vectors, lam):
    "Hash of a merge, and whether its record names the inputs that it was made of."
    base, s, m = vectors
    record = (base + lam*s + (1-lam)*m).save_pretrained(out/f"{lam}")
    right = all(i["hash"] == load_student(top/Path(i["path"]).name).hash for i in record["inputs"])
    return record["weights_hash"], right

# --- the equation

@settings(max_examples=6, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(lams, lams)
def test_closed_form_in_float64(trio, a, b):
    base, s, m = algebra(trio)
    θ, θs, θm = (numbers(load_student(trio/d)) for d in ("base", "speech", "music"))
    np.testing.assert_allclose(numbers(base + a*s + b*m), θ + a*(θs-θ) + b*(θm-θ), rtol=0, atol=1e-14)

@settings(max_examples=6, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(lams)
def test_base_cancels_when_the_weights_sum_to_one(trio, lam):
    base, s, m = algebra(trio)
    u = base + lam*s + (1-lam)*m
    assert {c.folder.name for n in u.names for c in u.weights(n)} <= {"speech", "music"}
    θs, θm = (numbers(load_student(trio/d)) for d in ("speech", "music"))
    np.testing.assert_allclose(numbers(u), lam*θs + (1-lam)*θm, rtol=0, atol=1e-14)

@pytest.mark.parametrize("lam, end",
                         [(1, "speech"), (0, "music"), (1., "speech"), (0., "music"), (np.float32(1), "speech")])
def test_endpoints_bit_for_bit_through_disk(trio, tmp_path, lam, end):
    base, s, m = algebra(trio)
    (base + lam*s + (1-lam)*m).save_pretrained(tmp_path/"out")
    a, b = (load_file(f/"model.safetensors") for f in (tmp_path/"out", trio/end))
    assert sorted(a) == sorted(b) and all(a[k].numpy().tobytes() == b[k].numpy().tobytes() for k in a)

@settings(max_examples=6, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(lams, lams)
def test_laws(trio, a, b):
    base, s, m = algebra(trio)
    same = lambda x, y: np.array_equal(numbers(x), numbers(y))
    assert same(a*s + b*m, b*m + a*s)
    assert same((base + a*s) + b*m, (base + b*m) + a*s) and same(base + (a*s + b*m), (base + a*s) + b*m)
    assert same(a*s + b*s, b*s + a*s) and same(a*(s + m), a*s + a*m)
    assert not numbers(a*s - a*s).any() and same(base + a*s - a*s, base) and same(-(-s), s)
    assert same(sum([s, m]), s + m) and same(s/4, .25*s)
    if a: assert same(a*s/a, s)

@settings(max_examples=6, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(lams, st.floats(0, 1))
def test_linear_in_lam(trio, a, t):
    base, s, m = algebra(trio)
    u = lambda lam: numbers(base + lam*s + (1-lam)*m)
    np.testing.assert_allclose(u(t*a), t*u(a) + (1-t)*u(0), rtol=0, atol=1e-13)

def test_many_domains(trio):
    base, *_ = algebra(trio)
    w = dict(speech=.4, music=.4, environment=.2)
    u = base + sum(k*TaskVector.between(base, load_student(trio/d)) for d, k in w.items())
    np.testing.assert_allclose(numbers(u), sum(k*numbers(load_student(trio/d)) for d, k in w.items()), rtol=0,
                               atol=1e-14)

def test_points_and_vectors_do_not_mix(trio):
    base, s, m = algebra(trio)
    for wrong in (lambda: base + base, lambda: 2*base, lambda: s - base, lambda: s*m, lambda: -base, lambda: base + 1,
                  lambda: s + 1):
        with pytest.raises(TypeError): wrong()
    for bad in (float("nan"), float("inf")):
        with pytest.raises((ValueError, OverflowError)): bad*s
    assert isinstance(s - m, TaskVector) and isinstance(base - s, Student)

def test_equal_content_read_twice_cancels(trio):
    again = load_student(trio/"base")
    base, s, _ = algebra(trio)
    assert len((again + s).weights(s.names[0])) == 1

def test_hash_is_the_encoders_hash(trio, tmp_path):
    base, s, m = algebra(trio)
    u = base + .3*s + .7*m
    u.save_pretrained(tmp_path/"u")
    assert (encoders.weights_hash(encoders.load_encoder(tmp_path/"u")) == load_student(tmp_path/"u").hash
            == encoders.weights_hash(u.model()))

def test_loaded_models_merge_like_their_folders(trio, tmp_path):
    base, s, m = algebra(trio)
    loaded = {d: HubertModel.from_pretrained(trio/d) for d in ("base", "speech", "music")}
    a, b = (TaskVector.between(loaded["base"], loaded[d]) for d in ("speech", "music"))
    made = loaded["base"] + .4*a + .6*b
    assert made.save_pretrained(tmp_path/"u")["weights_hash"] == (base + .4*s
                                                                  + .6*m).save_pretrained(tmp_path/"v")["weights_hash"]
    merge_recipe(tmp_path/"u/recipe.yaml", tmp_path/"w") # they lie in folders, which the recipe names
    assert load_student(tmp_path/"w").hash == load_student(tmp_path/"u").hash
    assert merge(loaded["base"], dict(speech=loaded["speech"], music=loaded["music"]),
                 dict(speech=.4, music=.6)).hash == made.hash
    with pytest.raises(TypeError, match="not int"): TaskVector.between(base, 3)

def test_a_loaded_model_may_have_another_float_type_than_its_folder(trio, tmp_path):
    for d in ("base", "speech", "music"): save(tmp_path/d, HubertModel.from_pretrained(trio/d).half())
    h = Checkpoint(tmp_path/"base").hash
    for d in ("speech", "music"): (tmp_path/d/"distilltv.json").write_text(json.dumps(dict(base_hash=h)))
    base, s, m = algebra(tmp_path)
    loaded = HubertModel.from_pretrained(tmp_path/"speech", dtype=torch.float32)
    made = base + .4*TaskVector.between(base, loaded) + .6*m
    assert made.hash == (base + .4*s + .6*m).hash
    made.save_pretrained(tmp_path/"u")
    merge_recipe(tmp_path/"u/recipe.yaml", tmp_path/"again")
    assert load_student(tmp_path/"again").hash == load_student(tmp_path/"u").hash
    save(tmp_path/"speech", HubertModel.from_pretrained(trio/"speech"), base_hash=h)    # of two folders it counts
    with pytest.raises(ValueError, match="one architecture and type"): load_student(tmp_path/"speech") - base

def test_a_model_that_is_only_in_memory_cannot_be_replayed(trio, tmp_path):
    new = tiny(9)
    with pytest.raises(ValueError, match="no base_hash is recorded"): TaskVector.between(trio/"base", new)
    v = TaskVector.between(trio/"base", new, trust=True)
    (load_student(trio/"base") + .5*v).save_pretrained(tmp_path/"u")
    with pytest.raises(ValueError, match="was a model in memory and lies in no folder"):
        merge_recipe(tmp_path/"u/recipe.yaml", tmp_path/"w")

def test_three_domains_of_a_profile(trio, tmp_path, monkeypatch):
    monkeypatch.setenv("DISTILLTV_HOME", str(tmp_path/"runs"))
    (tmp_path/"mine.toml").write_text('name = "mine"\n[teachers]\n'
                                      + "".join(f'{d} = "{trio/d}"\n' for d in ("speech", "music", "environment")),
                                      encoding="utf-8")
    with pytest.raises(FileNotFoundError,
                       match="mine.toml -p corpus both -p teacher speech .and again with music, environment"):
        find_students(tmp_path/"mine.toml")
    for d in ("base", "speech", "music", "environment"):
        shutil.copytree(trio/d, tmp_path/"runs/mine"/(d if d == "base" else f"students/both/{d}"))
    found = find_students(tmp_path/"mine.toml")
    assert list(found) == ["base", "speech", "music", "environment"]
    with pytest.raises(FileNotFoundError): find_students(tmp_path/"mine.toml", seed=1) # other students
    w = domain_weights('{"environment": 0.2, "speech": 0.4, "music": 4e-1}', .5, list(found)[1:])
    vectors = {d: TaskVector.between(found["base"], found[d]) for d in w}
    u = merge(found["base"], vectors, w)
    np.testing.assert_allclose(numbers(u), sum(k*numbers(load_student(trio/d)) for d, k in w.items()), rtol=0,
                               atol=1e-14)
    assert len(u.save_pretrained(tmp_path/"u", weights=w)["inputs"]) == 4

def test_a_student_that_does_not_fit_its_profile_is_refused(trio, tmp_path, monkeypatch):
    "How it was computed may differ, and what it does not record is taken; a shipped profile never changes."
    monkeypatch.setenv("DISTILLTV_HOME", str(tmp_path))
    def put(p, **change):
        for d in ("base", "speech", "music"):
            shutil.copytree(trio/d, p.folder/(d if d == "base" else f"students/both/{d}-seed1"), dirs_exist_ok=True)
        note = p.folder/"students/both/music-seed1/distilltv.json"
        note.write_text(json.dumps(settings_of(p) | dict(seed=1) | change))
        return note.parent
    p = Profile("mine", dict(speech="a", music="b"), steps=30_000, lr=1e-3)
    for change in ({}, dict(accumulate=4, precision="bf16"), dict(unheard_of=3)):
        assert put(p, **change) == find_students(p, "both", 1)["music"]
    for change, says in ((dict(steps=20), "with steps = 20, but the profile says steps = 30000: distil it again"),
                         (dict(student_layers=3, lr=.1), "with student_layers = 3, lr = 0.1, but the profile says "
                                                         "student_layers = 2, lr = 0.001: distil it again")):
        folder = put(p, **change)
        with pytest.raises(ValueError, match=f"{folder} was distilled {says}, or give the profile the old value"):
            find_students(p, "both", 1)
    hub = Profile("hub", p.teachers)
    assert put(hub, student_width=1536) == find_students(hub, "both", 1)["music"]

@pytest.mark.parametrize("weights, lam, says", [
    ("", .4, r"lam is the weight of the first of two domains, and here are 3 .*-p weights"),
    ({"a": 1, "b": 1}, .5, "weights lack c; name every domain"),
    ({"a": 1, "b": 1, "c": 1, "d": 1}, .5, "weights name 'd', which is no domain"),
    ("much", .5, "hold no table"),
    ("{a: [", .5, "hold no table"),
    ({"a": 1, "b": 1, "c": "x"}, .5, "the weight of c is 'x'; give a finite number"),
    ({"a": 1, "b": 1, "c": float("inf")}, .5, "the weight of c is inf"),
    ({"a": 1, "b": 1, "c": 1}, .3, "lam = 0.3 and weights are both given")])
def test_weights_by_domain_that_are_refused(weights, lam, says):
    with pytest.raises(ValueError, match=says): domain_weights(weights, lam, ["a", "b", "c"])

def test_a_misspelt_domain_of_weights_is_named():
    with pytest.raises(ValueError, match="'machine', which is no domain of the profile .did you mean machines"):
        domain_weights({"talk": .5, "machine": .5}, .5, ["talk", "machines"])

def test_weights_that_differ_have_folders_that_differ():
    lams = [.4, .40000001, 1/3, .333333, 0., 1e-9, 1.]
    assert len({merged_name("linear", l) for l in lams}) == len(lams) and merged_name("linear", .4) == "linear-lam-0.40"
    assert merged_name("linear", -0.) == merged_name("linear", 0)

# --- weights that differ by part

def test_weight_over_depth(trio):
    base, s, m = algebra(trio)
    lam = np.array([1., .25, 0.])
    u, θs, θm = base + lam*s + (1-lam)*m, load_student(trio/"speech"), load_student(trio/"music")
    for n in u.names:
        w = {"layer 1": .25, "layer 2": 0.}.get(part(n), 1.)
        np.testing.assert_allclose(np.asarray(u[n], np.float64),
                                   w*θs[n].astype(np.float64) + (1-w)*θm[n].astype(np.float64), rtol=0, atol=1e-15)

def test_weight_by_name(trio, tmp_path):
    base, s, m = algebra(trio)
    lam = ByName({"attention": 1, "layer 2": .5, "": 0})
    u = base + lam*s + (1-lam)*m
    w = {n: [float(k) for c, k in u.weights(n).items() if c.folder.name == "speech"] for n in u.names}
    assert w["encoder.layers.1.attention.k_proj.bias"] == [1] and w["encoder.layers.1.final_layer_norm.bias"] == [.5]
    assert w["encoder.layers.0.final_layer_norm.bias"] == []
    with pytest.raises(ValueError, match="no weight is given"): ByName({"attention": 1})*s
    deep = ByName({"layer 1": 1, "input norm": 2, "": 0})
    late = ByName({"": 0, "layer 1": 1}) # the empty key is the rest, wherever it stands
    assert [late.of(n) for n in ("encoder.layers.0.x", "encoder.layers.1.x")] == [1, 0]
    with pytest.raises(ValueError, match="'self_attn' is never used: no tensor has that"):
        ByName({"self_attn": 1, "": 0})*s
    with pytest.raises(ValueError, match="'layer 1' is never used: an earlier key fits encoder.layers.0"):
        ByName({"layers.0": 1, "layer 1": 2, "": 0})*s
    assert [deep.of(n) for n in ("encoder.layers.0.x", "encoder.layers.10.x", "encoder.layer_norm.bias",
                                 "encoder.layers.3.layer_norm.bias")] == [1, 0, 2, 0]

# --- rules

@pytest.mark.parametrize("rule", RULES)
def test_every_rule_gives_an_encoder(trio, tmp_path, rule):
    base, s, m = algebra(trio)
    w = [.4, .6] if rule != "model_stock" else [1, 1] # model stock takes its models as equals
    u = merge(base, dict(speech=s, music=m), dict(zip(("speech", "music"), w)), rule, seed=3)
    r = u.save_pretrained(tmp_path/"u")
    assert r["rule"] == rule and len(r["inputs"]) == 3
    assert HubertModel.from_pretrained(tmp_path/"u")(torch.randn(1, 4000))[0].isfinite().all()
    n = "encoder.layers.0.feed_forward.intermediate_dense.weight"
    want = base[n] + apply_rule(rule, [np.asarray(v[n], np.float64) for v in (s, m)], w,
                                base=base[n].astype(np.float64), name=n, seed=3)
    np.testing.assert_allclose(u[n], want, atol=1e-14)

def test_rules_refuse(trio):
    base, s, m = algebra(trio)
    two, w = dict(speech=s, music=m), dict(speech=.5, music=.5)
    with pytest.raises(ValueError, match="'magic' is unknown; use one of linear, task_arithmetic"):
        merge(base, two, w, "magic")
    with pytest.raises(ValueError, match="ties has no option 'gamma'; it has density"):
        merge(base, two, w, "ties", gamma=.1)
    with pytest.raises(ValueError, match="weights are given for"): merge(base, two, dict(speech=1))
    for rule, options, says in (("dare_linear", dict(density=50), r"density is 50; .*\(0, 1\]"),
                                ("ties", dict(density=0), "density is 0"),
                                ("breadcrumbs", dict(gamma=-1), r"gamma is -1; .*\[0, 1\)"),
                                ("della", dict(epsilon=2), "epsilon is 2"),
                                ("dare_ties", dict(density=True), "density is True"),
                                ("dare_ties", dict(seed=-1), "seed is -1")):
        with pytest.raises(ValueError, match=says): merge(base, two, w, rule, **options)
    with pytest.raises(ValueError, match="model_stock takes its models as equals"):
        merge(base, two, dict(speech=.1, music=.9), "model_stock")
    with pytest.raises(ValueError, match="slerp divides by the sum of its weights"):
        merge(base, two, dict(speech=1, music=-1), "slerp").hash
    with pytest.raises(ValueError, match="slerp merges two models, not 3"):
        merge(base, two | dict(x=s), w | dict(x=1), "slerp").hash

# --- several at once, and files that change

def test_threads_share_vectors(trio, tmp_path):
    "And the record of each merge names the right hashes, whoever read a tensor first."
    shared, lams = algebra(trio), [i/10 for i in range(11)]
    was = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        with ThreadPoolExecutor(6) as ex: got = list(ex.map(lambda l: saves(trio, tmp_path/"t", shared, l), lams))
    finally: sys.setswitchinterval(was)
    assert got == [saves(trio, tmp_path/"one", algebra(trio), l) for l in lams] and all(right for _, right in got)

def test_a_forked_worker_merges_what_was_read_before(trio, tmp_path):
    shared = algebra(trio)
    geometry(dict(speech=shared[1], music=shared[2]), base=shared[0]) # part of the hash is made by a thread
    with multiprocessing.get_context("fork").Pool(1) as pool:
        job = pool.apply_async(saves, (trio, tmp_path/"forked", shared, .4))
        assert job.get(60) == saves(trio, tmp_path/"here", shared, .4)

def test_students_and_vectors_are_copied_and_sent(mine):
    base, s, _ = algebra(mine)
    for again in (copy.deepcopy(base + .4*s), pickle.loads(pickle.dumps(base + .4*s))):
        assert again.hash == (base + .4*s).hash and (again - .4*s).hash == base.hash
    sent = pickle.dumps(s)
    edit(mine/"speech", lambda t: t["encoder.layer_norm.bias"].add_(1))
    with pytest.raises(ValueError, match="speech/model.safetensors was changed since it was opened"): pickle.loads(sent)

def test_a_file_that_is_written_over_while_open_is_refused(mine, tmp_path):
    base, s, m = algebra(mine)
    s.norm() # its hash is known now
    shutil.copyfile(mine/"music/model.safetensors", mine/"speech/model.safetensors")
    with pytest.raises(ValueError, match="speech/model.safetensors was changed while it was open"):
        (base + s).save_pretrained(tmp_path/"u")
    os.replace(shutil.copytree(mine/"speech", tmp_path/"c")/"model.safetensors", mine/"music/model.safetensors")
    (base + m).save_pretrained(tmp_path/"u") # replaced by rename: the old file is still there for us

# --- geometry

def test_geometry_against_numpy(trio):
    base, s, m = algebra(trio)
    a, b = numbers(s), numbers(m)
    assert s.norm() == pytest.approx(np.linalg.norm(a)) and s.dot(m) == pytest.approx(a@b)
    assert s.cosine(m) == pytest.approx(a@b/np.linalg.norm(a)/np.linalg.norm(b))
    t = geometry(dict(speech=s, music=m), by="tensor", base=base)
    assert len(t) == len(s.names) and (t["‖speech‖"]**2).sum() == pytest.approx(a@a)
    assert np.isnan((s-s).cosine(m))

def test_every_tensor_has_a_part(trio):
    names = load_student(trio/"base").names
    p = parts(names)
    assert sorted(n for ns in p.values() for n in ns) == names
    assert list(p) == [f"conv {i}" for i in range(7)] + ["projection", "position", "input norm", "layer 1", "layer 2"]
    assert part("encoder.layers.11.attention.k_proj.bias") == "layer 12" and part("masked_spec_embed") == "mask"

# --- files

@pytest.mark.parametrize("dtype", ["float32", "float64", "float16", "bfloat16"])
def test_round_trip(trio, tmp_path, dtype):
    base, s, m = algebra(trio)
    u = base + .3*s + .7*m
    record = u.save_pretrained(tmp_path/"u", dtype=dtype, lam=.3)
    model, info = HubertModel.from_pretrained(tmp_path/"u", output_loading_info=True)
    assert not any(info[k] for k in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    for n, t in model.state_dict().items():
        # rounded once (torch goes to float16 by way of float32)
        x = np.array(u[n]).astype("float32" if dtype == "bfloat16" else dtype)
        want = torch.from_numpy(x).to(getattr(torch, dtype))
        assert t.dtype == want.dtype and torch.equal(t, want), n
    assert record["weights_hash"] == load_student(tmp_path/"u").hash
    assert json.loads((tmp_path/"u/distilltv.json").read_text())["lam"] == .3
    assert all(np.isfinite(load_student(tmp_path/"u")[n]).all() for n in u.names)

def test_model_in_memory_equals_the_file(trio, tmp_path):
    base, s, m = algebra(trio)
    u = base + .3*s + .7*m
    u.save_pretrained(tmp_path/"u")
    wav = torch.randn(1, 4000)
    with torch.no_grad():
        assert torch.equal(u.model()(wav)[0], HubertModel.from_pretrained(tmp_path/"u").eval()(wav)[0])

def test_record_says_what_was_done(trio, tmp_path):
    base, s, m = algebra(trio)
    r = (base + 1.5*s - .5*m).save_pretrained(tmp_path/"u", lam=1.5)
    assert r["extrapolation"] and r["base_hash"] == load_student(trio/"base").hash
    assert {Path(i["path"]).name: i["weight"] for i in r["inputs"]} == dict(base="base", speech=1.5, music=-.5)
    assert all((tmp_path/"u"/i["path"]).exists() and i["hash"] == load_student(tmp_path/"u"/i["path"]).hash
               for i in r["inputs"])
    card = (tmp_path/"u/README.md").read_text()
    assert "extrapolation" in card and all(i["hash"][:16] in card for i in r["inputs"])
    assert not (base + .5*s + .5*m).save_pretrained(tmp_path/"v")["extrapolation"]

def test_a_scale_beyond_one_is_an_extrapolation_too(trio, tmp_path):
    base, s, m = algebra(trio)
    for scale, beyond in ((1., False), (1.5, True)):
        assert merge(base, dict(speech=s, music=m), dict(speech=.5, music=.5), "ties",
                     scale=scale).save_pretrained(tmp_path/"u")["extrapolation"] == beyond

@pytest.mark.parametrize("said", [["MIT"], {}, "", None, 3])
def test_a_licence_that_is_no_name_is_not_recorded(mine, tmp_path, said):
    note = mine/"speech/distilltv.json"
    note.write_text(json.dumps(json.loads(note.read_text()) | dict(licence=said)))
    base, s, m = algebra(mine)
    record = (base + .3*s + .7*m).save_pretrained(tmp_path/"u")
    assert {i["licence"] for i in record["inputs"]} == {"not recorded"}

def test_card_names_licences_and_scores(mine, tmp_path):
    (mine/"speech/distilltv.json").write_text(json.dumps(json.loads((mine/"speech/distilltv.json").read_text())
                                                         | dict(licence="CC-BY-4.0")))
    base, s, m = algebra(mine)
    first = (base + .3*s + .7*m).save_pretrained(tmp_path/"u", lam=.3)
    licences = {Path(i["path"]).name: i["licence"] for i in first["inputs"]}
    assert licences == dict(base="not recorded", speech="CC-BY-4.0", music="not recorded")
    assert "score" not in (tmp_path/"u/README.md").read_text()
    record = add_scores(tmp_path/"u", dict(phones=np.float64(.5)))
    record = add_scores(tmp_path/"u", dict(pitch=.75))
    assert record == json.loads((tmp_path/"u/distilltv.json").read_text())
    assert record["scores"] == dict(phones=.5, pitch=.75)
    card = (tmp_path/"u/README.md").read_text()
    assert all(line in card
               for line in ("| phones | 0.5 |", "| pitch | 0.75 |", "CC-BY-4.0", f"numpy {np.__version__}"))
    merge_recipe(tmp_path/"u/recipe.yaml", tmp_path/"v")
    for f in (tmp_path/"u").iterdir(): assert f.read_bytes() == (tmp_path/"v"/f.name).read_bytes(), f.name

@pytest.mark.parametrize("said, front", [
    ("CC-BY-4.0", dict(license="cc-by-4.0")), ("CC BY-NC 4.0", dict(license="cc-by-nc-4.0")),
    ("MIT License", dict(license="mit")), ("no", dict(license="other", license_name="no")),
    ("proprietary: ask us", dict(license="other", license_name="proprietary-ask-us")), ("not recorded", {})])
def test_licences_are_named_as_the_hub_names_them(said, front):
    assert (yaml.safe_load(licence_line([said, said])) or {}) == front

def test_the_card_opens_the_folder_with_its_own_class_in_float32(tmp_path):
    more = {}
    for i, d in enumerate(("base", "speech")):
        torch.manual_seed(i)
        model = WavLMModel(WavLMConfig(**{k: v for k, v in TINY.items() if k != "feat_proj_layer_norm"}))
        encoders.save_encoder(model, tmp_path/d, **more)
        more = dict(base_hash=encoders.weights_hash(model))
    base = load_student(tmp_path/"base")
    u = base + .4*TaskVector.between(base, tmp_path/"speech")
    u.save_pretrained(tmp_path/"u", dtype=torch.bfloat16)
    for d in ("base", "u"):
        card = (tmp_path/d/"README.md").read_text()
        code, opened = card.split("```python\n")[1].split("```")[0], {}
        exec(code.replace("this folder", str(tmp_path/d)), opened)
        assert "hubert" not in card.lower() and opened["encoder"].dtype == torch.float32
    assert type(u.model()) is WavLMModel and encoders.weights_hash(u.model()) == u.hash

def test_arguments_of_others_are_no_facts(trio, tmp_path):
    base, s, _ = algebra(trio)
    for name, says in dict(torch_dtype="give dtype", license="give licence", push_to_hub="leave it out").items():
        with pytest.raises(ValueError, match=f"{name} .*{says}"):
            (base + s).save_pretrained(tmp_path/"u", **{name: "x"})

@pytest.mark.parametrize("rule", ["linear", "ties"])
@pytest.mark.parametrize("out", ["base", "speech", "link"])
def test_a_merge_does_not_take_the_place_of_an_input(trio, mine, rule, out):
    record = json.dumps(dict(base_hash=Checkpoint(trio/"base").hash, weights_hash="0"*64)) # as this package saves
    for d in ("base", "speech"): (mine/d/"distilltv.json").write_text(record)
    (mine/"link").symlink_to(mine/"speech")
    base, s, m = algebra(mine)
    u = merge(base, dict(speech=s, music=m), dict(speech=.5, music=.4), rule)
    with pytest.raises(ValueError, match=f"{out} would take the place of .*(base|speech), which goes into it"):
        u.save_pretrained(mine/out)
    assert load_student(mine/out).hash == load_student(trio/Path(os.path.realpath(mine/out)).name).hash

def test_two_students_lie_beside_each_other(trio, tmp_path):
    base, s, m = algebra(trio)
    for places, says in (("n/in", "n"), "in would lie within .*n, which is written too"), (("n", "./n"), "one folder"):
        with pytest.raises(ValueError, match=says): save_all({f"{tmp_path}/{p}": base + .5*s for p in places})
    assert not list(tmp_path.iterdir())

def test_a_sum_does_not_depend_on_where_its_terms_lie(trio, tmp_path):
    "Float64 sums of three terms depend on their order."
    for top, names in ((tmp_path/"a", "xyz"), (tmp_path/"b", "zyx")):
        for d, n in zip(("base", "speech", "music"), names): shutil.copytree(trio/d, top/n)
    one, two = ([load_student(tmp_path/top/n) for n in names] for top, names in (("a", "xyz"), ("b", "zyx")))
    for lam in (.1, .35, .7):
        u, v = (b + lam*(s-b) + (1-.9*lam)*(m-b) for b, s, m in (one, two))
        assert np.array_equal(numbers(u), numbers(v))

def test_facts_and_options_of_any_kind_are_written_plainly(trio, tmp_path):
    base, s, m = algebra(trio)
    facts = dict(lam=np.float64(.5), at=Path("a/b"), depth=np.array([1., .5]), by={("a", 1): (1, 2)}, scores=None)
    u = merge(base, dict(speech=s, music=m), dict(speech=.5, music=.5), "ties", density=np.float32(.3))
    u.save_pretrained(tmp_path/"u", **facts)
    record = json.loads((tmp_path/"u/distilltv.json").read_text())
    assert {k: record[k] for k in facts} == dict(lam=.5, at="a/b", depth=[1, .5], by={"('a', 1)": [1, 2]}, scores=None)
    assert add_scores(tmp_path/"u", dict(phones=.5))["scores"] == dict(phones=.5)
    merge_recipe(tmp_path/"u/recipe.yaml", tmp_path/"v")
    for f in (tmp_path/"u").iterdir(): assert f.read_bytes() == (tmp_path/"v"/f.name).read_bytes(), f.name
    with pytest.raises(ValueError, match="scores is 5; give a table"): u.save_pretrained(tmp_path/"w", scores=5)

def test_unwritable_dtypes(trio, tmp_path):
    base, s, _ = algebra(trio)
    with pytest.raises(ValueError, match="int8.*float32, float64, float16, bfloat16"):
        (base + s).save_pretrained(tmp_path/"x", dtype="int8")
    with pytest.raises(ValueError, match="does not fit float16"):
        (base + 1e7*s).save_pretrained(tmp_path/"x", dtype="float16")
    for dtype in ("float32", "bfloat16"):
        with pytest.raises(ValueError, match=f"does not fit {dtype}"):
            (base + 1e300*s).save_pretrained(tmp_path/"x", dtype=dtype)
    with pytest.raises(ValueError, match="larger than a float64"):
        (base + 1e300*(1e300*s)).save_pretrained(tmp_path/"x")
    with pytest.raises(ValueError, match="weights_hash is recorded by itself"):
        (base + s).save_pretrained(tmp_path/"x", weights_hash="0")
    assert not list(tmp_path.iterdir())

def test_memory_does_not_grow_with_inputs_beyond_one_tensor_each(tmp_path):
    import tracemalloc
    one, rng, peaks = 2**18, np.random.default_rng(0), {}
    for i in range(7): # a base and six students of twelve tensors of a megabyte
        (tmp_path/f"{i}").mkdir()
        save_file({f"{n:02}": torch.from_numpy(rng.normal(size=one).astype("float32")) for n in range(12)},
                  tmp_path/f"{i}/model.safetensors")
        (tmp_path/f"{i}/config.json").write_text("{}")
    origin = load_student(tmp_path/"0").hash
    for k in (2, 6):
        base, *students = (load_student(tmp_path/f"{i}", origin) for i in range(k+1))
        u = base + sum((s-base)/(k+1) for s in students)
        tracemalloc.start()
        u.save_pretrained(tmp_path/"out")
        peaks[k] = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert peaks[2] < (3+5)*4*one                     # the inputs' tensors, the float64 sum and its rounded copy
    assert peaks[6] - peaks[2] < 4*(1.25*4*one)       # four inputs more, one tensor each

# --- what an encoder hears

def hears(model): return model.sample_rate, model.do_normalize

@pytest.fixture(scope="module")
def other_audio(tmp_path_factory):
    "Encoders of 24 kHz whose waveforms are not normalised."
    top, more = tmp_path_factory.mktemp("audio"), {}
    for i, d in enumerate(("base", "speech", "music")):
        model = tiny(i)
        model.sample_rate, model.do_normalize = 24_000, False
        encoders.save_encoder(model, top/d, **more)
        more = more or dict(base_hash=encoders.weights_hash(model))
    return top

def test_rate_and_normalisation_stay_with_a_model(other_audio, tmp_path):
    base, s, m = algebra(other_audio)
    u = base + .4*s + .6*m
    dial = Dial(base + s, base + m, .4).model
    u.save_pretrained(tmp_path/"folder")
    encoders.save_encoder(dial, tmp_path/"saved")
    opened = [encoders.load_encoder(tmp_path/d) for d in ("folder", "saved")]
    assert {hears(x) for x in (u.model(), dial, *opened)} == {(24_000, False)}
    assert {(x.hop, x.window) for x in (u.model(), dial, *opened)} == {(320, 400)}

def test_loaded_models_that_lie_in_no_folder_keep_their_audio(other_audio, tmp_path):
    loaded = {d: encoders.load_encoder(other_audio/d) for d in ("base", "speech")}
    for d, x in loaded.items(): x.name_or_path = f"org/{d}" # as opened by a name of the hub
    u = loaded["base"] + .4*TaskVector.between(loaded["base"], loaded["speech"])
    u.save_pretrained(tmp_path/"u")
    assert hears(encoders.load_encoder(tmp_path/"u")) == (24_000, False)
    loaded["speech"].sample_rate = 16_000
    with pytest.raises(ValueError, match="differs between org/base and org/speech .sampling_rate"):
        (loaded["base"] + TaskVector.between(loaded["base"], loaded["speech"])).save_pretrained(tmp_path/"v")

def test_a_processors_file_says_it_too(mine, tmp_path):
    "`transformers` 5 writes what a Wav2Vec2Processor hears nowhere else, and reads it there first."
    said = dict(feature_extractor_type="Wav2Vec2FeatureExtractor", sampling_rate=24_000, do_normalize=False)
    for d in ("base", "speech"):
        (mine/d/"processor_config.json").write_text(json.dumps(dict(feature_extractor=said)))
    base, s, _ = algebra(mine)
    (base + .4*s).save_pretrained(tmp_path/"u")
    assert hears(encoders.load_encoder(mine/"base")) == hears(encoders.load_encoder(tmp_path/"u")) == (24_000, False)

@pytest.mark.parametrize("said", [dict(processor_class="Wav2Vec2Processor"), dict(padding_side="left"), dict(),
                                  dict(feature_extractor_type="Wav2Vec2FeatureExtractor", feature_size=1)])
def test_what_nobody_hears_does_not_matter(mine, tmp_path, said):
    for d, more in (("base", {}), ("speech", said)):
        (mine/d/"preprocessor_config.json").write_text(json.dumps(dict(sampling_rate=16_000) | more))
    base, s, _ = algebra(mine)
    (base + s).save_pretrained(tmp_path/"u")

# --- refusals

def test_another_base_is_refused_by_name(mine):
    (mine/"speech/distilltv.json").write_text(json.dumps(dict(base_hash="f00d"*16)))
    with pytest.raises(ValueError, match=r"speech.*base start from different θ₀ \(f00df00d"): algebra(mine)
    (mine/"speech/distilltv.json").unlink()
    with pytest.raises(ValueError, match=r"no base_hash is recorded in distilltv.json of .*speech"): algebra(mine)

def test_a_changed_base_is_refused(mine):
    edit(mine/"base", lambda t: t["encoder.layer_norm.bias"].add_(1e-3))
    with pytest.raises(ValueError, match="different θ₀"): algebra(mine)

def test_vectors_of_two_bases_are_refused(trio, tmp_path):
    _, s, _ = algebra(trio)
    save(tmp_path/"base", tiny(7))
    base = load_student(tmp_path/"base")
    save(tmp_path/"music", tiny(8), base_hash=base.hash)
    m = TaskVector.between(base, load_student(tmp_path/"music"))
    for wrong in (lambda: s + m, lambda: base + s, lambda: base - s):
        with pytest.raises(ValueError, match="different θ₀"): wrong()

def _mis_shape(t): t["encoder.layer_norm.bias"] = torch.zeros(47)
def _half(t): t["encoder.layer_norm.bias"] = t["encoder.layer_norm.bias"].half()
def _folded(t): t["encoder.pos_conv_embed.conv.weight"] = t.pop(V); t.pop(G)
@pytest.mark.parametrize("change, says", [
    (lambda t: t.pop("encoder.layer_norm.bias"), "encoder.layer_norm.bias is missing from .*music but present in"),
    (lambda t: t.update(extra=torch.zeros(2)), "extra is missing from .*base but present in .*music"),
    (lambda t: t.pop(G), "original0 is missing from .*music"),
    (_mis_shape, r"encoder.layer_norm.bias is F32 \(47,\) in .*music but F32 \(48,\) in .*base"),
    (_half, r"encoder.layer_norm.bias is F16 \(48,\) in .*music"),
    (_folded, "pos_conv_embed.conv.(weight|parametrizations).* is missing"),
])
def test_other_tensors_are_refused(mine, change, says):
    edit(mine/"music", change)
    with pytest.raises(ValueError, match=says): algebra(mine)

@pytest.mark.parametrize("dtype", [torch.int64, torch.uint8, torch.bool, torch.int32])
def test_integers_are_refused(mine, dtype):
    edit(mine/"music", lambda t: t.update({"encoder.layer_norm.steps": torch.zeros((), dtype=dtype)}))
    with pytest.raises(ValueError, match="music.*encoder.layer_norm.steps is .*only float"): algebra(mine)

@pytest.mark.parametrize("name, dtype",
                         [("running_mean", torch.float32), ("running_var", torch.float32),
                          ("num_batches_tracked", torch.int64)])
def test_running_statistics_are_refused(mine, name, dtype):
    edit(mine/"music", lambda t: t.update({f"encoder.pos_conv_embed.batch_norm.{name}": torch.zeros((), dtype=dtype)}))
    with pytest.raises(ValueError, match=f"music.*batch_norm.{name} is a running statistic"): algebra(mine)

@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nan_is_refused_even_at_weight_zero(mine, tmp_path, value):
    edit(mine/"music", lambda t: t["encoder.layers.1.attention.k_proj.bias"][5:6].fill_(value))
    base, s, m = algebra(mine)
    for lam in (.5, 1):
        with pytest.raises(ValueError, match="music.*layers.1.attention.k_proj.bias holds NaN"):
            (base + lam*s + (1-lam)*m).save_pretrained(tmp_path/"out")
    assert not (tmp_path/"out").exists()

def test_another_config_is_refused(mine):
    c = json.loads((mine/"music/config.json").read_text())
    (mine/"music/config.json").write_text(json.dumps(c | dict(num_attention_heads=2)))
    with pytest.raises(ValueError, match="num_attention_heads is 2 in .*music but 4 in .*base"): algebra(mine)
    (mine/"music/config.json").write_text(json.dumps(c | dict(hidden_dropout=.3, transformers_version="4.0")))
    algebra(mine) # what does not change the function does not matter

def test_preprocessors_must_agree(mine, tmp_path):
    for d, n in (("base", True), ("speech", True), ("music", False)):
        (mine/d/"preprocessor_config.json").write_text(json.dumps(dict(do_normalize=n)))
    base, s, m = algebra(mine)
    with pytest.raises(ValueError, match="preprocessor_config.json differs"):
        (base + s + m).save_pretrained(tmp_path/"out")
    (base + s).save_pretrained(tmp_path/"out")
    assert (json.loads((tmp_path/"out/preprocessor_config.json").read_text())
            == dict(do_normalize=True, return_attention_mask=False))

def test_mask_embedding_goes_with_the_config(tmp_path):
    save(tmp_path/"a", tiny(0, mask_time_prob=.05))
    assert "masked_spec_embed" in load_student(tmp_path/"a").names
    edit(tmp_path/"a", lambda t: t.pop("masked_spec_embed"))
    with pytest.raises(ValueError, match="asks for masked_spec_embed, the file lacks it"): load_student(tmp_path/"a")
    save(tmp_path/"b", tiny(0))
    edit(tmp_path/"b", lambda t: t.update(masked_spec_embed=torch.zeros(48)))
    with pytest.raises(ValueError, match="has no use for masked_spec_embed, the file holds it"):
        load_student(tmp_path/"b")

def test_the_feature_extractor_passes_a_mask_where_the_front_end_wants_one(tmp_path):
    for norm, masked in (("group", False), ("layer", True)):
        for i, d in enumerate(("base", "speech")):
            save(tmp_path/norm/d, tiny(i, feat_extract_norm=norm),
                 **(dict(base_hash=Checkpoint(tmp_path/norm/"base").hash) if i else {}))
            (tmp_path/norm/d/"preprocessor_config.json").write_text(json.dumps(dict(do_normalize=True,
                                                                                    return_attention_mask=False)))
        base = load_student(tmp_path/norm/"base")
        (base + .5*TaskVector.between(base, tmp_path/norm/"speech")).save_pretrained(tmp_path/norm/"u")
        assert json.loads((tmp_path/norm/"u/preprocessor_config.json").read_text())["return_attention_mask"] is masked

def test_configs_of_other_versions_are_the_same_architecture(mine):
    c = json.loads((mine/"music/config.json").read_text())
    silent = {k: v for k, v in c.items() if k != "conv_pos_batch_norm"}
    for said in (silent, c | dict(gradient_checkpointing=False),
                 c | dict(tokenizer_class="Wav2Vec2CTCTokenizer", vocab_size=7)):
        (mine/"music/config.json").write_text(json.dumps(said))
        algebra(mine)
    # its default is another
    (mine/"music/config.json").write_text(json.dumps({k: v for k, v in c.items() if k != "num_attention_heads"}))
    with pytest.raises(ValueError, match="num_attention_heads is 12 in .*music but 4"): algebra(mine)

@pytest.mark.parametrize("more", [{"transformers.js_config": {}}, dict(num_labels=30), dict(finetuning_task="asr"),
                                  dict(attention_relax=None), dict(deepnorm=False)])
def test_settings_that_compute_nothing_are_no_architecture(mine, more):
    file = mine/"speech/config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | more))
    algebra(mine)

def test_a_switch_of_mert_is_architecture(mine):
    file = mine/"speech/config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | dict(deepnorm=True)))
    with pytest.raises(ValueError, match="deepnorm is (True|False) in"): algebra(mine)

def test_a_merged_mert_opens_without_its_authors_code(mine, tmp_path):
    "As what it is here, a HuBERT; and it merges with what we save of it."
    for d in ("base", "music"):
        file = mine/d/"config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | dict(
            model_type="mert_model", architectures=["MERTModel"], auto_map=dict(AutoModel="modeling_MERT.MERTModel"),
            attention_relax=-1., deepnorm=False)))
    base, s, m = algebra(mine)
    u = base + .4*s + .6*m
    u.save_pretrained(tmp_path/"u")
    model = AutoModel.from_pretrained(tmp_path/"u")
    assert type(model) is HubertModel and encoders.weights_hash(model) == encoders.weights_hash(u.model())

def test_layers_are_as_many_as_the_config_says(tmp_path):
    cut = tiny(0)
    cut.encoder.layers = cut.encoder.layers[:1]
    save(tmp_path/"cut", cut)
    for model in (tmp_path/"cut", cut):
        with pytest.raises(ValueError, match="says num_hidden_layers = 2, but the weights are of 1"): as_student(model)

def test_a_student_that_is_loaded_is_trusted_like_its_folder(trio, tmp_path):
    save(tmp_path/"plain", tiny(5))
    for model in (tmp_path/"plain", load_student(tmp_path/"plain"), HubertModel.from_pretrained(tmp_path/"plain")):
        with pytest.raises(ValueError, match="no base_hash is recorded"): TaskVector.between(trio/"base", model)
        assert TaskVector.between(trio/"base", model, trust=True).origin == load_student(trio/"base").hash
    with pytest.raises(ValueError, match="different θ₀"): # what is recorded is not overruled
        TaskVector.between(tmp_path/"plain", load_student(trio/"speech"), trust=True)

@pytest.mark.parametrize("name, holds, says", [
    ("model.safetensors", b"version https://git-lfs.github.com/spec/v1\n", "fetch them with git lfs pull"),
    ("adapter_model.safetensors", b"", "merge_and_unload"), ("model.fp16.safetensors", b"", "variant='fp16'")])
def test_files_that_are_no_whole_model_say_what_to_do(mine, name, holds, says):
    (mine/"music/model.safetensors").unlink()
    (mine/"music"/name).write_bytes(holds)
    with pytest.raises((ValueError, OSError), match=says): load_student(mine/"music")

def test_a_head_that_is_too_much_says_what_to_do(mine, tmp_path):
    HubertForCTC(HubertConfig(**TINY)).save_pretrained(tmp_path/"ctc")
    with pytest.raises(ValueError, match="missing from .*; .*load_encoder, which leaves heads out"):
        TaskVector.between(mine/"base", tmp_path/"ctc", trust=True)
    TaskVector.between(mine/"base", encoders.load_encoder(tmp_path/"ctc"), trust=True)

def test_shards_and_broken_json_say_what_to_do(mine, tmp_path):
    tiny(1).save_pretrained(tmp_path/"shards", max_shard_size="100KB")
    with pytest.raises(FileNotFoundError,
                       match="in several files .shards.; join them with HubertModel.from_pretrained"):
        load_student(tmp_path/"shards")
    for text in ("[1]", "{", "["*10**5, "\udcff"):
        (mine/"music/config.json").write_text(text, errors="surrogateescape")
        with pytest.raises(ValueError, match="music/config.json is not"): load_student(mine/"music")

def test_a_folder_of_somebody_else_is_not_replaced(trio, tmp_path):
    base, s, m = algebra(trio)
    (tmp_path/"models").mkdir()
    (tmp_path/"models/notes.txt").write_text("three years")
    with pytest.raises((OSError, ValueError), match="models"): (base + s).save_pretrained(tmp_path/"models")
    assert [f.name for f in tmp_path.iterdir()] == ["models"]
    assert (tmp_path/"models/notes.txt").read_text() == "three years"

def test_a_folder_without_a_model(tmp_path):
    with pytest.raises(FileNotFoundError, match="/nowhere does not exist; check the path"):
        load_student(tmp_path/"nowhere")
    with pytest.raises(FileNotFoundError, match="holds no model.safetensors; write one"): load_student(tmp_path)

def test_what_is_no_student_says_what_it_lacks(mine):
    base, s, m = algebra(mine)
    (mine/"music/distilltv.json").unlink()
    with pytest.raises(ValueError, match="no base_hash is recorded in distilltv.json of .*music, so its θ₀ is not kn.*"
                                         "distil it first, or give trust=True if it was trained from .*speech"):
        TaskVector.between(mine/"speech", mine/"music")
    for name in ("save_pretrained", "model", "hash"):
        with pytest.raises(AttributeError, match=f"no model and has no {name}: add it to a base"): getattr(s + m, name)
    with pytest.raises(AttributeError, match="a task vector has no lenght$"): s.lenght

def test_the_card_says_if_weights_do_not_add_up_to_one(trio, tmp_path):
    base, s, m = algebra(trio)
    for a, says in ((.4, "\nThe weights add up to 0.8.\n"), (.6, "")):
        (base + a*s + .4*m).save_pretrained(tmp_path/f"{a}")
        card = (tmp_path/f"{a}/README.md").read_text(encoding="utf-8")
        assert says in card and ("add up" in card) == bool(says)

def test_a_folder_without_a_config(mine):
    (mine/"speech/config.json").unlink()
    with pytest.raises(FileNotFoundError, match="speech holds no config.json"): load_student(mine/"speech")

# --- weight normalisation

def _old_names(t):
    for new, old in ((G, "weight_g"), (V, "weight_v")): t[new.split(".parametrizations")[0] + "." + old] = t.pop(new)

def test_both_spellings_of_weight_norm_merge_alike(mine, trio, tmp_path):
    for d in ("base", "music"): edit(mine/d, _old_names)
    outs = []
    for top in (mine, trio):
        base, s, m = algebra(top)
        u = base + .3*s + .7*m
        outs.append(u.save_pretrained(tmp_path/f"out{len(outs)}")["weights_hash"])
        assert G in u.names and V in u.names
    assert outs[0] == outs[1]
    assert not HubertModel.from_pretrained(tmp_path/"out0", output_loading_info=True)[1]["missing_keys"]

def test_both_spellings_in_one_file_are_refused(mine):
    def both(t):
        keep = {k: t[k].clone() for k in (G, V)}
        _old_names(t)
        t.update(keep)
    edit(mine/"base", both)
    with pytest.raises(ValueError, match="original[01] twice"): load_student(mine/"base")

def test_merged_kernel_has_interpolated_length(trio, tmp_path):
    "(g, v) apart: the effective kernel's length at each tap is the mean of the students' lengths."
    base, s, m = algebra(trio)
    (base + .5*s + .5*m).save_pretrained(tmp_path/"u")
    length = lambda f: HubertModel.from_pretrained(f).encoder.pos_conv_embed.conv.weight.detach().norm(dim=(0, 1))
    want = (load_student(trio/"speech")[G] + load_student(trio/"music")[G]).ravel()/2
    np.testing.assert_allclose(length(tmp_path/"u").numpy(), np.abs(want), rtol=1e-5)

# --- whole or not at all

KILL = """
import sys, time
from distilltv import weights
from distilltv.merge import *
base, s, m = load_student(sys.argv[1]+"/base"), load_student(sys.argv[1]+"/speech"), load_student(sys.argv[1]+"/music")
u = base + .25*(s-base) + .75*(m-base)
slow = weights._rounded
def wait(*a):
    time.sleep(.01)
    return slow(*a)
weights._rounded = wait
print("go", flush=True)
u.save_pretrained(sys.argv[2])
"""

def killed_while_writing(trio, to, after):
    with subprocess.Popen([sys.executable, "-c", KILL, str(trio), str(to)], stdout=subprocess.PIPE, cwd=ROOT) as p:
        p.stdout.readline()
        time.sleep(after)
        p.send_signal(signal.SIGKILL)

@pytest.mark.parametrize("after", [0, .1, .3])
def test_killed_while_writing_leaves_the_old_folder_whole(trio, tmp_path, after):
    base, s, m = algebra(trio)
    old = (base + .5*s + .5*m).save_pretrained(tmp_path/"u")["weights_hash"]
    killed_while_writing(trio, tmp_path/"u", after)
    new = (base + .25*s + .75*m).hash
    assert load_student(tmp_path/"u").hash in (old, new)
    (base + .25*s + .75*m).save_pretrained(tmp_path/"u") # what the killed run left is in nobody's way
    assert load_student(tmp_path/"u").hash == load_student(tmp_path/"u").hash and (tmp_path/"u/README.md").exists()

@pytest.mark.parametrize("after", [0, .2])
def test_killed_while_writing_where_nothing_was_leaves_nothing_or_all(trio, tmp_path, after):
    killed_while_writing(trio, tmp_path/"u", after)
    base, s, m = algebra(trio)
    assert not (tmp_path/"u").exists() or load_student(tmp_path/"u").hash == (base + .25*s + .75*m).hash
    (base + .25*s + .75*m).save_pretrained(tmp_path/"u")
    assert (tmp_path/"u/README.md").exists()

BETWEEN = """
import ctypes, os, sys
from distilltv import files
if sys.argv[2] == "without": files._exchange = lambda a, b: False
def dies_after(call, when):
    def f(*a):
        if when == "before": os._exit(9)
        out = call(*a)
        os._exit(9)
    return f
where, when = sys.argv[3].split()
if where == "exchange": files._exchange = dies_after(files._exchange, when)
else: os.replace = dies_after(os.replace, when)
with files.atomic_folder(sys.argv[1]) as t: (t/"distilltv.json").write_text(sys.argv[4])
"""

def note(version): return json.dumps(dict(weights_hash="0"*64, version=version))
def put(folder, version):
    with atomic_folder(folder) as t: (t/"distilltv.json").write_text(note(version))
def version(folder): return json.loads((folder/"distilltv.json").read_text())["version"]

@pytest.mark.parametrize("exchange, dies, left", [
    ("with", "exchange before", "old"), ("with", "exchange after", "new"), ("with", "rename before", "new"),
    ("without", "rename before", "old"), ("without", "rename after", None)])
def test_killed_between_two_renames(tmp_path, exchange, dies, left):
    if exchange == "with" and sys.platform != "linux": pytest.skip("only Linux exchanges two names in one step")
    put(tmp_path/"u", "old")
    subprocess.run([sys.executable, "-c", BETWEEN, str(tmp_path/"u"), exchange, dies, note("new")], cwd=ROOT)
    if left: assert version(tmp_path/"u") == left # the name was never without a whole folder
    else: assert version(tmp_path/".u.old") == "old" and not (tmp_path/"u").exists()
    try:
        with atomic_folder(tmp_path/"u") as t:
            # the next one finds it, whatever becomes of itself
            assert version(tmp_path/"u") == (left or "old")
            raise KeyboardInterrupt
    except KeyboardInterrupt: pass
    assert version(tmp_path/"u") == (left or "old")
    put(tmp_path/"u", "newer")
    assert version(tmp_path/"u") == "newer"

# --- the notebook

def papermill(out, home, data, *parameters):
    env = os.environ | dict(DISTILLTV_HOME=str(home), DISTILLTV_DATA=str(data), PYTHONPATH=str(ROOT))
    return subprocess.run([sys.executable, "-m", "papermill", "nbs/03_merge.ipynb", str(out), *parameters], cwd=ROOT,
                          env=env,
                          stdin=subprocess.DEVNULL, capture_output=True, text=True)

@pytest.mark.parametrize("name, value, says",
                         [("lamb", "0.3", "unknown parameter 'lamb'"), ("lam", "much", "lam = 'much' is not a number"),
                                               ("method", "magic", "method = 'magic' is not one of 'linear'")])
def test_notebook_refuses_wrong_parameters(tmp_path, name, value, says):
    r = papermill(tmp_path/"out.ipynb", tmp_path/"runs", tmp_path, "-p", name, value)
    assert r.returncode and says in r.stderr

def test_notebook_uses_the_lam_it_is_given(trio, tmp_path):
    for d in ("base", "speech", "music"):
        shutil.copytree(trio/d, tmp_path/"data"/(d if d == "base" else f"students/{d}"))
    for d in ("speech", "music"):
        f = tmp_path/f"data/students/{d}/distilltv.json"
        f.write_text(json.dumps(json.loads(f.read_text()) | dict(corpus="both")))
        (tmp_path/"data"/d).symlink_to(ROOT/"data/mini"/d) # audio for the probe at the end
    r = papermill(tmp_path/"out.ipynb", tmp_path/"runs", tmp_path/"data", "-p", "lam", "0.4", "-p", "out",
                  str(tmp_path/"made"))
    assert not r.returncode, r.stderr[-2000:]
    base, s, m = algebra(trio)
    made = load_student(tmp_path/"made")
    assert all(np.array_equal(made[n], np.asarray((base + .4*s + .6*m)[n]).astype(np.float32)) for n in made.names)
    assert (json.loads((tmp_path/"made/distilltv.json").read_text())["lam"] == .4
            == json.loads((tmp_path/"made/result.json").read_text())["parameters"]["lam"])

def test_which_students_are_found(trio, tmp_path, monkeypatch):
    monkeypatch.setenv("DISTILLTV_HOME", str(tmp_path/"runs")); monkeypatch.setenv("DISTILLTV_DATA",
                                                                                   str(tmp_path/"data"))
    def put(top, corpus):
        for d in ("speech", "music"):
            shutil.copytree(trio/d, top/d)
            (top/d/"distilltv.json").write_text(json.dumps(dict(base_hash="x", corpus=corpus)))
    with pytest.raises(FileNotFoundError, match="not all students of profile mini distilled on 'both'.*"
                                                "-p teacher speech.*again with music"):
        find_students()
    shutil.copytree(trio/"base", tmp_path/"data/base")
    put(tmp_path/"data/students", "both")
    assert find_students()["music"] == tmp_path/"data/students/music"
    with pytest.raises(FileNotFoundError): find_students(corpus="own") # the shipped pair is another
    with pytest.raises(FileNotFoundError): find_students("hub")
    put(tmp_path/"runs/mini/students/both", "both")
    assert find_students()["music"] == tmp_path/"runs/mini/students/both/music"
    assert find_students()["base"] == tmp_path/"data/base"
