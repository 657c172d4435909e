"Published data sets on tiny trees with their real layout and file formats; letters; adapters for others' tools."
import csv, dataclasses, json, os, re, shutil, unicodedata, zlib
from dataclasses import replace
from pathlib import Path
import datasets, numpy as np, pandas as pd, pytest, soundfile as sf, torch
from hypothesis import given, settings, strategies as st
from distilltv import adapters as A, answers as N, features as E, fit as F, frozen as Z, letters as L
from distilltv import probe as P, published as B, questions as Q
from distilltv import tasks as T
from distilltv.profiles import profile

torch.set_num_threads(1)

def tone(path, seconds=.2, hz=440., rate=16000, **kw):
    "A sine with a little noise, written in the data set's own format."
    path.parent.mkdir(parents=True, exist_ok=True)
    n = int(seconds*rate)
    noise = np.random.default_rng(zlib.crc32('/'.join(path.parts[-3:]).encode())).standard_normal(n)
    sf.write(path, .3*np.sin(2*np.pi*hz*np.arange(n)/rate) + .01*noise, rate, **kw)

def speech_commands(at):
    base, test = at/"speech_commands_v0.01", at/"speech_commands_test_set_v0.01"
    for word, hz in dict(yes=300, no=600, bed=1200).items():
        for i in range(8): tone(base/word/f"s{i}_nohash_0.wav", .3, hz)
        tone(test/("_unknown_" if word == "bed" else word)/f"t_{word}_nohash_0.wav", .3, hz)
    tone(test/"_silence_"/"silence0.wav", 1, 5000)
    tone(base/"_background_noise_/pink_noise.wav", 11, 5000)
    (base/"validation_list.txt").write_text("".join(f"{w}/s6_nohash_0.wav\n" for w in ("yes", "no", "bed")))
    (base/"testing_list.txt").write_text("yes/s7_nohash_0.wav\n")

def fluent_commands(at):
    base = at/"fluent_speech_commands_dataset"
    for k, split in enumerate(("train", "valid", "test")):
        (base/"data").mkdir(parents=True, exist_ok=True)
        with open(base/f"data/{split}_data.csv", "w", newline="") as f:
            out = csv.writer(f)
            out.writerow(["", "path", "speakerId", "transcription", "action", "object", "location"])
            for i in range(12):
                up, lamp = i % 2, i//2 % 2
                tone(base/f"wavs/speakers/sp{k}/{split}{i}.wav", .2 + .02*i, 200 + 1500*up + 400*lamp)
                out.writerow([i, f"wavs/speakers/sp{k}/{split}{i}.wav", f"sp{k}", "words", ("down", "up")[up],
                              ("heat", "lights")[lamp], "none"])

def voxceleb1(at):
    lines = []
    for s in (1, 2):
        for v, part in enumerate((1, 1, 2, 3)):
            name = f"id1000{s}/video{v}/00001.wav"
            tone(at/f"VoxCeleb1/{'dev' if s == 1 else 'test'}/wav"/name, 8.5 if v == 0 else .3, 300*s)
            lines.append(f"{part} {name}\n")
    (at/"VoxCeleb1/iden_split.txt").write_text("".join(lines))

def iemocap(at):
    for s in range(1, 6):
        d, says = f"Ses0{s}F_impro01", ""
        for i, e in enumerate(["ang", "hap", "exc", "neu", "sad", "fru", "xxx"]):
            u = f"{d}_{'FM'[i % 2]}{i:03d}"
            tone(at/f"IEMOCAP_full_release/Session{s}/sentences/wav/{d}/{u}.wav", .3,
                 dict(ang=300, hap=700, exc=700, neu=1500).get(e, 3000))
            says += f"[{i}.0000 - {i}.9000]\t{u}\t{e}\t[2.5000, 2.5000, 2.5000]\nC-E2:\tNeutral;\t()\n\n"
        f = at/f"IEMOCAP_full_release/Session{s}/dialog/EmoEvaluation/{d}.txt"
        f.parent.mkdir(parents=True)
        f.write_text("% [START_TIME - END_TIME] TURN_NAME EMOTION [V, A, D]\n\n" + says)

def librispeech(at):
    for s, part in enumerate(("train-clean-100", "dev-clean", "test-clean")):
        f = at/f"LibriSpeech/{part}/{s}/198"
        for i, hz in enumerate((400, 2000)): tone(f/f"{s}-198-000{i}.flac", .3, hz)
        (f/f"{s}-198.trans.txt").write_text(f"{s}-198-0000 A\n{s}-198-0001 I I\n")

def vocalset(at):
    for s in [f"female{i}" for i in range(1, 10)] + [f"male{i}" for i in range(1, 12)]:
        for t in ("belt", "vibrato", "fast_forte"):
            for e in ("arpeggios", "scales"):
                tone(at/f"VocalSet/FULL/{s}/{e}/{t}/{s[0]}{s.strip('emal f')}_{e}_{t}_a.wav", 3.1, 440, 8000)
    tone(at/"VocalSet/FULL/female1/long_tones/belt/f1_long_belt_a.wav", 6.5, 440, 44100)
    (at/"VocalSet/test_singers_technique.txt").write_text("f2\nf8\nm3\nm5\nm10\n")

def nsynth(at):
    for split in ("train", "valid", "test"):
        notes = {f"{fam}_acoustic_{split}-{p:03d}-075":
                 dict(instrument_family_str=fam, pitch=p, instrument_source_str="acoustic")
                 for fam in ("flute", "bass") for p in (60, 61)}
        for n, r in notes.items(): tone(at/f"nsynth/nsynth-{split}/audio/{n}.wav", .3, 5*r["pitch"])
        (at/f"nsynth/nsynth-{split}/examples.json").write_text(json.dumps(notes))

def gtzan(at):
    from torchaudio.datasets import gtzan as lists
    for split in ("train", "valid", "test"):
        for n in getattr(lists, f"filtered_{split}")[::40]:
            tone(at/f"gtzan/genres/{n.split('.')[0]}/{n}.au", .3, 440, 22050, format="AU", subtype="PCM_16")
    listed = {n for s in ("train", "valid", "test") for n in getattr(lists, f"filtered_{s}")}
    faulty = next(n for i in range(100) if (n := f"jazz.{i:05d}") not in listed)
    tone(at/f"gtzan/genres/jazz/{faulty}.au", .3, format="AU", subtype="PCM_16")

def esc50(at):
    rows = [dict(filename=f"{f}-{i}-A-{c}.wav", fold=f, target=c, category=("dog", "rain")[c], esc10="True",
                 src_file=f"{f}{i}", take="A") for f in range(1, 6) for i in range(2) for c in range(2)]
    for r in rows: tone(at/"ESC-50-master/audio"/r["filename"], .3, 300 + 2000*r["target"], 44100)
    (at/"ESC-50-master/meta").mkdir()
    pd.DataFrame(rows).to_csv(at/"ESC-50-master/meta/esc50.csv", index=False)

