"""The shipped corpora keep their promises, and bad audio is refused by name."""
import hashlib, io, re, unicodedata
from collections import defaultdict
import numpy as np, pandas as pd, pytest, soundfile as sf, torch
from datasets import Audio, Dataset
from distilltv import corpora
from distilltv.corpora import AudioError, SAMPLE_RATE, crop_batch, load_audio, load_corpus, normalise, segment_audio
from distilltv.runs import data_dir
from distilltv.scale import Crops, Stream, merge_quarantines, write_quarantine

LICENCES = {"CC-BY-3.0", "CC-BY-SA-3.0", "CC-BY-SA-3.0-IT", "BSD-style-Shmyrev", "BSD-style-Gutierrez", "MIT", "GPL-2.0-only", "GPL-2.0-or-later", "CC-BY-SA-3.0-US"}

@pytest.fixture(scope="session")
def speech(): return load_corpus("speech").to_pandas()

@pytest.fixture(scope="session")
def music(): return load_corpus("music").to_pandas()

def apart(table, *group):
    "No group has rows in two splits."
    across = table.groupby(list(group)).split.nunique()
    assert (across == 1).all(), f"{group} in two splits: {list(across[across > 1].index)[:5]}"

def plain(text): return " ".join(re.findall(r"\w+", unicodedata.normalize("NFKC", text).lower()))

# --- what is in the tables

@pytest.mark.parametrize("name", ["speech", "music"])
def test_one_table_one_split_column(name):
    table = load_corpus(name).to_pandas()
    assert table.id.is_unique and set(table.split) == {"train", "valid", "test"}
    assert (table.end - table.start).sum()/SAMPLE_RATE/3600 >= 1.5
    assert set(table.license) <= LICENCES
    assert not set(table.columns) & {"speaker", "genre", "composer", "mode"}, "labels that only give the recording chain away"

@pytest.mark.parametrize("name", ["speech", "music"])
def test_every_file_and_source_is_credited(name):
    table, credits = load_corpus(name).to_pandas(), (data_dir()/"ATTRIBUTION.md").read_text(encoding="utf8")
    for source in table.source.unique():
        if source.startswith("asterisk-core-sounds"): assert "asterisk-core-sounds-{en,es,fr,it,ru}" in credits
        elif source == "music21-ryansMammoth": assert "music21/corpus/ryansMammoth" in credits
        else: assert source in credits, source
    assert "voip.ammdomus.it" in credits and "Muldjord" in credits
    assert {str(p.relative_to(data_dir()/name)) for p in (data_dir()/name).rglob("*.ogg")} == set(table.file)

def test_gpl_audio_is_apart_and_never_trained_on(music):
    gpl = music[music.license.str.contains("GPL")]
    assert set(gpl.file.str.split("/").str[0]) == {"audio-gpl2"} and set(gpl.split) == {"test"}
    assert (music[~music.license.str.contains("GPL")].file.str.split("/").str[0] == "audio").all()
    assert "GNU GENERAL PUBLIC LICENSE" in (data_dir()/"music/audio-gpl2/LICENSE.txt").read_text()

@pytest.mark.parametrize("name", ["speech", "music"])
def test_shards_are_16k_mono_and_segments_do_not_overlap(name):
    for path, rows in load_corpus(name).to_pandas().groupby("path"):
        info, rows = sf.info(path), rows.sort_values("start")
        assert (info.samplerate, info.channels) == (SAMPLE_RATE, 1)
        assert (rows.end > rows.start).all() and rows.end.max() <= info.frames
        assert (rows.start.values[1:] >= rows.end.values[:-1]).all()

@pytest.mark.parametrize("name", ["speech", "music"])
def test_no_identical_audio_anywhere(name):
    "Every segment is audible, and none has the samples of another."
    seen = {}
    for row in load_corpus(name).to_list():
        x = corpora._shard(row["path"])[row["start"]:row["end"]]
        assert np.abs(x).max() > 300, f"{row['id']} is silent"
        h = hashlib.blake2b(x.tobytes()).digest()
        assert h not in seen, f"{row['id']} has the audio of {seen[h]}"
        seen[h] = row["id"]

