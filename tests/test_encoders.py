"Encoders: checkpoints in the hub's own format, strict loading, hashes, θ₀, and parity with torchaudio's forward pass."
import copy, json, logging, os, pytest, torch
from safetensors.torch import load_file, save_file
from torchaudio.models.wav2vec2.utils import import_huggingface_model
from transformers import (Data2VecAudioConfig, Data2VecAudioForCTC, HubertConfig, HubertForCTC, HubertModel,
                          Wav2Vec2Config,
                          Wav2Vec2ForPreTraining, WavLMConfig, WavLMModel)
from distilltv.frozen import open_encoder
from distilltv.merge import load_student
from distilltv.encoders import (Heads, frames, hidden_states, load_encoder, make_base, random_student, receptive,
                                save_encoder, student_config, weights_hash)

logging.getLogger("torchaudio").setLevel("ERROR")

@pytest.fixture(scope="module")
def teacher():
    torch.manual_seed(0)
    return HubertModel(HubertConfig(hidden_size=48, num_hidden_layers=4, num_attention_heads=4, intermediate_size=96,
                                    conv_dim=[16]*7,
                                    num_conv_pos_embeddings=16, num_conv_pos_embedding_groups=4)).eval()

@pytest.fixture()
def folder(teacher, tmp_path): return save_encoder(make_base(teacher), tmp_path/"base", role="base")

def edit(folder, change):
    file = folder/"model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, metadata=dict(format="pt"))

def test_plain_transformers_opens_what_we_save(folder, teacher):
    plain, wav = HubertModel.from_pretrained(folder).eval(), torch.randn(2, 4000)
    assert torch.equal(hidden_states(plain, wav), hidden_states(make_base(teacher), wav))
    assert json.loads((folder/"preprocessor_config.json").read_text())["do_normalize"] is True

@pytest.mark.parametrize("norm", ["layer", "group"])
def test_a_padded_batch_through_the_saved_feature_extractor_is_each_clip_alone(tmp_path, norm):
    "transformers' rule: encoders whose convolutions are normalised by frame are given a mask, those by group none."
    from transformers import AutoFeatureExtractor
    torch.manual_seed(0)
    config = HubertConfig(hidden_size=48, num_hidden_layers=2, num_attention_heads=4, intermediate_size=96,
                          conv_dim=[16]*7, feat_extract_norm=norm,
                          do_stable_layer_norm=norm == "layer", num_conv_pos_embeddings=16,
                          num_conv_pos_embedding_groups=4)
    save_encoder(HubertModel(config), tmp_path/"m")
    extract = AutoFeatureExtractor.from_pretrained(tmp_path/"m")
    model = HubertModel.from_pretrained(tmp_path/"m").eval()
    assert extract.return_attention_mask is (norm == "layer")
    # zeros are part of what such an encoder hears: no mask can take them back
    if norm == "group": return
    long, short = torch.randn(16_000).numpy(), torch.randn(6_000).numpy()
    with torch.no_grad():
        alone = model(**extract(short, sampling_rate=16_000, return_tensors="pt")).last_hidden_state[0]
        beside = model(**extract([long, short], sampling_rate=16_000, padding=True,
                                 return_tensors="pt")).last_hidden_state[1, :len(alone)]
    assert (alone - beside).abs().max() < 1e-4

def test_what_a_teacher_says_of_its_waveforms_is_kept(folder, tmp_path):
    file = folder/"preprocessor_config.json"
    file.write_text(json.dumps(json.loads(file.read_text(encoding="utf-8")) | dict(do_normalize=False)),
                    encoding="utf-8")
    raw = load_encoder(folder)
    assert raw.do_normalize is False and load_encoder(save_encoder(raw, tmp_path/"copy")).do_normalize is False
    assert "unit variance" not in (tmp_path/"copy/README.md").read_text(encoding="utf-8")
    file.unlink()
    assert load_encoder(folder).do_normalize is True         # transformers' own default
    file.write_text("{", encoding="utf-8")
    with pytest.raises(ValueError, match="preprocessor_config.json cannot be read"): load_encoder(folder)
    with pytest.raises(ValueError, match="none is not a model folder"): load_encoder(tmp_path/"none")

