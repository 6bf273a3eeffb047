"""The fixed set of statistics of each kind of input and output, one value an item.

Everything is scale-free: values are first brought to 0..1 by the signature's declared range, so
that one set of bins serves every device and every bundle. Statistics that span decades (noise,
energies) are kept as base-10 logarithms. Changing a statistic, its name or its range raises
`sketches.RULE_VERSION`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from shoal_agent.telemetry.boxes import BOXES, box_statistics
from shoal_protos.bundle import BoxRule
from shoal_protos.errors import InvalidInput

Array = np.ndarray[Any, Any]

BINS = 128
MAX_CLASS_BINS = 256
SCORE_THRESHOLD = BoxRule().score_threshold
_PATCHES, _PATCH = 4, 16  # images above 64x64 are read through a 4x4 grid of 16x16 patches
_SPECTRUM_BINS = 513
_LOG_FLOOR = 1e-4

# name -> (low, high) of its fixed bins, per kind.
IMAGE: Mapping[str, tuple[float, float]] = {
    "brightness": (0.0, 1.0),
    "contrast": (0.0, 0.6),
    "p05": (0.0, 1.0),
    "p25": (0.0, 1.0),
    "p50": (0.0, 1.0),
    "p75": (0.0, 1.0),
    "p95": (0.0, 1.0),
    "noise": (-4.0, 0.5),  # log10 of the Laplacian's median absolute deviation, as a sigma
    "sharpness": (-4.0, 0.5),  # log10 of the Laplacian's standard deviation
    "gradient_energy": (-4.0, 0.5),  # log10 of the mean squared difference of neighbours
    "entropy": (0.0, 1.0),  # of 16 grey levels, 1 = uniform
    "edge_density": (0.0, 1.0),
    "centre_border": (-1.0, 1.0),
    "anisotropy": (-1.0, 1.0),  # horizontal against vertical differences
    "dark_share": (0.0, 1.0),
    "bright_share": (0.0, 1.0),
}
COLOUR: Mapping[str, tuple[float, float]] = {
    "saturation": (0.0, 1.0),
    "first_minus_last": (-1.0, 1.0),  # red against blue, or blue against red
    "second_minus_others": (-1.0, 1.0),
}
_BANDS = 8
SERIES: Mapping[str, tuple[float, float]] = {
    "mean": (-4.0, 4.0),  # asinh
    "rms": (-4.0, 4.0),  # log10
    "peak_to_peak": (-4.0, 4.0),  # log10
    "skewness": (-4.0, 4.0),  # asinh
    "kurtosis": (-4.0, 6.0),  # asinh of the excess
    "crest": (0.0, 2.0),  # log10 of peak / rms
    "zero_crossings": (0.0, 1.0),
    "roughness": (-4.0, 1.0),  # log10 of difference rms / rms
    "centroid": (0.0, 1.0),
    "rolloff": (0.0, 1.0),
    "flatness": (-4.0, 0.0),  # log10
    **{f"band_{i}": (-6.0, 0.0) for i in range(_BANDS)},  # log10 of the share of the energy
}
TENSOR: Mapping[str, tuple[float, float]] = {
    "mean": (-8.0, 8.0),  # asinh, as all below but shares
    "spread": (-6.0, 6.0),  # log10 of the standard deviation
    "min": (-8.0, 8.0),
    "p10": (-8.0, 8.0),
    "p25": (-8.0, 8.0),
    "p50": (-8.0, 8.0),
    "p75": (-8.0, 8.0),
    "p90": (-8.0, 8.0),
    "max": (-8.0, 8.0),
    "skewness": (-4.0, 4.0),
    "kurtosis": (-4.0, 6.0),
    "zero_share": (0.0, 1.0),
    "not_finite": (0.0, 1.0),
}
UNIT_TENSOR: Mapping[str, tuple[float, float]] = {
    **dict.fromkeys(("mean", "min", "p10", "p25", "p50", "p75", "p90", "max"), (-0.25, 1.25)),
    "spread": (-6.0, 1.0),
    "skewness": (-4.0, 4.0),
    "kurtosis": (-4.0, 6.0),
    "zero_share": (0.0, 1.0),
    "not_finite": (0.0, 1.0),
}
LOGITS: Mapping[str, tuple[float, float]] = {
    "confidence": (0.0, 1.0),
    "entropy": (0.0, 1.0),  # 1 = uniform over the classes
    "margin": (0.0, 1.0),  # best minus second-best probability
}
INPUT_KINDS = ("image", "series", "audio", "tensor")
OUTPUT_KINDS = ("logits", "values", "boxes")


def _log10(values: Array) -> Array:
    return np.log10(np.maximum(values, _LOG_FLOOR))


def _finite(values: Array) -> Array:
    return np.nan_to_num(values, copy=False, nan=0.0, posinf=3e38, neginf=-3e38)


def normalise(batch: Array, low: float, high: float) -> Array:
    """float32 copy of `batch` with [low, high] brought to [0, 1]; unchanged where no range is declared."""
    values = batch.astype(np.float32)
    if high > low and np.isfinite(low) and np.isfinite(high):
        values -= np.float32(low)
        values *= np.float32(1.0 / (high - low))
    return values


def is_ranged(low: float, high: float) -> bool:
    return bool(np.isfinite(low) and np.isfinite(high) and high > low)


def ranges_of(kind: str, low: float, high: float, channels: int = 1) -> Mapping[str, tuple[float, float]]:
    """Statistic -> range of its bins. `channels` matters to images only."""
    if kind == "image":
        return {**IMAGE, **COLOUR} if channels >= 3 else IMAGE
    if kind in ("series", "audio"):
        return SERIES
    if kind == "logits":
        return LOGITS
    if kind == "boxes":
        return BOXES
    if kind in ("tensor", "values"):
        return UNIT_TENSOR if is_ranged(low, high) else TENSOR
    raise InvalidInput(f"Unknown kind '{kind}'.", f"Known are {', '.join(INPUT_KINDS + OUTPUT_KINDS)}.")


# ---------------------------------------------------------------------------- images


def as_images(batch: Array) -> Array:
    """[N, H, W, C] view of [N, H, W], [N, H, W, C], or of [H, W, C] grey batches with C = 1.

    Raises:
        InvalidInput: fewer than 3 or more than 4 dimensions, or no pixels.
    """
    if batch.ndim == 3:
        batch = batch[..., None]
    if batch.ndim != 4 or 0 in batch.shape[1:]:
        raise InvalidInput(f"Images are [N, H, W, C], not {list(batch.shape)}.")
    return batch


def _patches(images: Array) -> tuple[Array, Array]:
    """([N, P, h, w, C], centre mask [P, h, w]): the whole image, or a grid of native-resolution patches."""
    count, height, width, channels = images.shape
    rows, columns = np.arange(height), np.arange(width)
    inside = (np.abs(rows - (height - 1) / 2) < height / 4)[:, None] & (
        np.abs(columns - (width - 1) / 2) < width / 4
    )[None, :]
    if height <= _PATCHES * _PATCH or width <= _PATCHES * _PATCH:
        step_y = max(1, height // (_PATCHES * _PATCH) // 2)
        step_x = max(1, width // (_PATCHES * _PATCH) // 2)
        return images[:, None, ::step_y, ::step_x], inside[None, ::step_y, ::step_x]
    tops = np.linspace(0, height - _PATCH, _PATCHES).astype(int)
    lefts = np.linspace(0, width - _PATCH, _PATCHES).astype(int)
    corners = [(top, left) for top in tops for left in lefts]
    cut = np.stack([images[:, t : t + _PATCH, x : x + _PATCH] for t, x in corners], axis=1)
    mask = np.stack([inside[t : t + _PATCH, x : x + _PATCH] for t, x in corners])
    return cut.reshape(count, len(corners), _PATCH, _PATCH, channels), mask


def image_statistics(batch: Array, low: float, high: float) -> dict[str, Array]:
    """Statistics of images [N, H, W, C] or [N, H, W], any numeric dtype. Returns float32 [N] each."""
    patches, centre = _patches(as_images(batch))
    patches = _finite(normalise(patches, low, high))
    result: dict[str, Array] = {}
    if patches.shape[-1] >= 3:
        result.update(_colour_statistics(patches))
    # Luminance as the mean of the channels: it needs no colour order.
    grey = patches[..., 0] if patches.shape[-1] == 1 else patches.mean(axis=-1)
    count = len(grey)
    flat = grey.reshape(count, -1)
    result["brightness"] = flat.mean(axis=1)
    result["contrast"] = flat.std(axis=1)
    ordered = np.sort(flat, axis=1)
    for name, share in (("p05", 0.05), ("p25", 0.25), ("p50", 0.5), ("p75", 0.75), ("p95", 0.95)):
        result[name] = ordered[:, round(share * (ordered.shape[1] - 1))]
    result["dark_share"] = (flat <= 0.02).mean(axis=1)
    result["bright_share"] = (flat >= 0.98).mean(axis=1)
    result["entropy"] = _grey_entropy(flat)
    result.update(_edge_statistics(grey))
    mask = centre.reshape(-1)
    inner = flat[:, mask].mean(axis=1) if mask.any() else result["brightness"]
    outer = flat[:, ~mask].mean(axis=1) if not mask.all() else result["brightness"]
    result["centre_border"] = inner - outer
    return result


def _colour_statistics(patches: Array) -> dict[str, Array]:
    means = patches[..., :3].mean(axis=(1, 2, 3))  # [N, 3]
    spread = patches[..., :3].max(axis=-1) - patches[..., :3].min(axis=-1)
    return {
        "saturation": spread.mean(axis=(1, 2, 3)),
        "first_minus_last": means[:, 0] - means[:, 2],
        "second_minus_others": means[:, 1] - (means[:, 0] + means[:, 2]) / 2,
    }


def _grey_entropy(flat: Array) -> Array:
    count, pixels = flat.shape
    levels = np.clip(flat * 16, 0, 15).astype(np.int64)
    levels += np.arange(count)[:, None] * 16
    shares = np.bincount(levels.ravel(), minlength=count * 16).reshape(count, 16) / pixels
    bits: Array = -(shares * np.log2(np.maximum(shares, 1e-12))).sum(axis=1)
    return bits / 4.0


def _edge_statistics(grey: Array) -> dict[str, Array]:
    count = len(grey)
    if grey.shape[2] < 3 or grey.shape[3] < 3:  # too small for neighbours
        nothing = np.zeros(count, np.float32)
        floor = _log10(nothing)
        return {
            "noise": floor,
            "sharpness": floor,
            "gradient_energy": floor,
            "edge_density": nothing,
            "anisotropy": nothing,
        }
    dx, dy = np.diff(grey, axis=3), np.diff(grey, axis=2)
    # Noise: the 3x3 difference of two Laplacians cancels edges and ramps (Immerkaer), weight 36.
    second_x = grey[:, :, :, 2:] - 2 * grey[:, :, :, 1:-1] + grey[:, :, :, :-2]
    mixed = (second_x[:, :, 2:] - 2 * second_x[:, :, 1:-1] + second_x[:, :, :-2]).reshape(count, -1)
    second_y = grey[:, :, 2:] - 2 * grey[:, :, 1:-1] + grey[:, :, :-2]
    laplacian = (second_x[:, :, 1:-1] + second_y[:, :, :, 1:-1]).reshape(count, -1)
    energy_x = np.square(dx).mean(axis=(1, 2, 3))
    energy_y = np.square(dy).mean(axis=(1, 2, 3))
    middle = mixed.shape[1] // 2
    deviation = np.partition(np.abs(mixed), middle, axis=1)[:, middle]
    return {
        "noise": _log10(deviation * (1.4826 / 6.0)),
        "sharpness": _log10(laplacian.std(axis=1)),
        "gradient_energy": _log10(energy_x + energy_y),
        "edge_density": (np.abs(dx) > 0.1).mean(axis=(1, 2, 3)),
        "anisotropy": (energy_x - energy_y) / (energy_x + energy_y + 1e-6),
    }


# ---------------------------------------------------------------------------- series and audio


def as_series(batch: Array) -> Array:
    """[N, T] from [N, T], [N, T, C] or [N, C, T] with few channels: the channels' mean."""
    if batch.ndim == 3:
        axis = 2 if batch.shape[2] <= batch.shape[1] else 1
        batch = batch.mean(axis=axis)
    if batch.ndim != 2 or batch.shape[1] < 2:
        raise InvalidInput(f"Series are [N, T] or [N, T, C] with T > 1, not {list(batch.shape)}.")
    return batch


