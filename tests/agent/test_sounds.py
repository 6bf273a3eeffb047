from __future__ import annotations

import struct
import wave
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shoal_agent import sounds
from shoal_protos.bundle import Signature, TensorSpec
from shoal_protos.errors import InvalidInput, NotFound, ShoalError, Unsupported

Array = np.ndarray[Any, Any]


def signature(
    shape: tuple[int, ...] = (-1, 8000), datatype: str = "FP32", rate: int = 8000, **more: Any
) -> Signature:
    spec = TensorSpec("sound", datatype, shape, "NT", *more.pop("range", (None, None)))
    return Signature(
        (spec,), (TensorSpec("y", "FP32", (-1, 2)),), more.pop("kind", "audio"), "logits", sample_rate=rate
    )


def tone(rate: int, seconds: float = 1.0, frequency: float = 440.0) -> Array:
    return 0.5 * np.sin(2 * np.pi * frequency * np.arange(round(rate * seconds)) / rate)


def wav(samples: Array, rate: int, bits: int = 16, coding: int = 1, extensible: bool = False) -> bytes:
    """A WAV file by its specification; samples [frames] or [frames, channels] from -1 to 1."""
    frames = samples[:, None] if samples.ndim == 1 else samples
    if coding == 3:
        body = frames.astype(f"<f{bits // 8}").tobytes()
    elif bits == 8:
        body = (np.rint(frames * 127) + 128).astype(np.uint8).tobytes()
    else:
        whole = np.rint(frames * (2 ** (bits - 1) - 1)).astype("<i4")
        body = whole.reshape(-1, 1).view(np.uint8)[:, : bits // 8].tobytes()
    channels, width = frames.shape[1], bits // 8
    form = struct.pack(
        "<HHIIHH",
        0xFFFE if extensible else coding,
        channels,
        rate,
        rate * channels * width,
        channels * width,
        bits,
    )
    if extensible:
        form += struct.pack("<HHIH14s", 22, bits, 0, coding, b"\0" * 14)
    chunks = b"LIST" + struct.pack("<I", 3) + b"abc\0"  # odd sizes are filled up
    chunks += b"fmt " + struct.pack("<I", len(form)) + form
    chunks += b"data" + struct.pack("<I", len(body)) + body
    return b"RIFF" + struct.pack("<I", 4 + len(chunks)) + b"WAVE" + chunks


class TestWav:
    @pytest.mark.parametrize(
        ("bits", "coding", "extensible"),
        [
            (8, 1, False),
            (16, 1, False),
            (24, 1, False),
            (32, 1, False),
            (32, 3, False),
            (64, 3, False),
            (24, 1, True),
        ],
    )
    def test_codings(self, bits: int, coding: int, extensible: bool) -> None:
        truth = tone(8000)
        sound = sounds.read_wav(wav(np.stack([truth, -truth], 1), 8000, bits, coding, extensible))
        assert sound.rate == 8000 and sound.samples.shape == (8000, 2)
        np.testing.assert_allclose(sound.samples[:, 0], truth, atol=0.01 if bits == 8 else 1e-4)
        np.testing.assert_allclose(sound.samples[:, 1], -truth, atol=0.01 if bits == 8 else 1e-4)

    def test_the_standard_librarys_files(self, tmp_path: Path) -> None:
        values = np.rint(tone(8000) * 32767).astype("<i2")
        with wave.open(str(tmp_path / "a.wav"), "wb") as file:
            file.setnchannels(1)
            file.setsampwidth(2)
            file.setframerate(8000)
            file.writeframes(values.tobytes())
        for source in (tmp_path / "a.wav", str(tmp_path / "a.wav"), (tmp_path / "a.wav").read_bytes()):
            got = sounds.decode(source, signature())
            np.testing.assert_allclose(got, values / 32768, atol=1e-6)

    def test_refusals(self, tmp_path: Path) -> None:
        good = wav(tone(8000), 8000)
        (tmp_path / "a.wav").write_bytes(good[:-100])
        with pytest.raises(InvalidInput, match=r"a\.wav is cut off"):
            sounds.read_wav(tmp_path / "a.wav")
        with pytest.raises(NotFound, match=r"none\.wav"):
            sounds.read_wav("none.wav")
        with pytest.raises(InvalidInput, match="not a WAV"):
            sounds.read_wav(b"ID3 this is music")
        with pytest.raises(InvalidInput, match="cannot be read"):
            sounds.read_wav(tmp_path)
        with pytest.raises(InvalidInput, match="coding 1 with 12 bits"):
            sounds.read_wav(good.replace(struct.pack("<HH", 2, 16), struct.pack("<HH", 2, 12)))
        with pytest.raises(InvalidInput, match="no samples"):
            sounds.read_wav(wav(np.zeros(0), 8000))
        with pytest.raises(InvalidInput, match="no samples"):
            sounds.read_wav(good[:12])
        with pytest.raises(InvalidInput, match="0 Hz"):
            sounds.read_wav(wav(tone(8000), 0))
        with pytest.raises(InvalidInput, match="int is no sound"):
            sounds.read_wav(7)

    @given(st.integers(0, 80), st.binary(max_size=60))
    @settings(deadline=None, max_examples=150)
    def test_damaged_files_never_raise_anything_else(self, place: int, noise: bytes) -> None:
        data = bytearray(wav(tone(8000, 0.01), 8000))
        data[place : place + len(noise)] = noise
        try:
            sound = sounds.read_wav(bytes(data))
        except ShoalError:
            return
        assert sound.samples.ndim == 2


class TestDecode:
    def test_length(self) -> None:
        short = sounds.decode(wav(tone(8000, 0.5), 8000), signature())
        assert short.shape == (8000,) and not short[4000:].any() and short[:4000].any()
        long = sounds.decode(wav(tone(8000, 2), 8000), signature())
        np.testing.assert_allclose(long, tone(8000), atol=1e-4)
        assert sounds.decode(wav(tone(8000, 0.3), 8000), signature((-1, -1))).shape == (2400,)

    @pytest.mark.parametrize("shape", [(-1, 8000), (-1, 8000, 1), (-1, 1, 8000)])
    def test_shapes(self, shape: tuple[int, ...]) -> None:
        assert sounds.decode(wav(tone(8000), 8000), signature(shape)).shape == shape[1:]

    def test_dtypes_and_ranges(self) -> None:
        data = wav(tone(8000), 8000)
        whole = sounds.decode(data, signature(datatype="INT16"))
        np.testing.assert_allclose(whole / 32767, tone(8000), atol=1e-4)
        bytes_ = sounds.decode(data, signature(datatype="UINT8", range=(0.0, 200.0)))
        np.testing.assert_allclose(bytes_, 100 + 100 * tone(8000), atol=1)
        halved = sounds.decode(data, signature(range=(-0.5, 0.5)))
        np.testing.assert_allclose(halved, tone(8000) / 2, atol=1e-4)

    def test_arrays(self) -> None:
        floats = tone(8000).astype(np.float32)
        whole = np.rint(floats * 32767).astype(np.int16)
        for array in (
            floats,
            whole,
            np.stack([floats, floats], 1),
            (whole.astype(np.int32) + 32768).astype(np.uint16),
        ):
            np.testing.assert_allclose(sounds.decode(array, signature()), tone(8000), atol=1e-3)
        half = sounds.decode(tone(16000).astype(np.float32), signature(), rate=16000)
        np.testing.assert_allclose(half[100:-100], tone(8000)[100:-100], atol=1e-3)
        for bad in (np.zeros((2, 3, 4)), np.zeros(0), np.asarray([np.nan]), np.asarray(["a"])):
            with pytest.raises(InvalidInput):
                sounds.decode(bad, signature())

    def test_models_that_take_no_sound(self) -> None:
        with pytest.raises(Unsupported, match="takes no sound"):
            sounds.decode(wav(tone(8000), 8000), signature(kind="tensor"))
        with pytest.raises(Unsupported, match="takes no sound"):
            sounds.decode(wav(tone(8000), 8000), signature((-1, 80, 100)))
        with pytest.raises(Unsupported, match="sample_rate"):
            sounds.decode(wav(tone(8000), 8000), signature(rate=0))


class TestResample:
    @pytest.mark.parametrize(
        ("rate", "wanted"), [(44100, 16000), (48000, 16000), (8000, 16000), (22050, 8000), (44099, 8000)]
    )
    def test_a_tone_stays_itself(self, rate: int, wanted: int) -> None:
        got = sounds.resample(tone(rate), rate, wanted)
        assert len(got) == -(-rate * wanted // rate)
        np.testing.assert_allclose(got[300:-300], tone(wanted)[300:-300], atol=1e-3)

    def test_what_the_lower_rate_cannot_hold_is_gone(self) -> None:
        got = sounds.resample(tone(48000, frequency=6000), 48000, 8000)
        assert np.abs(got[300:-300]).max() < 1e-3

    def test_a_constant_stays_constant(self) -> None:
        np.testing.assert_allclose(sounds.resample(np.ones(5000), 11025, 8000)[60:-60], 1, atol=1e-4)

    def test_refusals(self) -> None:
        with pytest.raises(InvalidInput, match="cannot go"):
            sounds.resample(np.ones(5), 10**9, 8000)
