"""Families of changes that the world makes to inputs, one family per kind of input.

A `Corruption` is a frozen set of parameters that turns clean endpoint inputs into changed ones; the
same code serves matching (which parameters explain the field?) and training (learn under them).
Everything happens in endpoint space, so the result is what an application could have sent.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from torch import Generator, Tensor

SMOOTHING = 17  # bins of the equaliser's running mean: the channel's shape, not one recording's lines


@dataclass(frozen=True)
class Range:
    """The value range of an input. `whole` = an integer dtype; `clip` = the range was declared."""

    low: float
    high: float
    whole: bool = False
    clip: bool = True

    @property
    def width(self) -> float:
        return self.high - self.low


@dataclass(frozen=True)
class Parameter:
    """How a parameter is drawn: `share` of the candidates use it at all, the others keep `neutral`."""

    low: float
    high: float
    neutral: float
    share: float
    log: bool = False

    def draw(self, random: np.random.Generator) -> float:
        if random.random() >= self.share:
            return self.neutral
        if self.log:
            return float(math.exp(random.uniform(math.log(self.low), math.log(self.high))))
        return float(random.uniform(self.low, self.high))

    def near(self, value: float, random: np.random.Generator, spread: float) -> float:
        """A value near `value`, inside the limits; an unused parameter stays so half the time."""
        if value == self.neutral and random.random() < 0.5:
            return value
        low, high = min(self.low, self.neutral), max(self.high, self.neutral)
        if self.log:
            moved = value * math.exp(random.normal(0, spread * math.log(high / low)))
        else:
            moved = value + random.normal(0, spread * (high - low))
        return float(min(max(moved, low), high))


FAMILIES: Mapping[str, Mapping[str, Parameter]] = {
    "image": {
        "contrast": Parameter(0.35, 1.6, 1.0, 0.85, log=True),
        "offset": Parameter(-0.35, 0.35, 0.0, 0.7),  # of the range
        "noise": Parameter(0.0, 0.3, 0.0, 0.8),  # sigma, of the range
        "blur": Parameter(0.2, 1.6, 0.0, 0.35),  # sigma, pixels
    },
    "series": {
        "resample": Parameter(0.9, 1.1, 1.0, 0.5),  # ratio of lengths: speed of a machine, of speech
        "gain": Parameter(0.4, 2.5, 1.0, 0.7, log=True),
        "noise": Parameter(0.0, 0.5, 0.0, 0.6),  # sigma, of each item's own deviation
        "equaliser": Parameter(0.3, 1.2, 0.0, 0.8),  # strength of the field's mean spectrum, 1 = whole
    },
    "tensor": {
        "gain": Parameter(0.5, 2.0, 1.0, 0.7, log=True),
        "offset": Parameter(-0.5, 0.5, 0.0, 0.7),  # of the range
        "noise": Parameter(0.0, 0.3, 0.0, 0.7),  # sigma, of the range
    },
}


def family_of(input_kind: str) -> str:
    """The family that changes inputs of this kind."""
    return {"image": "image", "series": "series", "audio": "series"}.get(input_kind, "tensor")


@dataclass(frozen=True)
class Corruption:
    """One change with its parameters. `spectrum` is the log gain per frequency bin that the
    equaliser applies at strength 1; series only."""

    family: str
    params: Mapping[str, float] = field(default_factory=dict)
    spectrum: tuple[float, ...] = ()

    def get(self, name: str) -> float:
        return self.params.get(name, FAMILIES[self.family][name].neutral)

    def apply(self, inputs: Tensor, limits: Range, generator: Generator | None = None) -> Tensor:
        """Changed copy of float32 endpoint inputs [n, ...]; whole numbers where the dtype is integer."""
        unit = (inputs - limits.low) / limits.width
        if self.family == "image":
            changed = _image(self, unit, generator)
        elif self.family == "series":
            changed = _series(self, unit, generator)
        else:
            changed = _tensor(self, unit, generator)
        changed = changed * limits.width + limits.low
        if limits.clip:
            changed = changed.clamp(limits.low, limits.high)
        return changed.round() if limits.whole else changed

    def sentence(self) -> str:
        """The parameters for people: "contrast 0.70, noise 0.094"."""
        used = [
            f"{name} {self.get(name):.3g}"
            for name, spec in FAMILIES[self.family].items()
            if self.get(name) != spec.neutral
        ]
        return ", ".join(used) or "no change"


def draw(family: str, random: np.random.Generator, spectrum: Sequence[float] = ()) -> Corruption:
    """A random member of a family."""
    params = {name: spec.draw(random) for name, spec in FAMILIES[family].items()}
    return Corruption(family, params, tuple(spectrum))


def near(corruption: Corruption, random: np.random.Generator, spread: float = 0.06) -> Corruption:
    """A random neighbour; `spread` is the standard deviation as a share of each parameter's span."""
    specs = FAMILIES[corruption.family]
    params = {name: spec.near(corruption.get(name), random, spread) for name, spec in specs.items()}
    return Corruption(corruption.family, params, corruption.spectrum)


