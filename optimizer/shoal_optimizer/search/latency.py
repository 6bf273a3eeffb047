"""What an unseen network will take on a class of devices, learned from what others took there.

A table remembers (class, runtime, kernels, time) of whole networks and of single kernels, and fits

    microseconds = sum over kernels of  a + b * multiply-adds + c * bytes moved + d * bytes of weights

with one (a, b, c, d) per kind of kernel and precision, none of them negative, so that more work never
takes less time. Where measurements say little, coefficients stay near a prior for a CPU core whose one
free parameter, its speed, is measured. What is left over is corrected per class by the ratio of measured
to predicted, the latest measurements counting most. Pure: no clock, no files.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from shoal_optimizer.search.kernels import Kernel, kernels, profiled
from shoal_protos.bundle import canonical_json, digest_of
from shoal_protos.errors import InvalidInput, MissingExtra

if TYPE_CHECKING:
    import numpy as np

__all__ = ["Kernel", "LatencyTable", "Prediction", "kernels", "profiled"]

VERSION = 1
LEAST_NETWORKS = 3  # different ones measured on a runtime before anything is predicted
MOST_NETWORKS, MOST_KERNELS, MOST_PAIRS = 48, 160, 64  # kept per (class, runtime); and such pairs
SAME_NETWORK = 3  # measurements kept of one network
HALF_LIFE = 4.0  # later measurements after which one counts half in the correction
FIT_HALF_LIFE = 8.0  # and in the fit
_UNSEEN = 0.25  # share of the predicted time in kinds of kernels never measured: above it nothing is said
_OF_OTHERS = 0.3  # weight of measurements on other classes, scaled to this one's speed
_OF_KERNELS = 0.3  # weight of single kernels: a profiler measures itself too
_TOWARDS_PRIOR = 0.05  # weight of the prior per coefficient, against 1 per measured network
_DOUBT_ALONE = 0.5  # relative error told when too few networks are there to leave one out

# Prior of one coefficient per kernel, multiply-add, byte moved and byte of weights, in microseconds on a
# core of 5e10 float multiply-adds a second: only their proportions matter.
_PRIOR = {
    "conv": (2.0, 2e-5, 2e-5, 2e-5),
    "pointwise": (2.0, 2e-5, 3e-5, 2e-5),
    "depthwise": (2.0, 8e-5, 5e-5, 2e-5),
    "gemm": (1.5, 3e-5, 3e-5, 5e-5),
    "pool": (1.5, 3e-5, 3e-5, 0.0),
    "pair": (1.5, 0.0, 3e-5, 3e-5),
    "activation": (1.5, 0.0, 2e-4, 0.0),
    "move": (1.5, 0.0, 5e-5, 0.0),
    "resize": (2.0, 0.0, 5e-3, 0.0),  # 0.1 ms for 32x32 to 24x24 in ONNX Runtime 1.32
    "quantize": (1.5, 0.0, 5e-5, 0.0),
    "other": (2.0, 5e-5, 1e-4, 5e-5),
}
_FASTER = {"int8": 0.35}  # times a multiply-add in float32

Features = Mapping[str, tuple[float, ...]]  # "operator/precision" -> count, lane MACs, bytes, weight bytes


@dataclass(frozen=True)
class Prediction:
    """Milliseconds, and the root mean square of relative errors when each known network is left out."""

    ms: float
    relative_error: float


@dataclass(frozen=True)
class Row:
    """One measurement. `order` counts measurements: the latest has the highest. `single`: one kernel."""

    profile_class: str
    runtime: str
    features: Features
    ms: float
    order: int
    single: bool = False

    @property
    def network(self) -> str:
        """Digest of what was measured, whatever it took."""
        return digest_of(canonical_json(_plain(self.features)))[7:23]

    @property
    def key(self) -> tuple[Any, ...]:
        return (self.profile_class, self.runtime, self.single, self.network, self.order, self.ms)

    def to_json(self) -> list[Any]:
        features = _plain(self.features)
        return [self.profile_class, self.runtime, features, self.ms, self.order, self.single]


def features_of(found: Iterable[Kernel]) -> dict[str, tuple[float, ...]]:
    """Sums over the kernels of each kind: count, lane multiply-adds, bytes moved, bytes of weights."""
    sums: dict[str, tuple[float, ...]] = {}
    for kernel in found:
        key = f"{kernel.operator}/{kernel.precision}"
        mine = (1.0, kernel.lane_macs, float(kernel.moved_bytes), float(kernel.weight_bytes))
        sums[key] = tuple(a + b for a, b in zip(sums.get(key, (0.0,) * 4), mine, strict=True))
    return sums


class LatencyTable:
    """Measurements with what follows from them. `observe` changes the table and returns it."""

    def __init__(self, rows: Iterable[Row] = (), after: int = 0) -> None:
        self._rows = _bounded(rows)
        self._after = after
        self._fits: dict[tuple[str, str], _Fit | None] = {}

    def __len__(self) -> int:
        return len(self._rows)

    def observe(self, profile_class: str, runtime: str, found: Sequence[Kernel], ms: float) -> LatencyTable:
        """Adds a measurement of a whole network: milliseconds for one item.

        Raises:
            InvalidInput: `ms` is no positive number, or there are no kernels.
        """
        if not math.isfinite(ms) or ms <= 0 or not found:
            raise InvalidInput(
                f"A latency of {ms} ms of {len(found)} kernels is no measurement.", "Measure again."
            )
        return self._add([Row(profile_class, runtime, features_of(found), float(ms), self._next)])

    def observe_profile(
        self,
        profile_class: str,
        runtime: str,
        profile: str | bytes,
        found: Sequence[Kernel] = (),
        ms: float | None = None,
    ) -> LatencyTable:
        """Adds the kernels of an ONNX Runtime profile (JSON), each with its share of `ms`.

        Args:
            found: the network's kernels, which say what a profile of an int8 network leaves out.
            ms: what the network takes without the profiler; None = the sum of the profile's kernels.

        Raises:
            InvalidInput: it is no such profile.
        """
        timed = profiled(profile, found)
        total = sum(us for _, us in timed) / 1000
        scale = ms / total if ms is not None and total > 0 else 1.0
        rows = [
            Row(profile_class, runtime, features_of([kernel]), max(us, 0.1) / 1000 * scale, self._next, True)
            for kernel, us in timed
        ]
        return self._add(rows)

    def predict(self, profile_class: str, runtime: str, found: Sequence[Kernel]) -> Prediction | None:
        """Milliseconds for one item on devices of a class; None where the table knows too little."""
        key = (profile_class, runtime)
        if key not in self._fits:
            self._fits[key] = _fit(self._rows, *key)
        fit = self._fits[key]
        features = features_of(found)
        if fit is None or not features or fit.unseen(features) > _UNSEEN:
            return None
        ms = fit.ms(features)
        beyond = max(ms / fit.most, fit.least / ms, 1.0) if ms > 0 else math.inf
        return Prediction(ms, fit.relative_error * (1 + math.log2(beyond))) if math.isfinite(beyond) else None

    def merge(self, other: LatencyTable) -> LatencyTable:
        """A table with the measurements of both; of more than are kept, the latest."""
        return LatencyTable([*self._rows, *other._rows])

    def later(self) -> LatencyTable:
        """An empty table whose measurements, merged into this one, count as made after its own."""
        return LatencyTable(after=self._next - 1)

    def to_json(self) -> dict[str, Any]:
        return {"version": VERSION, "rows": [row.to_json() for row in self._rows]}

    @classmethod
    def from_json(cls, raw: Mapping[str, Any]) -> LatencyTable:
        """Reads what `to_json` wrote; a table of another version is empty.

        Raises:
            InvalidInput: the rows are not what a table has.
        """
        if raw.get("version") != VERSION:
            return cls()
        try:
            return cls(_row(item) for item in raw["rows"])
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise InvalidInput(
                f"This is no latency table: {error!r}.", "Delete the file of knowledge."
            ) from error

    @property
    def _next(self) -> int:
        return 1 + max((row.order for row in self._rows), default=self._after)

    def _add(self, rows: Iterable[Row]) -> LatencyTable:
        self._rows = _bounded([*self._rows, *rows])
        self._fits.clear()
        return self


def _plain(features: Features) -> dict[str, list[float]]:
    return {key: list(values) for key, values in sorted(features.items())}


def _row(item: Sequence[Any]) -> Row:
    profile_class, runtime, features, ms, order, single = item
    found = {str(key): tuple(float(v) for v in values) for key, values in features.items()}
    numbers = [ms, *(v for values in found.values() for v in values)]
    if (
        any(len(values) != 4 for values in found.values())
        or not all(math.isfinite(v) and v >= 0 for v in numbers)
        or ms <= 0
    ):
        raise ValueError("a number is out of range")
    return Row(str(profile_class), str(runtime), found, float(ms), int(order), bool(single))


def _bounded(rows: Iterable[Row]) -> tuple[Row, ...]:
    """Each measurement once, sorted, and the latest of them where there are too many."""
    every = sorted({row.key: row for row in rows}.values(), key=lambda r: (r.order, r.key), reverse=True)
    newest: dict[tuple[str, str], list[Row]] = {}
    counts: dict[tuple[Any, ...], int] = {}
    for row in every:
        pair = (row.profile_class, row.runtime)
        if pair not in newest and len(newest) == MOST_PAIRS:
            continue
        kept = newest.setdefault(pair, [])
        for group, most in (
            ((*pair, row.single, row.network), 1 if row.single else SAME_NETWORK),
            ((*pair, row.single), MOST_KERNELS if row.single else MOST_NETWORKS),
        ):
            counts[group] = counts.get(group, 0) + 1
            if counts[group] > most:
                counts[group] -= 1
                break
        else:
            kept.append(row)
    return tuple(sorted((row for kept in newest.values() for row in kept), key=lambda r: (r.order, r.key)))


# ---------------------------------------------------------------------------- fitting


class _Fit:
    """Coefficients for one class and runtime, and how well they did on networks that they had not seen."""

    def __init__(
        self, rows: Sequence[Row], speeds: Mapping[str, float], profile_class: str, careful: bool = True
    ) -> None:
        self.profile_class = profile_class
        self.rows, self.speeds = rows, speeds
        self.kinds = {key for row in rows for key in row.features}
        self.columns = sorted((kind, index) for kind in self.kinds for index in range(4))
        self.coefficients = self._solve()
        self.correction = self._correct()
        own = self._networks(profile_class) or self._networks(None)
        times = [row.ms * self._scale(row) for row in own]
        self.least, self.most = min(times), max(times)
        self.relative_error = self._left_out() if careful else math.nan

    def _networks(self, profile_class: str | None) -> list[Row]:
        wanted = (None, profile_class) if profile_class is not None else (None,)
        return [r for r in self.rows if not r.single and (wanted == (None,) or r.profile_class in wanted)]

    def _scale(self, row: Row) -> float:
        """Makes times of another class those of this one."""
        return self.speeds[self.profile_class] / self.speeds[row.profile_class]

    def raw(self, features: Features) -> float:
        """Milliseconds without the correction."""
        speed = self.speeds[self.profile_class]
        total = 0.0
        for kind, values in features.items():
            known = self.coefficients.get(kind)
            if known is None:
                known = tuple(value * speed for value in _prior(kind))
            total += sum(a * b for a, b in zip(known, values, strict=True))
        return total

    def ms(self, features: Features) -> float:
        return self.raw(features) * self.correction

    def unseen(self, features: Features) -> float:
        """Share of the predicted time in kinds of kernels that were never measured."""
        total = self.raw(features)
        if total <= 0:
            return 1.0
        return self.raw({k: v for k, v in features.items() if k not in self.kinds}) / total

    def _solve(self) -> dict[str, tuple[float, ...]]:
        """Nonnegative least squares on relative errors, with a ridge towards the prior's proportions."""
        import numpy as np

        try:
            from scipy.optimize import nnls
        except ImportError as error:
            raise MissingExtra("optimizer", "scipy") from error
        prior = np.array([_prior(kind)[index] for kind, index in self.columns])
        prior = np.maximum(prior * self.speeds[self.profile_class], 1e-12)
        matrix = self._matrix() * prior  # unknowns are multiples of the prior
        ridge = math.sqrt(_TOWARDS_PRIOR) * np.eye(len(prior))
        weights = self._weights()
        system = np.vstack([matrix * weights[:, None], ridge])
        wanted = np.concatenate([weights, ridge.sum(0)])
        solved, _ = nnls(system, wanted, maxiter=50 * len(prior))
        found: dict[str, list[float]] = {kind: [0.0] * 4 for kind in self.kinds}
        for (kind, index), value in zip(self.columns, solved * prior, strict=True):
            found[kind][index] = float(value)
        return {kind: tuple(values) for kind, values in found.items()}

    def _matrix(self) -> np.ndarray:
        """One row a measurement: its features over its time, so that 1 is right."""
        import numpy as np

        nothing = (0.0,) * 4
        return np.array(
            [
                [
                    row.features.get(kind, nothing)[index] / (row.ms * self._scale(row))
                    for kind, index in self.columns
                ]
                for row in self.rows
            ]
        )

    def _weights(self) -> np.ndarray:
        import numpy as np

        singles = sum(row.single for row in self.rows)
        latest = max(row.order for row in self.rows)
        found = []
        for row in self.rows:
            weight = 1.0 if row.profile_class == self.profile_class else _OF_OTHERS
            weight *= math.sqrt(0.5 ** ((latest - row.order) / FIT_HALF_LIFE))  # squared by least squares
            if row.single:  # all single kernels together weigh as some networks do
                weight *= _OF_KERNELS * min(1.0, math.sqrt(10 / singles))
            found.append(weight)
        return np.array(found)

    def _correct(self) -> float:
        """Measured over predicted on this class, the latest counting most, shrunk towards 1."""
        rows = sorted(self._networks(self.profile_class), key=lambda row: -row.order)
        total, weight = 0.0, 0.5
        for age, row in enumerate(rows):
            predicted = self.raw(row.features)
            if predicted > 0:
                share = 0.5 ** (age / HALF_LIFE)
                total += share * math.log(row.ms / predicted)
                weight += share
        return math.exp(total / weight)

    def _left_out(self) -> float:
        own = self._networks(self.profile_class)
        names = list(dict.fromkeys(row.network for row in own))
        if len(names) < LEAST_NETWORKS:
            return _DOUBT_ALONE
        squares: list[float] = []
        for name in names:
            rest = [row for row in self.rows if row.single or row.network != name]
            fit = _Fit(rest, self.speeds, self.profile_class, careful=False)
            mine = [row for row in own if row.network == name]
            squares.extend((fit.ms(row.features) / row.ms - 1) ** 2 for row in mine)
        return math.sqrt(sum(squares) / len(squares))


