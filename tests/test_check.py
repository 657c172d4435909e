"What `check_profile` says of a profile that is right, and of each that is wrong."
import re
from dataclasses import replace
import numpy as np, pytest, soundfile as sf, torch
from transformers import HubertConfig, HubertModel
from distilltv.check import _time, check_profile, operations
from distilltv.encoders import save_encoder
from distilltv.profiles import new_profile, profile
from distilltv.tasks import TASKS

TINY = dict(hidden_size=48, num_hidden_layers=4, num_attention_heads=4, intermediate_size=96, conv_dim=(24,)*7,
            num_conv_pos_embeddings=16, num_conv_pos_embedding_groups=4)

@pytest.fixture(scope="module")
def mine(tmp_path_factory):
    "A profile of three domains with tiny teachers and three files each."
    d = tmp_path_factory.mktemp("mine")
    torch.manual_seed(0)
    text = 'name = "mine"\n[teachers]\n'
    for n in "abc":
        save_encoder(HubertModel(HubertConfig(**TINY)), d/f"teacher-{n}")
        text += f'{n} = "teacher-{n}"\n'
        for split in ("train", "dev", "test"):
            (d/n/split).mkdir(parents=True)
            sf.write(d/n/split/"x.wav", np.random.default_rng(ord(n)).normal(0, .1, 36_000), 16_000)
    text += ('[audio]\na = "a"\nb = "b"\nc = "c"\n[student]\nlayers = 2\n'
             '[training]\npredict = [2, 3]\nsteps = 9\nbatch = 3\nseconds = 1\n')
    (d/"mine.toml").write_text(text, encoding="utf-8")
    return d/"mine.toml"

def test_a_right_profile_fits_on_one_screen(mine):
    check = check_profile(mine)
    assert not check.wrong and len(check.lines) < 24 and max(map(len, check.lines)) < 300
    says = str(check)
    for part in ("a, b, c, ensemble: 9 steps of 3 crops of 1 s",
                 "2.2 s train, 2.2 s valid, 2.2 s test; 0 of 1 training",
                 "2 layers of 48, 4 heads", "merges of a, b, c", "3 teachers, 4 students"):
        assert part in says, part
    assert not (mine.parent/"runs").exists() and not profile(mine).folder.exists()      # nothing is written

@pytest.mark.parametrize("seconds, says", [(0, "none"), (4.5, "4.5 s"), (138, "2.3 min"), (360, "0.10 h"),
                                           (36_000, "10.00 h")])
def test_little_audio_is_said_in_minutes_or_seconds(seconds, says): assert _time(seconds) == says

def test_teachers_of_other_depths_say_what_is_predicted_of_each(mine, tmp_path):
    p = profile(mine)
    assert "are predicted of each" not in str(check_profile(p))
    save_encoder(HubertModel(HubertConfig(**TINY | dict(num_hidden_layers=5))), tmp_path/"deep")
    says = str(check_profile(replace(p, teachers=p.teachers | dict(b=str(tmp_path/"deep")))))
    assert "layers 2, 3 are predicted of each, of 4 (a), 5 (b), 4 (c)" in says

def test_a_teacher_that_is_written_like_a_hub_name(mine, monkeypatch):
    monkeypatch.setattr("distilltv.check.load_encoder", _refuse)
    text = mine.read_text(encoding="utf-8")
    (mine.parent/"typo.toml").write_text(text.replace('"teacher-b"', '"enc/tlak"').replace('"mine"', '"typo"'),
                                         encoding="utf-8")
    wrong = check_profile(mine.parent/"typo.toml").wrong
    assert f"(there is no folder {mine.parent/'enc/tlak'}; a folder is written ./enc/tlak): " in wrong[1]
    assert "folder is written" not in wrong[0]      # it is a folder, so that was not what is wrong

def _refuse(path): raise ValueError(f"{path} is not a model folder")