def test_drums_are_credited_whole_and_apart():
    "Each kit is one shard under its own licence, makers share no fold, nothing occurs twice, and no corpus that is trained on holds them."
    d, folder, credits = pd.read_csv(data_dir()/"drums/metadata.csv"), data_dir()/"drums", (data_dir()/"ATTRIBUTION.md").read_text(encoding="utf8")
    assert {str(p.relative_to(folder)) for p in folder.rglob("*.ogg")} == set(d.file) and (d.groupby("file").kit.nunique() == 1).all() and (d.groupby("kit").license.nunique() == 1).all()
    assert all(k in credits and m in credits for k, m in zip(d.kit, d.maker)) and "hydrogen-drumkits" in credits
    assert (d.license.str.startswith("GPL") == (d.file.str.split("/").str[0] == "audio-gpl2")).all() and set(d.license) <= LICENCES
    assert "GNU GENERAL PUBLIC LICENSE" in (folder/"audio-gpl2/LICENSE.txt").read_text() and "Emiliano Grilli" in (data_dir()/"LICENSES/hydrogen-drumkits.txt").read_text(encoding="utf8")
    assert (d.groupby("maker").fold.nunique() == 1).all() and (d.end - d.start).between(.08*SAMPLE_RATE, .5*SAMPLE_RATE).all()
    heard = set()
    for file, rows in d.groupby("file"):
        x = corpora.read_shard(folder/file)
        for r in rows.sort_values("start").itertuples():
            assert np.abs(x[r.start:r.end]).max() > .01 and (h := x[r.start:r.end].tobytes()) not in heard, r.id
            heard.add(h)
    assert not (set(load_corpus("music").to_pandas().source) | set(load_corpus("speech").to_pandas().source)) & set(d.source)

def test_checksums():
    lines = (data_dir()/"checksums.txt").read_text().split("\n")
    for line in filter(None, lines):
        kind, digest, file = line.split("  ")
        if kind == "file": assert hashlib.sha256((data_dir()/file).read_bytes()).hexdigest() == digest, file

# --- groupings, task by task

def test_speech_groups_stay_together(speech):
    russian = speech[speech.source == "festvox-ru"]
    assert len(russian[russian.split == "test"]) >= 40
    apart(russian.assign(text=russian.text.map(plain)), "text")
    asterisk = speech[speech.source.str.startswith("asterisk")].copy()
    asterisk["key"] = asterisk.id.str.split("/", n=1).str[1]
    asterisk["words"] = asterisk.text.map(plain)
    apart(asterisk, "lang", "key")
    apart(asterisk[asterisk.words != ""], "lang", "words")
    mandarin = speech[speech.voice == "gcin-5"].copy()
    mandarin["base"] = mandarin.text.str.rstrip("1234")
    apart(mandarin, "base")

def test_prompt_pairs(speech):
    "A prompt is said once by each of two voices, within one split, and no two prompts have the same words."
    pairs = speech[speech.prompt != ""]
    assert set(pairs.lang) == {"fr", "it"}
    for lang, rows in pairs.groupby("lang"):
        assert rows.voice.nunique() == 2
        assert (rows.groupby("prompt").voice.nunique() == 2).all() and (rows.groupby("prompt").size() == 2).all()
        words = rows[rows.text != ""].text.map(plain)
        assert words.is_unique
        assert (rows[rows.split == "test"].prompt.nunique()) >= 100

def test_mandarin_classes_are_trained_before_they_are_tested(speech):
    for label in ("initial", "final"):
        rows = speech[speech[label] != ""]
        train, test = (set(rows[rows.split == s][label]) for s in ("train", "test"))
        assert test <= train and len(test) >= 20
        assert set(rows.voice) == {"gcin-5"}

def test_phones_lie_in_order_within_their_segments(speech):
    phones = pd.read_csv(data_dir()/"speech/phones.csv").merge(speech[["id", "start", "end", "split"]], on="id", suffixes=("", "_row"))
    assert (phones.start >= 0).all() and (phones.end > phones.start).all() and (phones.end <= phones.end_row - phones.start_row).all()
    for _, p in phones.groupby("id"): assert (p.start.values[1:] == p.end.values[:-1]).all()
    assert set(phones.id) == set(speech[speech.source == "festvox-ru"].id)
    assert set(phones[phones.split == "test"].phone) <= set(phones[phones.split == "train"].phone)
    assert (phones.split == "test").sum() > 3000

