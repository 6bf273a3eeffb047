"""What earlier searches measured of each way to quantize, used before the next one tries it.

One entry per (quantizer, format, runtime, instruction-set tier, kind of network): the latency of the
quantized network over that of its fp32 form in the same runtime, as mean and spread of its logarithm.
Pure and without torch: the controller merges tables too.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from shoal_optimizer.analysis import Analysis

SLOWER = 1.5  # below it a loss of speed may pay in size, or be noise of other machines
ENOUGH = 3  # measured networks before anything is refused
Z95 = 1.959963984540054
TIERS = {
    "amx": "AMX", "avx512vnni": "AVX-512 VNNI", "avxvnni": "AVX-VNNI", "avx512": "AVX-512", "avx2": "AVX2",
    "i8mm": "Arm I8MM", "dotprod": "Arm dot products", "neon": "Arm Neon", "base": "the base set",
}  # fmt: skip


@dataclass(frozen=True, order=True)
class Key:
    """What a ratio is about. `format` is the target's, `kind` as `kind_of` says."""

    quantizer: str
    format: str
    runtime: str
    tier: str
    kind: str


@dataclass(frozen=True)
class Ratio:
    """Latency over fp32: `n` networks, mean and sum of squares (about it) of the logarithm.

    Sums as in Welford (1962), so that tables of several searches add up.
    """

    n: int = 0
    mean: float = 0.0
    squares: float = 0.0

    def with_value(self, ratio: float) -> Ratio:
        return self.merged(Ratio(1, math.log(ratio), 0.0))

    def merged(self, other: Ratio) -> Ratio:
        """Both together: the parallel form of Chan, Golub and LeVeque (1979)."""
        n = self.n + other.n
        if not n:
            return self
        delta = other.mean - self.mean
        return Ratio(
            n,
            self.mean + delta * other.n / n,
            self.squares + other.squares + delta * delta * self.n * other.n / n,
        )

    @property
    def value(self) -> float:
        """The typical ratio (geometric mean): 8.0 = eight times slower than fp32."""
        return math.exp(self.mean)

    @property
    def spread(self) -> float:
        """Standard deviation of the logarithm; infinite for fewer than two networks."""
        return math.sqrt(self.squares / (self.n - 1)) if self.n > 1 else math.inf

    @property
    def interval(self) -> tuple[float, float]:
        """Where the next network's ratio lies (95 %, normal in the logarithm)."""
        if self.n < 2:
            return 0.0, math.inf
        width = Z95 * self.spread * math.sqrt(1 + 1 / self.n)
        return math.exp(self.mean - width), math.exp(min(700.0, self.mean + width))


class PriorTable:
    """Ratios by key."""

    def __init__(self, entries: Mapping[Key, Ratio] | None = None) -> None:
        self._entries = dict(entries or {})

    def __len__(self) -> int:
        return len(self._entries)

    def get(self, key: Key) -> Ratio | None:
        return self._entries.get(key)

    def items(self) -> list[tuple[Key, Ratio]]:
        return sorted(self._entries.items(), key=lambda item: item[0])

    def observe(self, key: Key, ratio: float) -> None:
        """Adds one network's measured ratio; what is no positive number is ignored."""
        if math.isfinite(ratio) and ratio > 0:
            self._entries[key] = self._entries.get(key, Ratio()).with_value(ratio)

    def merge(self, other: PriorTable) -> None:
        """Adds what the other one has seen."""
        for key, ratio in other.items():
            self._entries[key] = self._entries.get(key, Ratio()).merged(ratio)

    def verdict(self, key: Key) -> str:
        """Why not to try this, "" when it may pay: only what is slower beyond its spread is refused."""
        known = self.get(key)
        if known is None or known.n < ENOUGH or known.interval[0] < SLOWER:
            return ""
        low, high = known.interval
        return (
            f"on {TIERS.get(key.tier, key.tier)} {named(key.quantizer)} is {known.value:.2g}x slower here "
            f"than fp32 in {key.runtime} for {key.kind} networks ({known.n} measured, {low:.2g}x to "
            f"{high:.2g}x): not tried"
        )

    def to_json(self) -> list[dict[str, Any]]:
        return [
            {**key.__dict__, "n": ratio.n, "mean": ratio.mean, "squares": ratio.squares}
            for key, ratio in self.items()
        ]

    @classmethod
    def from_json(cls, raw: Any) -> PriorTable:
        """Unreadable entries are left out: knowledge is a help, never a need."""
        found: dict[Key, Ratio] = {}
        for entry in raw if isinstance(raw, list) else []:
            try:
                key = Key(*(str(entry[name]) for name in Key.__dataclass_fields__))
                ratio = Ratio(int(entry["n"]), float(entry["mean"]), float(entry["squares"]))
            except (KeyError, TypeError, ValueError):
                continue
            if ratio.n > 0 and math.isfinite(ratio.mean) and 0 <= ratio.squares < math.inf:
                found[key] = ratio
        return cls(found)


def named(quantizer: str) -> str:
    """For people: "dynamic INT8"."""
    plain = {
        "static": "static INT8", "dynamic": "dynamic INT8", "percentile": "INT8 with percentile ranges",
        "entropy": "INT8 with entropy ranges", "aware": "INT8 with some layers in float",
    }  # fmt: skip
    precision = quantizer.partition("_")[0].upper()
    return plain.get(quantizer, f"{precision} weights" if "_weights" in quantizer else precision)


def tier_of(isa: Iterable[str]) -> str:
    """The tier of a class's features, as class names have it."""
    have = set(isa)
    for feature, tier in (
        ("amx_int8", "amx"), ("avx512_vnni", "avx512vnni"), ("avx_vnni", "avxvnni"), ("avx512f", "avx512"),
        ("avx2", "avx2"), ("i8mm", "i8mm"), ("dotprod", "dotprod"), ("neon", "neon"),
    ):  # fmt: skip
        if feature in have:
            return tier
    return "base"


def kind_of(analysis: Analysis) -> str:
    """What a network mostly computes: "convolutional", "depthwise", "recurrent", "attention" or "dense".

    Quantizers gain and lose by it: dynamic INT8 is made for dense ones, depthwise ones gain least.
    """
    total = sum(layer.macs for layer in analysis.layers) or 1
    kinds = {layer.kind for layer in analysis.layers}
    if any(kind in kinds for kind in ("MultiheadAttention", "Attention")):
        return "attention"
    if any(kind.startswith(("LSTM", "GRU", "RNN")) for kind in kinds):
        return "recurrent"
    if analysis.conv_share < 0.5:
        return "dense"
    # A depthwise convolution has far fewer multiply-adds per output than the channels that it reads.
    thin = sum(1 for layer in analysis.layers if layer.kind.startswith("Conv") and _thin(layer))
    convolutions = sum(1 for layer in analysis.layers if layer.kind.startswith("Conv"))
    return "depthwise" if total and 4 * thin > convolutions else "convolutional"


def _thin(layer: Any) -> bool:
    outputs = math.prod(layer.output) if layer.output else 0
    channels = layer.output[0] if layer.output else 0
    return bool(outputs) and channels > 8 and layer.macs / outputs <= 25
