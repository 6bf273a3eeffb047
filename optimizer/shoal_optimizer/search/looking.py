"""Which made candidates a counted measurement is spent on."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

from shoal_optimizer.meter import Figure, Measurement
from shoal_optimizer.search import frontier, looks
from shoal_optimizer.search.candidate import Candidate
from shoal_optimizer.search.frontier import Estimate, Point
from shoal_optimizer.search.looks import Bounds

FLOOR = 0.05  # of the metric below the original's: what loses more is worth nothing


def worth(
    found: Sequence[Candidate],
    everything: Iterable[Candidate],
    timed: Callable[[Candidate], Measurement | None],
) -> list[Candidate]:
    """Those of `found` whose measurement could change the front, the likeliest first.

    Plain candidates always come first: everything is compared with them. Without a measured plain one,
    or without its accuracy, nothing can be told and all stay.
    """
    known = {c.bundle: (c, m) for c in everything if (m := timed(c)) is not None}
    plain = [(c, m) for c, m in known.values() if c.plain and c.accuracy and m.latency_p50]
    if not plain:
        return list(found)
    bounds = Bounds(
        min(c.accuracy.value for c, _ in plain if c.accuracy) - FLOOR,
        1.001 * max(m.latency_p50.value for _, m in plain if m.latency_p50),
        1.001 * max(c.size_bytes for c, _ in plain),
    )
    seen = [_point(c, m.latency_p50) for c, m in known.values()]
    first = [c for c in found if c.plain or c.bundle in known or c.accuracy is None]
    rest = {c.name: c for c in found if c not in first}
    unseen = [_point(c, _predicted(c.predicted)) for c in rest.values()]
    return [*first, *(rest[p.key] for p in looks.worth(seen, unseen, bounds))]


def _point(candidate: Candidate, latency: Figure | Estimate | None) -> Point:
    accuracy = candidate.accuracy
    return Point(
        candidate.name,
        {
            frontier.ACCURACY: None if accuracy is None else accuracy.estimate,
            frontier.LATENCY: latency.estimate if isinstance(latency, Figure) else latency,
            frontier.SIZE: Estimate(float(candidate.size_bytes)),
        },
    )


def _predicted(found: Mapping[str, Mapping[str, float]]) -> Estimate | None:
    """The prediction of the class that is fastest: a candidate is worth a look if any class may want it."""
    if not found:
        return None
    best = min(found.values(), key=lambda said: said["ms"])
    return Estimate(best["ms"], best["relative_error"] * best["ms"])