def test_notes_groups(music):
    notes = music[music.kind == "note"]
    assert not notes.duplicated(["program", "pitch"]).any()      # hence no pair in two splits or banks
    assert set(notes[notes.bank == "timgm"].split) == {"test"} and set(notes[notes.bank == "msgeneral"].split) == {"train", "valid"}
    for label in ("pitch", "family", "program"):
        assert set(notes[notes.split == "test"][label]) <= set(notes[notes.split == "train"][label])

def test_pieces_and_tracks_stay_together(music):
    pieces, tracks = music[music.kind == "piece"], music[music.kind == "recording"]
    apart(pieces, "piece"); apart(tracks, "track")
    assert not pieces.duplicated("id").any() and tracks.track.nunique() >= 20
    titles = pieces.id.str.replace(r"(Reel|Jig|Hornpipe|Clog|Strathspey|Fling)$", "", regex=True).str.replace(r"\d+$", "", regex=True)
    apart(pieces.assign(title=titles.str.lower()), "title")

def test_keys(music):
    pieces = music[music.kind == "piece"]
    assert pieces.key.str.fullmatch(r"(\d|1[01]):(major|minor)").all()
    assert set(pieces[pieces.split == "test"].key) <= set(pieces[pieces.split == "train"].key)
    assert pieces.key.value_counts(normalize=True).max() < .15 and (pieces[pieces.split == "test"].shape[0]) >= 80

# --- bad audio

def tone(seconds=1., rate=SAMPLE_RATE): return np.sin(2*np.pi*440*np.arange(int(seconds*rate))/rate).astype(np.float32)/2

BAD = {
    "zero": (lambda p: p.touch(), "0 bytes"),
    "text": (lambda p: p.write_text("not audio at all\n"*50), "cannot be read as audio"),
    "nan": (lambda p: sf.write(p, np.where(np.arange(16000) == 99, np.nan, tone()), SAMPLE_RATE, subtype="FLOAT"), "not finite"),
    "silent": (lambda p: sf.write(p, np.zeros(16000), SAMPLE_RATE), "silent"),
    "empty": (lambda p: sf.write(p, np.zeros(0), SAMPLE_RATE), "no samples"),
}

@pytest.mark.parametrize("fault", BAD)
def test_bad_audio_is_named(tmp_path, fault):
    make, says = BAD[fault]
    path = tmp_path/f"{fault}.wav"
    make(path)
    with pytest.raises(AudioError, match=f"{fault}.wav.*{says}"): load_audio(path)