def _prior(kind: str) -> tuple[float, ...]:
    """Milliseconds per kernel, multiply-add, byte moved and byte of weights."""
    operator, _, precision = kind.partition("/")
    count, macs, moved, weights = _PRIOR.get(operator, _PRIOR["other"])
    return count / 1000, macs / 1000 * _FASTER.get(precision, 1.0), moved / 1000, weights / 1000


def _fit(rows: Sequence[Row], profile_class: str, runtime: str) -> _Fit | None:
    """None where fewer than three different networks were measured on the runtime, or none on the class."""
    mine = [row for row in rows if row.runtime == runtime]
    speeds = _speeds(mine)
    mine = [row for row in mine if row.profile_class in speeds]
    networks = {row.network for row in mine if not row.single}
    if profile_class not in speeds or len(networks) < LEAST_NETWORKS:
        return None
    return _Fit(mine, speeds, profile_class)


def _speeds(rows: Iterable[Row]) -> dict[str, float]:
    """Class -> how much slower than the prior its networks ran, the median over them."""
    ratios: dict[str, list[float]] = {}
    for row in rows:
        if not row.single:
            prior = sum(
                a * b
                for kind, values in row.features.items()
                for a, b in zip(_prior(kind), values, strict=True)
            )
            ratios.setdefault(row.profile_class, []).append(row.ms / max(prior, 1e-12))
    return {name: sorted(values)[len(values) // 2] for name, values in ratios.items()}