def log_spectrum(values: Array) -> Array:
    """Natural log of the Hann-windowed magnitude spectrum, [N, at most 513], of [N, T]."""
    length = values.shape[1]
    centred = values - values.mean(axis=1, keepdims=True)
    magnitude = np.abs(np.fft.rfft(centred * np.hanning(length).astype(np.float32), axis=1))
    if magnitude.shape[1] > _SPECTRUM_BINS:
        edges = np.linspace(0, magnitude.shape[1], _SPECTRUM_BINS + 1).astype(int)[:-1]
        widths = np.diff([*edges, magnitude.shape[1]])
        magnitude = np.add.reduceat(magnitude, edges, axis=1) / widths
    return np.log(magnitude + 1e-8)


def series_statistics(batch: Array, low: float, high: float) -> dict[str, Array]:
    """Statistics of [N, T] or [N, T, C]. A declared range is brought to -1..1 first."""
    return series_and_spectrum(batch, low, high)[0]


def series_and_spectrum(batch: Array, low: float, high: float) -> tuple[dict[str, Array], Array]:
    values = _finite(normalise(as_series(batch), low, high))
    if is_ranged(low, high):
        values = values * 2 - 1
    mean = values.mean(axis=1)
    centred = values - mean[:, None]
    rms = np.sqrt(np.square(centred).mean(axis=1))
    safe = np.maximum(rms, 1e-8)
    standard = centred / safe[:, None]
    peak = np.abs(standard).max(axis=1)
    sign = centred >= 0
    spectrum = log_spectrum(values)
    power = np.exp(2 * spectrum)
    total = power.sum(axis=1, keepdims=True) + 1e-12
    share = power / total
    places = np.linspace(0, 1, share.shape[1])
    result = {
        "mean": np.arcsinh(mean),
        "rms": _log10(rms),
        "peak_to_peak": _log10(values.max(axis=1) - values.min(axis=1)),
        "skewness": np.arcsinh((standard**3).mean(axis=1)),
        "kurtosis": np.arcsinh((standard**4).mean(axis=1) - 3),
        "crest": _log10(peak),
        "zero_crossings": (sign[:, 1:] != sign[:, :-1]).mean(axis=1),
        "roughness": _log10(np.sqrt(np.square(np.diff(values, axis=1)).mean(axis=1)) / safe),
        "centroid": (share * places).sum(axis=1),
        "rolloff": (np.cumsum(share, axis=1) < 0.85).mean(axis=1),
        "flatness": np.log10(np.maximum(np.exp(2 * spectrum.mean(axis=1)) / total[:, 0] * len(places), 1e-4)),
    }
    edges = np.linspace(0, share.shape[1], _BANDS + 1).astype(int)
    for band in range(_BANDS):
        part = share[:, edges[band] : max(edges[band + 1], edges[band] + 1)].sum(axis=1)
        result[f"band_{band}"] = np.log10(np.maximum(part, 1e-6))
    return result, spectrum


