"""Gates of an export: does it answer as the original does, and does its int8 really run in int8?

Neither needs labels. Parity is judged by two kinds of figures, because each alone is fooled:

- Agreement of the best class says nothing for a network that can't decide (an untrained one): there the
  smallest error turns the answer. It is corrected for chance (Cohen's kappa: J. Cohen, "A coefficient of
  agreement for nominal scales", 1960) so that always answering the commonest class counts for nothing,
  and taken at the upper end of its interval (J. Fleiss et al., "Large sample standard errors of kappa",
  1969, the simple form), since a few dozen items are compared.
- Signal to noise in decibels, 10 log10(energy of the signal / energy of the error). The signal is either
  the whole output (logits without their mean over the classes, which no softmax sees) or only what
  differs between items. The first is large for a network whose outputs hardly move, whatever the export
  does with them; the second is what a regression or a box is worth.

Logits are refused when all three figures are bad, values and boxes when the second signal to noise is.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from shoal_protos.errors import InvalidInput, Unsupported

MIN_KAPPA = 0.6  # "substantial" agreement begins here (Landis and Koch, 1977)
MIN_SQNR_DB = 10.0  # of what differs between items: the export explains 90 % of the original's variance
SURE_SQNR_DB = 20.0  # of whole logits: disagreement then comes from classes that are nearly tied
MIN_INT8_SHARE = 0.5  # of the operations that should be int8
_SIGMAS = 1.645  # one-sided 95 %
_BEST_DB = 200.0  # what equal outputs are given
_NAMED = 8


@dataclass(frozen=True)
class Parity:
    """How an export's answers compare with the original's on the same inputs.

    Attributes:
        largest: absolute difference, in output units; infinite for another shape or NaN.
        scale: largest absolute output of the original.
        agreement, kappa: of the best class; None unless the output is logits. `kappa_high` is the upper
            end of its one-sided 95 % interval.
        sqnr_db: of the whole output. `varying_sqnr_db`: of what differs between items.
    """

    items: int
    largest: float
    scale: float
    agreement: float | None
    kappa: float | None
    kappa_high: float | None
    sqnr_db: float
    varying_sqnr_db: float

    def facts(self) -> dict[str, Any]:
        return {
            "parity_max": self.largest,
            "parity_scale": self.scale,
            "parity_agreement": self.agreement,
            "parity_kappa": self.kappa,
            "parity_sqnr_db": self.sqnr_db,
            "parity_varying_sqnr_db": self.varying_sqnr_db,
            "parity_items": self.items,
        }


def compare(wanted: np.ndarray, got: np.ndarray, output_kind: str) -> Parity:
    """Figures of `got` against the original's outputs `wanted`, both [n, ...]."""
    scale = float(np.max(np.abs(wanted))) if wanted.size else 0.0
    if got.shape != wanted.shape or not np.isfinite(got).all():
        none = None if output_kind != "logits" else 0.0
        return Parity(len(wanted), math.inf, scale or 1.0, none, none, none, -_BEST_DB, -_BEST_DB)
    right, given = wanted.astype(np.float64), got.astype(np.float64)
    largest = float(np.max(np.abs(given - right))) if right.size else 0.0
    agreement = kappa = high = None
    if output_kind == "logits":
        agreement, kappa, high = _agreement(right.argmax(-1).ravel(), given.argmax(-1).ravel())
        right = right - right.mean(-1, keepdims=True)
        given = given - given.mean(-1, keepdims=True)
    varying = right - right.mean(0, keepdims=True)
    error = given - right
    return Parity(
        len(wanted),
        largest,
        scale or 1.0,
        agreement,
        kappa,
        high,
        _decibels(right, error),
        _decibels(varying, error),
    )


def _decibels(signal: np.ndarray, error: np.ndarray) -> float:
    power, noise = float(np.sum(signal**2)), float(np.sum(error**2))
    if noise == 0.0:
        return _BEST_DB
    if power == 0.0:
        return -_BEST_DB
    return float(np.clip(10.0 * math.log10(power / noise), -_BEST_DB, _BEST_DB))