def test_state_i_is_the_output_of_layer_i_before_the_final_norm(teacher):
    torch.manual_seed(0)
    model = HubertModel(HubertConfig(**teacher.config.to_dict()
                                     | dict(do_stable_layer_norm=True, feat_extract_norm="layer"))).eval()
    kept, wav = [], torch.randn(1, 4000)
    for layer in model.encoder.layers:
        layer.register_forward_hook(lambda m, a, out: kept.append(out[0] if isinstance(out, tuple) else out))
    states = hidden_states(model, wav)
    for state, out in zip(states[1:], kept): assert torch.equal(state, out)
    class After(torch.nn.Module):                            # as transformers listed it before 5.16
        config = model.config
        def forward(self, wav, **kw):
            out = model(wav, **kw)
            out.hidden_states = (*out.hidden_states[:-1], out.last_hidden_state)
            return out
    with pytest.raises(RuntimeError, match="transformers>=5.16"): hidden_states(After(), wav)

def test_old_weight_norm_names_load_to_the_same_encoder(folder):
    before = weights_hash(load_encoder(folder))
    def rename(t):
        for old, new in (("original0", "weight_g"), ("original1", "weight_v")):
            t[f"encoder.pos_conv_embed.conv.{new}"] = t.pop("encoder.pos_conv_embed.conv."
                                                            f"parametrizations.weight.{old}")
    edit(folder, rename)
    assert weights_hash(load_encoder(folder)) == before

@pytest.mark.parametrize("name",
                         ["encoder.layers.1.attention.q_proj.weight",
                          "encoder.pos_conv_embed.conv.parametrizations.weight.original1"])
def test_a_missing_tensor_is_named(folder, name):
    edit(folder, lambda t: t.pop(name))
    with pytest.raises(ValueError, match=name.replace(".", r"\.")): load_encoder(folder)

def test_an_extra_tensor_is_named(folder):
    edit(folder, lambda t: t.update({"encoder.layers.2.surprise": torch.zeros(3)}))
    with pytest.raises(ValueError, match="surprise"): load_encoder(folder)

def test_a_missing_folder_is_a_sentence(tmp_path):
    with pytest.raises(ValueError, match="not a model folder"): load_encoder(tmp_path/"nothing/here")

def test_hash_sees_names_values_and_shapes_but_not_storage():
    a = dict(w=torch.arange(6.).view(2, 3))
    assert weights_hash(a) == weights_hash(dict(w=a["w"].T.contiguous().T)) == weights_hash(dict(w=a["w"].half()))
    others = [dict(v=a["w"]), dict(w=a["w"].view(3, 2)), dict(w=a["w"]+1e-6)]
    assert len({weights_hash(a), *map(weights_hash, others)}) == 4

def test_merge_and_encoders_agree_on_hashes(folder):
    from distilltv.merge import Checkpoint
    assert Checkpoint(folder).hash == weights_hash(load_encoder(folder))

def test_base_copies_what_the_paper_copies(teacher):
    base, source = make_base(teacher).state_dict(), teacher.state_dict()
    fresh = {k for k, v in base.items() if k not in source or not torch.equal(v, source[k])}
    assert fresh <= {"encoder.layer_norm.weight", "encoder.layer_norm.bias"}
    assert not base["encoder.layer_norm.bias"].any() and (base["encoder.layer_norm.weight"] == 1).all()
    assert "feature_projection.layer_norm.weight" not in base and "masked_spec_embed" not in base

def test_paper_sizes():
    with torch.device("meta"):
        shapes = dict(two=(2,), three=(3,), wide=(2, 1536, 6))
        sizes = {n: sum(p.numel() for p in HubertModel(student_config(HubertConfig(), *s)).parameters())
                 for n, s in shapes.items()}
        heads = sum(p.numel() for p in Heads(768, 768, 3).parameters())
    assert sizes == dict(two=23_491_200, three=30_579_072, wide=61_650_048) and heads == 3_543_552

def test_a_wide_base_copies_the_convolutions_and_seeds_the_rest(teacher):
    wide = lambda seed: make_base(teacher, width=96, heads=2, seed=seed)
    a, source = wide(3).state_dict(), teacher.state_dict()
    same = {k for k, v in a.items() if k in source and v.shape == source[k].shape and torch.equal(v, source[k])
            and v.unique().numel() > 2}
    assert same == {k for k in a if k.startswith("feature_extractor.") and a[k].unique().numel() > 2} and same
    assert weights_hash(a) == weights_hash(wide(3)) != weights_hash(wide(4))
    assert wide(3).config.num_attention_heads == 2 and next(wide(3).parameters()).requires_grad

