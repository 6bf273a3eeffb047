"""Who goes when: waves over devices, decided once and purely.

Waves are cumulative targets ("1", "25%", "100%"). Within a wave, `admit` keeps the disruption
budget, so that a store of three devices never loses two of them at once.
"""

from __future__ import annotations

import hashlib
import itertools
import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from shoal_protos.errors import InvalidInput

MAX_WAVES = 50


@dataclass(frozen=True)
class Candidate:
    """A device that a rollout would change."""

    device: str
    profile_class: str
    connected: bool = True
    labels: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Budget:
    """At most `max_unavailable` devices of one group update at the same time.

    A group is a combination of the labels in `group_by`; without any, the whole fleet is one
    group. 0 = no limit.
    """

    group_by: tuple[str, ...] = ()
    max_unavailable: int = 0

    def group(self, labels: Mapping[str, str]) -> tuple[str, ...]:
        return tuple(str(labels.get(name, "")) for name in self.group_by)


@dataclass(frozen=True)
class PlannedWave:
    name: str
    devices: tuple[str, ...]


def target(step: str, total: int) -> int:
    """How many devices have the new assignment after this step: "3" -> 3, "25%" -> a quarter, rounded up.

    Raises:
        InvalidInput: neither a whole number of at least 1 nor a per cent above 0 up to 100.
    """
    text = step.strip()
    number = text.removesuffix("%").strip()
    try:
        value = float(number)
    except ValueError:
        value = math.nan
    if text.endswith("%") and 0 < value <= 100:
        return min(total, math.ceil(total * value / 100 - 1e-9))
    if not text.endswith("%") and value >= 1 and value.is_integer():
        return min(total, int(value))
    raise InvalidInput(
        f"'{step}' is not a wave.", "Write a number of devices (1, 20) or a per cent of them (25%, 100%)."
    )


def order(devices: Iterable[Candidate], seed: int) -> list[Candidate]:
    """The order in which devices go: one of each class first (the largest class leads), then
    every class in proportion. Connected devices go before others of their class; the rest is
    decided by a hash of the seed and the device, so the same input gives the same order."""
    classes: dict[str, list[Candidate]] = defaultdict(list)
    for candidate in devices:
        classes[candidate.profile_class].append(candidate)
    keyed: list[tuple[float, int, str, Candidate]] = []
    for name, members in classes.items():
        members.sort(key=lambda c: (not c.connected, _draw(seed, c.device)))
        for place, member in enumerate(members):
            share = 0.0 if place == 0 else place / len(members)
            keyed.append((share, -len(members), name, member))
    # A class with nobody connected cannot prove anything early: it follows those that can.
    keyed.sort(key=lambda entry: (entry[0] > 0, not entry[3].connected, *entry[:3]))
    return [entry[3] for entry in keyed]


def _draw(seed: int, device: str) -> str:
    return hashlib.sha256(f"{seed}/{device}".encode()).hexdigest()


def plan(devices: Sequence[Candidate], steps: Sequence[str], *, seed: int = 0) -> tuple[PlannedWave, ...]:
    """Splits devices into waves.

    The second wave is as large as it must be to cover every profile class; the last always
    reaches everybody. Waves that would be empty are left out.

    Raises:
        InvalidInput: a step is malformed, steps shrink, or there are more than 50.
    """
    if not steps or len(steps) > MAX_WAVES:
        raise InvalidInput(f"A rollout has 1 to {MAX_WAVES} waves, not {len(steps)}.", "Try: 1, 25%, 100%.")
    total = len(devices)
    _refuse_shrinking(steps)
    # A number and a per cent may cross in a small fleet: a wave never takes devices back.
    targets = list(itertools.accumulate((target(step, total) for step in steps), max))
    names = [step.strip() for step in steps]
    if targets[-1] < total:
        targets.append(total)
        names.append("100%")
    if len(targets) > 1:
        covered = len({candidate.profile_class for candidate in devices})
        targets[1:] = [max(count, min(total, covered)) for count in targets[1:]]
    return tuple(_cut([c.device for c in order(devices, seed)], targets, names))


def _refuse_shrinking(steps: Sequence[str]) -> None:
    for before, after in itertools.pairwise(steps):
        a, b = (step.strip().endswith("%") for step in (before, after))
        if a == b and target(before, 1 << 40) > target(after, 1 << 40):
            raise InvalidInput(
                f"The waves {', '.join(steps)} shrink.", "Each wave counts all devices up to then."
            )


def _cut(devices: list[str], targets: list[int], names: list[str]) -> Iterable[PlannedWave]:
    done = 0
    for count, name in zip(targets, names, strict=True):
        if count > done:
            label = "100%" if count == len(devices) and done else name
            yield PlannedWave(label, tuple(devices[done:count]))
            done = count


def admit(
    waiting: Sequence[str],
    in_progress: Iterable[str],
    labels: Mapping[str, Mapping[str, str]],
    budget: Budget,
) -> tuple[str, ...]:
    """Which of the waiting devices may start now without breaking the disruption budget.

    Args:
        in_progress: devices that are updating or settling at this moment.
        labels: device -> its labels, for `group_by`.
    """
    if budget.max_unavailable <= 0:
        return tuple(waiting)
    busy = Counter(budget.group(labels.get(device, {})) for device in in_progress)
    started = []
    for device in waiting:
        group = budget.group(labels.get(device, {}))
        if busy[group] < budget.max_unavailable:
            busy[group] += 1
            started.append(device)
    return tuple(started)
