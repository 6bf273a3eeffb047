"""The limits and deadlines of a rollout: one frozen value, stored with the rollout as JSON."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from shoal_protos.errors import InvalidInput


@dataclass(frozen=True)
class Gates:
    """What a wave must not exceed. Shares are 0..1, times in seconds, latencies in milliseconds."""

    max_failed_share: float = 0.02  # of a wave's devices; below one whole device = none may fail
    latency_p95_increase: float = 0.5  # 0.5 = half as slow again, on the same devices
    latency_floor_ms: float = 2.0  # a rise smaller than this harms nobody
    latency_limit_ms: float = 0.0  # the objective's own limit; 0 = none
    error_share_increase: float = 0.01
    accuracy_drop: float = 0.05
    min_requests: int = 50  # a device, before its latency is judged
    min_labels: int = 20  # of the wave, before accuracy is judged
    settle_s: float = 10.0  # after the last switch, before a wave can pass
    observe_s: float = 60.0  # after the last switch: the wave is decided with what there is
    silent_s: float = 180.0  # a device not heard of for so long is silent
    update_s: float = 1800.0  # a device that is still updating after this counts as failed
    group_by: tuple[str, ...] = ()
    max_unavailable: int = 0
    seed: int = 0

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Gates:
        """Builds gates from stored or sent values; unknown names are refused.

        Raises:
            InvalidInput: an unknown gate, a value of the wrong type, or a negative limit.
        """
        kwargs: dict[str, Any] = {}
        for spec in dataclasses.fields(cls):
            if spec.name in values:
                kwargs[spec.name] = _convert(spec.name, type(spec.default), values[spec.name])
        unknown = sorted(set(values) - {spec.name for spec in dataclasses.fields(cls)})
        if unknown:
            known = ", ".join(spec.name for spec in dataclasses.fields(cls))
            raise InvalidInput(f"There is no gate '{unknown[0]}'.", f"Gates: {known}.")
        return cls(**kwargs)

    def to_json(self) -> dict[str, Any]:
        values = dataclasses.asdict(self)
        values["group_by"] = list(self.group_by)
        return values


def _convert(name: str, kind: type, value: Any) -> Any:
    try:
        if kind is tuple:
            if isinstance(value, str):
                raise ValueError
            return tuple(str(item) for item in value)
        number = kind(value)
    except (TypeError, ValueError):
        raise InvalidInput(f"The gate '{name}' is {value!r}, which is no {kind.__name__}.") from None
    if not number >= 0 or number == float("inf"):
        raise InvalidInput(f"The gate '{name}' must be 0 or more, not {value!r}.")
    return number