def test_a_base_needs_a_hubert_with_enough_layers(teacher):
    with pytest.raises(ValueError, match="teacher of at least as many"): make_base(teacher, layers=5)
    with pytest.raises(ValueError, match="not wavlm"): make_base(WavLMModel(WavLMConfig(**SMALL)))

@pytest.mark.parametrize("kernels, strides",
                         [((10, 3, 3, 3, 3, 2, 2), (5, 2, 2, 2, 2, 2, 2)), ((400, 1), (320, 1)),
                          ((8, 4, 3), (3, 2, 5))])
def test_receptive_field_counts_frames(kernels, strides):
    hop, window = receptive(HubertConfig(conv_kernel=kernels, conv_stride=strides, conv_dim=[4]*len(kernels)))
    for n in [window-1, window, window+hop-1, window+hop, 5000, 16_001]:
        length = n
        for k, s in zip(kernels, strides): length = (length-k)//s+1 if length >= k else 0
        assert frames(n, hop, window) == length

@pytest.mark.parametrize("samples", [399, 400, 719, 720, 16_000, 250_000])
def test_frames_is_what_the_convolutions_give(teacher, samples):
    if samples < 400: assert frames(samples) == 0
    else:
        with torch.no_grad(): assert teacher.feature_extractor(torch.zeros(1, samples)).shape[-1] == frames(samples)

def test_random_students_do_not_touch_the_global_generator(teacher):
    torch.manual_seed(3); a = torch.rand(1)
    torch.manual_seed(3); random_student(student_config(teacher.config), seed=9); b = torch.rand(1)
    assert a == b

# --- teachers: small random weights in the file layout of the hub

SMALL = dict(hidden_size=48, num_hidden_layers=4, num_attention_heads=4, intermediate_size=96, conv_dim=[16]*7,
             num_conv_pos_embeddings=16, num_conv_pos_embedding_groups=4)
LARGE = SMALL | dict(do_stable_layer_norm=True, feat_extract_norm="layer", conv_bias=True)
MINI = LARGE | dict(conv_dim=[16]*2, conv_kernel=[400, 1], conv_stride=[320, 1])
PUBLISHED = dict(mini=(HubertModel, HubertConfig(**MINI)), hubert_base=(HubertModel, HubertConfig(**SMALL)),
                 hubert_large=(HubertModel, HubertConfig(**LARGE)),
                 hubert_ctc=(HubertForCTC, HubertConfig(**SMALL)), wavlm_base=(WavLMModel, WavLMConfig(**SMALL)),
                 wavlm_large=(WavLMModel, WavLMConfig(**LARGE)),
                 data2vec=(Data2VecAudioForCTC, Data2VecAudioConfig(**SMALL)),
                 wav2vec2=(Wav2Vec2ForPreTraining,
                           Wav2Vec2Config(**SMALL, codevector_dim=16, proj_codevector_dim=16,
                                          num_codevectors_per_group=8)))
OLD = {"parametrizations.weight.original0": "weight_g", "parametrizations.weight.original1": "weight_v"}

def seeded(cls, config):
    torch.manual_seed(1)
    return cls(config).eval()

def old_names(state):
    "The names that weight norm gave its tensors before torch 2.0."
    for new, old in OLD.items(): state = {k.replace(new, old): v for k, v in state.items()}
    return state

def publish(model, folder, config=None, weights="bin", names=dict):
    "A folder as it lies on the hub: config.json and one file of weights."
    folder.mkdir(exist_ok=True)
    (folder/"config.json").write_text(json.dumps(model.config.to_dict() if config is None else config))
    state = names(model.state_dict())
    if weights == "bin": torch.save(state, folder/"pytorch_model.bin")
    else:
        save_file({k: v.contiguous() for k, v in state.items()}, folder/"model.safetensors", metadata=dict(format="pt"))
    return folder

def states_of_torchaudio(model, wav):
    with torch.no_grad(): return import_huggingface_model(model).eval().extract_features(wav)[0]

