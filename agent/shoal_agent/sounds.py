"""From a WAV file to the tensor that a model takes. Needs numpy only.

The rule: mean of the channels, resampled to the declared rate by a polyphase filter (a sinc of 16
zero crossings a side under a Kaiser window, cut off at 0.95 of the lower of both Nyquist rates), cut
at the end or filled up with silence to the declared length, full scale (-1..1) mapped to the input's
declared range, else to -1..1 for floats and to the whole range for integers.
"""

from __future__ import annotations

import math
import os
import struct
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from shoal_agent.runtimes.tensors import dtype_of
from shoal_protos.bundle import Signature, TensorSpec
from shoal_protos.errors import InvalidInput, NotFound, Unsupported

Array = np.ndarray[Any, Any]

MAX_BYTES = 64 << 20
MAX_RATE = 1_000_000  # Hz
_PCM, _FLOAT, _EXTENSIBLE = 1, 3, 0xFFFE
_CROSSINGS = 16
_CUTOFF = 0.95
_BETA = 9.0  # Kaiser: about 90 dB down
_CHUNK = 1 << 20  # filter products at once


class Sound(NamedTuple):
    """samples: float32 [frames, channels] from -1 to 1; rate: Hz."""

    samples: Array
    rate: int


def decode(source: Any, signature: Signature, rate: int = 0) -> Array:
    """A sound as the model takes it: the first input's shape without the batch, in its dtype.

    Args:
        source: a path or bytes of a WAV file, or an array of samples, [frames] or [frames, channels]:
            integers of their whole range, or floats from -1 to 1.
        rate: an array's rate, Hz; left out, the declared one.

    Raises:
        InvalidInput: not a WAV file, cut off, or of a coding other than PCM and float.
        NotFound: there is no such file.
        Unsupported: the model's input takes no sound, or declares no rate that is needed.
    """
    spec = signature.inputs[0]
    length = length_of(signature)
    if isinstance(source, np.ndarray):
        sound = Sound(_unit(source), rate or signature.sample_rate)
    else:
        sound = read_wav(source)
    mono = sound.samples.mean(axis=1, dtype=np.float32)
    if signature.sample_rate == 0 and not isinstance(source, np.ndarray):
        raise Unsupported(
            f"The model does not say which rate its input '{spec.name}' has.",
            "Declare sample_rate in the task and push it again.",
        )
    values = resample(mono, sound.rate, signature.sample_rate)
    if length > 0:
        values = values[:length]
        values = np.pad(values, (0, length - len(values)))
    return _typed(values, spec).reshape([len(values) if size < 0 else size for size in spec.shape[1:]])


def length_of(signature: Signature) -> int:
    """Declared samples of the first input, 0 = any number. Raises Unsupported if it takes no sound."""
    spec = signature.inputs[0]
    inner = [size for size in spec.shape[1:] if size != 1]
    if signature.input_kind not in ("audio", "series") or len(inner) != 1:
        raise Unsupported(
            f"The input '{spec.name}' takes no sound: it is {signature.input_kind} {list(spec.shape)}.",
            "Declare an audio or series input [N, samples]; or send a finished array with infer().",
        )
    return max(0, inner[0])


def _typed(values: Array, spec: TensorSpec) -> Array:
    dtype = dtype_of(spec.datatype)
    low, high = spec.low, spec.high
    if low is None or high is None or high <= low:
        if dtype.kind == "f":
            return values.astype(dtype)
        limits = np.iinfo(dtype)
        low, high = float(limits.min), float(limits.max)
    middle, half = (high + low) / 2, (high - low) / 2
    scaled = np.clip(values.astype(np.float64) * half + middle, low, high)
    typed: Array = (scaled if dtype.kind == "f" else np.rint(scaled)).astype(dtype)
    return typed


def _unit(values: Array) -> Array:
    """Samples as float32 [frames, channels] from -1 to 1."""
    if values.ndim == 1:
        values = values[:, None]
    if values.ndim != 2 or not values.size:
        raise InvalidInput(
            f"An array of shape {list(values.shape)} is no sound.", "Pass [frames] or [frames, channels]."
        )
    if values.dtype.kind == "f":
        if not np.isfinite(values).all():
            raise InvalidInput("The sound holds values that are not numbers.")
        return values.astype(np.float32)
    if values.dtype.kind not in "iu":
        raise InvalidInput(f"A sound is integers or floats, not {values.dtype}.")
    bits = values.dtype.itemsize * 8
    shifted = values.astype(np.float64) - (2.0 ** (bits - 1) if values.dtype.kind == "u" else 0.0)
    unit: Array = (shifted / 2.0 ** (bits - 1)).astype(np.float32)
    return unit


# ---------------------------------------------------------------------------- WAV