def test_questions_of_ones_own_are_counted_and_their_domain_is_noted(mine):
    p, folder = profile(mine), mine.parent/"a"
    rows = [f"{s}/x.wav,{s},{k},{s}{k}{i},{i*.5},{i*.5+.4}" for s in ("train", "dev", "test")
            for k, i in (("one", 0), ("two", 1), ("", 2), ("two", 3))]
    (folder/"t.csv").write_text("\n".join(["file,split,kind,who,start,end", *rows]), encoding="utf-8")
    def says(domain, **more):
        task = dict(table=str(folder/"t.csv"), label="kind", group="who", domain=domain)
        found = check_profile(replace(p, tasks=dict(kind=task), **more))
        TASKS.pop("kind", None)
        return str(found)
    assert "beside the default tasks kind (a): 2 classes, 3 train" in says("a")     # no label is no class
    assert "kind (birds, no domain of the profile): " in says("birds")
    assert "kind (Music, no domain of the profile: did you mean music?): " in says("Music")
    assert "asked of each: kind\n  kind (a): 2 classes" in says("a", ask="own")
    assert "task 'kinds' is unknown" in says("a", ask="kinds")
    assert "test recordings" not in says("a")
    rows[-1] = rows[-1].replace("test/x.wav", "train/x.wav")
    (folder/"t.csv").write_text("\n".join(["file,split,kind,who,start,end", *rows]), encoding="utf-8")
    assert "\n    1 of 2 test recordings are in the training audio: take them out" in says("a")

def test_every_mistake_is_said_at_once(mine, tmp_path):
    p, empty = profile(mine), tmp_path/"empty"
    empty.mkdir()
    (tmp_path/"test-clean").mkdir()
    sf.write(tmp_path/"test-clean/x.wav", np.random.default_rng(0).normal(0, .1, 36_000), 16_000)
    for change, says in ((dict(predict=(2, 5)), "layer 5, but the teacher of a has 4"),
                         (dict(teachers=p.teachers | dict(b=str(tmp_path/"none"))),
                          "the teacher of b cannot be opened: .*none"),
                         (dict(student_layers=5), "no student can start from the teacher of a"),
                         (dict(student_heads=5, student_width=0), "width 48 cannot have 5 attention heads"),
                         (dict(audio=p.audio | dict(c="")), "c has no audio, but corpus = both"),
                         (dict(audio=p.audio | dict(c=str(tmp_path/"none"))), "the audio of c cannot be used: .*none"),
                         (dict(audio=p.audio | dict(c=str(empty))),
                          "the audio of c cannot be used: .*no readable audio"),
                         (dict(audio=p.audio | dict(c=f"stream:{empty}")),
                          "the audio of c cannot be used: .*cannot be opened as stream"),
                         (dict(audio=p.audio | dict(c=str(mine.parent/"a/train"))), "no validation audio"),
                         (dict(cache="float16"), "with epoch=0 nothing is"),
                         (dict(loss="cl", accumulate=2, batch=4), "use accumulate=1"),
                         (dict(batch=2), "batch = 2 is fewer than the 3 corpora .*: choose at least 3"),
                         (dict(loss="cl", batch=1, corpus="a"), "batch = 1 is too small for loss = cl"),
                         (dict(compile="nonsense"), "compile = 'nonsense' is no backend"),
                         (dict(student_width=42, student_heads=2), "width = 42 cannot be shared by the 4 groups"),
                         (dict(audio=p.audio | dict(c=f"stream:{mine.parent}/a::test")),
                          "the audio of c cannot be used: .* asks for test audio"),
                         (dict(short="alone", batch=4), "choose a multiple of 3")):
        found = check_profile(replace(p, **change)).wrong
        assert len(found) == (3 if "predict" in change else 1) and re.search(says, found[0]), (change, found)
    short = check_profile(replace(p, seconds=.02)).wrong
    assert len(short) == 3 and "seconds = 0.02 is too short for the teacher of a" in short[0]
    half = check_profile(replace(p, precision="fp16"))      # it may be meant for another machine
    assert half.wrong == [] and ("fp16 needs a GPU: none here" in str(half)) == (not torch.cuda.is_available())
    both = check_profile(replace(p, predict=(9,), audio=p.audio | dict(c="")))
    assert len(both.wrong) == 4                     # the layer, of three teachers, and the audio
    assert check_profile(replace(p, audio=p.audio | dict(c=""), corpus="a")).wrong == []     # c is not heard
    assert "is not a file" in check_profile(tmp_path/"no.toml").wrong[0]

def test_a_new_profile_is_read_and_never_overwrites(tmp_path):
    path = new_profile(tmp_path/"hub.toml")
    assert profile(path).name == "my-hub"
    for wrong, says in ((path, "exists already"), (tmp_path/"x.yaml", "does not end in .toml"),
                        (tmp_path/"no/x.toml", "is not a folder")):
        with pytest.raises(ValueError, match=says): new_profile(wrong)

def test_operations_are_those_of_a_pass_and_three_times_with_its_gradient():
    small = HubertConfig(**TINY)
    once, trained = operations(small, 1.), operations(small, 1., backward=True)
    assert 2.5 < trained/once < 3.2 and operations(HubertConfig(**TINY | dict(num_hidden_layers=8)), 1.) > once