@pytest.mark.parametrize("name", PUBLISHED)
def test_every_family_opens_and_computes_what_torchaudio_does(tmp_path, name):
    model, wav = seeded(*PUBLISHED[name]), torch.randn(2, 4001)
    ours = load_encoder(publish(model, tmp_path/name, weights="safetensors"))
    states = hidden_states(ours, wav)
    assert states.shape == (5, 2, frames(4001), 48) and not ours.training
    assert not any(p.requires_grad for p in ours.parameters())
    if name != "data2vec":  # which torchaudio lacks
        theirs = states_of_torchaudio(ours, wav)
        assert len(theirs) == 4 and theirs[0].shape[1] == frames(4001)
        torch.testing.assert_close(states[1:], torch.stack(theirs), atol=1e-5, rtol=0)
    backbone = getattr(model, model.base_model_prefix, model)
    with torch.no_grad():
        torch.testing.assert_close(states[:-1],
                                   torch.stack(backbone(wav, output_hidden_states=True).hidden_states)[:-1])

def test_heads_are_left_out_by_name(tmp_path):
    open_ = lambda name: load_encoder(publish(seeded(*PUBLISHED[name]), tmp_path/name)).left_out
    assert open_("hubert_ctc") == open_("data2vec") == ["lm_head.bias", "lm_head.weight"] and open_("hubert_base") == []
    assert {n.split(".")[0] for n in open_("wav2vec2")} == {"quantizer", "project_q", "project_hid"}

@pytest.mark.parametrize("name", PUBLISHED)
def test_a_teacher_without_its_upper_layers_computes_the_same(tmp_path, name):
    folder, wav = publish(seeded(*PUBLISHED[name]), tmp_path/name), torch.randn(2, 4000)
    whole, short = load_encoder(folder), load_encoder(folder, layers=3)
    assert torch.equal(hidden_states(short, wav), hidden_states(whole, wav)[:4])
    assert not any(".layers.3." in k and "pos_conv" not in k for k in short.state_dict())
    with pytest.raises(ValueError, match="has 4 layers"): load_encoder(folder, layers=5)

@pytest.mark.parametrize("weights", ["bin", "safetensors"])
@pytest.mark.parametrize("names", [dict, old_names])
def test_both_files_and_both_names_of_the_weight_norm(tmp_path, weights, names):
    model = seeded(*PUBLISHED["hubert_base"])
    assert weights_hash(load_encoder(publish(model, tmp_path/"it", weights=weights,
                                             names=names))) == weights_hash(model)

def test_a_mismatched_tensor_is_named(tmp_path):
    model = seeded(*PUBLISHED["hubert_base"])
    folder = publish(model, tmp_path/"it", config=model.config.to_dict() | dict(intermediate_size=80))
    with pytest.raises(ValueError,
                       match=r"mismatched.*layers\.0\.feed_forward\.intermediate_dense\.bias \[96\], not \[80\]"):
        load_encoder(folder)

def test_no_layer_between_is_left_out(tmp_path):
    model = seeded(*PUBLISHED["hubert_base"])
    folder = publish(model, tmp_path/"it",
                     names=lambda s: {k: v for k, v in s.items() if ".layers.1." not in k}
                     | {"encoder.layers.7.layer_norm.bias": torch.zeros(48)})
    with pytest.raises(ValueError, match=r"missing.*layers\.1\.attention.*unexpected.*layers\.7\."):
        load_encoder(folder, layers=3)

# what `m-a-p` publishes, by its config.json: keys beside HuBERT's own
CODE = dict(auto_map=dict(AutoConfig="configuration_MERT.MERTConfig", AutoModel="modeling_MERT.MERTModel"),
            architectures=["MERTModel"],
            model_type="mert_model", attention_relax=-1.0)
MORE = dict(_name_or_path="m-a-p/MERT", feat_extract_dropout=0.0, feature_extractor_cqt=False,
            feature_extractor_cqt_bins=336,
            gradient_checkpointing=False, hidden_dropout_prob=0.1, tokenizer_class="Wav2Vec2CTCTokenizer",
            torch_dtype="float32")
STATIC = {f"mask_{a}_{k}": v for a in ("channel", "time")
          for k, v in dict(length=10, min_space=1, other=0.0, prob=0.05, selection="static").items()}
MERT = dict(v0=MORE | dict(architectures=["HubertModel"], sample_rate=16_000),
            v0_first=MORE | dict(model_type="music_hubert", sample_rate=16_000),
            v0_public=MORE | CODE | dict(sample_rate=16_000),
            v1_95M=MORE | CODE | dict(deepnorm=False, sample_rate=24_000),
            v1_330M=MORE | CODE | STATIC
            | dict(deepnorm=False, attention_relax=32.0, do_stable_layer_norm=True, sample_rate=24_000))