def read_wav(source: Any) -> Sound:
    """Reads a WAV file: PCM of 8, 16, 24 or 32 bits, or float of 32 or 64 bits.

    Raises:
        InvalidInput, NotFound: as `decode`.
    """
    data, name = _bytes(source)
    if len(data) < 12 or data[:4] not in (b"RIFF", b"RF64") or data[8:12] != b"WAVE":
        raise InvalidInput(f"{name} is not a WAV file.", "Convert it: ffmpeg -i IN -ac 1 OUT.wav")
    form: tuple[int, int, int, int] | None = None
    place = 12
    while place + 8 <= len(data):
        kind, size = data[place : place + 4], int.from_bytes(data[place + 4 : place + 8], "little")
        body = data[place + 8 : place + 8 + size]
        if kind == b"fmt ":
            form = _format(body, name)
        elif kind == b"data":
            if form is None:
                raise InvalidInput(f"{name} has no format before its samples.")
            if len(body) < size and size not in (0xFFFFFFFF, 0x7FFFFFFF):  # what a recorder in a pipe writes
                raise InvalidInput(f"{name} is cut off: {len(body)} of {size} bytes.", "Copy it again.")
            return _samples(body, form, name)
        place += 8 + size + (size & 1)
    raise InvalidInput(f"{name} holds no samples.")


def _bytes(source: Any) -> tuple[bytes, str]:
    if isinstance(source, (bytes, bytearray, memoryview)):
        data, name = bytes(source), "The sound"
    elif isinstance(source, (str, os.PathLike)):
        path = Path(source)
        name = path.name[:100]
        try:
            if path.stat().st_size > MAX_BYTES:
                raise InvalidInput(f"{name} is larger than {MAX_BYTES >> 20} MiB.", "Send a part of it.")
            data = path.read_bytes()
        except FileNotFoundError as error:
            raise NotFound(f"There is no file {path}.") from error
        except OSError as error:
            raise InvalidInput(f"{name} cannot be read: {error.strerror or error}.") from error
    else:
        raise InvalidInput(f"A {type(source).__name__} is no sound.", "Pass a path, bytes or an array.")
    if len(data) > MAX_BYTES:
        raise InvalidInput(f"{name} is larger than {MAX_BYTES >> 20} MiB.", "Send a part of it.")
    return data, name


def _format(body: bytes, name: str) -> tuple[int, int, int, int]:
    """(coding, channels, rate, bits)."""
    if len(body) < 16:
        raise InvalidInput(f"{name} has a damaged format.")
    coding, channels, rate, _, _, bits = struct.unpack("<HHIIHH", body[:16])
    if coding == _EXTENSIBLE and len(body) >= 26:
        coding = int.from_bytes(body[24:26], "little")
    known = (coding == _PCM and bits in (8, 16, 24, 32)) or (coding == _FLOAT and bits in (32, 64))
    if not known:
        raise InvalidInput(
            f"{name} has the coding {coding} with {bits} bits.",
            "Use PCM or float: ffmpeg -i IN -c:a pcm_s16le OUT.wav",
        )
    if not 1 <= channels <= 64 or not 1 <= rate <= MAX_RATE:
        raise InvalidInput(f"{name} announces {channels} channels at {rate} Hz.")
    return coding, channels, rate, bits


def _samples(body: bytes, form: tuple[int, int, int, int], name: str) -> Sound:
    coding, channels, rate, bits = form
    frame = channels * bits // 8
    body = body[: len(body) // frame * frame]
    if not body:
        raise InvalidInput(f"{name} holds no samples.")
    if coding == _FLOAT:
        values = np.frombuffer(body, "<f4" if bits == 32 else "<f8")
    elif bits == 24:  # as the upper three bytes of 32 bits
        wide = np.zeros((len(body) // 3, 4), np.uint8)
        wide[:, 1:] = np.frombuffer(body, np.uint8).reshape(-1, 3)
        values = wide.view("<i4")[:, 0]
    else:
        values = np.frombuffer(body, {8: "u1", 16: "<i2", 32: "<i4"}[bits])
    return Sound(_unit(values.reshape(-1, channels)), rate)


# ---------------------------------------------------------------------------- rate


def resample(samples: Array, rate: int, wanted: int) -> Array:
    """float [n] at `rate` -> float32 [ceil(n * wanted / rate)] at `wanted`, both Hz."""
    if rate == wanted or not len(samples):
        return samples.astype(np.float32)
    if not (1 <= rate <= MAX_RATE and 1 <= wanted <= MAX_RATE):
        raise InvalidInput(f"A sound cannot go from {rate} to {wanted} Hz.")
    common = math.gcd(rate, wanted)
    up, down = wanted // common, rate // common
    count = -(-len(samples) * up // down)
    steps = np.arange(count, dtype=np.int64) * down
    places, phases = steps // up, steps % up
    used, which = np.unique(phases, return_inverse=True)
    filters, reach = _filters(used / up, min(1.0, wanted / rate))
    padded = np.pad(samples.astype(np.float64), (reach - 1, reach + 1))
    windows = np.lib.stride_tricks.sliding_window_view(padded, 2 * reach)
    rows = max(1, _CHUNK // (2 * reach))
    result = np.empty(count, np.float32)
    for start in range(0, count, rows):
        part = slice(start, start + rows)
        result[part] = np.einsum("ij,ij->i", windows[places[part]], filters[which[part]])
    return result


def _filters(shifts: Array, share: float) -> tuple[Array, int]:
    """(one row of taps per shift in samples [s, 2 reach], taps on each side)."""
    cutoff = share * _CUTOFF
    reach = math.ceil(_CROSSINGS / cutoff)
    times = np.arange(-reach + 1, reach + 1) - shifts[:, None]
    window = np.i0(_BETA * np.sqrt(np.maximum(0.0, 1 - (times / reach) ** 2))) / np.i0(_BETA)
    taps = cutoff * np.sinc(cutoff * times) * window
    return taps / taps.sum(axis=1, keepdims=True), reach