# ---------------------------------------------------------------------------- tensors and outputs


def tensor_statistics(batch: Array, low: float, high: float) -> dict[str, Array]:
    """Moments and quantiles of each item of [N, ...]."""
    flat = batch.reshape(len(batch), -1)
    if flat.shape[1] == 0:
        raise InvalidInput("An item without values has no statistics.")
    values = normalise(flat, low, high)
    finite = np.isfinite(values)
    values = _finite(values).astype(np.float64)
    scale = (lambda x: x) if is_ranged(low, high) else np.arcsinh
    ordered = np.sort(values, axis=1)
    last = ordered.shape[1] - 1
    mean = values.mean(axis=1)
    centred = values - mean[:, None]
    spread = np.sqrt(np.square(centred).mean(axis=1))
    standard = centred / np.maximum(spread, 1e-12)[:, None]
    result = {
        "mean": scale(mean),
        "spread": np.log10(np.maximum(spread, 1e-6)),
        "min": scale(ordered[:, 0]),
        "max": scale(ordered[:, last]),
        "skewness": np.arcsinh((standard**3).mean(axis=1)),
        "kurtosis": np.arcsinh((standard**4).mean(axis=1) - 3),
        "zero_share": (flat == 0).mean(axis=1),
        "not_finite": 1.0 - finite.mean(axis=1),
    }
    for name, share in (("p10", 0.1), ("p25", 0.25), ("p50", 0.5), ("p75", 0.75), ("p90", 0.9)):
        result[name] = scale(ordered[:, round(share * last)])
    return result