def giantsteps(at):
    train, test = at/"giantsteps/giantsteps-mtg-key-dataset-master", at/"giantsteps/giantsteps-key-dataset-master"
    (train/"annotations/genre").mkdir(parents=True), (test/"annotations/key").mkdir(parents=True)
    (test/"annotations/genre").mkdir()
    rows = [["ID", "MANUAL KEY", "C", "ALTERNATIVE", "COMMENTS"]]
    for i in range(40):
        rows.append([str(1000+i), "Eb minor" if i % 2 else "C major", "2" if i < 38 else "1", "", ""])
        tone(train/f"audio/{1000+i}.LOFI.mp3", .5, 300 + 900*(i % 2), 44100, format="MP3")
        (train/f"annotations/genre/{1000+i}.LOFI.genre").write_text("trance\n" if i % 3 else "techno\n")
    (train/"annotations/annotations.txt").write_text("\n".join("\t".join(r) for r in rows))
    for i in range(4):
        tone(test/f"audio/{i}.LOFI.mp3", .5, 300 + 900*(i % 2), 44100, format="MP3")
        (test/f"annotations/key/{i}.LOFI.key").write_text("D# minor" if i % 2 else "C major")
        (test/f"annotations/genre/{i}.LOFI.genre").write_text("techno\n")

def magnatagatune(at):
    rows = []
    for k, folder in enumerate("0bbccdef"):
        for i in range(2):
            # artist, album, number, title, start, end
            name = f"{folder}/artist_{k % 3}-album_{k}-0{i+1}-song_{i}-0-29.mp3"
            tone(at/"MTT"/name, .5, 300 + 2000*i, 16000, format="MP3")
            rows.append(dict(clip_id=len(rows), slow=1-i, fast=i, odd=0, mp3_path=name))
    (pd.DataFrame(rows + [dict(clip_id=99, slow=0, fast=0, odd=0, mp3_path="0/no_one-nothing-01-untagged-0-29.mp3")])
     .to_csv(at/"MTT/annotations_final.csv", sep="\t", index=False))

