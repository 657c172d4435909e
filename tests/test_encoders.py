"Encoders: strict loading, hashes, θ₀, and parity of the student with an independent forward pass."
import json, pytest, torch
from safetensors.torch import load_file, save_file
from transformers import HubertConfig, HubertModel
from distilltv.encoders import Heads, frames, hidden_states, load_encoder, make_base, random_student, save_encoder, student_config, weights_hash

@pytest.fixture(scope="module")
def teacher():
    torch.manual_seed(0)
    return HubertModel(HubertConfig(hidden_size=48, num_hidden_layers=4, num_attention_heads=4, intermediate_size=96, conv_dim=[16]*7,
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

def test_old_weight_norm_names_load_to_the_same_encoder(folder):
    before = weights_hash(load_encoder(folder))
    def rename(t):
        for old, new in (("original0", "weight_g"), ("original1", "weight_v")):
            t[f"encoder.pos_conv_embed.conv.{new}"] = t.pop(f"encoder.pos_conv_embed.conv.parametrizations.weight.{old}")
    edit(folder, rename)
    assert weights_hash(load_encoder(folder)) == before

@pytest.mark.parametrize("name", ["encoder.layers.1.attention.q_proj.weight", "encoder.pos_conv_embed.conv.parametrizations.weight.original1"])
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
        sizes = {n: sum(p.numel() for p in HubertModel(student_config(HubertConfig(), n)).parameters()) for n in (2, 3)}
        heads = sum(p.numel() for p in Heads(768, 768, 3).parameters())
    assert sizes == {2: 23_491_200, 3: 30_579_072} and heads == 3_543_552

@pytest.mark.parametrize("samples", [399, 400, 719, 720, 16_000, 250_000])
def test_frames_is_what_the_convolutions_give(teacher, samples):
    if samples < 400: assert frames(samples) == 0
    else:
        with torch.no_grad(): assert teacher.feature_extractor(torch.zeros(1, samples)).shape[-1] == frames(samples)

def test_random_students_do_not_touch_the_global_generator(teacher):
    torch.manual_seed(3); a = torch.rand(1)
    torch.manual_seed(3); random_student(student_config(teacher.config), seed=9); b = torch.rand(1)
    assert a == b
