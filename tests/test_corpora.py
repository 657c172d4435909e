"""The shipped corpora keep their promises, and bad audio is refused by name."""
import hashlib, io, os, re, resource, sys, tarfile, tracemalloc, unicodedata, zipfile
from collections import defaultdict
import numpy as np, pandas as pd, pyarrow as pa, pytest, soundfile as sf, torch
from datasets import Audio, Dataset
from hypothesis import given, settings, strategies as st
from distilltv import audio, corpora
from distilltv.audio import AudioError, SAMPLE_RATE, load_audio, normalise
from distilltv.corpora import crop_batch, load_corpus, segment_audio
from distilltv.runs import data_dir
from distilltv.scale import Crops, Stream, merge_quarantines, write_quarantine

LICENCES = {"CC-BY-3.0", "CC-BY-SA-3.0", "CC-BY-SA-3.0-IT", "BSD-style-Shmyrev", "BSD-style-Gutierrez", "MIT",
            "GPL-2.0-only", "GPL-2.0-or-later", "CC-BY-SA-3.0-US"}

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
    assert not set(table.columns) & {"speaker", "genre", "composer",
                                     "mode"}, "labels that only give the recording chain away"

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
        x = corpora.read_shard(row["path"], row["start"], row["end"])
        assert np.abs(x).max() > 300/32768, f"{row['id']} is silent"
        h = hashlib.blake2b(x.tobytes()).digest()
        assert h not in seen, f"{row['id']} has the audio of {seen[h]}"
        seen[h] = row["id"]

def test_drums_are_credited_whole_and_apart():
    """Each kit is one shard under its own licence, makers share no fold, nothing occurs twice, and no corpus that is
    trained on holds them."""
    d, folder = pd.read_csv(data_dir()/"drums/metadata.csv"), data_dir()/"drums"
    credits = (data_dir()/"ATTRIBUTION.md").read_text(encoding="utf8")
    assert {str(p.relative_to(folder)) for p in folder.rglob("*.ogg")} == set(d.file)
    assert (d.groupby("file").kit.nunique() == 1).all() and (d.groupby("kit").license.nunique() == 1).all()
    assert all(k in credits and m in credits for k, m in zip(d.kit, d.maker)) and "hydrogen-drumkits" in credits
    assert (d.license.str.startswith("GPL") == (d.file.str.split("/").str[0] == "audio-gpl2")).all()
    assert set(d.license) <= LICENCES
    assert "GNU GENERAL PUBLIC LICENSE" in (folder/"audio-gpl2/LICENSE.txt").read_text()
    assert "Emiliano Grilli" in (data_dir()/"LICENSES/hydrogen-drumkits.txt").read_text(encoding="utf8")
    assert (d.groupby("maker").fold.nunique() == 1).all()
    assert (d.end - d.start).between(.08*SAMPLE_RATE, .5*SAMPLE_RATE).all()
    heard = set()
    for file, rows in d.groupby("file"):
        x = corpora.read_shard(folder/file)
        for r in rows.sort_values("start").itertuples():
            assert np.abs(x[r.start:r.end]).max() > .01 and (h := x[r.start:r.end].tobytes()) not in heard, r.id
            heard.add(h)
    assert not (set(load_corpus("music").to_pandas().source)
                | set(load_corpus("speech").to_pandas().source)) & set(d.source)

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
    phones = pd.read_csv(data_dir()/"speech/phones.csv").merge(speech[["id", "start", "end", "split"]], on="id",
                                                               suffixes=("", "_row"))
    assert (phones.start >= 0).all() and (phones.end > phones.start).all()
    assert (phones.end <= phones.end_row - phones.start_row).all()
    for _, p in phones.groupby("id"): assert (p.start.values[1:] == p.end.values[:-1]).all()
    assert set(phones.id) == set(speech[speech.source == "festvox-ru"].id)
    assert set(phones[phones.split == "test"].phone) <= set(phones[phones.split == "train"].phone)
    assert (phones.split == "test").sum() > 3000

def test_notes_groups(music):
    notes = music[music.kind == "note"]
    assert not notes.duplicated(["program", "pitch"]).any()      # hence no pair in two splits or banks
    assert set(notes[notes.bank == "timgm"].split) == {"test"}
    assert set(notes[notes.bank == "msgeneral"].split) == {"train", "valid"}
    for label in ("pitch", "family", "program"):
        assert set(notes[notes.split == "test"][label]) <= set(notes[notes.split == "train"][label])

def test_pieces_and_tracks_stay_together(music):
    pieces, tracks = music[music.kind == "piece"], music[music.kind == "recording"]
    apart(pieces, "piece"); apart(tracks, "track")
    assert not pieces.duplicated("id").any() and tracks.track.nunique() >= 20
    titles = pieces.id.str.replace(r"(Reel|Jig|Hornpipe|Clog|Strathspey|Fling)$", "",
                                   regex=True).str.replace(r"\d+$", "", regex=True)
    apart(pieces.assign(title=titles.str.lower()), "title")

def test_keys(music):
    pieces = music[music.kind == "piece"]
    assert pieces.key.str.fullmatch(r"(\d|1[01]):(major|minor)").all()
    assert set(pieces[pieces.split == "test"].key) <= set(pieces[pieces.split == "train"].key)
    assert pieces.key.value_counts(normalize=True).max() < .15 and (pieces[pieces.split == "test"].shape[0]) >= 80

# --- bad audio

def tone(seconds=1., rate=SAMPLE_RATE):
    return np.sin(2*np.pi*440*np.arange(int(seconds*rate))/rate).astype(np.float32)/2

BAD = {
    "zero": (lambda p: p.touch(), "0 bytes"),
    "text": (lambda p: p.write_text("not audio at all\n"*50), "cannot be read as audio"),
    "nan": (lambda p: sf.write(p, np.where(np.arange(16000) == 99, np.nan, tone()), SAMPLE_RATE, subtype="FLOAT"),
            "not finite"),
    "silent": (lambda p: sf.write(p, np.zeros(16000), SAMPLE_RATE), "silent"),
    "empty": (lambda p: sf.write(p, np.zeros(0), SAMPLE_RATE), "no samples"),
    "dead": (lambda p: sf.write(p, .3 + np.arange(16000) % 2/2**15, SAMPLE_RATE), "silent but for a constant offset"),
}

@pytest.mark.parametrize("fault", BAD)
def test_bad_audio_is_named(tmp_path, fault):
    make, says = BAD[fault]
    path = tmp_path/f"{fault}.wav"
    make(path)
    with pytest.raises(AudioError, match=f"{fault}.wav.*{says}"): load_audio(path)

def test_a_file_that_is_no_mp3_is_not_said_to_be_missing(tmp_path):
    (tmp_path/"x.mp3").write_bytes(np.random.default_rng(0).bytes(9000))
    with pytest.raises(AudioError, match="x.mp3 is damaged or not what its name says"): load_audio(tmp_path/"x.mp3")

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
    with pytest.raises(AudioError, match="cannot be opened .File name too long"): load_audio(tmp_path/f"{'a'*300}.wav")

