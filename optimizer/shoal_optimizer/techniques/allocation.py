"""How many channels each unit keeps: pure decisions over `Unit` and `Costs`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from shoal_optimizer.techniques.channels import Costs, Unit
from shoal_protos.errors import InvalidInput

ALLOCATIONS = ("uniform", "sensitivity", "global")
KINDS = ("channels", "macs", "parameters")
_RATIOS = tuple(i / 200 for i in range(200))

Widths = dict[str, int]
Loss = Callable[[Unit, int], float]  # what is expected to be lost when a unit has this width


def uniform(units: Sequence[Unit], ratio: float, round_to: int, max_ratio: float = 1.0) -> Widths:
    """The same share goes from every unit."""
    least = {unit.name: unit.widths(round_to, max_ratio)[-1] for unit in units}
    return {unit.name: max(least[unit.name], unit.kept(ratio, round_to)) for unit in units}


def reaching(costs: Costs, share: float, kind: str, round_to: int, max_ratio: float = 1.0) -> Widths:
    """Uniform widths that remove at least `share` of the multiply-adds or parameters.

    Raises:
        InvalidInput: so much cannot be removed; the message says how much can.
    """
    whole = costs.of({}, kind)
    for ratio in _RATIOS:
        widths = uniform(costs.units, ratio, round_to, max_ratio)
        if costs.of(widths, kind) <= (1 - share) * whole + 1e-9 * whole:
            return widths
    raise _unreachable(costs, share, kind, round_to, max_ratio)


def least_loss(
    costs: Costs, limit: float, kind: str, loss: Loss, round_to: int, max_ratio: float = 1.0
) -> Widths:
    """Widths at which the cost is `limit` at most and the sum of the expected losses is small.

    Greedy on the convex hull: the step that loses least per cost saved is taken until the limit is
    met, and a step may pass over widths that are no better than a smaller one.

    Args:
        limit: in multiply-adds or weights. loss: 0 at a unit's own width; the losses of units add up.

    Raises:
        InvalidInput: the limit cannot be met.
    """
    now = {unit.name: unit.width for unit in costs.units}
    options = {unit.name: unit.widths(round_to, max_ratio) for unit in costs.units}
    lost = {unit.name: {w: loss(unit, w) for w in options[unit.name]} for unit in costs.units}
    cost = costs.of(now, kind)
    while cost > limit * (1 + 1e-9):
        best: tuple[float, str, int] | None = None
        for unit in costs.units:
            smaller = [w for w in options[unit.name] if w < now[unit.name]]
            if not smaller:
                continue
            saved = cost - costs.of({**now, unit.name: smaller[-1]}, kind)
            each = saved / (now[unit.name] - smaller[-1])  # per channel; nearly the same at all widths
            if each <= 0:
                continue
            for width in smaller:
                more = max(0.0, lost[unit.name][width] - lost[unit.name][now[unit.name]])
                price = more / (each * (now[unit.name] - width))
                # Of equal prices the smallest step: what comes next may be dearer elsewhere.
                if best is None or price < best[0] - 1e-15:
                    best = price, unit.name, width
        if best is None:
            raise _unreachable(costs, 1 - limit / costs.of({}, kind), kind, round_to, max_ratio)
        now[best[1]] = best[2]
        cost = costs.of(now, kind)
    return _given_back(costs, now, limit, kind, lost, options)


def _given_back(
    costs: Costs, now: Widths, limit: float, kind: str, lost: Mapping[str, Mapping[int, float]],
    options: Mapping[str, Sequence[int]],
) -> Widths:  # fmt: skip
    """What the last steps took beyond the limit goes back to where it regains most per cost."""
    found = dict(now)
    while True:
        best: tuple[float, str, int] | None = None
        cost = costs.of(found, kind)
        for unit in costs.units:
            for width in (w for w in options[unit.name] if w > found[unit.name]):
                more = costs.of({**found, unit.name: width}, kind)
                if more > limit * (1 + 1e-9):
                    continue
                regained = max(0.0, lost[unit.name][found[unit.name]] - lost[unit.name][width])
                worth = regained / max(more - cost, 1e-9)
                if best is None or worth > best[0]:
                    best = worth, unit.name, width
        if best is None:
            return found
        found[best[1]] = best[2]


def between(whole: Mapping[str, int], last: Mapping[str, int], part: float, units: Sequence[Unit],
            round_to: int) -> Widths:  # fmt: skip
    """Widths of a round in which `part` (0..1) of the way to the last ones is gone."""
    found = {}
    for unit in units:
        if unit.name not in last:
            continue
        start = whole.get(unit.name, unit.width)
        wanted = start - (start - last[unit.name]) * part
        fitting = [w for w in unit.widths(round_to) if w >= last[unit.name]]
        found[unit.name] = min(fitting, key=lambda w: (abs(w - wanted), w), default=unit.width)
    return found


def _unreachable(costs: Costs, share: float, kind: str, round_to: int, max_ratio: float) -> InvalidInput:
    least = {unit.name: unit.widths(round_to, max_ratio)[-1] for unit in costs.units}
    most = 1 - costs.of(least, kind) / max(costs.of({}, kind), 1.0)
    return InvalidInput(
        f"{share:.1%} of the {'multiply-adds' if kind == 'macs' else 'parameters'} cannot go: with at "
        f"most {max_ratio:.0%} of each layer's channels it is {most:.1%}.",
        "Lower channel_pruning.ratio, or raise max_ratio or lower round_to.",
    )