def probabilities(logits: Array) -> Array:
    """Softmax over the last axis, [N, C] float64, of [N, C] or [N, ..., C] (flattened to [N, -1])."""
    values = _finite(logits.reshape(len(logits), -1).astype(np.float64))
    values -= values.max(axis=1, keepdims=True)
    np.exp(values, out=values)
    values /= values.sum(axis=1, keepdims=True)
    return values


def logits_statistics(batch: Array) -> dict[str, Array]:
    """Confidence, entropy, margin and `class` (the arg-max) of logits [N, C]."""
    shares = probabilities(batch)
    count, classes = shares.shape
    if classes == 0:
        raise InvalidInput("Logits without classes have no statistics.")
    best = shares.argmax(axis=1)
    confidence = shares[np.arange(count), best]
    second = np.partition(shares, classes - 2, axis=1)[:, classes - 2] if classes > 1 else 0.0
    entropy = -(shares * np.log(np.maximum(shares, 1e-12))).sum(axis=1) / max(np.log(classes), 1e-9)
    return {"confidence": confidence, "entropy": entropy, "margin": confidence - second, "class": best}


def statistics(
    kind: str, batch: Array, low: float = 0.0, high: float = 0.0, *, threshold: float = SCORE_THRESHOLD
) -> dict[str, Array]:
    """Statistic -> [N] of a batch [N, ...].

    Args:
        kind: "image", "series", "audio", "tensor", "logits", "values" or "boxes".
        low, high: the signature's declared range; `high <= low` or NaN = not declared.
        threshold: of the signature's box rule; matters to boxes only.

    Raises:
        InvalidInput: an unknown kind, or a batch of a shape that the kind does not have.
    """
    if kind == "image":
        return image_statistics(batch, low, high)
    if kind in ("series", "audio"):
        return series_statistics(batch, low, high)
    if kind == "logits":
        return logits_statistics(batch)
    if kind == "boxes":
        return box_statistics(batch, threshold)
    if kind in ("tensor", "values"):
        return tensor_statistics(batch, low, high)
    raise InvalidInput(f"Unknown kind '{kind}'.", f"Known are {', '.join(INPUT_KINDS + OUTPUT_KINDS)}.")