def _agreement(wanted: np.ndarray, got: np.ndarray) -> tuple[float, float, float]:
    """(share of equal classes, kappa, upper end of kappa)."""
    count = len(wanted)
    if count == 0:
        return 1.0, 1.0, 1.0
    classes = int(max(wanted.max(), got.max())) + 1
    first, second = (np.bincount(part, minlength=classes) / count for part in (wanted, got))
    agreement, chance = float(np.mean(wanted == got)), float(np.sum(first * second))
    if chance > 1.0 - 1e-9:  # both always answer the same class
        return agreement, 1.0, 1.0
    kappa = (agreement - chance) / (1.0 - chance)
    # Adding a success and a failure keeps the error from being 0 at the ends.
    smooth = (agreement * count + 1.0) / (count + 2.0)
    error = math.sqrt(smooth * (1.0 - smooth) / count) / (1.0 - chance)
    return agreement, kappa, min(1.0, kappa + _SIGMAS * error)


def require_parity(parity: Parity, runtime: str, precision: str) -> None:
    """Refuses an export that does not answer as the original does.

    Raises:
        InvalidInput: fp32 differs by more than rounding.
        Unsupported: a narrower precision is far from the original: float is the better file then.
    """
    if precision == "fp32":
        if not parity.largest <= 1e-3 + 1e-2 * parity.scale:
            raise InvalidInput(
                f"The model converted for {runtime} answers differently: by {parity.largest:.3g} on outputs "
                f"up to {parity.scale:.3g}.",
                "Look for randomness or training-mode layers in forward().",
            )
        return
    reason = parity_refusal(parity)
    if reason:
        raise Unsupported(
            f"The {precision} file for {runtime} does not answer as the original does: {reason}.",
            "Use another calibration method (percentile, entropy), more varied calibration data, or the "
            "precision fp32.",
        )


def parity_refusal(parity: Parity) -> str:
    """Why a narrow export is too far from the original, "" when it is not."""
    if parity.largest == math.inf:
        return "its outputs have another shape or are not finite"
    if parity.varying_sqnr_db >= MIN_SQNR_DB:
        return ""
    error = f"errors are {-parity.varying_sqnr_db:+.1f} dB of what differs between items"
    if parity.agreement is None or parity.kappa_high is None:
        return f"{error} (at most {-MIN_SQNR_DB:+.0f} dB)"
    if parity.kappa_high >= MIN_KAPPA or parity.sqnr_db >= SURE_SQNR_DB:
        return ""
    return f"the best class is the same for {parity.agreement:.0%} of {parity.items} items, and {error}"


# ---------------------------------------------------------------------------- int8 share


def expected_share(share: float, floats: int, by_design: int) -> float:
    """The share among operations that should be int8.

    Args:
        share: of all convolutions and matrix products, as the runtime tells.
        floats: how many of them stayed in float.
        by_design: how many of those belong there: preparation, answer, layers that were kept in float.
    """
    if share >= 1.0 or not floats or not by_design:
        return share
    total = round(floats / (1.0 - share))
    meant = min(by_design, floats)
    return (total - floats) / (total - meant) if total > meant else 1.0


def share_refusal(share: float | None, minimum: float = MIN_INT8_SHARE, floats: Sequence[str] = ()) -> str:
    """Why too little of a file runs in int8, "" when enough does or nobody measured it.

    Args:
        share: of the operations that should be int8; of a trial's, of all of them.
        floats: the operations that stayed in float, to be named.
    """
    if share is None or math.isnan(share) or (share >= minimum and share > 0.0):
        return ""
    named = f": {', '.join(floats[:_NAMED])}{'...' if len(floats) > _NAMED else ''} stayed in float"
    least = f"at least {minimum:.0%}" if minimum > 0 else "more than none"
    return f"only {share:.0%} of its convolutions and matrix products run in int8 (wanted: {least})" + (
        named if floats else ""
    )


def require_share(
    share: float | None, runtime: str, minimum: float = MIN_INT8_SHARE, floats: Sequence[str] = ()
) -> None:
    """Raises Unsupported, naming the operations, when int8 silently became float."""
    reason = share_refusal(share, minimum, floats)
    if not reason:
        return
    if share == 0:
        raise Unsupported(
            f"No convolution or matrix product of this model runs in int8 in {runtime}"
            + (f" ({', '.join(floats[:_NAMED])})." if floats else "."),
            "Use the precision fp32: an int8 file that is computed in float is only less accurate.",
        )
    raise Unsupported(
        f"Of the int8 file for {runtime}, {reason}.",
        "Use the precision fp32 or another runtime, or lower min_int8_share.",
    )