def _randn(like: Tensor, generator: Generator | None) -> Tensor:
    import torch

    return torch.randn(like.shape, generator=generator, dtype=like.dtype)


def _image(corruption: Corruption, unit: Tensor, generator: Generator | None) -> Tensor:
    """Optics first, then exposure, then the sensor's noise. `unit` is [n, h, w] or [n, h, w, c] in 0..1."""
    sigma = corruption.get("blur")
    if sigma > 0:
        unit = _blurred(unit, sigma)
    unit = (unit - 0.5) * corruption.get("contrast") + 0.5 + corruption.get("offset")
    noise = corruption.get("noise")
    return unit + noise * _randn(unit, generator) if noise > 0 else unit


def _blurred(unit: Tensor, sigma: float) -> Tensor:
    import torch
    from torch.nn import functional

    reach = max(1, math.ceil(2.5 * sigma))
    places = torch.arange(-reach, reach + 1, dtype=unit.dtype)
    kernel = torch.exp(-0.5 * (places / sigma) ** 2)
    kernel = kernel / kernel.sum()
    planes = unit if unit.ndim == 3 else unit.movedim(-1, 1).flatten(0, 1)  # [n * c, h, w]
    padded = functional.pad(planes[:, None], (reach,) * 4, mode="replicate")
    rows = functional.conv2d(padded, kernel[None, None, :, None])
    blurred = functional.conv2d(rows, kernel[None, None, None, :])[:, 0]
    if unit.ndim == 3:
        return blurred
    count, channels = unit.shape[0], unit.shape[-1]
    return blurred.reshape(count, channels, *blurred.shape[1:]).movedim(1, -1)


def _series(corruption: Corruption, unit: Tensor, generator: Generator | None) -> Tensor:
    """`unit` is [n, t], [n, t, c] or [n, c, t]; the longer of the last two axes is time."""
    time_last = unit.ndim == 2 or unit.shape[2] > unit.shape[1]
    values = unit if time_last else unit.transpose(1, 2)
    middle = values.mean(dim=-1, keepdim=True)
    centred = values - middle
    ratio = corruption.get("resample")
    if ratio != 1:
        centred = _resampled(centred, ratio)
    strength = corruption.get("equaliser")
    if strength > 0 and corruption.spectrum:
        centred = _equalised(centred, corruption.spectrum, strength)
    centred = centred * corruption.get("gain")
    noise = corruption.get("noise")
    if noise > 0:
        centred = centred + noise * centred.std(dim=-1, keepdim=True) * _randn(centred, generator)
    result = centred + middle
    return result if time_last else result.transpose(1, 2)


def _resampled(values: Tensor, ratio: float) -> Tensor:
    """Plays the series `ratio` times as fast, mirrored at its end so that the length stays."""
    import torch

    length = values.shape[-1]
    places = torch.arange(length, dtype=torch.float32) * ratio
    period = 2 * (length - 1)
    places = (length - 1) - (places % period - (length - 1)).abs()
    left = places.floor().long().clamp(0, length - 2)
    share = places - left
    return values[..., left] * (1 - share) + values[..., left + 1] * share


def _equalised(values: Tensor, spectrum: Sequence[float], strength: float) -> Tensor:
    import torch

    length = values.shape[-1]
    bins = length // 2 + 1
    gains = np.interp(np.linspace(0, 1, bins), np.linspace(0, 1, len(spectrum)), np.asarray(spectrum))
    gain = torch.from_numpy(np.exp(np.clip(strength * gains, -4, 4)).astype(np.float32))
    changed: Tensor = torch.fft.irfft(torch.fft.rfft(values, dim=-1) * gain, n=length, dim=-1)
    return changed


def _tensor(corruption: Corruption, unit: Tensor, generator: Generator | None) -> Tensor:
    unit = unit * corruption.get("gain") + corruption.get("offset")
    noise = corruption.get("noise")
    return unit + noise * _randn(unit, generator) if noise > 0 else unit


def smoothed(spectrum: np.ndarray, bins: int = SMOOTHING) -> np.ndarray:
    """Running mean over at most `bins` bins, as long as the input."""
    width = min(bins, len(spectrum))
    padded = np.pad(spectrum, (width // 2, width - 1 - width // 2), mode="edge")
    result: np.ndarray = np.convolve(padded, np.ones(width) / width, mode="valid")
    return result