def test_too_long_is_refused_before_decoding(tmp_path, monkeypatch):
    sf.write(tmp_path/"long.wav", tone(4), SAMPLE_RATE)
    monkeypatch.setattr(audio, "MAX_HOURS", 3/3600)
    monkeypatch.setattr(audio, "_read", lambda *a: pytest.fail("decoded"))
    with pytest.raises(AudioError, match="long.wav.*more than the limit"): load_audio(tmp_path/"long.wav")

def test_stereo_and_other_rates_come_back_mono_16k(tmp_path):
    x = tone(1, 44_100)
    sf.write(tmp_path/"cd.wav", np.stack([x, 0*x], 1), 44_100)
    y = load_audio(tmp_path/"cd.wav")
    assert y.dtype == np.float32 and y.shape == (16_000,)
    assert abs(np.abs(np.fft.rfft(y)).argmax() - 440) <= 1 and abs(np.abs(y[2000:-2000]).max() - .25) < .01

# --- files of every kind

HALVES = dict(WAV="wav", WAVEX="wav", RF64="wav", W64="w64", AIFF="aiff", AU="au", CAF="caf", NIST="wav")

@pytest.mark.parametrize("rate, channels, subtype", [(44_100, 1, "PCM_16"), (16_000, 2, "PCM_24")])
@pytest.mark.parametrize("kind", HALVES)
def test_half_a_file_is_not_heard_as_a_whole(tmp_path, kind, rate, channels, subtype):
    path, x = tmp_path/f"a.{HALVES[kind]}", np.random.default_rng(0).normal(0, .1, (rate, channels))
    sf.write(path, x, rate, format=kind, subtype=subtype)
    whole = load_audio(path)
    assert len(whole) == SAMPLE_RATE and np.array_equal(load_audio("x", data=path.read_bytes()), whole)
    for keep in (.3, .5, .99):
        half = path.read_bytes()[:int(path.stat().st_size*keep)]
        for data in (None, half):
            if data is None: (tmp_path/f"cut.{HALVES[kind]}").write_bytes(half)
            with pytest.raises(AudioError, match="truncated"): load_audio(tmp_path/f"cut.{HALVES[kind]}", data=data)

@pytest.mark.parametrize("kind, subtype", [("OGG", "OPUS"), ("OGG", "VORBIS"), ("NIST", "ULAW"), ("NIST", "ALAW")])
def test_a_file_without_its_last_byte_is_truncated(kind, subtype):
    b = encoded(np.random.default_rng(0).normal(0, .1, 48_000), SAMPLE_RATE, format=kind, subtype=subtype)
    assert len(load_audio("x", data=b)) == 48_000
    damaged = b[:-50] + bytes([b[-50] ^ 1]) + b[-49:]    # a page of Ogg has a checksum
    for bad in (b[:-1], b[:3268], *[damaged]*(kind == "OGG")):
        with pytest.raises(AudioError, match="truncated"): load_audio("x", data=bad)

def encoded(x, rate, **how):
    f = io.BytesIO()
    sf.write(f, x, rate, **how)
    return f.getvalue()

def mp3(x, rate, tag=True, **how):
    "An MP3, with or without its first frame: the tag that says how many frames follow."
    b = encoded(x, rate, format="MP3", **how)
    return b if tag else b[audio._frame(b[:4])[0]:]

MODES = dict(constant=dict(bitrate_mode="CONSTANT", compression_level=.5), variable=dict(bitrate_mode="VARIABLE"))