def emomusic(at):
    meta = {str(i): dict(split=("train", "train", "valid", "test")[i//16], y=[float(i % 4), -float(i % 4)])
            for i in range(64)}
    for n, r in meta.items(): tone(at/f"emomusic/wav/{n}.wav", .3, 300*2**r["y"][0], 22050)
    (at/"emomusic/meta.json").write_text(json.dumps(meta))

MAKERS = dict(speech_commands=speech_commands, fluent_commands=fluent_commands, voxceleb1=voxceleb1, iemocap=iemocap,
              librispeech=librispeech, vocalset_singers=vocalset, vocalset_techniques=vocalset, nsynth=nsynth,
              gtzan=gtzan, esc50=esc50, giantsteps=giantsteps, magnatagatune=magnatagatune, emomusic=emomusic)

@pytest.fixture
def root(tmp_path, monkeypatch):
    monkeypatch.setenv("DISTILLTV_HOME", str(tmp_path/"runs"))
    monkeypatch.setenv("DISTILLTV_DATASETS", str(tmp_path/"data"))
    for n, t in B.PUBLISHED.items(): monkeypatch.setitem(T.TASKS, n, dataclasses.replace(t, steps=min(t.steps, 600)))
    T.forget_tables()
    (tmp_path/"data").mkdir()
    return tmp_path/"data"

EXPECTED = dict(    # rows of train, valid and test, and the labels
    speech_commands=((6+7+7+10, 3+1, 4), {"yes", "no", "_unknown_", "_silence_"}),
    fluent_commands=((12, 12, 12), {f"{a}|{o}|none" for a in ("up", "down") for o in ("heat", "lights")}),
    voxceleb1=((4, 2, 2), {"id10001", "id10002"}), librispeech=((2, 2, 2), {"A", "I I"}),
    magnatagatune=((6, 4, 6), {"1|0|0", "0|1|0"}), emomusic=((32, 16, 16), {f"{i}.0|-{i}.0" for i in range(4)}),
    giantsteps=((None, None, 4), {"0:major", "3:minor"}), nsynth=((4, 4, 4), None), gtzan=((12, 5, 8), None))

@pytest.mark.parametrize("name", list(MAKERS))
def test_a_loader_reads_the_layout(root, name):
    MAKERS[name](root)
    df = getattr(B, name)(root)
    assert {"id", "file", "start", "end", "lo", "hi", "split"} <= set(df) and df.id.is_unique
    assert all((root/f).is_file() for f in df.file) and ((df.end - df.start - 400) % 320 == 0).all()
    assert (df.lo == 0).all() and (df.hi == df.end - df.start).all()
    assert not len(T.duplicates(df, root))
    for t in B.PUBLISHED.values():
        if t.segments == name:
            assert T.task_table(t.name).usable.any()
            l = T.check_leakage(t.name)
            if t.name in ("genreid", "emo"):
                assert np.isnan(l["chain"]) and l["state"].startswith("leakage not checked")
            else:
                assert set(t.chain) <= set(df.columns) and l["chain"] >= 0
                assert not l["state"].startswith("leakage not checked")
    if name not in EXPECTED: return
    counts, labels = EXPECTED[name]
    got = df.split.value_counts()
    assert all(c is None or got[s] == c for s, c in zip(("train", "valid", "test"), counts))
    assert labels is None or set(df.label) == labels

@pytest.mark.parametrize("name", list(MAKERS))
def test_what_a_mac_lays_beside_files_is_no_row(root, name):
    MAKERS[name](root)
    table, files = getattr(B, name)(root), [f for f in root.rglob("*") if f.is_file()]
    for top in {f.relative_to(root).parts[0] for f in files}: shutil.copytree(root/top, root/top/"__MACOSX"/top)
    for f in files:    # libsndfile takes it for a part of an MP3
        if f.suffix != ".mp3": f.with_name(f"._{f.name}").write_bytes(b"\0\5\26\7 Mac OS X \n")
    pd.testing.assert_frame_equal(getattr(B, name)(root), table)

def test_a_score_says_what_its_leakage_check_held_on_to(root):
    emomusic(root), gtzan(root)
    status = P.probe("logmel", "emo,genreid", seeds=1).status
    assert status.str.contains("leakage not checked: the files here say nothing").all()      # not a silent pass
    # the authors' table beside MARBLE's files: each artist has one mood, here, and is in every split
    with open(root/"emomusic/songs_info.csv", "w") as f: f.write("in the wrong place")
    (root/"emomusic/annotations").mkdir()
    with open(root/"emomusic/annotations/songs_info.csv", "w", newline="") as f:
        w = csv.writer(f)
        w.writerow(["song_id", "file_name", "Artist", "Song title", "Genre"])
        w.writerows([i, f"{i}.mp3", f"artist {i % 4}", "a\tsong", "Folk\t"] for i in range(64))
    T.forget_tables()
    df = B.emomusic(root)
    assert df.artist[df.song == "7"].item() == "artist 3" and set(df.genre) == {"Folk"}
    l = T.check_leakage("emo")                                 # told, because the split is its authors'
    assert l["chain"] == 1 and l["state"] == "leak: artist, genre alone reach 1.00, guessing 0.00"
    assert P.probe("logmel", "emo", seeds=1).status.str.contains("leak: artist, genre alone reach 1.00").all()

def test_clips_of_a_track_are_one_group_and_artists_are_known(root):
    magnatagatune(root)
    df = B.magnatagatune(root)
    assert df.track.nunique() == len(df) and set(df.artist) == {"artist_0", "artist_1", "artist_2"}
    assert df.track[0] == "0/artist_0-album_0-01-song_0"
    # by hand: the training answers of an artist are one clip with each tag, so artists tell nothing
    l = T.check_leakage("mtt")
    assert l["chain"] == .5 and l["state"] == ""

def test_a_missing_data_set_is_said_to_be_missing(root, tmp_path):
    esc50(root)
    scores = P.probe(Z.open_encoder("logmel"), "ks,esc50,ic", seeds=1, out=tmp_path/"out")
    missing = scores[scores.score.isna()]
    assert missing.task.tolist() == ["ks", "ic"] and scores[scores.task == "esc50"].score.notna().all()
    assert missing.status.iloc[0].startswith("not run: Speech Commands v0.01 is not in data: fetch")
    assert "1.5 GB, CC BY 4.0" in missing.status.iloc[0]
    written = pd.read_csv(tmp_path/"out/scores.csv")
    assert set(written.task) == {"esc50"} and pd.read_csv(tmp_path/"out/not_run.csv").task.tolist() == ["ks", "ic"]

def test_a_missing_part_is_named(root):
    nsynth(root)
    shutil.rmtree(root/"nsynth/nsynth-valid")
    with pytest.raises(B.MissingData, match="NSynth lacks nsynth-valid/examples.json: fetch"): T.task_table("pitchid")

@pytest.mark.parametrize("task, make", [("esc50", esc50), ("ic", fluent_commands), ("sid", voxceleb1),
                                        ("gs-key", giantsteps), ("ks", speech_commands)])
def test_a_solvable_task_is_solved(root, task, make):
    make(root)
    scores = P.probe("logmel", task, seeds=2)
    linear = scores[(scores.probe == "linear") & (scores.metric == "accuracy")]
    assert len(linear) == 2 and (linear.score >= .75).all() and (scores[scores.probe == "knn"].score >= .75).all()

def test_folds_test_every_item_once(root):
    esc50(root)
    rows, kept = P.score_task(Z.LogMel(), "esc50", seeds=(0,))
    assert rows[0]["n_test"] == 20 and sorted(kept["id"]) == sorted(B.esc50(root).id) and kept["pred"].shape == (1, 20)
    for k in range(5):
        d = T.task_table("esc50", fold=k)
        assert set(d[d.split == "test"].fold) == {k} and set(d[d.split == "valid"].fold) == {(k+1) % 5}

def test_an_intent_is_right_when_all_slots_are(root):
    fluent_commands(root)
    _, kept = P.score_task(Z.LogMel(), "ic", seeds=(0,))
    assert set(kept["classes"][kept["true"]]) == set(B.fluent_commands(root).label)

def test_tags_and_numbers(root):
    magnatagatune(root), emomusic(root)
    scores = P.probe("logmel", "mtt,emo", seeds=1).set_index("metric").score
    assert scores["roc-auc"] == 1 and scores["average precision"] == 1
    assert scores["r2"] > .5 and {"r2:0", "r2:1"} <= set(scores.index)

def test_number_scores_against_hand_worked():
    true, said = np.array([[1, 0, 0], [0, 1, 0], [1, 1, 0]]), np.array([[.9, .2, .5], [.1, .8, .5], [.05, .9, .5]])
    assert N.number_score("roc-auc", true, said) == (.5 + 1)/2        # the third tag never occurs
    assert N.number_score("r2:1", np.array([[0, 1.], [0, 3.]]), np.array([[9, 1.], [9, 2.]])) == .5

def test_a_corrupt_file_costs_a_row_not_the_run(root):
    esc50(root)
    files = sorted((root/"ESC-50-master/audio").glob("*.wav"))
    files[3].write_bytes(b"not a sound at all")
    files[5].write_bytes(files[5].read_bytes()[:200])
    with pytest.warns(UserWarning, match="2 of 20 windows could not be read"):
        scores = P.probe("logmel", "esc50", seeds=1)
    linear = scores[scores.probe == "linear"].iloc[0]
    assert linear.n_test == 18 and linear.status == "2 of 20 rows unreadable" and linear.score == 1

def unheard(folder, split, answer=N.Classes()):
    "A task of which no recording of one split can be read."
    rows = []
    for s in ("train", "valid", "test"):
        for i in range(4):
            f = folder/f"{s}{i}.wav"
            tone(f, .2, 300 + 900*(i % 2))
            if s == split: f.write_bytes(b"not a sound at all")
            rows.append(dict(id=f.stem, file=f.name, start=0, end=3200, lo=0, hi=3200, split=s, label="ab"[i % 2],
                             voice="vw"[i//2], lang="x"))
    return T.Task("unheard", "music", lambda root: pd.DataFrame(rows), "label", "id", answer=answer,
                  home=lambda: folder)

@pytest.mark.filterwarnings("ignore:.*could not be read")
@pytest.mark.parametrize("answer", [N.Classes(), N.Match(), L.Words(), L.Spelling()], ids=lambda a: type(a).__name__)
@pytest.mark.parametrize("split", ["train", "valid", "test"])
def test_a_split_that_cannot_be_heard_is_named(tmp_path, root, split, answer):
    with pytest.raises(N.Unheard, match=f"task unheard: 0 rows of the {split} split can be heard"):
        P.score_task(Z.LogMel(), unheard(tmp_path, split, answer), seeds=(0,))

@pytest.mark.filterwarnings("ignore:.*could not be read")
def test_a_split_that_cannot_be_heard_costs_the_task_not_the_run(tmp_path, root):
    T.add_task(unheard(tmp_path, "valid"))
    esc50(root)
    try: d = P.probe("logmel", "unheard,esc50", seeds=1, out=tmp_path/"out").set_index("task")
    finally: T.TASKS.pop("unheard")
    assert d.loc["unheard", "status"].startswith("not run: task unheard: 0 rows of the valid split can be heard")
    assert d.loc["esc50"].score.notna().all() and (tmp_path/"out/not_run.csv").exists()
    P.probe("logmel", "esc50", seeds=1, out=tmp_path/"out")
    assert not (tmp_path/"out/not_run.csv").exists()

@pytest.mark.filterwarnings("ignore:.*could not be read")
@pytest.mark.parametrize("wrong, says", [
    (lambda d: d.assign(file="no-" + d.file), "none of 12 files could be read"),
    (lambda d: d.assign(end=9000), "none of 12 files could be read; .* ends before its table says"),
    (lambda d: d.assign(end=9000, shard=True), "is shorter than its table says"),
    (lambda d: d.assign(split="train"), "the test and valid split of table .* is empty"),
    (lambda d: d.assign(voice=""), "has no voice"), (lambda d: d.assign(voice="v"), "'v' .column voice. is in several"),
    (lambda d: d.assign(label=""), "no label in the"),
    (lambda d: d.drop(columns="split"), "no column split, its split")])
def test_a_task_whose_data_are_wrong_costs_the_task_not_the_run(tmp_path, root, wrong, says):
    good = unheard(tmp_path, "")
    table = wrong(good.load(None).assign(voice=lambda d: d.id))
    bad = replace(good, name="bad", load=lambda root: table, group="voice")
    d = P.probe("logmel", [good, bad], seeds=1).set_index("task")
    assert re.search(f"^not run: .*{says}", d.loc["bad", "status"]) and d.loc["unheard"].score.notna().all()
    if "split" in says:
        with pytest.raises(T.SplitError, match=says): P.probe("logmel", bad, seeds=1)

def test_one_class_that_can_be_heard_is_no_question(tmp_path):
    t = T.Task("one", "music", lambda r: None, "label", "id")
    df = pd.DataFrame(dict(id=list("abcdef"), label=list("xyxyxy"), split=["train"]*2 + ["valid"]*2 + ["test"]*2))
    x = torch.randn(1, 1, 6, 3)
    x[:, :, 1] = torch.nan
    extra = pd.DataFrame(dict(id=["g"], label=["x"], split=["train"]))
    df, x = pd.concat([df, extra], ignore_index=True).assign(usable=True), torch.cat([x, x[:, :, :1]], 2)
    with pytest.raises(N.Unheard, match="task one: the train split has one class only, 'x'"):
        N.Classes().score_split(x, df, t, (0,), "linear")

def test_the_last_step_of_a_short_training_is_looked_at():
    x = torch.tensor([[[-1.], [1.]]]).repeat(1, 20, 1)
    y = torch.arange(40) % 2
    fit = F.fit_probes(x, y, x, y, 2, lrs=(.1,), seeds=(0,), steps=10)
    assert fit["valid"].item() == 1 and fit["p"]["b"].abs().max() > 0

def test_a_corrupt_file_among_a_hundred_thousand(root, tmp_path, monkeypatch):
    """One of 100,000 files is no sound: it is named, counted and left out, and nothing grows with the square
    of the rows."""
    n, folder, reads = 100_000, tmp_path/"many", {}
    folder.mkdir()
    (folder/"777.wav").write_bytes(b"not a sound at all")
    for i in (5, 6, 99_990): tone(folder/f"{i}.wav", .05, 300 + 900*(i % 2))
    tones = [.1*np.sin(2*np.pi*hz*np.arange(720)/16000).astype(np.float32) for hz in (300, 1200)]
    read, hashes = E.read_window, E.audio_hashes
    def decode(root, file, start, end):      # the four files that are there, and one of two tones for the others
        reads[file] = reads.get(file, 0) + 1
        return read(root, file, start, end) if os.path.exists(file) else tones[int(file.split("/")[-1][:-4]) % 2]
    monkeypatch.setattr(E, "read_window", decode)
    for room in (E, T):
        monkeypatch.setattr(room, "audio_hashes", lambda files, root: dict(zip(files, files))
                            | hashes([f for f in files if f.endswith(("/777.wav", "/5.wav"))], root))
    i = np.arange(n)
    table = pd.DataFrame(dict(id=i.astype(str), file=[f"{folder}/{k}.wav" for k in i], start=0, end=720, lo=0, hi=720,
                              label=np.where(i % 2, "high", "low"), bank="one",
                              split=np.where(i < 98_000, "train", np.where(i < 99_000, "valid", "test"))))
    T.add_task(T.Task("many", "music", lambda root: table, "label", "id", ("bank",), steps=100))
    try:
        with pytest.warns(UserWarning, match=r"1 of 100000 windows could not be read and are left out; the first: "
                                             r".*777\.wav"):
            scores = P.probe("logmel", "many", seeds=1)
    finally: T.TASKS.pop("many")
    assert scores.status.eq("1 of 100000 rows unreadable").all()
    assert (scores.score == 1).all() and (scores.n_test == 1000).all()
    assert len(reads) == n and max(reads.values()) == 1       # each file decoded once

def test_neighbours_do_not_need_a_table_of_all_pairs(monkeypatch):
    g = torch.Generator().manual_seed(0)
    x, y, xt = (torch.randn(2**16, 4, generator=g), torch.randint(3, (2**16,), generator=g),
                torch.randn(1300, 4, generator=g))
    largest, matmul = [], torch.Tensor.topk
    monkeypatch.setattr(torch.Tensor, "topk", lambda t, k: largest.append(t.numel()) or matmul(t, k))
    near = F.knn(x, y, xt)
    assert len(largest) == 3 and max(largest) <= 2**25 and np.array_equal(near[1290:], F.knn(x, y, xt[1290:]))

def test_a_file_in_two_splits_is_reported(root):
    nsynth(root)
    a, b = (sorted((root/"nsynth/nsynth-train/audio").glob("*.wav"))[0],
            sorted((root/"nsynth/nsynth-test/audio").glob("*.wav"))[1])
    shutil.copy(a, b)
    T.forget_tables()
    d = T.duplicates(B.nsynth(root), root)
    assert set(d.split) == {"train", "test"} and len(d) == 2
    scores = P.probe("logmel", "pitchid", seeds=1)      # and nobody has to ask for it
    assert scores.status.str.startswith("2 rows have the audio of a row in another split, "
                                        "such as nsynth/nsynth-t").all()

@pytest.mark.parametrize("spans, twice", [
    (dict(train=[(0, 40)], test=[(1, 45)]), {"train0", "test0"}), (dict(train=[(0, 40)], test=[(40, 80)]), set()),
    (dict(train=[(0, 40), (30, 60)], test=[(50, 90)]), {"train1", "test0"}),
    (dict(train=[(0, 90), (10, 20)], test=[(30, 40), (95, 99)]), {"train0", "test0"}),
    (dict(train=[(0, 40), (5, 45)], test=[(60, 70)]), set())])
def test_windows_of_a_recording_that_overlap_across_splits_are_duplicates(tmp_path, spans, twice):
    (tmp_path/"a.wav").write_bytes(b"x"), (tmp_path/"b.wav").write_bytes(b"x")    # one recording under two names
    rows = [dict(id=f"{s}{i}", split=s, file=f"{'ab'[s == 'test']}.wav", start=a, end=b) for s, some in spans.items()
            for i, (a, b) in enumerate(some)]
    assert set(T.duplicates(pd.DataFrame(rows), tmp_path).id) == twice

def test_a_clip_in_two_folds_is_reported(root):
    esc50(root)
    a, b = (root/f"ESC-50-master/audio/{f}-0-A-0.wav" for f in (1, 2))
    shutil.copy(a, b)
    T.forget_tables()
    assert (P.probe("logmel", "esc50", seeds=1).status
            .str.startswith("2 rows have the audio of a row in another split").all())

def test_a_published_task_that_leaks_is_not_reported(root, monkeypatch):
    "An instrument on both sides of NSynth's split would be recognised by its name alone."
    nsynth(root)
    for split in ("train", "valid", "test"):
        f = root/f"nsynth/nsynth-{split}/examples.json"
        notes = json.loads(f.read_text())
        f.write_text(json.dumps({n.replace(f"_{split}-", "_000-"): r for n, r in notes.items()}))
        for n in notes:
            (root/f"nsynth/nsynth-{split}/audio/{n}.wav").rename(
                root/f"nsynth/nsynth-{split}/audio/{n.replace(f'_{split}-', '_000-')}.wav")
    d = B.nsynth(root)
    monkeypatch.setitem(T.TASKS, "instcls",
                        dataclasses.replace(T.find_task("instcls"), load=lambda root: d.assign(note=d.split + d.note)))
    scores = P.probe("logmel", "instcls", seeds=1)
    assert scores.score.isna().all() and "instrument, velocity alone predict family at 1.00" in scores.status[0]

def test_vocalset_splits_keep_recordings_and_singers_apart(root):
    vocalset(root)
    singers, techniques = B.vocalset_singers(root), B.vocalset_techniques(root)
    assert (singers.groupby("recording").split.nunique() == 1).all() and singers.singer.nunique() == 20
    assert set(techniques.singer[techniques.split == "test"]) == {"f2", "f8", "m3", "m5", "m10"}
    assert "fast_forte" not in set(techniques.technique)
    long = singers[singers.recording == "f1_long_belt_a"]
    assert long.start.tolist() == [0, 48000]

def test_iemocap_counts_excited_as_happy_and_folds_by_session(root):
    iemocap(root)
    d = B.iemocap(root)
    assert d.label.value_counts().to_dict() == dict(ang=5, hap=10, neu=5, sad=5)
    assert all(f.startswith(f"IEMOCAP_full_release/Session{k+1}/") for f, k in zip(d.file, d.fold))

def test_letters_are_learnt():
    torch.manual_seed(0)
    net = L.Letters(1, 80, 16)
    adam, want = torch.optim.Adam(net.parameters(), 1e-2), L.letters("I I")
    x = torch.randn(1, 1, 1, 80) + .1*torch.randn(1, 1, 14, 80)
    losses = []
    for _ in range(60):
        losses.append(torch.nn.functional.ctc_loss(net(x), want[None], [14], [len(want)]))
        adam.zero_grad(), losses[-1].backward(), torch.nn.utils.clip_grad_norm_(net.parameters(), 1.), adam.step()
    assert losses[-1] < .1*losses[0]

def test_letters_are_scored(root):
    librispeech(root)
    rows, kept = L.score_letters(Z.LogMel(), T.find_task("asr"), "last", (0, 1), steps=2, batch=2, width=8, every=1)
    assert [r["seed"] for r in rows] == [0, 1] and rows[0]["metric"] == "wer" and rows[0]["n_test"] == 2
    assert kept["edits"].shape == (2, 2) and kept["words"].tolist() == [1, 2]
    assert rows[0]["score"] == kept["edits"][0].sum()/3

def spelt(at, silent=False):
    "Clips whose letters are tones, a tenth of a second each, as a task whose answer is spelt."
    rng, rows = np.random.default_rng(0), []
    for i in range(90):
        # no letter twice in a row
        text = "abcd"[(first := rng.integers(4))] + "".join("abcd"[(first := (first + k) % 4)]
                                                            for k in rng.integers(1, 4, 4))
        x = np.concatenate([.3*np.sin(2*np.pi*hz*np.arange(1600)/16000)
                            for hz in (400*(1 + "abcd".index(c)) for c in text)])
        (at/"tones").mkdir(parents=True, exist_ok=True)
        sf.write(at/f"tones/{i}.wav", x*(not silent) + .01*rng.standard_normal(8000), 16000)
        rows.append(dict(path=at/f"tones/{i}.wav", split=("train", "train", "valid", "test")[i % 4],
                         label=text, clip=str(i)))
    table = B._clips(rows, at)
    return T.Task("tones", "speech", lambda root: table, "label", "clip", answer=L.Spelling(), metric="cer",
                  home=B.datasets_dir)

@pytest.mark.parametrize("silent", [False, True])
def test_a_linear_probe_of_frames_learns_to_spell(root, silent, monkeypatch):
    "The error rate falls far below that of any text said blindly, and does not where there is nothing to hear."
    monkeypatch.setitem(T.TASKS, "tones", spelt(root, silent))
    d = P.probe("logmel", "tones", seeds=2)
    test = T.task_table("tones").query("split == 'test'").label.tolist()
    blind = min(L.letter_errors(test, [s]*len(test))[0].sum()/L.letter_errors(test, test)[1].sum() for s in set(test))
    assert set(d.probe) == {"ctc"} and set(d.metric) == {"cer"} and d.n_test[0] == len(test) and blind > .5
    assert (d.score > .9*blind).all() if silent else (d.score < .5*blind).all()

def test_spelling_by_the_sum_of_layers_and_one_by_one(root, monkeypatch):
    g = torch.Generator().manual_seed(0)
    y = torch.randint(1, 4, (40, 3), generator=g)
    x = torch.stack([torch.randn(40, 9, 5, generator=g),
                     torch.nn.functional.one_hot(y.repeat_interleave(3, 1), 5).float()
                     + .1*torch.randn(40, 9, 5, generator=g)])
    part = (x, torch.full((40,), 9), y, torch.full((40,), 3))
    p, wrong = L.fit_spelling(part, part, "_abcd", lrs=(1e-2, 3e-2), seeds=(3, 4), steps=90)
    assert p["a"].argmax(-1).eq(1).all()       # the second layer has the letters
    for s, seed in enumerate((3, 4)):
        for r, lr in enumerate((1e-2, 3e-2)):
            q, w = L.fit_spelling(part, part, "_abcd", lrs=(lr,), seeds=(seed,), steps=90)
            torch.testing.assert_close(p["W"][s, r], q["W"][0, 0], atol=1e-4, rtol=1e-3)
            assert w[0, 0] == wrong[s, r]

def test_a_text_may_hold_the_sign_of_the_blank():
    assert L.letters("a_b", "__ab").tolist() == [2, 1, 3]
    assert L.heard_text(torch.eye(4)[[2, 0, 1, 0, 3]], "__ab") == "a_b"

def tones(n=16):
    "Rows as a `datasets` repository has them: bytes, class labels, a column of splits."
    import io
    def wav(i):
        with io.BytesIO() as f:
            sf.write(f, .3*np.sin(np.arange(6000)*(.1 + .4*(i % 2))) + .01*np.random.default_rng(i).normal(size=6000),
                     8000, format="FLAC")
            return dict(bytes=f.getvalue(), path=f"{i}.flac")
    return datasets.Dataset.from_list([
        dict(sound=wav(i), what=i % 2, who=f"s{i//4}", part=("train", "train", "validation", "test")[i//2 % 4])
        for i in range(n)]).cast_column("sound", datasets.Audio(decode=False))

def test_a_table_of_anything_that_datasets_opens(root, tmp_path, monkeypatch):
    data = tones().cast_column("what", datasets.ClassLabel(names=["low", "high"]))
    kw = dict(audio="sound", label="what", split="part")
    t = T.from_datasets(data, tmp_path/"kept", speaker="who", **kw)
    assert t.label.tolist() == ["low", "high"]*8 and t.split.value_counts().to_dict() == dict(train=8, valid=4, test=4)
    assert set(t.speaker) == {"s0", "s1", "s2", "s3"}
    # 6000 samples at 8 kHz, whole frames at 16 kHz
    assert t.end.max() == (12000 - 400)//320*320 + 400 and len(list((tmp_path/"kept").glob("*.flac"))) == 16
    before = {f: f.stat().st_mtime_ns for f in (tmp_path/"kept").iterdir()}
    split = datasets.DatasetDict({s: data.filter(lambda r: r["part"] == s).remove_columns("part")
                                  for s in ("train", "validation", "test")})
    again = T.from_datasets(split, tmp_path/"kept", audio="sound", label="what")
    assert before == {f: f.stat().st_mtime_ns for f in (tmp_path/"kept").iterdir()}
    assert sorted(again.file) == sorted(t.file) and set(again.split) == {"train", "valid", "test"}
    mine = t.assign(speaker=t.split + t.id)
    T.add_task(T.Task("low-or-high", "sound", lambda root: mine, "label", "speaker", ("speaker",)))
    assert (P.probe("logmel", "low-or-high", seeds=1).score == 1).all() and "low-or-high" not in T.task_names("paper")
    with pytest.raises(ValueError, match="task 'ks' exists already"):
        T.add_task(T.Task("ks", "sound", lambda root: mine, "label", "speaker"))
    def speech_commands(root): return mine    # another function of the name that has the table of `ks`
    with pytest.raises(ValueError, match="task 'ks' exists already"):
        T.add_task(T.Task("ks", "sound", speech_commands, "label", "speaker"))
    T.TASKS.pop("low-or-high")

def test_rows_of_datasets_without_audio_or_columns_are_named(tmp_path):
    with pytest.raises(ValueError, match="no column 'label'; it has sound, what, who, part"):
        T.from_datasets(tones(), tmp_path, audio="sound", split="part")
    sf.write(tmp_path/"a.wav", np.zeros(8000) + .1, 16000)
    rows = datasets.Dataset.from_list([
        dict(audio=dict(bytes=None, path=str(tmp_path/"a.wav")), label=None, split="test")
        ]).cast_column("audio", datasets.Audio(decode=False))
    assert T.from_datasets(rows, tmp_path)[["file", "label"]].values.tolist() == [[str(tmp_path/"a.wav"), ""]]
    some = tones().map(lambda r, i: dict(part=None if i == 1 else r["part"]), with_indices=True)
    with pytest.raises(ValueError, match="row 1 of the data set has no part; give it one, or leave it out"):
        T.from_datasets(some, tmp_path, audio="sound", label="what", split="part")
    for empty in (None, dict(bytes=None, path=None)):
        gap = datasets.Dataset.from_list([dict(audio=a, label="a", split="test") for a in (rows[0]["audio"], empty)])
        with pytest.raises(ValueError, match="row 1 of the data set has neither audio bytes nor a path"):
            T.from_datasets(gap.cast_column("audio", datasets.Audio(decode=False)), tmp_path)

@pytest.mark.parametrize("kind", ["text", "number", "classes"])
def test_cells_of_datasets_that_say_nothing_are_empty(tmp_path, kind):
    sf.write(tmp_path/"a.wav", np.zeros(8000) + .1, 16000)
    something, nothing = dict(text=("a", None), number=(1., float("nan")), classes=(0, -1))[kind]
    sound = dict(bytes=None, path=str(tmp_path/"a.wav"))
    data = datasets.Dataset.from_list([dict(audio=sound, split="test", label=v, who=v) for v in (something, nothing)])
    data = data.cast_column("audio", datasets.Audio(decode=False))
    if kind == "classes":
        for c in ("label", "who"): data = data.cast_column(c, datasets.ClassLabel(names=["a"]))
    t = T.from_datasets(data, tmp_path, singer="who")
    assert t[["label", "singer"]].eq("").all(axis=1).tolist() == [False, True]

QUESTION = """
name = "mine"
[teachers]
speech = "a/b"
[tasks.high]
table = "tones/table.csv"
label = "what"
group = "who"
domain = "tones"
"""

@pytest.fixture
def question(tmp_path):
    "A profile with a question of its own, and the table that it asks about."
    (tmp_path/"tones").mkdir()
    rows = []
    for i in range(32):
        tone = .3*np.sin(np.arange(16_000)*(.1 + .4*(i % 2))) + .01*np.random.default_rng(i).normal(size=16_000)
        sf.write(tmp_path/f"tones/{i}.wav", tone, 8_000)
        rows.append(dict(file=f"{i}.wav", split=("train", "train", "dev", "test")[i//2 % 4],
                         what="low high".split()[i % 2], who=f"00{i//2}", start="" if i % 3 else ".5", end="1.25"))
    pd.DataFrame(rows).to_csv(tmp_path/"tones/table.csv", index=False, encoding="utf-8-sig")
    (tmp_path/"mine.toml").write_text(QUESTION, encoding="utf-8")
    yield tmp_path
    T.TASKS.pop("high", None)

def test_no_question_of_ones_own_is_a_sentence(monkeypatch):
    monkeypatch.setattr(T, "TASKS", {n: t for n, t in T.TASKS.items() if t.asked != "own"})
    with pytest.raises(ValueError, match="no question of your own.*-p profile FILE"): T.task_names("own")
    with pytest.raises(ValueError, match="task 'kind' is unknown.*is known with -p profile FILE"): T.find_task("kind")

def test_a_question_of_a_profile(question):
    p = profile(question/"mine.toml")
    assert Q.profile_tasks(p) == Q.profile_tasks(p) == ["high"]     # entered once, however often
    assert "high" not in T.task_names("all")
    assert T.task_names("own") == T.task_names("tones") == ["high"]     # a domain asks for its own questions too
    t = T.task_table("high")
    assert t.split.value_counts().to_dict() == dict(train=16, valid=8, test=8)
    assert t.who[0] == "000" and set(t.start) == {0, 8_000}
    # seconds, in whole frames at 16 kHz
    assert set(t.end - t.start) == {(n - 400)//320*320 + 400 for n in (12_000, 20_000)}
    scores = P.probe("logmel", ["high"], seeds=1)
    assert (scores.score == 1).all() and set(scores.domain) == {"tones"}
    with pytest.raises(ValueError, match="profile mine: task 'phones' exists already"):
        Q.profile_tasks(replace(p, tasks=dict(phones=p.tasks["high"])))

@pytest.mark.parametrize("change, says", [
    (lambda d: d.drop(columns="what"), "has no column what; it has file, split, who"),
    (lambda d: d.assign(split="tset"), "has the split 'tset'"),
    (lambda d: d.assign(file="no.wav"), "names no.wav, which is not there"),
    (lambda d: d.assign(end="soon"), "no number of seconds"),
    (lambda d: d.assign(end="7"), "row 2 of .*, 0.wav, is empty or ends after its recording"),
    (lambda d: d.assign(who="a"), "'a' .column who. is in several splits: put each into one"),
    (lambda d: d[d.split != "dev"], "the valid split of table table.csv is empty"),
    (None, "there is no table .*table.csv; correct tasks.high.table")])
def test_a_question_that_cannot_be_asked_is_a_sentence(question, change, says):
    file = question/"tones/table.csv"
    if change:
        change(pd.read_csv(file, dtype=str, keep_default_na=False, encoding="utf-8-sig")).to_csv(file, index=False)
    else: file.unlink()
    with pytest.raises(ValueError, match=f"task high: .*{says}") as e:
        Q.table_task("high", **profile(question/"mine.toml").tasks["high"]).split()
    assert "\n" not in str(e.value)

def cell(column, value, row=4):
    "A table with another value in one cell."
    def change(d):
        d.loc[row-2, column] = value
        return d
    return change

@pytest.mark.parametrize("change, says", [
    (cell("who", " "), "row 4 of .* says nothing in the column who"),
    (cell("split", ""), "row 4 of .* says nothing in the column split"),
    (cell("split", "tset"), "row 4 of .* has the split 'tset'"),
    (cell("file", "a\nb.wav"), r"row 4 of .* names a.nb.wav, which is not there"),
    (cell("file", "x"*300), "row 4 of .* which is not there"),
    (cell("file", "empty.wav"), "row 4 of .* names empty.wav, which has 0 bytes"),
    (cell("file", "cut.wav"), "row 4 of .* names cut.wav, which is truncated"),
    (cell("start", "nan"), "row 4 of .* has start = 'nan', no number of seconds"),
    (cell("end", "inf"), "row 4 of .* has end = 'inf', no number"),
    (cell("end", "1,2"), "row 4 of .* has end = '1,2', no number"),
    (cell("end", "2.2"), "row 4 of .*, 2.wav, is empty or ends after its recording, which lasts 2 s"),
    (cell("start", "-1"), "row 4 of .*, 2.wav, is empty or ends after its recording, which lasts 2 s"),
    (cell("start", "1.24"), "row 4 of .*, 2.wav, is shorter than 25 ms"),
    (lambda d: d.assign(who=""), "row 2 of .* column who.*31 more rows are like it"),
    (lambda d: d.assign(what="low"), "has the same what in all rows of train"),
    (lambda d: d.rename(columns=dict(what="snr")), "no column what; it has file, split, snr")])
def test_a_cell_that_is_wrong_is_named_by_row_and_column(question, change, says):
    whole = (question/"tones/2.wav").read_bytes()
    (question/"tones/empty.wav").touch(), (question/"tones/cut.wav").write_bytes(whole[:len(whole)//2])
    test_a_question_that_cannot_be_asked_is_a_sentence(question, change, says)

@pytest.mark.parametrize("change, says", [
    (lambda b: b.replace(b",", b'";"').replace(b"file", b'"file'), "is not a table.*separate columns by commas"),
    (lambda b: b.replace(b",", b";"), "has one column, file;split;what;who;start;end; separate columns by commas"),
    (lambda b: b.replace(b"who", b"what", 1), "has two columns what"),
    (lambda b: b.replace(b"who", b" split", 1), "has two columns split"),
    (lambda b: b + b"1.wav,train,low\n", "row 34 of .* has 3 cells, but there are 6 columns"),
    (lambda b: b"", "has no rows below"), (lambda b: b[:b.index(b"\n")], "has no rows below"),
    (lambda b: b + b'"1.wav', "is not a table"), (lambda b: b.replace(b"low", b"l\xf6w"), "is not UTF-8 text"),
    (lambda b: b.decode("utf-8-sig").encode("utf-16"), "is not UTF-8 text")])
def test_a_file_that_is_no_table_is_a_sentence(question, change, says):
    file = question/"tones/table.csv"
    file.write_bytes(change(file.read_bytes()))
    with pytest.raises(T.TableError, match=f"task high: .*{says}") as e:
        Q.table_task("high", **profile(question/"mine.toml").tasks["high"]).table()
    assert "\n" not in str(e.value) and str(file) in str(e.value)

def test_a_table_as_others_write_it(question):
    """Absolute paths, a folder elsewhere, blank rows, a row without a label, and columns that mean something else
    in ours."""
    file = question/"tones/table.csv"
    d = pd.read_csv(file, dtype=str, keep_default_na=False,
                    encoding="utf-8-sig").assign(snr="5", lo="x", shard="y", fold="z")
    d.loc[:2, "file"] = [str(question/"tones/0.wav"), "../tones/1.wav", "../tones/../tones/2.wav"]
    d.loc[3, "what"] = " "
    file.write_text("\n\n".join(d.to_csv(index=False).splitlines()), encoding="utf-8")
    Q.profile_tasks(profile(question/"mine.toml"))
    scores = P.probe("logmel", "high", seeds=1)
    assert (scores.score == 1).all() and scores.status.str.startswith("1 of 32 rows have no label").all()

def test_spaces_around_a_cell_mean_nothing(question):
    file = question/"tones/table.csv"
    d = pd.read_csv(file, dtype=str, keep_default_na=False, encoding="utf-8-sig")
    table = lambda: Q.table_task("high", **profile(question/"mine.toml").tasks["high"]).split()
    usual = table()
    d["who"] = d.who.where(d.index % 2 > 0, d.who + " ")
    d.assign(what=" " + d.what, split=d.split + " ").to_csv(file, index=False)
    pd.testing.assert_frame_equal(table(), usual)

@pytest.mark.parametrize("on_disk, in_table", [("NFD", "NFC"), ("NFC", "NFD")])
def test_a_table_from_another_system_names_the_same_files_and_people(question, on_disk, in_table):
    "Of a Mac, which writes é as two signs, or of Windows, with its backslashes."
    file, made = question/"tones/table.csv", unicodedata.normalize
    d = pd.read_csv(file, dtype=str, keep_default_na=False, encoding="utf-8-sig")
    table = lambda: Q.table_task("high", **profile(question/"mine.toml").tasks["high"]).split()
    usual = table()
    T.forget_tables()
    (question/"tones/sub").mkdir()
    for f in d.file: (question/"tones"/f).rename(question/"tones/sub"/made(on_disk, f"é{f}"))
    d = d.assign(file=[made(in_table, f"sub\\é{f}" + " "*(i % 2)) for i, f in enumerate(d.file)],
                 who=[made(form, f"é{w}") for form, w in zip(["NFC", "NFD"]*16, d.who)])
    d.rename(columns=lambda c: f" {c}").to_csv(file, index=False)
    got = table()
    assert got.file.tolist() == [made(on_disk, f"sub/é{f}") for f in usual.file]
    assert got.who.nunique() == usual.who.nunique() == 16 and got.end.tolist() == usual.end.tolist()

def edited(question, **columns):
    "The table of a question written anew with other cells: for each column a function of the table."
    d = pd.read_csv(question/"tones/table.csv", dtype=str, keep_default_na=False, encoding="utf-8-sig")
    d.assign(**columns).to_csv(question/"tones/table.csv", index=False)

def test_a_table_that_was_corrected_is_read_again_and_its_scores_are_told_apart(question):
    Q.profile_tasks(profile(question/"mine.toml"))
    score = lambda: P.probe("logmel", "high", seeds=1).iloc[0]
    then = score()
    edited(question, what=lambda d: np.roll(d.what, 1).tolist()[:16] + d.what.tolist()[16:])
    now = score()
    assert now.score < then.score == 1 and now.data_hash != then.data_hash

def test_test_recordings_that_are_trained_on_are_counted(question):
    shutil.copytree(question/"tones", question/"others")
    score = lambda p: Q.profile_tasks(p) and P.probe("logmel", "high", seeds=1).status[0]
    p = replace(profile(question/"mine.toml"), audio=dict(speech=str(question/"tones")))
    assert "8 of 8 test recordings are in the training audio" in score(p)
    for audio in ("others", "not there"): assert "test rec" not in score(replace(p, audio=dict(speech=audio)))
    (question/"tones/test").mkdir()
    for f in question.glob("tones/*.wav"): f.rename(f.parent/"test"/f.name)
    edited(question, file=lambda d: "test/" + d.file)
    assert "test recordings" not in score(p)        # the folder's name says that it is not trained on

def test_times_may_be_rounded_and_one_letter_be_written_in_two_ways(question):
    table = lambda: Q.table_task("high", **profile(question/"mine.toml").tasks["high"]).split()
    edited(question, end=lambda d: "2")
    exact = table()
    edited(question, end=lambda d: "2.09")
    pd.testing.assert_frame_equal(table(), exact)
    two_ways = lambda d: d.what.str.replace("low", "Zo\u00eb").where(d.index % 3 > 0, d.what.replace("low", "Zoe\u0308"))
    edited(question, what=two_ways)
    assert table().usable.all() and set(table().label) == {"Zo\u00eb", "high"}
    edited(question, who=lambda d: d.who.where(d.index > 1, "\u00e9").where(d.index < 30, "e\u0301"))
    with pytest.raises(T.TableError, match="is in several splits"): table()

def test_a_question_in_a_folder_whose_name_is_not_utf8(question, tmp_path):
    """As an old disk has them: `soundfile` cannot open what is in it, and the table of what was not run must be
    written all the same."""
    folder = Path(os.fsdecode(os.fsencode(tmp_path) + b"/t\xf6nes"))
    shutil.copytree(question/"tones", folder/"tones"), shutil.copy(question/"mine.toml", folder)
    Q.profile_tasks(profile(folder/"mine.toml"))
    P.probe("logmel", "high", seeds=1, out=tmp_path/"out")
    assert ("table.csv lies in a folder whose name is not UTF-8; rename it"
            in pd.read_csv(tmp_path/"out/not_run.csv").status[0])

@pytest.mark.parametrize("column", ["snr", "end"])
def test_a_label_of_a_name_that_means_something_else_is_refused(question, column):
    said = profile(question/"mine.toml").tasks["high"] | dict(label=column)
    file = question/"tones/table.csv"
    pd.read_csv(file, dtype=str, encoding="utf-8-sig").assign(snr="5").to_csv(file, index=False)
    with pytest.raises(T.TableError, match=f"task high: .*its column {column} has a meaning of its own here"):
        Q.table_task("high", **said).table()

def test_a_question_with_the_name_of_a_domain_is_refused(question):
    p = profile(question/"mine.toml")
    with pytest.raises(ValueError, match="profile mine: task 'music' has the name of a domain"):
        Q.profile_tasks(replace(p, tasks=dict(music=p.tasks["high"])))

@pytest.mark.parametrize("kind", ["object", "str", "category", "Int64", "boolean", "float"])
def test_missing_labels_are_left_out_whatever_type_holds_them(question, monkeypatch, kind):
    table = Q.table_task("high", **profile(question/"mine.toml").tasks["high"]).table()
    label = (table.what if kind in ("object", "str", "category")
             else (table.what == "high").astype(kind if kind != "float" else "Int64"))
    label = label.astype(object).mask(table.index % 11 == 0).astype(kind)
    monkeypatch.setitem(T.TASKS, "some", T.Task("some", "tones", lambda root: table.assign(what=label), "what", "who",
                                                home=lambda: question/"tones"))
    assert T.task_table("some").usable.tolist() == [i % 11 != 0 for i in range(32)]
    scores = P.probe("logmel", "some", seeds=1)
    assert (scores.score == 1).all() and scores.status.str.startswith("3 of 32 rows have no label").all()

@pytest.mark.parametrize("nobody", [np.nan, None, ""])
def test_a_row_without_a_group_is_refused(question, nobody):
    "It could be the same singer's as a row of another split."
    table = Q.table_task("high", **profile(question/"mine.toml").tasks["high"]).table()
    table = table.assign(who=table.who.astype(object).where(table.index > 1, nobody))
    task = T.Task("some", "tones", lambda root: table, "what", "who", home=lambda: question/"tones")
    with pytest.raises(ValueError, match="task some: 0.wav:8000 has no who .nor have 1 others."): task.split()
    with pytest.raises(ValueError, match="task some: .* has no column singer, its group"):
        replace(task, group="singer").split()

def levenshtein(a, b):
    "The textbook table, as an independent opinion."
    d = np.add.outer(np.arange(len(a)+1), np.arange(len(b)+1))
    for i in range(len(a)):
        for j in range(len(b)): d[i+1, j+1] = min(d[i, j+1] + 1, d[i+1, j] + 1, d[i, j] + (a[i] != b[j]))
    return d[-1, -1]

@given(st.lists(st.sampled_from("abc"), max_size=6), st.lists(st.sampled_from("abc"), max_size=6))
def test_word_errors(a, b):
    edits, words = L.word_errors([" ".join(a)], [" ".join(b)])
    assert edits[0] == levenshtein(a, b) and words[0] == len(a)
    edits, size = L.letter_errors(["".join(a)], ["".join(b)])
    assert edits[0] == levenshtein(a, b) and size[0] == len(a)

def test_xares_contract():
    "What X-ARES' checker asks: three attributes, and [batch, frames, dim] for a batch and for one long clip."
    e = A.XaresEncoder(Z.LogMel())
    assert isinstance(e.sampling_rate, int) and isinstance(e.output_dim, int) and isinstance(e.hop_size_in_ms, float)
    for seconds in (1, 45):
        h = e(torch.randn(2, 16000*seconds))
        assert h.shape[::2] == (2, e.output_dim) and abs(h.shape[1]*e.hop_size_in_ms/1000 - seconds) < .05
    assert e(torch.randn(100)).shape == (1, 1, 80)

def test_s3prl_contract():
    wavs = [torch.randn(16000), torch.randn(4000)]
    u = A.S3prlUpstream(Z.LogMel())
    out = u(wavs)
    assert u.get_downsample_rates("hidden_states") == 320 and out["hidden_states"][0].shape == (2, 49, 80)
    torch.testing.assert_close(out["last_hidden_state"][1, :12], u([wavs[1]])["last_hidden_state"][0])
    torch.nn.Linear(80, 2)(out["last_hidden_state"]).sum().backward()    # a probe on top can be trained

FOREIGN = dict(voxceleb1="VoxCeleb1/iden_split.txt",
               fluent_commands="fluent_speech_commands_dataset/data/train_data.csv",
               nsynth="nsynth/nsynth-train/examples.json", esc50="ESC-50-master/meta/esc50.csv",
               giantsteps="giantsteps/giantsteps-mtg-key-dataset-master/annotations/annotations.txt",
               magnatagatune="MTT/annotations_final.csv", emomusic="emomusic/meta.json",
               speech_commands="speech_commands_v0.01/validation_list.txt",
               librispeech="LibriSpeech/dev-clean/1/198/1-198.trans.txt",
               iemocap="IEMOCAP_full_release/Session1/dialog/EmoEvaluation/Ses01F_impro01.txt")

@pytest.mark.parametrize("name", list(FOREIGN))
def test_whatever_a_metadata_file_holds_ends_in_a_table_or_a_sentence(root, name):
    "Bytes, words and cut files in the place of the authors' tables: a table, or an error that names the task."
    MAKERS[name](root)
    task, file = next(t for t in B.PUBLISHED.values() if t.load is getattr(B, name)), root/FOREIGN[name]
    whole = file.read_bytes()
    @settings(max_examples=40, deadline=None)
    @given(st.one_of(st.binary(max_size=200), st.text(max_size=100).map(str.encode),
                     st.integers(0, len(whole)).map(lambda n: whole[:n]),
                     st.tuples(st.integers(0, len(whole)), st.binary(max_size=8))
                     .map(lambda p: whole[:p[0]] + p[1] + whole[p[0]:])))
    def check(content):
        file.write_bytes(content)
        T.forget_tables()
        try: assert isinstance(task.table(), pd.DataFrame)
        except T.TableError as e: assert f"task {task.name}: its table cannot be read" in str(e) and "\n" not in str(e)
        except B.MissingData as e: assert "\n" not in str(e)
    check()

def test_an_unreadable_table_costs_the_task_not_the_run(root):
    esc50(root), nsynth(root)
    (root/"nsynth/nsynth-train/examples.json").write_text("{")
    d = P.probe("logmel", "instcls,esc50", seeds=1)
    assert d[d.task == "instcls"].status.item().startswith("not run: task instcls: its table cannot be read from")
    assert d[d.task == "esc50"].score.notna().all()
