"""Choosing for a class: what must not be chosen, and when the plain variant stays. Pure."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

from shoal_agent.telemetry.intervals import wilson
from shoal_optimizer.objective import Choice, Objective, show
from shoal_optimizer.search import frontier
from shoal_optimizer.search.frontier import Point

MOST_LOSS = 0.03  # of recall on one class of the data, unless the objective bounds that class itself
MOST_SAID = 3  # rivals that the sentence names where the plain variant stays

Recalls = Mapping[str, tuple[float, int]]  # label -> (recall, items)


def lost_class(mine: Recalls, plain: Recalls, objective: Objective) -> str:
    """Which class of the data a variant loses more than 3 points of recall on, in words; "" = none.

    With few items a difference may be chance, so the interval of the difference must leave out zero
    (Newcombe 1998, method 10). It takes the samples for independent, while both judged the same items,
    so it errs towards keeping.
    """
    worst, said = 0.0, ""
    for label, (reference, there) in plain.items():
        if label in objective.labels or label not in mine:
            continue
        recall, here = mine[label]
        loss = reference - recall
        if loss <= MOST_LOSS + 1e-9 or loss <= worst or _least_loss(reference, there, recall, here) <= 0:
            continue
        worst = loss
        moved = f"{reference:.3g} to {recall:.3g}, {here} items"
        said = f"loses {100 * loss:.1f} points of recall on '{label}' ({moved})"
    return said


def _least_loss(reference: float, there: int, recall: float, here: int) -> float:
    low, _ = wilson(reference * there, there)
    _, high = wilson(recall * here, here)
    return (reference - recall) - math.hypot(reference - low, high - recall)


def beats(a: Point, b: Point, objective: Objective, *, z: float = frontier.Z95) -> bool:
    """True if `a` is better than `b` under the objective beyond the noise of measuring.

    Meeting the bounds counts first, then the goals in order, then being better in something and worse
    in nothing.
    """
    metrics = frontier.metrics_for(objective)
    mine, other = frontier.as_objective_point(a), frontier.as_objective_point(b)
    missed, missed_other = objective.missed(mine), objective.missed(other)
    if missed and not missed_other:
        return False
    if missed_other and not missed:
        return True
    if missed:
        nearer = objective.distance(mine) < objective.distance(other)
        return nearer and any(_clearly(a, b, metric, z) > 0 for metric in missed_other)
    for metric in objective.goals:
        sign = _clearly(a, b, metric, z)
        if sign:
            return sign > 0
    return frontier.dominates(a, b, z=z, metrics=metrics)


def _clearly(a: Point, b: Point, metric: str, z: float) -> int:
    """1 if `a` is better beyond noise, -1 if it is worse, 0 if that cannot be told."""
    mine, other = a.get(metric), b.get(metric)
    if mine is None or other is None:
        return 0
    better, error = frontier.gain(metric, mine, other)
    return 0 if abs(better) <= z * error else 1 if better > 0 else -1


def choose(
    points: Sequence[Point],
    plain: frozenset[str],
    objective: Objective,
    refused: Mapping[str, str] | None = None,
) -> Choice:
    """The point to use. A plain variant stays unless another one is better beyond the noise.

    Args:
        points: candidates that may be chosen; there is one at least.
        plain: keys of plain variants.
        refused: name -> why it may not be chosen, of candidates that are not among the points.
    """
    by_key = {p.key: p for p in points}
    first = objective.choose(map(frontier.as_objective_point, points))
    kept = next((key for key in first.ranked if key in plain), None)
    if kept is None:
        return first
    for key in first.ranked:
        if key not in plain and beats(by_key[key], by_key[kept], objective):
            if key == first.key:
                return first
            alone = objective.choose([frontier.as_objective_point(by_key[key])])
            return replace(alone, ranked=(key, *(k for k in first.ranked if k != key)))
    alone = objective.choose([frontier.as_objective_point(by_key[kept])])
    rivals = [by_key[key] for key in first.ranked if key not in plain]
    reasons = [_beside(rival, by_key[kept], objective) for rival in rivals]
    reasons += [f"{name} {why}" for name, why in (refused or {}).items()]
    if not reasons:  # there is nothing but plain variants
        return first
    more = f"; {len(reasons) - MOST_SAID} more are no better" if len(reasons) > MOST_SAID else ""
    sentence = (
        f"{kept} stays as it is: nothing is better beyond noise. {'; '.join(reasons[:MOST_SAID])}{more}."
    )
    if not alone.feasible:
        sentence = f"{alone.sentence} {sentence}"
    return replace(alone, sentence=sentence, ranked=(kept, *(k for k in first.ranked if k != kept)))


def _beside(rival: Point, plain: Point, objective: Objective) -> str:
    """How a rival does beside the plain variant, by the first figure that the objective asks for."""
    missed = objective.missed(frontier.as_objective_point(rival))
    for constraint in objective.constraints:
        value = rival.get(constraint.metric)
        if constraint.metric in missed and value is not None:
            by = show(constraint.metric, constraint.miss(value.value))
            return f"{rival.key} misses {constraint} by {by}"
    goal = objective.goals[0]
    mine, other = rival.get(goal), plain.get(goal)
    if mine is None or other is None or not mine.value or not other.value:
        return f"{rival.key} has no {goal} measured"
    if goal.startswith("latency"):
        return f"{rival.key} was measured {other.value / mine.value:.2g}x as fast here"
    if goal == frontier.ACCURACY:
        return f"{rival.key} reaches {show(goal, mine.value)} instead of {show(goal, other.value)}"
    return f"{rival.key} has {mine.value / other.value:.2g} of its {goal}"