@pytest.mark.parametrize("rate", [8_000, 16_000, 22_050, 44_100, 48_000])
@pytest.mark.parametrize("mode", MODES)
def test_an_mp3_without_a_tag_is_read_whole_or_refused(mode, rate):
    x = np.random.default_rng(0).normal(0, .1, 2*rate)
    tagged, b = (mp3(x, rate, tag, **MODES[mode]) for tag in (True, False))
    at = tagged.find(b"Info" if mode == "constant" else b"Xing") + 8
    frames = int.from_bytes(tagged[at:at+4], "big")
    samples = frames*(1152 if rate > 24_000 else 576)
    for data in (b, b"ID3\4\0\0\0\0\1\0" + bytes(128) + b, b + b"TAG" + b"x"*125, b + bytes(999)):
        try: assert len(load_audio("x", data=data)) == -(-samples*SAMPLE_RATE//rate)
        except AudioError as e: assert mode == "variable" and "convert it to FLAC" in str(e)
    for bad in (b[:-1], b[:len(b)//2 + 5], b[:-audio._frame(b[:4])[0]//2]):
        with pytest.raises(AudioError, match="truncated"): load_audio("x", data=bad)

def test_an_mp3_without_a_tag_has_the_samples_of_the_one_with_it(tmp_path):
    x = np.random.default_rng(0).normal(0, .1, 2*SAMPLE_RATE)
    tagged, b = (load_audio("x", data=mp3(x, SAMPLE_RATE, tag, **MODES["constant"])) for tag in (True, False))
    assert np.abs(b[1105:1105+len(tagged)] - tagged).max() < 1e-4    # 1105: the encoder's delay, which the tag tells
    (tmp_path/"a.mp3").write_bytes(mp3(x, SAMPLE_RATE, False, **MODES["constant"]))
    assert audio.audio_length(tmp_path/"a.mp3") == len(b)
    assert np.abs(audio.load_part(tmp_path/"a.mp3", 9_000, 10_000) - b[9_000:10_000]).max() < 1e-4

def test_an_mp3_that_would_be_read_in_part_is_refused():
    x = np.random.default_rng(0).normal(0, .1, 2*SAMPLE_RATE)
    loud, soft = (mp3(x, SAMPLE_RATE, False, bitrate_mode="CONSTANT", compression_level=c) for c in (0, .9))
    assert len(loud) > 2*len(soft)
    with pytest.raises(AudioError, match="does not say how long it is.*FLAC"): load_audio("x", data=loud + soft)
    with pytest.raises(AudioError, match=f"no MP3 frame at byte {len(soft)}.*FLAC"):
        load_audio("x", data=soft + b"junk"*300 + soft)

ID3 = {"": b"", "ID3v1": b"TAG" + b"x"*125, "APE": b"APETAGEX\xd0\7\0\0" + (32).to_bytes(4, "little") + bytes(48),
       "ID3v2": b"ID3\4\0\0\0\0\1\0" + bytes(128)}

@pytest.mark.parametrize("tags", ID3)
@pytest.mark.parametrize("tag", [True, False])
@pytest.mark.parametrize("rate, channels", [(16_000, 1), (44_100, 2)])
def test_joined_mp3s_are_named(tag, tags, rate, channels):
    x = np.random.default_rng(0).normal(0, .1, (rate, channels))
    a, b = mp3(x[:, 0], rate, tag, **MODES["constant"]), mp3(x, rate, **MODES["constant"])
    assert len(load_audio("x", data=a + ID3[tags])) == len(load_audio("x", data=a))
    if tag or tags:    # else it is one longer MP3 without a tag, or of two rates
        with pytest.raises(AudioError, match="x is several files joined"): load_audio("x", data=a + ID3[tags] + b)

@pytest.mark.parametrize("kind, subtype", [*((k, "PCM_16") for k in HALVES), ("OGG", "OPUS"), ("OGG", "VORBIS")])
@pytest.mark.parametrize("more", [.1, 4])
def test_joined_files_are_named(kind, subtype, more):
    x = np.random.default_rng(0).normal(0, .1, 4*SAMPLE_RATE)
    a, b = (encoded(x[:int(n*SAMPLE_RATE)], SAMPLE_RATE, format=kind, subtype=subtype) for n in (1, more))
    with pytest.raises(AudioError, match="x is several files joined, of which only the first"):
        load_audio("x", data=a + b)

def test_a_header_that_tells_of_too_few_samples_is_named():
    "As of a recorder that was switched off; chunks behind the samples, tags and zeros are no samples."
    x, rest = np.random.default_rng(0).normal(0, .1, (2, 4*SAMPLE_RATE))
    whole, samples = encoded(x, SAMPLE_RATE, format="WAV"), encoded(rest, SAMPLE_RATE, format="WAV")[44:]
    with pytest.raises(AudioError, match="goes on behind the samples that its header tells of"):
        load_audio("x", data=whole + samples)
    chunk = len(samples).to_bytes(4, "little") + samples
    for behind in (b"LIST" + chunk, b"ID3\4" + samples, bytes(2**17)):
        assert np.array_equal(load_audio("x", data=whole + behind), load_audio("x", data=whole))

UNSOUGHT = [("WAV", "GSM610"), ("W64", "GSM610"), ("WAV", "G721_32"), ("WAV", "NMS_ADPCM_16"), ("AU", "G723_24"),
            ("AIFF", "DWVW_16")]

@pytest.mark.parametrize("kind, subtype", UNSOUGHT)
def test_a_codec_without_seek_is_read_in_parts(tmp_path, kind, subtype):
    x = np.random.default_rng(0).normal(0, .1, 48_000)
    sf.write(tmp_path/"a.wav", x, SAMPLE_RATE, format=kind, subtype=subtype)
    whole = load_audio(tmp_path/"a.wav")
    for start in (0, 1, 9_000, 40_000):
        part = audio.load_part(tmp_path/"a.wav", start, start+4_000)
        assert np.array_equal(part, whole[start:start+4_000])

@pytest.mark.parametrize("kind", ["WAV", "FLAC", "OGG", "MP3"])
@pytest.mark.parametrize("rate, channels", [(16_000, 1), (44_100, 2)])
def test_blocks_are_the_samples_of_one_read(tmp_path, monkeypatch, kind, rate, channels):
    sf.write(tmp_path/"a", np.random.default_rng(0).normal(0, .1, (rate, channels)), rate, format=kind)
    monkeypatch.setattr(audio, "_BLOCK", 999)
    with audio._Forward(tmp_path/"a") as f: x = f.read(f.frames, dtype="float32", always_2d=True).mean(1)
    assert np.array_equal(load_audio(tmp_path/"a"), audio._resample(torch.from_numpy(x), rate).numpy())

@pytest.mark.parametrize("rate, channels", [(192_000, 8), (16_000, 1)])
def test_memory_is_that_of_what_is_heard(rate, channels):
    "A FLAC of a tenth of a second whose header promises almost three hours."
    b = bytearray(encoded(np.random.default_rng(0).normal(0, .1, (rate//10, channels)), rate, format="FLAC"))
    b[18:26] = (int.from_bytes(b[18:26], "big") & ~(2**36-1) | int(2.9*3600*rate)).to_bytes(8, "big")
    tracemalloc.start()
    with pytest.raises(AudioError, match="promises"): load_audio("x", data=bytes(b))
    assert tracemalloc.get_traced_memory()[1] < 20e6
    tracemalloc.stop()

def piped(path, riff, data):
    "A whole WAV file with the lengths that a program writes when it cannot seek back."
    sf.write(path, tone(2), SAMPLE_RATE)
    b = bytearray(path.read_bytes())
    b[4:8], b[40:44] = riff.to_bytes(4, "little"), data.to_bytes(4, "little")
    path.write_bytes(b)
    return path

@pytest.mark.parametrize("riff, data", [(0x7ffff024, 0x7ffff000), (2**32-1, 2**32-1)])
def test_a_wav_from_a_pipe_is_whole(tmp_path, riff, data):
    assert len(load_audio(piped(tmp_path/"a.wav", riff, data))) == 32_000

def endless(path, rate=SAMPLE_RATE):
    "A FLAC that does not say how long it is, as from a pipe."
    sf.write(path, np.random.default_rng(0).normal(0, .1, 3*rate), rate)
    b = bytearray(path.read_bytes())
    b[18:26] = (int.from_bytes(b[18:26], "big") & ~(2**36-1)).to_bytes(8, "big")
    path.write_bytes(b)

@pytest.mark.parametrize("rate", [8_000, 16_000, 44_100])
def test_flac_of_unknown_length_is_decoded_to_its_end_or_left_out_by_name(tmp_path, rate):
    endless(tmp_path/"a.flac", rate)
    sf.write(tmp_path/"b.wav", tone(2), SAMPLE_RATE)
    assert len(load_audio(tmp_path/"a.flac")) == 48_000
    with pytest.raises(AudioError, match="a.flac lasts longer than the limit"):
        load_audio(tmp_path/"a.flac", max_hours=1/3600)
    with pytest.warns(UserWarning, match="a.flac does not say how long it is"):
        assert load_corpus(tmp_path)["id"][:] == ["b"]

def test_channels_that_cancel_each_other_are_named(tmp_path):
    x = np.random.default_rng(0).normal(0, .1, (SAMPLE_RATE, 2))
    sf.write(tmp_path/"inverted.wav", np.stack([x[:, 0], -x[:, 0]], 1), SAMPLE_RATE)
    with pytest.raises(AudioError, match="inverted.wav has channels that cancel each other"):
        load_audio(tmp_path/"inverted.wav")
    for name, y in dict(two=x, one_side=x*[1, 0], eight=np.tile(x, 4)*[1, 1, 1, 1, .5, .5, .2, 0]).items():
        sf.write(tmp_path/f"{name}.wav", y, SAMPLE_RATE)
        assert len(load_audio(tmp_path/f"{name}.wav")) == SAMPLE_RATE

@pytest.mark.parametrize("rate", [44_101, 47_999, 7_919, 22_051, 12_000, 96_000])
def test_any_rate_keeps_pitch_and_length_in_little_memory(tmp_path, rate):
    sf.write(tmp_path/"a.wav", tone(2, rate), rate)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    x = load_audio(tmp_path/"a.wav")
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)/1e3 < 300
    assert len(x) == 32_000 and np.abs(x - tone(2))[500:-500].max() < .02

def test_what_is_no_rate_is_refused(tmp_path):
    for rate in (3, 2_000_000_000):
        sf.write(tmp_path/"a.wav", tone(1), rate)
        with pytest.raises(AudioError, match=f"{rate} samples a second"): load_audio(tmp_path/"a.wav")

def sources():
    "Small files of every kind, as bytes."
    out = [mp3(np.random.default_rng(0).normal(0, .1, 3000), SAMPLE_RATE, False)]
    for kind, suffix in [*HALVES.items(), ("FLAC", "flac"), ("OGG", "ogg"), ("MP3", "mp3")]:
        b = io.BytesIO()
        sf.write(b, np.random.default_rng(0).normal(0, .1, 3000), SAMPLE_RATE, format=kind)
        out.append(b.getvalue())
    return out

def test_an_mp3_that_decodes_to_nothing_is_named():
    "Found by the test below: a changed frame header, behind which no frame can be decoded."
    b = bytearray(sources()[-1])
    b[153:156] = b"\x000\x0f"
    with pytest.raises(AudioError, match="fuzz "): load_audio("fuzz", data=bytes(b))

@pytest.mark.filterwarnings("error")    # nor a traceback of soundfile's on the way
@settings(max_examples=400, deadline=None)
@given(st.sampled_from(sources()),
       st.lists(st.tuples(st.integers(0, 200), st.binary(min_size=1, max_size=8)), max_size=4),
       st.none() | st.integers(0, 3000))
def test_any_bytes_are_audio_or_an_audio_error(data, changes, length):
    b = bytearray(data)
    for at, new in changes: b[at:at+len(new)] = new
    try: x = load_audio("fuzz", data=bytes(b[:length]))
    except AudioError as e: assert str(e).startswith("fuzz ")
    else: assert x.dtype == np.float32 and np.isfinite(x).all()

# --- folders: which split, which table, which files

SPLIT_OF = dict(train="train", training="train", test="test", testing="test", dev="valid", valid="valid",
                validation="valid", val="valid", eval="valid", Test="test",
                devices="", testimonials="", Testament="", Devo="", trains="", latest="", contest="", evaluate="",
                testdrive="", **{
                "test-clean": "test", "dev-other": "valid", "train-clean-100": "train", "test_set": "test",
                "dev-drums": "", "test drive": "", "dev.2": "valid"}) | {
    name: split for split, names in dict(
        test="""nsynth-test,testset,TestSet,test1,test92,test set,test-en,test_A,test-v2,test_final,testdata,my_test,
                cv-valid-test,clean_testset_wav,noisy_testset_wav,heldout,held-out,Held_Out,holdout,test (copy),test(1),
                dev_test,test_clips,test-clean-resampled,test_16k_mono,testing_list,test-clean.tar,testclean,
                test_24bit""",
        valid="eval_segments,eval92,dev93,eval2000,devset,cv-valid-dev,Dev Set",
        train="trainset,cv-valid-train,noisy_trainset_28spk_wav",
        none="""train_test_split,train-wreck-band,Crash_Test_Dummies,Test Dream,The Test,A Test,Test Me,Night Train,
                Training Day,attestation,protest,developer,valentine,dataset,pytest-of-me,
                Test Clips,Mono Test,Crash_Test_Stereo_Dummies"""
        ).items() for name in re.split(r",\s*", names)}
SPLIT_OF = {name: split.replace("none", "") for name, split in SPLIT_OF.items()}

@pytest.mark.parametrize("name", SPLIT_OF)
def test_a_folder_says_its_split_by_its_whole_name(name): assert corpora.split_of(name) == SPLIT_OF[name]

def audio_in(*folders):
    for i, f in enumerate(folders):
        f.mkdir(parents=True, exist_ok=True)
        sf.write(f/"x.wav", np.random.default_rng(i).normal(0, .1, 32_000), SAMPLE_RATE)

def test_naming_a_test_folder_as_the_corpus_trains_on_nothing(tmp_path):
    audio_in(tmp_path/"LibriSpeech/test-clean/1089", tmp_path/"set/train/a", tmp_path/"set/test/a",
             tmp_path/"home/test/mine", tmp_path/"eval", tmp_path/"nsynth-test/audio", tmp_path/"nsynth-train/audio",
             tmp_path/"home/my_test/mine", tmp_path/"x/test_names_of_tests0/mine", tmp_path/"train_test_split/train")
    for folder, split in (("LibriSpeech/test-clean", "test"), ("LibriSpeech/test-clean/1089", "test"),
                          ("set/test", "test"), ("set/test/a", "test"),
                          ("set/train/a", "train"), ("home/test/mine", "train"), ("eval", "valid"),
                          ("nsynth-test", "test"), ("nsynth-test/audio", "test"), ("nsynth-train/audio", "train"),
                          ("home/my_test/mine", "train"), ("x/test_names_of_tests0/mine", "train"),
                          ("train_test_split/train", "train")):
        assert load_corpus(tmp_path/folder)["split"][:] == [split], folder
        if split != "train":
            with pytest.raises(ValueError, match="has no training audio"): crop_batch(str(tmp_path/folder), 0, 1, 1.)

def test_a_name_that_a_twin_lies_beside_is_a_split_and_doubts_are_told(tmp_path):
    names = ("train-drums", "dev-drums", "eval_segments", "Test Dream", "test", "Testament")
    audio_in(*(tmp_path/"c"/d/"x" for d in names))
    with pytest.warns(UserWarning, match="held-out audio: Test Dream is taken for train, dev-drums is taken for valid, "
                                         "eval_segments is taken for valid; rename"):
        rows = load_corpus(tmp_path/"c")
    assert dict(zip(rows["id"][:], rows["split"][:])) == {
        "Test Dream/x/x": "train", "Testament/x/x": "train", "dev-drums/x/x": "valid", "eval_segments/x/x": "valid",
        "test/x/x": "test", "train-drums/x/x": "train"}
    assert load_corpus(tmp_path/"c/dev-drums/x")["split"][:] == ["valid"]

def test_a_link_is_held_out_if_what_it_leads_to_is(tmp_path):
    audio_in(tmp_path/"LibriSpeech/test-clean/1", tmp_path/"c/train", tmp_path/"c/dev")
    (tmp_path/"speech").symlink_to(tmp_path/"LibriSpeech/test-clean")
    (tmp_path/"c/part").symlink_to(tmp_path/"LibriSpeech/test-clean")
    (tmp_path/"c/again").symlink_to(tmp_path/"c/dev")
    (tmp_path/"c/a.wav").symlink_to(tmp_path/"LibriSpeech/test-clean/1/x.wav")
    with pytest.raises(ValueError, match="has no training audio"): crop_batch(str(tmp_path/"speech"), 0, 1, 1.)
    with pytest.raises(ValueError, match="asks for test audio"): Stream(f"stream:{tmp_path}/speech")
    found = load_corpus(tmp_path/"c")
    assert dict(zip(found["id"][:], found["split"][:])) == {"a": "test", "again/x": "valid", "part/1/x": "test",
                                                            "train/x": "train"}

@pytest.mark.parametrize("name, text", [("testing_list.txt", "a/x.wav"), ("en/test.tsv", "path\nx"),
                                        ("metadata.csv", "file_name,split,label\na/x.wav,test,x")])
def test_lists_that_are_not_read_are_told_where_no_folder_says_a_split(tmp_path, name, text):
    audio_in(tmp_path/"c/a", tmp_path/"c/en")
    (tmp_path/"c"/name).write_text(text, encoding="utf-8")
    with pytest.warns(UserWarning, match=f"^{os.path.basename(name)} of .*: such lists are not read and all files"):
        load_corpus(tmp_path/"c")
    audio_in(tmp_path/"c/dev")
    assert set(load_corpus(tmp_path/"c")["split"][:]) == {"train", "valid"}

@pytest.mark.parametrize("text",
                         ["file_name,transcription\na.wav,hello\n", "a|Printing, in|Printing, in\n", "", "\0", '"',
                          "id,file\na,a.wav\n"])
def test_a_table_of_others_is_not_ours(tmp_path, text):
    sf.write(tmp_path/"a.wav", tone(1), SAMPLE_RATE)
    (tmp_path/"metadata.csv").write_text(text, encoding="utf-8")
    assert load_corpus(tmp_path)["id"][:] == ["a"]

HEAD = "id,file,start,end,split,license\n"

@pytest.mark.parametrize("row, says",
                         [("a,a.ogg,0,x,train,MIT", "row 3: start = '0' and end = 'x'"),
                          ("a,a.ogg,9,9,train,MIT", "row 3: start"), ("a,a.ogg,-1,9,train,MIT", "row 3: start"),
                                       ("a,a.ogg,0,9,dev,MIT", "row 3: split = 'dev'"),
                                       ("a,a.ogg,0,9", "row 3 has more or fewer cells"),
                                       ("a,,0,9,test,MIT", "row 3 names no file"),
                                       ("ok,a.ogg,0,9,test,MIT", "the id 'ok' occurs twice"),
                                       ("a,a.ogg,0,9,train,MIT,x", "row 3 has more or fewer cells")])
def test_a_wrong_row_is_named(tmp_path, row, says):
    (tmp_path/"metadata.csv").write_text(HEAD + "ok,a.ogg,0,9,train,MIT\n" + row + "\n", encoding="utf-8")
    with pytest.raises(ValueError, match=f"metadata.csv.*{says}"): load_corpus(tmp_path)

@pytest.mark.parametrize("head", [HEAD, HEAD.replace(",license", ",source")])
def test_a_segment_behind_the_end_of_its_file_is_named(tmp_path, head):
    "Of a shard or of a loose file; positions are those at 16 kHz."
    rate = SAMPLE_RATE if "license" in head else 44_100
    sf.write(tmp_path/"a.wav", tone(2, rate), rate)
    def written(*spans):
        rows = [f"{i},a.wav,{a},{b},train,MIT\n" for i, (a, b) in enumerate(spans)]
        (tmp_path/"metadata.csv").write_text(head + "".join(rows), encoding="utf-8")
    written((0, 16_000), (16_000, 32_000))
    assert crop_batch(str(tmp_path), 0, 2, 1.).shape == (2, 16_000)
    for beyond in ((0, 88_200), (40_000, 80_000)):
        written((0, 16_000), beyond)
        with pytest.raises(ValueError, match=f"row 3: end = {beyond[1]} .* a.wav, which has 32000 samples"):
            crop_batch(str(tmp_path), 0, 2, 1.)

def test_a_part_that_a_shard_does_not_have_is_named(tmp_path):
    sf.write(tmp_path/"a.wav", tone(1), SAMPLE_RATE, subtype="PCM_16")
    row = dict(id="a", path=str(tmp_path/"a.wav"), start=20_000, end=30_000, shard=True)
    with pytest.raises(AudioError, match="a.wav has no samples from 2.* on"):
        corpora.Segments([row]).crop(8000, np.random.default_rng(0))

def test_a_corpus_is_what_lies_there_now(tmp_path, monkeypatch):
    "After a file has come, in another working directory, and with another folder of data."
    heard = lambda name: [r["path"] for r in corpora.open_segments(name, "train").rows]
    audio_in(tmp_path/"one/a/train", tmp_path/"two/a/train", tmp_path/"data/speech")
    monkeypatch.chdir(tmp_path/"one")
    assert heard("a") == [str(tmp_path/"one/a/train/x.wav")]
    monkeypatch.chdir(tmp_path/"two")
    assert heard("a") == [str(tmp_path/"two/a/train/x.wav")]
    assert corpora.open_segments("a", "train") is corpora.open_segments("a", "train")
    sf.write("a/train/y.wav", tone(1), SAMPLE_RATE)
    assert heard("a") == [str(tmp_path/f"two/a/train/{n}.wav") for n in "xy"]
    assert len(heard("speech")) > 1
    monkeypatch.setenv("DISTILLTV_DATA", str(tmp_path/"data"))
    assert heard("speech") == [str(tmp_path/"data/speech/x.wav")]

def test_crops_know_the_contents_of_their_files_wherever_they_lie(tmp_path):
    audio_in(tmp_path/"a/train", tmp_path/"a/other")
    def seen(folder): return (crops := Crops([tmp_path/folder], 2, 1.)).contents, crops.hash
    first = seen("a")
    (tmp_path/"a").rename(tmp_path/"b")
    os.utime(tmp_path/"b/train/x.wav", (1, 1))
    moved = seen("b")
    sf.write(tmp_path/"b/train/x.wav", np.random.default_rng(9).normal(0, .1, 32_000), SAMPLE_RATE)
    changed = seen("b")
    assert first == moved and first[0] != changed[0] and first[1] == changed[1]
    assert Crops(["speech"], 2, 1.).contents != Crops(["music"], 2, 1.).contents

@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=60) | st.text(max_size=60).map(lambda t: t.encode("utf-8", "surrogatepass")))
def test_any_table_is_rows_or_a_sentence(tmp_path_factory, rest):
    folder = tmp_path_factory.getbasetemp()/"table"
    folder.mkdir(exist_ok=True)
    (folder/"metadata.csv").write_bytes(HEAD.encode() + rest)
    try: rows = corpora._rows(str(folder))[0]
    except ValueError as e: assert str(folder) in str(e)
    else: assert all(0 <= r["start"] < r["end"] for r in rows)

@pytest.mark.filterwarnings("ignore:.*files left out")
def test_what_is_passed_over_is_said_and_links_are_followed(tmp_path):
    audio_in(tmp_path/"disk/more", tmp_path/"c")
    (tmp_path/"c/link").symlink_to(tmp_path/"disk")
    (tmp_path/"c/again").symlink_to(tmp_path/"c")             # a circle
    (tmp_path/"c/song.m4a").touch(), (tmp_path/"c/fma.tar.gz").touch()
    (tmp_path/"c/notes.txt").touch()
    os.close(os.open(os.fsencode(tmp_path/"c") + b"/caf\xe9.wav", os.O_CREAT | os.O_WRONLY))
    says = "(?=.*is not looked into: unpack)(?=.*m4a file, which is not read).*not UTF-8"
    with pytest.warns(UserWarning, match=f"3 of 5 files left out: {says}"):
        found = load_corpus(tmp_path/"c")
    assert found["id"][:] == ["link/more/x", "x"]
    bad = corpora._rows(str(tmp_path/"c"))[1]
    write_quarantine(bad, tmp_path)
    assert set(bad) == {str(tmp_path/"c/song.m4a"), str(tmp_path/"c/fma.tar.gz"),
                        str(tmp_path/"c")+"/caf\\xe9.wav"} == set(pd.read_csv(tmp_path/"quarantine.csv").path)

def test_training_batches_are_those_of_every_version():
    "SHA-256 of the first four batches of the mini profile."
    batches = b"".join(crop_batch("both", k, 6, 2.56).numpy().tobytes() for k in range(4))
    assert hashlib.sha256(batches).hexdigest() == "7ea852dc01d960d56dbb80cdb62507f5a826642262ab2a207d016a616425ba22"

def test_any_number_of_sources_alternate(tmp_path):
    audio_in(tmp_path/"birds")
    three = crop_batch(["speech", "mini:music", str(tmp_path/"birds")], 2, 6, .5)
    for i, name in enumerate(("speech", "music", str(tmp_path/"birds"))):
        assert torch.equal(three[i::3], crop_batch(name, 2, 6, .5)[i::3])

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

@pytest.mark.parametrize("shut", ["shut", ""])
def test_a_folder_of_which_one_may_see_only_the_names_is_left_out(tmp_path, monkeypatch, shut):
    "Mode 0444: its files are listed, but neither described nor opened."
    audio_in(tmp_path/"c/shut", tmp_path/"c/open")
    stat = os.stat
    def refusing(path, *args, **kw):
        if str(path).startswith(os.path.join(tmp_path/"c", shut, "")): raise PermissionError(13, "Permission denied")
        return stat(path, *args, **kw)
    monkeypatch.setattr(os, "stat", refusing)
    says = r"shut.x.wav cannot be opened \(Permission denied\)"
    if not shut:
        with pytest.raises(ValueError, match=f"no readable audio file: 2 of 2 .*{says}"): load_corpus(tmp_path/"c")
        return
    with pytest.warns(UserWarning, match=f"1 of 2 files left out: .*{says}"):
        assert load_corpus(tmp_path/"c")["id"][:] == ["open/x"]

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
        assert {r["split"] for r in corpora.open_segments(name, "train").rows} == {"train"}

@pytest.mark.parametrize("wrong", [dict(batch_size=0), dict(seconds=0), dict(seconds=-1.), dict(seconds=np.nan),
                                   dict(seconds=np.inf)])
def test_a_batch_of_nothing_is_refused(wrong):
    with pytest.raises(ValueError, match=f"^{list(wrong)[0]} = .* is not a"): crop_batch("speech", 0, **wrong)

def test_a_shard_that_is_no_audio_is_named(tmp_path):
    rows = [f"{name},{name}.wav,0,99,train,CC0\n" for name in "ab"]
    (tmp_path/"metadata.csv").write_text("id,file,start,end,split,license\n" + "".join(rows))
    (tmp_path/"a.wav").write_bytes(b"garbage"*99)
    for row, says in zip(load_corpus(tmp_path), ("a.wav cannot be read as audio", "b.wav is not a file")):
        with pytest.raises(AudioError, match=says): segment_audio(row)

@pytest.mark.parametrize("keep", [0, 50, 1000])
def test_a_damaged_cache_of_a_shard_is_made_again(tmp_path, monkeypatch, keep):
    monkeypatch.setenv("DISTILLTV_HOME", str(tmp_path))
    sf.write(tmp_path/"a.wav", tone(1), SAMPLE_RATE)
    whole = corpora.read_shard(tmp_path/"a.wav")
    cached, = (tmp_path/"cache/audio").glob("*.npy")
    cached.unlink()    # what is mapped must not shrink
    corpora._decoded.cache_clear()
    corpora.read_shard(tmp_path/"a.wav")
    corpora._decoded.cache_clear()
    cut(cached, keep/cached.stat().st_size)
    assert np.array_equal(corpora.read_shard(tmp_path/"a.wav"), whole)

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
    for i in range(n):
        sf.write(tmp_path/f"train/{i}.flac", np.random.default_rng(i).normal(0, .1, int(seconds*SAMPLE_RATE)),
                 SAMPLE_RATE)
    return tmp_path/"train"

def cut(path, share=.5): path.write_bytes(path.read_bytes()[:int(path.stat().st_size*share)])

def test_broken_files_are_quarantined_and_change_no_other_crop(tmp_path):
    folder = folder_of(tmp_path)
    before = [Crops([folder], 4, 1., seed=1)(k) for k in range(4)]
    whole = Crops([folder], 4, 1., seed=1)
    for k in range(4): whole(k)
    met = [k for k in range(4) if any(f == "2" for f in whole.files(k))]
    cut(folder/"2.flac")                                    # the header stays good: only decoding can tell
    crops = Crops([folder], 4, 1., seed=1)
    after = [crops(k) for k in range(4)]
    assert met and list(crops.quarantine) == [str(folder/"2.flac")]
    assert "breaks off" in crops.quarantine[str(folder/"2.flac")]
    for k in range(4):
        if k not in met: assert torch.equal(before[k], after[k])
        assert after[k].shape == (4, 16_000) and after[k].isfinite().all()
    assert torch.equal(Crops([folder], 4, 1., seed=1)(3), after[3]), "a crop depends on the steps before it"

def test_quarantine_has_every_fault_and_becomes_a_table(tmp_path):
    folder = folder_of(tmp_path, 3)
    for fault, (make, _) in BAD.items(): make(folder/f"{fault}.wav")
    with pytest.warns(UserWarning, match="3 of 9 files left out"): crops = Crops([folder], 8, .5)
    for k in range(20): crops(k)
    write_quarantine(merge_quarantines([crops.state(20), dict(quarantine={"b,c.wav": "is \"odd\""})]), tmp_path)
    table = pd.read_csv(tmp_path/"quarantine.csv", index_col="path").reason
    assert table["b,c.wav"] == 'is "odd"' and len(table) == len(BAD)+1
    for fault, (_, says) in BAD.items(): assert says in table[str(folder/f"{fault}.wav")]

def test_a_corpus_of_broken_files_ends_in_a_sentence(tmp_path):
    folder = folder_of(tmp_path, 2)
    for f in folder.glob("*"): cut(f)
    with pytest.raises(AudioError, match=r"\d\.flac.*draws of a crop in a row met unusable files"):
        Crops([folder], 2, 1.)(0)
    with pytest.raises(ValueError, match="has no validation audio: put some files below a folder named dev or valid"):
        Crops([folder], 2, 1., split="valid")

@pytest.mark.parametrize("rate, channels", [(44_100, 2), (8_000, 1), (48_000, 2)])
def test_crops_of_other_rates_are_16k_mono_and_of_one_length(tmp_path, rate, channels):
    sf.write(tmp_path/"tone.wav", np.stack([tone(1.3, rate)]*channels, 1), rate)
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
    read, frames = audio._read, []
    monkeypatch.setattr(audio, "_read", lambda p, start, n, *a: frames.append(n) or read(p, start, n, *a))
    # the sparse part of the file is one constant
    with pytest.raises(AudioError, match="silent but for a constant offset for a crop's length"):
        Crops([tmp_path], 2, 1.)(0)
    assert max(frames) == 16_000

@pytest.mark.filterwarnings("ignore:.*files left out")
def test_headers_of_a_folder_are_read_once(tmp_path, monkeypatch):
    monkeypatch.setenv("DISTILLTV_HOME", str(tmp_path/"home"))
    folder = folder_of(tmp_path, 3)
    rows = corpora._rows(str(folder))
    with monkeypatch.context() as m:
        m.setattr(audio, "_open", lambda *a: pytest.fail("read again"))
        assert corpora._rows(str(folder)) == rows
    (folder/"1.flac").touch()
    cut(folder/"0.flac", 0)
    assert "0 bytes" in corpora._rows(str(folder))[1][str(folder/"0.flac")]
    (folder/"gone.wav").symlink_to(tmp_path/"nowhere.wav")
    assert "not a file" in corpora._rows(str(folder))[1][str(folder/"gone.wav")]

def test_examples_of_one_name_are_counted_each_and_an_empty_cell_is_one_more(tmp_path):
    "A hub's stream often has one file name for all rows, or none."
    b = io.BytesIO()
    sf.write(b, tone(.5), SAMPLE_RATE, format="WAV")
    good, bad = dict(bytes=b.getvalue(), path="audio.wav"), dict(bytes=b"no audio", path="audio.wav")
    rows = pa.array([good]*4 + [bad]*3 + [None], pa.struct([("bytes", pa.binary()), ("path", pa.string())]))
    Dataset(pa.table(dict(audio=rows))).cast_column("audio", Audio()).to_parquet(tmp_path/"train-0.parquet")
    stream, quarantine = Stream(f"stream:{tmp_path}", block=8), {}
    # three epochs: each example is counted once
    for _ in range(12): stream.crop(8000, np.random.default_rng(0), quarantine)
    assert len(quarantine) == 4 and sum("cannot be read as audio" in v for v in quarantine.values()) == 3
    assert [k for k, v in quarantine.items() if "empty cell" in v] == [f"example 7 of block 0 of stream:{tmp_path}"]

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
        Dataset.from_dict(dict(audio=audio)).cast_column("audio",
                                                         Audio(decode=False)).to_parquet(folder/f"train-{s}.parquet")
    return f"stream:{folder}"

def names(stream, n, quarantine=None):
    used, rng = [], np.random.default_rng(0)
    for _ in range(n): assert stream.crop(8000, rng, {} if quarantine is None else quarantine, used).shape == (8000,)
    return used

def test_a_stream_gives_each_example_once_an_epoch_in_another_order(parquet):
    stream, bad = Stream(parquet, block=4), {}
    epochs = names(stream, 28, bad)
    assert list(bad) == ["7.wav"]
    assert set(epochs[:14]) == set(epochs[14:]) == {f"{i}.wav" for i in range(15) if i != 7}
    assert epochs[:14] != epochs[14:]
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
        while not stream.mark()["epoch"]: stream.crop(8000, np.random.default_rng(0), {}, mine)
        shares.append(mine[:-1])                            # the last one is of the second epoch
    assert sorted(sum(shares, [])) == sorted(f"{i}.wav" for i in range(15) if i != 7)

def test_crops_of_a_stream_continue_and_their_shares_are_apart(parquet):
    whole, again = (Crops([parquet, "speech"], 4, .3) for _ in range(2))
    steps = [whole(k) for k in range(6)]
    again.restore(4, [whole.state(4)])
    assert torch.equal(again(4), steps[4]) and torch.equal(again(5), steps[5])
    with pytest.raises(ValueError, match="no way to step 9 but through step 6"): again(9)
    with pytest.raises(ValueError, match="shared by 2 processes, not 1"): again.restore(4, [whole.state(4)]*2)

@pytest.mark.parametrize("world, steps", [(1, 14), (2, 7)])
def test_broken_examples_have_the_same_names_after_a_restart(tmp_path, world, steps):
    """Two shards with a broken example of one name in each, met before the restart or after it, and again in later
    epochs."""
    buffer = io.BytesIO()
    sf.write(buffer, np.random.default_rng(0).normal(0, .1, 6000), 16_000, format="WAV")
    for s in range(2):
        audio = [dict(path=f"{s}{i}.wav", bytes=buffer.getvalue())
                 for i in range(3+6*s)] + [dict(path="a.wav", bytes=b"<html>404</html>")]
        Dataset.from_dict(dict(audio=audio)).cast_column("audio",
                                                         Audio(decode=False)).to_parquet(tmp_path/f"train-{s}.parquet")
    def crops(): return [Crops([f"stream:{tmp_path}"], 2*world, .3, rank=r, world=world) for r in range(world)]
    def hear(all_crops, steps):
        for k in steps:
            for r, c in enumerate(all_crops): c.items(k, slice(2*r, 2*r+2))
    for stop in range(1, 6):
        whole, again = crops(), crops()
        hear(whole, range(stop))
        saved = [c.state(stop) for c in whole]
        for r, c in enumerate(again): c.restore(stop, saved, r)
        for run in (whole, again): hear(run, range(stop, steps))
        assert [c.quarantine for c in again] == [c.quarantine for c in whole]
        assert sum(len(c.quarantine) for c in whole) == 2

def test_shares_of_a_folder_are_the_batch(tmp_path):
    crops = Crops([folder_of(tmp_path)], 6, 1.)
    assert torch.equal(torch.cat([crops.items(2, slice(0, 3)), crops.items(2, slice(3, 6))]), crops(2))

@pytest.fixture()
def lengths(tmp_path):
    "Recordings of .5, 1.2, 2.5, 3 and 9 s; each is a ramp in a band of its own, so a crop tells where it is from."
    (tmp_path/"train").mkdir()
    for i, s in enumerate((.5, 1.2, 2.5, 3., 9.)):
        sf.write(tmp_path/f"train/{i}.wav", .1*i + .1 + np.linspace(0, .09, int(s*SAMPLE_RATE)), SAMPLE_RATE,
                 subtype="FLOAT")
    return tmp_path

def heard_alone(crops, step, monkeypatch):
    "What a batch was cut from, before it is normalised."
    with monkeypatch.context() as m:
        m.setattr("distilltv.corpora.normalise", lambda x: x)
        return crops(step)

def test_short_recordings_alone_are_heard_in_shorter_crops_and_more_of_them(lengths, monkeypatch):
    crops, seen = Crops([lengths], 3, 3., short="alone"), {}
    for k in range(60):
        x = heard_alone(crops, k, monkeypatch)
        m = 48_000//x.shape[1]
        assert x.shape == (3*m, 48_000//m), "not the same number of seconds in each batch"
        of = (x*10).floor().long() - 1
        for row, ids in zip(x, of):
            if m < 3 or 0 not in ids:
                assert (ids == ids[0]).all() and (row.diff() > 0).all(), "a crop of more than one recording"
        seen.setdefault(m, set()).update(of.flatten().tolist())
    assert seen == {1: {3, 4}, 2: {2}, 3: {0, 1}}, "shorter than a second: continued, as ever"
    spread = [x for k in range(60) if (x := heard_alone(crops, k, monkeypatch)).shape[1] == 24_000]
    first = np.concatenate([x[:, 0] for x in spread])
    assert all(len(x.unique(dim=0)) == 6 for x in spread), "a crop twice in a batch"
    # the last 1.5 of 2.5 s
    assert first.min() < .302 and .330 < first.max() < .337, "crops begin anywhere that they fit"

def test_batches_by_seconds_follow_seed_and_step_and_are_shared(lengths):
    crops = lambda **more: Crops([lengths, "speech"], 4, 3., seed=2, short="alone", **more)
    whole, several = crops(), 0
    for k in range(12):
        batch, parts = whole(k), [crops(rank=r, world=2).items(k, slice(2*r, 2*r+2)) for r in range(2)]
        if not isinstance(batch, tuple):
            assert torch.equal(torch.cat(parts), batch)
            continue
        (wav, n), several = batch, several+1
        assert n.sum() == 4*48_000 and len(n.unique()) == 2
        for row, length in zip(wav, n):
            assert row[length:].isnan().all() and row[:length].isfinite().all() and abs(row[:length].std() - 1) < .01
        assert torch.equal(torch.cat([p[1] for p in parts]), n)
        assert torch.equal(torch.cat([p[0] for p in parts]).nan_to_num(99), wav.nan_to_num(99))
    assert several

@pytest.mark.parametrize("short", ["join", "alone"])
def test_an_epoch_comes_again_in_another_order(lengths, short):
    crops = Crops([lengths], 2, 1., seed=1, short=short, epoch=8)
    turns = [[crops(8*t + k).numpy().tobytes() for k in range(8)] for t in range(3)]
    assert len(set(turns[0])) == 8 and sorted(turns[0]) == sorted(turns[1]) == sorted(turns[2])
    assert len({tuple(t) for t in turns}) == 3
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
        with pytest.raises(ValueError, match="in the order it comes: a stream takes short=join and epoch=0"):
            Crops([parquet], 2, 1., **choice)
    with pytest.raises(ValueError, match="short = 'pad' is unknown; use join or alone"):
        Crops(["speech"], 2, 1., short="pad")

@pytest.mark.parametrize("split, held", [("test", "test"), ("train+test", "test"), ("test[:10%]", "test"),
                                         ("all", "all"), ("validation", "validation")])
def test_a_stream_of_held_out_audio_is_refused(parquet, split, held):
    with pytest.raises(ValueError, match=f"asks for {held} audio, which is for validation and probes only"):
        Stream(f"{parquet}::{split}")
    with pytest.raises(ValueError, match="cannot be opened"): Stream(f"{parquet}::train.clean.100")

def test_a_stream_of_a_folder_of_test_audio_is_refused(tmp_path):
    audio_in(tmp_path/"LibriSpeech/test-clean/a")
    for folder in ("test-clean", "test-clean/a"):
        with pytest.raises(ValueError, match="test-clean.* asks for test audio"):
            Stream(f"stream:{tmp_path}/LibriSpeech/{folder}")

def test_a_stream_of_plain_audio_needs_torchcodec(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torchcodec", None)
    audio_in(tmp_path/"a")
    with pytest.raises(ValueError, match="plain audio files.* with torchcodec only: pip install torchcodec, or unpack"):
        Stream(f"stream:{tmp_path}/a").crop(8000, np.random.default_rng(0))

def test_a_stream_that_cannot_be_opened_is_named(tmp_path):
    with pytest.raises(ValueError, match="cannot be opened as stream:NAME:CONFIG:SPLIT"):
        Stream(f"stream:{tmp_path}/nothing")
    Dataset.from_dict(dict(text=["a"])).to_parquet(tmp_path/"train.parquet")
    with pytest.raises(ValueError, match="no audio column, only text"): Stream(f"stream:{tmp_path}")

def shard(file, kind=Audio(decode=False), **columns):
    "A Parquet file of columns of audio, rows of path and bytes; without a kind as other libraries write them."
    data = Dataset.from_dict(columns)
    for c in columns if kind else (): data = data.cast_column(c, kind)
    data.to_parquet(file)
    return f"stream:{file.parent}"

def sounds(n, first=0):
    "Rows of path and bytes, of one length in bytes."
    def wav(i):
        f = io.BytesIO()
        sf.write(f, np.random.default_rng(i).normal(0, .1, 8000), SAMPLE_RATE, format="WAV")
        return f.getvalue()
    return [dict(path=f"{i}.wav", bytes=wav(first+i)) for i in range(n)]

def test_a_stream_of_a_folder_is_known_by_what_its_files_hold(tmp_path):
    def known(first):
        crops = Crops([shard(tmp_path/"train.parquet", audio=sounds(3, first))], 2, .25)
        return crops.hash, crops.contents
    one, other = known(0), known(9)
    assert one == known(0) and one[0] != other[0] and one[1] != other[1]

def test_the_place_in_a_stream_is_not_lost_silently(parquet, monkeypatch):
    "As by datasets 5.0.0, where a loaded position stays what it was."
    stream = Stream(parquet, block=4)
    monkeypatch.setattr(stream.data, "state_dict", lambda: stream.mark()["data"])
    assert len(names(stream, 4)) == 4
    with pytest.raises(ValueError, match="datasets [0-9.]+ does not say where stream:.* is"): names(stream, 1)

@pytest.mark.parametrize("file, keep", [("train-1.parquet", .5), ("train-1.parquet", 0), ("train.tar", .5),
                                        ("train.tar", 0)])
def test_a_shard_that_breaks_off_is_named_before_the_first_step(tmp_path, file, keep):
    for s in range(2): shard(tmp_path/f"train-{s}.parquet", audio=sounds(4))
    (tmp_path/"._train-0.parquet").touch()    # no shard: macOS leaves such files
    assert Stream(f"stream:{tmp_path}")
    with tarfile.open(tmp_path/"train.tar", "w") as t: t.add(tmp_path/"train-0.parquet", "x")
    cut(tmp_path/file, keep)
    with pytest.raises(ValueError, match=f"{file} is damaged or cut off: get it again"): Stream(f"stream:{tmp_path}")

def test_a_shard_that_cannot_be_read_is_a_sentence(tmp_path):
    for s in range(2): shard(tmp_path/f"train-{s}.parquet", audio=sounds(4))
    stream = Stream(f"stream:{tmp_path}", block=4)
    (tmp_path/"train-1.parquet").write_bytes(b"PAR1"*999)
    names(stream, 4)
    with pytest.raises(ValueError, match="stream:.* cannot be read any further"): names(stream, 1)

@pytest.mark.parametrize("kind", [Audio(decode=False), None], ids=["of datasets", "of others"])
def test_the_audio_column_is_the_only_one_or_is_called_so(tmp_path, kind):
    rows, noise = sounds(2), [dict(r, path="noise") for r in sounds(2)]
    def heard(**columns): return set(names(Stream(shard(tmp_path/"train.parquet", kind, **columns)), 2))
    assert heard(sound=rows) == heard(noise=noise, audio=rows) == {"0.wav", "1.wav"}
    with pytest.raises(ValueError, match="several columns of audio, noise, clean: name"): heard(noise=noise, clean=rows)

def test_an_example_in_an_archive_is_fetched(tmp_path):
    with zipfile.ZipFile(tmp_path/"some.zip", "w") as z: z.writestr("a.wav", sounds(1)[0]["bytes"])
    rows = [dict(path=f"zip://{name}::{tmp_path}/some.zip", bytes=None) for name in ("a.wav", "b.wav")]
    bad = {}
    stream = Stream(shard(tmp_path/"train.parquet", None, audio=rows))
    assert set(names(stream, 3, bad)) == {rows[0]["path"]} and list(bad) == [rows[1]["path"]]