def publish_mert(folder, version, **more):
    "MERT in small, with code that leaves a mark if it is run."
    config = SMALL | {k: v for k, v in MERT[version].items() if k == "do_stable_layer_norm"}
    model = seeded(HubertModel, HubertConfig(**config))
    publish(model, folder, config=model.config.to_dict() | MERT[version] | more, names=old_names)
    for file in ("configuration_MERT.py", "modeling_MERT.py", "__init__.py"):
        (folder/file).write_text(f"open({str(folder/'was_run')!r}, 'w')\n"
                                 "class MERTConfig: pass\nclass MERTModel: pass\n")
    rate = MERT[version]["sample_rate"]
    (folder/"preprocessor_config.json").write_text(json.dumps(dict(feature_extractor_type="Wav2Vec2FeatureExtractor",
                                                                   sampling_rate=rate, do_normalize=True)))
    return model

@pytest.mark.parametrize("version", MERT)
def test_mert_opens_as_hubert_and_its_code_is_not_run(tmp_path, version):
    model, wav = publish_mert(tmp_path/"mert", version), torch.randn(1, 24_000)
    mert = load_encoder(tmp_path/"mert")
    assert type(mert) is HubertModel and weights_hash(mert) == weights_hash(model)
    assert not (tmp_path/"mert/was_run").exists()
    assert mert.sample_rate == MERT[version]["sample_rate"]
    assert mert.sample_rate//mert.hop == (75 if "v1" in version else 50)
    assert hidden_states(mert, wav).shape[2] == frames(24_000, mert.hop, mert.window) == 74
    assert torch.equal(hidden_states(mert, wav), hidden_states(model, wav))
    assert not hasattr(mert.config, "auto_map") and mert.config.model_type == "hubert"

@pytest.mark.parametrize("more, says",
                         [(dict(deepnorm=True), "switches on deepnorm"),
                          (dict(feature_extractor_cqt=True), "switches on feature_extractor_cqt"),
                                        (dict(chroma_bins=12, zoom=True), "chroma_bins, zoom"),
                                        (dict(sample_rate=44_100), "44100 Hz and preprocessor_config.json 24000 Hz"),
                                        (dict(model_type="mert2"), "'mert2'; an encoder is one of hubert")])
def test_what_we_would_compute_wrongly_is_refused_by_name(tmp_path, more, says):
    publish_mert(tmp_path/"mert", "v1_95M", **more)
    with pytest.raises(ValueError, match=says): load_encoder(tmp_path/"mert")
    assert not (tmp_path/"mert/was_run").exists()

@pytest.mark.parametrize("kind", ["bert", "whisper", None])
def test_another_architecture_is_a_sentence(tmp_path, kind):
    (tmp_path/"config.json").write_text(json.dumps(dict(model_type=kind, hidden_size=8)))
    with pytest.raises(ValueError, match=f"holds a model of type {kind!r}; an encoder is one of"):
        load_encoder(tmp_path)

def test_attention_relax_cannot_change_a_softmax():
    "Why MERT's `attention_relax` may be ignored: it moves all logits of a row by the same amount."
    logits = torch.randn(3, 7, dtype=torch.float64)*9
    relaxed = (logits/32 - (logits/32).amax(-1, keepdim=True))*32
    torch.testing.assert_close(relaxed.softmax(-1), logits.softmax(-1))

class Hostile:
    def __init__(self, mark): self.mark = mark
    def __reduce__(self): return os.system, (f"touch {self.mark}",)

def test_a_pickle_with_code_is_refused_by_name(tmp_path):
    folder = publish(seeded(*PUBLISHED["hubert_base"]), tmp_path/"it",
                     names=lambda s: s | {"extra": Hostile(tmp_path/"was_run")})
    with pytest.raises(ValueError,
                       match=rf"{folder}: pytorch_model.bin holds more than tensors: it wants (posix|nt).system"):
        load_encoder(folder)
    assert not (tmp_path/"was_run").exists()
    # preferred: the pickle beside it is not even opened
    publish(seeded(*PUBLISHED["hubert_base"]), folder, weights="safetensors")
    load_encoder(folder)
    assert not (tmp_path/"was_run").exists()