@pytest.mark.parametrize("suffix", ["flac", "ogg"])
def test_truncated_audio_is_named(tmp_path, suffix):
    path = tmp_path/f"cut.{suffix}"
    sf.write(path, np.random.default_rng(0).normal(0, .1, 160_000), SAMPLE_RATE)
    path.write_bytes(path.read_bytes()[:len(path.read_bytes())//2])
    with pytest.raises(AudioError, match=f"cut.{suffix}"): load_audio(path)

def test_truncated_wav_is_named(tmp_path):
    path = tmp_path/"cut.wav"
    sf.write(path, tone(2), SAMPLE_RATE)
    path.write_bytes(path.read_bytes()[:30_000])
    with pytest.raises(AudioError, match="cut.wav"): load_audio(path)

def test_missing_file_and_folder_are_named(tmp_path):
    with pytest.raises(AudioError, match="nothing.wav"): load_audio(tmp_path/"nothing.wav")
    with pytest.raises(AudioError): load_audio(tmp_path)

def test_too_long_is_refused_before_decoding(tmp_path, monkeypatch):
    sf.write(tmp_path/"long.wav", tone(4), SAMPLE_RATE)
    monkeypatch.setattr(corpora, "MAX_HOURS", 3/3600)
    monkeypatch.setattr(corpora, "_read", lambda *a: pytest.fail("decoded"))
    with pytest.raises(AudioError, match="long.wav.*more than the limit"): load_audio(tmp_path/"long.wav")

def test_stereo_and_other_rates_come_back_mono_16k(tmp_path):
    x = tone(1, 44_100)
    sf.write(tmp_path/"cd.wav", np.stack([x, 0*x], 1), 44_100)
    y = load_audio(tmp_path/"cd.wav")
    assert y.dtype == np.float32 and y.shape == (16_000,)
    assert abs(np.abs(np.fft.rfft(y)).argmax() - 440) <= 1 and abs(np.abs(y[2000:-2000]).max() - .25) < .01

# --- folders of audio

def test_folder_corpus_leaves_bad_files_out_by_name(tmp_path):
    for d in ("train-clean-100/19", "dev-clean/84", "test-clean/61"):
        (tmp_path/d).mkdir(parents=True)
        sf.write(tmp_path/d/"a.flac", tone(2), SAMPLE_RATE)
    (tmp_path/"train-clean-100/19/b.flac").write_bytes(b"junk"*99)
    with pytest.warns(UserWarning, match="1 of 4 files left out.*b.flac"): rows = load_corpus(str(tmp_path))
    assert sorted(rows["split"]) == ["test", "train", "valid"]
    with pytest.warns(UserWarning): batch = crop_batch(str(tmp_path), 0, 2, 1.)
    assert batch.shape == (2, 16_000)

def test_unknown_corpus_and_split_are_refused(tmp_path):
    with pytest.raises(ValueError, match="neither speech nor music"): load_corpus("sppech")
    with pytest.raises(ValueError, match="split 'dev'"): load_corpus("speech", "dev")
    with pytest.raises(ValueError, match="no readable audio"): load_corpus(str(tmp_path))

# --- crops

@pytest.mark.parametrize("corpus", ["speech", "music", "both"])
def test_crops_depend_on_seed_and_step_only(corpus):
    a = crop_batch(corpus, 7, 4, 1., 0)
    for step in (3, 0): crop_batch(corpus, step, 4, 1., 5)
    assert torch.equal(a, crop_batch(corpus, 7, 4, 1., 0))
    assert not torch.equal(a, crop_batch(corpus, 8, 4, 1., 0)) and not torch.equal(a, crop_batch(corpus, 7, 4, 1., 1))
    assert torch.equal(a[:2], crop_batch(corpus, 7, 2, 1., 0))
    assert a.dtype == torch.float32 and a.shape == (4, 16_000) and torch.isfinite(a).all()
    assert a.mean(-1).abs().max() < 1e-4 and (a.var(-1, correction=0) - 1).abs().max() < 1e-2

def test_both_alternates_the_two_corpora():
    both, speech, music = (crop_batch(c, 2, 4, .5, 0) for c in ("both", "speech", "music"))
    assert torch.equal(both[0::2], speech[0::2]) and torch.equal(both[1::2], music[1::2])

def test_test_segments_are_never_cropped():
    with pytest.raises(ValueError, match="probes only"): crop_batch("speech", 0, split="test")
    for name in ("speech", "music"):
        assert {r["split"] for r in corpora._pool(name, "train", None).rows} == {"train"}

def test_segment_audio_gives_the_samples_of_its_row(music):
    row = music[music.source == "fretsonfire-songs-sectoid"].iloc[3].to_dict()
    whole = sf.read(row["path"], dtype="int16")[0]/np.float32(32768)
    assert np.array_equal(segment_audio(row), whole[row["start"]:row["end"]])
    assert np.array_equal(segment_audio(row, 100, 50), whole[row["start"]+100:row["start"]+150])

def test_normalise_is_hubert_convention():
    x = np.random.default_rng(0).normal(3, 2, 16_000).astype(np.float32)
    assert np.allclose(normalise(x), (x - x.mean())/np.sqrt(x.var() + 1e-7), atol=1e-5)

# --- at scale: folders with broken files, streams, shares

def folder_of(tmp_path, n=6, seconds=2.):
    (tmp_path/"train").mkdir()
    for i in range(n): sf.write(tmp_path/f"train/{i}.flac", np.random.default_rng(i).normal(0, .1, int(seconds*SAMPLE_RATE)), SAMPLE_RATE)
    return tmp_path/"train"

def cut(path, share=.5): path.write_bytes(path.read_bytes()[:int(path.stat().st_size*share)])

def test_broken_files_are_quarantined_and_change_no_other_crop(tmp_path):
    folder = folder_of(tmp_path)
    before = [Crops([folder], 4, 1., seed=1)(k) for k in range(4)]
    whole = Crops([folder], 4, 1., seed=1)
    for k in range(4): whole(k)
    met = [k for k in range(4) if any(f == "2" for f in whole.files(k))]
    cut(folder/"2.flac")                                    # the header stays good: only decoding can tell
    corpora._pool.cache_clear()
    crops = Crops([folder], 4, 1., seed=1)
    after = [crops(k) for k in range(4)]
    assert met and list(crops.quarantine) == [str(folder/"2.flac")] and "breaks off" in crops.quarantine[str(folder/"2.flac")]
    for k in range(4):
        if k not in met: assert torch.equal(before[k], after[k])
        assert after[k].shape == (4, 16_000) and after[k].isfinite().all()
    assert torch.equal(Crops([folder], 4, 1., seed=1)(3), after[3]), "a crop depends on the steps before it"

def test_quarantine_has_every_fault_and_becomes_a_table(tmp_path):
    folder = folder_of(tmp_path, 3)
    for fault, (make, _) in BAD.items(): make(folder/f"{fault}.wav")
    corpora._pool.cache_clear()
    with pytest.warns(UserWarning, match="3 of 8 files left out"): crops = Crops([folder], 8, .5)
    for k in range(20): crops(k)
    write_quarantine(merge_quarantines([crops.state(20), dict(quarantine={"b,c.wav": "is \"odd\""})]), tmp_path)
    table = pd.read_csv(tmp_path/"quarantine.csv", index_col="path").reason
    assert table["b,c.wav"] == 'is "odd"' and len(table) == len(BAD)+1
    for fault, (_, says) in BAD.items(): assert says in table[str(folder/f"{fault}.wav")]

def test_a_corpus_of_broken_files_ends_in_a_sentence(tmp_path):
    folder = folder_of(tmp_path, 2)
    for f in folder.glob("*"): cut(f)
    corpora._pool.cache_clear()
    with pytest.raises(AudioError, match=r"\d\.flac.*draws of a crop in a row met unusable files"): Crops([folder], 2, 1.)(0)
    with pytest.raises(ValueError, match="has no valid audio: a file's split comes from the folders above"): Crops([folder], 2, 1., split="valid")

@pytest.mark.parametrize("rate, channels", [(44_100, 2), (8_000, 1), (48_000, 2)])
def test_crops_of_other_rates_are_16k_mono_and_of_one_length(tmp_path, rate, channels):
    sf.write(tmp_path/"tone.wav", np.stack([tone(1.3, rate)]*channels, 1), rate)
    corpora._pool.cache_clear()
    x = Crops([tmp_path], 6, 1.0001)(0)
    assert x.shape == (6, 16_001)
    assert abs(np.abs(np.fft.rfft(x[0]))[:4000].argmax() - 440) <= 3

def test_a_long_file_is_cropped_without_being_decoded(tmp_path, monkeypatch):
    "Three hours and more, of which a crop reads its seconds."
    path = tmp_path/"long.wav"
    sf.write(path, tone(1), SAMPLE_RATE, subtype="PCM_U8")
    size = 44 + int(3.2*3600*SAMPLE_RATE)
    head = bytearray(path.read_bytes()[:44])
    head[4:8], head[40:44] = (size-8).to_bytes(4, "little"), (size-44).to_bytes(4, "little")
    with open(path, "r+b") as f: f.write(head); f.truncate(size)      # sparse: no disk is used
    with pytest.raises(AudioError, match="long.wav.*3.2 h, more than the limit of 3 h: cut it"): load_audio(path)
    read, frames = corpora._read, []
    monkeypatch.setattr(corpora, "_read", lambda p, start, n, *a: frames.append(n) or read(p, start, n, *a))
    corpora._pool.cache_clear()
    assert Crops([tmp_path], 2, 1.)(0).shape == (2, 16_000) and max(frames) == 16_000

def test_headers_of_a_folder_are_read_once(tmp_path, monkeypatch):
    monkeypatch.setenv("DISTILLTV_HOME", str(tmp_path/"home"))
    folder = folder_of(tmp_path, 3)
    rows = corpora._rows(str(folder), None)
    with monkeypatch.context() as m:
        m.setattr(corpora, "_open", lambda *a: pytest.fail("read again"))
        assert corpora._rows(str(folder), None) == rows
    (folder/"1.flac").touch()
    cut(folder/"0.flac", 0)
    assert "0 bytes" in corpora._rows(str(folder), None)[1][str(folder/"0.flac")]
    (folder/"gone.wav").symlink_to(tmp_path/"nowhere.wav")
    assert "not a file" in corpora._rows(str(folder), None)[1][str(folder/"gone.wav")]

@pytest.fixture(scope="module")
def parquet(tmp_path_factory):
    "Three shards of short noises, one of them at 44.1 kHz stereo, one broken."
    folder = tmp_path_factory.mktemp("parquet")
    def wav(i):
        f, rate = io.BytesIO(), 44_100 if i == 4 else SAMPLE_RATE
        sf.write(f, np.random.default_rng(i).normal(0, .1, (rate, 2 if i == 4 else 1)), rate, format="WAV")
        return f.getvalue() if i != 7 else b"<html>404</html>"
    for s in range(3):
        audio = [dict(path=f"{i}.wav", bytes=wav(i)) for i in range(5*s, 5*s+5)]
        Dataset.from_dict(dict(audio=audio)).cast_column("audio", Audio(decode=False)).to_parquet(folder/f"train-{s}.parquet")
    return f"stream:{folder}"

def names(stream, n, quarantine=None):
    used, rng = [], np.random.default_rng(0)
    for _ in range(n): assert stream.crop(8000, rng, {} if quarantine is None else quarantine, used).shape == (8000,)
    return used

def test_a_stream_gives_each_example_once_an_epoch_in_another_order(parquet):
    stream, bad = Stream(parquet, block=4), {}
    epochs = names(stream, 28, bad)
    assert list(bad) == ["7.wav"]
    assert set(epochs[:14]) == set(epochs[14:]) == {f"{i}.wav" for i in range(15) if i != 7} and epochs[:14] != epochs[14:]
    assert names(Stream(parquet, block=4), 28) == epochs != names(Stream(parquet, seed=1, block=4), 28)

@pytest.mark.parametrize("taken", [0, 3, 4, 13, 17])
def test_a_stream_goes_on_where_it_was(parquet, taken):
    a, b = Stream(parquet, block=4), Stream(parquet, block=4)
    names(a, taken)
    b.seek(a.mark())
    assert names(a, 20) == names(b, 20)

@pytest.mark.parametrize("world", [2, 3, 4])
def test_processes_share_a_stream_without_duplicates(parquet, world):
    shares = []
    for rank in range(world):
        stream, mine = Stream(parquet, rank=rank, world=world, block=4), []
        while not stream.epoch: stream.crop(8000, np.random.default_rng(0), {}, mine)
        shares.append(mine[:-1])                            # the last one is of the second epoch
    assert sorted(sum(shares, [])) == sorted(f"{i}.wav" for i in range(15) if i != 7)

def test_crops_of_a_stream_continue_and_their_shares_are_apart(parquet):
    whole, again = (Crops([parquet, "speech"], 4, .3) for _ in range(2))
    steps = [whole(k) for k in range(6)]
    again.restore(4, [whole.state(4)])
    assert torch.equal(again(4), steps[4]) and torch.equal(again(5), steps[5])
    with pytest.raises(ValueError, match="no way to step 9 but through step 6"): again(9)
    with pytest.raises(ValueError, match="shared by 2 processes, not 1"): again.restore(4, [whole.state(4)]*2)

def test_shares_of_a_folder_are_the_batch(tmp_path):
    crops = Crops([folder_of(tmp_path)], 6, 1.)
    assert torch.equal(torch.cat([crops.items(2, slice(0, 3)), crops.items(2, slice(3, 6))]), crops(2))

@pytest.fixture()
def lengths(tmp_path):
    "Recordings of .5, 1.2, 2.5, 3 and 9 s; each is a ramp in a band of its own, so a crop tells where it is from."
    (tmp_path/"train").mkdir()
    for i, s in enumerate((.5, 1.2, 2.5, 3., 9.)): sf.write(tmp_path/f"train/{i}.wav", .1*i + .1 + np.linspace(0, .09, int(s*SAMPLE_RATE)), SAMPLE_RATE, subtype="FLOAT")
    corpora._pool.cache_clear()
    return tmp_path

def heard_alone(crops, step, monkeypatch):
    "What a batch was cut from, before it is normalised."
    with monkeypatch.context() as m:
        m.setattr("distilltv.scale.normalise", lambda x: x)
        return crops(step)

def test_short_recordings_alone_are_heard_in_shorter_crops_and_more_of_them(lengths, monkeypatch):
    crops, seen = Crops([lengths], 3, 3., short="alone"), {}
    for k in range(60):
        x = heard_alone(crops, k, monkeypatch)
        m = 48_000//x.shape[1]
        assert x.shape == (3*m, 48_000//m), "not the same number of seconds in each batch"
        of = (x*10).floor().long() - 1
        for row, ids in zip(x, of):
            if m < 3 or 0 not in ids: assert (ids == ids[0]).all() and (row.diff() > 0).all(), "a crop of more than one recording"
        seen.setdefault(m, set()).update(of.flatten().tolist())
    assert seen == {1: {3, 4}, 2: {2}, 3: {0, 1}}, "shorter than a second: continued, as ever"
    spread = [x for k in range(60) if (x := heard_alone(crops, k, monkeypatch)).shape[1] == 24_000]
    first = np.concatenate([x[:, 0] for x in spread])
    assert all(len(x.unique(dim=0)) == 6 for x in spread), "a crop twice in a batch"
    assert first.min() < .302 and .330 < first.max() < .337, "crops begin anywhere that they fit"    # the last 1.5 of 2.5 s

def test_batches_by_seconds_follow_seed_and_step_and_are_shared(lengths):
    crops = lambda **more: Crops([lengths, "speech"], 4, 3., seed=2, short="alone", **more)
    whole, several = crops(), 0
    assert whole.several == 2
    for k in range(12):
        batch, parts = whole(k), [crops(rank=r, world=2).items(k, slice(2*r, 2*r+2)) for r in range(2)]
        if not isinstance(batch, tuple):
            assert torch.equal(torch.cat(parts), batch)
            continue
        (wav, n), several = batch, several+1
        assert n.sum() == 4*48_000 and len(n.unique()) == 2
        for row, length in zip(wav, n): assert row[length:].isnan().all() and row[:length].isfinite().all() and abs(row[:length].std() - 1) < .01
        assert torch.equal(torch.cat([p[1] for p in parts]), n) and torch.equal(torch.cat([p[0] for p in parts]).nan_to_num(99), wav.nan_to_num(99))
    assert several

@pytest.mark.parametrize("short", ["join", "alone"])
def test_an_epoch_comes_again_in_another_order(lengths, short):
    crops = Crops([lengths], 2, 1., seed=1, short=short, epoch=8)
    turns = [[crops(8*t + k).numpy().tobytes() for k in range(8)] for t in range(3)]
    assert len(set(turns[0])) == 8 and sorted(turns[0]) == sorted(turns[1]) == sorted(turns[2]) and len({tuple(t) for t in turns}) == 3
    again = Crops([lengths], 2, 1., seed=1, short=short, epoch=8)
    assert again(19).numpy().tobytes() == turns[2][3], "a crop depends on the steps before it"
    if short == "join": assert Crops([lengths], 2, 1., seed=1)(0).shape == crops(0).shape

def test_an_epoch_begins_a_crop_in_every_part_of_each_corpus(tmp_path):
    folder = folder_of(tmp_path, 5, 4.)
    crops = Crops([folder, "speech"], 4, 1., epoch=10)
    pool, starts = crops.sources[0], []
    pool._draw = lambda n, rng, used, share=None: starts.append(share) or np.ones(n, np.float32)
    for k in range(10): crops(k)
    del pool._draw
    assert sorted(starts) == [(i, 20) for i in range(20)] and starts != sorted(starts)
    used = []
    for i in range(20): pool.crop(16_000, np.random.default_rng(0), used=used, share=(i, 20))
    assert set(used) == set("01234") and used[0] == "0"

def test_what_a_stream_cannot_do_is_a_sentence(parquet):
    for choice in (dict(short="alone"), dict(epoch=5)):
        with pytest.raises(ValueError, match="in the order it comes: a stream takes short=join and epoch=0"): Crops([parquet], 2, 1., **choice)
    with pytest.raises(ValueError, match="short = 'pad' is unknown; use join or alone"): Crops(["speech"], 2, 1., short="pad")

def test_a_stream_that_cannot_be_opened_is_named(tmp_path):
    with pytest.raises(ValueError, match="cannot be opened as stream:NAME:CONFIG:SPLIT"): Stream(f"stream:{tmp_path}/nothing")
    Dataset.from_dict(dict(text=["a"])).to_parquet(tmp_path/"train.parquet")
    with pytest.raises(ValueError, match="no audio column, only text"): Stream(f"stream:{tmp_path}")