@pytest.mark.parametrize("file, damage",
                         [("pytorch_model.bin", lambda b: b[:len(b)//2]),
                          ("pytorch_model.bin", lambda b: b"<html>not found</html>"),
                                          ("pytorch_model.bin", lambda b: b""),
                                          ("model.safetensors", lambda b: b[:len(b)//2]),
                                          ("model.safetensors", lambda b: b""), ("config.json", lambda b: b[:50]),
                                          ("config.json", lambda b: b"")])
def test_damaged_files_are_a_sentence(tmp_path, file, damage):
    folder = publish(seeded(*PUBLISHED["hubert_base"]), tmp_path/"it",
                     weights="bin" if file.endswith("bin") else "safetensors")
    (folder/file).write_bytes(damage((folder/file).read_bytes()))
    with pytest.raises(ValueError, match=str(folder)) as e: load_encoder(folder)
    assert "\n" not in str(e.value)

def test_a_folder_without_weights_is_a_sentence(tmp_path):
    folder = publish(seeded(*PUBLISHED["hubert_base"]), tmp_path/"it")
    (folder/"pytorch_model.bin").unlink()
    with pytest.raises(ValueError, match="the weights cannot be read.*no file named model.safetensors"):
        load_encoder(folder)

def test_a_checkpoint_of_real_size(tmp_path):
    """HuBERT Base, MERT v0-public and MERT v1-95M: 211 tensors and 94 371 712 numbers, of which layers above 4 are not
    kept."""
    with torch.device("meta"): shapes = {k: v.shape for k, v in HubertModel(HubertConfig()).state_dict().items()}
    assert len(shapes) == 211 and sum(s.numel() for s in shapes.values()) == 94_371_712
    (tmp_path/"config.json").write_text(json.dumps(HubertConfig().to_dict() | MERT["v1_95M"]))
    torch.save(old_names({k: torch.full(s, .01) for k, s in shapes.items()}), tmp_path/"pytorch_model.bin")
    teacher = load_encoder(tmp_path, layers=4)
    assert sum(p.numel() for p in teacher.parameters()) == 94_371_712 - 8*7_087_872
    base = make_base(teacher)
    assert sum(p.numel() for p in base.parameters()) == 23_491_200
    assert all(p.mean().sub(.01).abs() < 1e-6 for n, p in base.named_parameters() if "encoder.layer_norm" not in n)

def test_the_published_distilhubert_opens(tmp_path):
    "Two layers, no norm before the projection, a mask embedding, zero-padded 16 kHz input that is not normalised."
    shape = dict(num_hidden_layers=2, feat_proj_layer_norm=False, apply_spec_augment=False, mask_time_prob=.05)
    with torch.device("meta"):
        assert sum(p.numel() for p in HubertModel(HubertConfig(**shape)).parameters()) == 23_491_200 + 768
    for weights in ("bin", "safetensors"):
        model = seeded(HubertModel, HubertConfig(**SMALL | shape))
        folder = publish(model, tmp_path/weights, weights=weights, names=old_names)
        extractor = dict(do_normalize=False, sampling_rate=16_000, feature_extractor_type="Wav2Vec2FeatureExtractor")
        (folder/"preprocessor_config.json").write_text(json.dumps(extractor))
        student = load_encoder(folder)
        assert weights_hash(student) == weights_hash(model) and student.sample_rate == 16_000 and student.left_out == []

def test_a_student_computes_what_torchaudio_does(teacher):
    "torchaudio knows no student without a norm before the projection, so that norm is taken out of its model."
    student, wav = make_base(teacher, layers=3), torch.randn(2, 4000)
    twin = HubertModel(HubertConfig(**student.config.to_dict() | dict(feat_proj_layer_norm=True))).eval()
    assert set(twin.load_state_dict(student.state_dict(),
                                    strict=False).missing_keys) == {f"feature_projection.layer_norm.{k}"
                                                                    for k in ("weight", "bias")}
    theirs = import_huggingface_model(twin).eval()
    theirs.encoder.feature_projection.layer_norm = torch.nn.Identity()
    with torch.no_grad():
        torch.testing.assert_close(hidden_states(student, wav)[1:], torch.stack(theirs.extract_features(wav)[0]),
                                   atol=1e-5, rtol=0)

def test_a_saved_encoder_has_a_card_and_its_sampling_rate(tmp_path, folder):
    card = (folder/"README.md").read_text()
    assert card.startswith("---\nlibrary_name: transformers\n") and "16,000 Hz" in card and "| role | base |" in card
    publish_mert(tmp_path/"mert", "v1_95M")
    again = load_encoder(save_encoder(load_encoder(tmp_path/"mert"), tmp_path/"mine", role="teacher"))
    assert again.sample_rate == 24_000 and "24,000 Hz" in (tmp_path/"mine/README.md").read_text()
    assert load_encoder(save_encoder(make_base(again), tmp_path/"base")).sample_rate == 16_000

@pytest.mark.parametrize("wrap", [torch.compile, torch.nn.DataParallel])
def test_a_wrapped_model_is_saved_without_its_wrapping(teacher, tmp_path, wrap):
    wrapped, generator = wrap(teacher), torch.get_rng_state()
    save_encoder(wrapped, tmp_path/"it")
    assert torch.equal(generator, torch.get_rng_state()) # a run that saves goes on as one that does not
    assert weights_hash(load_encoder(tmp_path/"it")) == weights_hash(teacher)

def cut(model): model.encoder.layers = model.encoder.layers[:1]
def exported(model): torch.nn.utils.parametrize.remove_parametrizations(model.encoder.pos_conv_embed.conv, "weight")

@pytest.mark.parametrize("change", [cut, exported])
def test_half_a_model_is_refused_before_anything_is_replaced(teacher, tmp_path, change):
    model = copy.deepcopy(teacher)
    save_encoder(model, tmp_path/"it")
    change(model)
    with pytest.raises(ValueError, match="not as the model's configuration says"): save_encoder(model, tmp_path/"it")
    assert weights_hash(load_encoder(tmp_path/"it")) == weights_hash(teacher)

def test_folders_and_types_as_people_write_them(teacher, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert save_encoder(teacher, "~/it", dtype="float16") == tmp_path/"it"
    assert load_encoder("~/it").dtype == torch.float32 == HubertModel.from_pretrained(tmp_path/"it").dtype
    save_encoder(copy.deepcopy(teacher).bfloat16(), tmp_path/"it")
    assert HubertModel.from_pretrained(tmp_path/"it").dtype == torch.float32
    with pytest.raises(ValueError, match="dtype 'int8' cannot be stored"): save_encoder(teacher, "~/it", dtype="int8")
    with pytest.raises(ValueError, match="license .*; give licence instead"):
        save_encoder(teacher, "~/it", license="MIT")

def test_the_default_type_of_torch_has_no_say(teacher, tmp_path):
    save_encoder(teacher, tmp_path/"it")
    def made():
        models = make_base(teacher, 1), make_base(teacher, 1, 32), load_student(tmp_path/"it").model()
        return [weights_hash(m) for m in models] + [open_encoder(n).hash for n in (str(tmp_path/"it"), "logmel")]
    want = made()
    torch.set_default_dtype(torch.bfloat16)
    try: assert made() == want and load_student(tmp_path/"it").model().dtype == torch.float32
    finally: torch.set_default_dtype(torch.float32)

@pytest.mark.filterwarnings("ignore:Initializing zero-element")
@pytest.mark.parametrize("file", ["config.json", "preprocessor_config.json"])
def test_whatever_a_configuration_says_ends_in_a_model_or_a_sentence(tmp_path, file):
    "Each value in turn is of another type or out of range; and the file holds no table at all."
    tiny = dict(hidden_size=48, num_hidden_layers=2, num_attention_heads=4, intermediate_size=96, conv_dim=[16]*7,
                num_conv_pos_embeddings=16, num_conv_pos_embedding_groups=4)
    save_encoder(HubertModel(HubertConfig(**tiny)), tmp_path/"it")
    whole = json.loads((tmp_path/"it"/file).read_text(encoding="utf-8"))
    wrong = [whole | {k: v} for k in whole for v in (None, [], {}, "x", -1, 0, 1.5, [1, "a"])]
    for content in [[], "x", 3, True, *wrong]:
        (tmp_path/"it"/file).write_text(json.dumps(content), encoding="utf-8")
        try: load_encoder(tmp_path/"it")
        except ValueError as e: assert str(tmp_path/"it") in str(e) and "\n" not in str(e), content

@pytest.mark.parametrize("said", [[], dict(model_type=[]), dict(model_type={})])
def test_what_a_probe_opens_is_read_by_the_same_function(tmp_path, said):
    (tmp_path/"config.json").write_text(json.dumps(said), encoding="utf-8")
    with pytest.raises(ValueError, match=str(tmp_path)): open_encoder(str(tmp_path))
