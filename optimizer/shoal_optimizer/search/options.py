"""Which runtime options are worth a measurement, and which of the measured ones to take. Pure.

More threads take cores from other work of a device, so they are taken only where they are clearly
faster and speed is what the objective still asks for.
"""

from __future__ import annotations

from collections.abc import Mapping

from shoal_optimizer.jobspec import ProfileClass, RuntimeOptions
from shoal_optimizer.meter import Measurement
from shoal_optimizer.objective import Objective

FEW_MACS = 20_000_000  # of one item; below it a second thread waits more than it works
CLEARLY = 0.9  # a gain below it is not worth another core
LATENCIES = ("latency_p50", "latency_p95")
MOST_OPTIONS = 3
_CPUS = ("CPUExecutionProvider", "CPU", "AzureExecutionProvider")


def worth_trying(profile_class: ProfileClass, runtime: str, macs: int) -> tuple[RuntimeOptions, ...]:
    """Options besides the default ones: accelerators first, then threads, doubled up to the cores."""
    offered = profile_class.providers.get(runtime, ())
    found = [RuntimeOptions(1, {"provider": name}) for name in offered if name not in _CPUS]
    if macs >= FEW_MACS:
        cores = profile_class.most_threads
        threads = [cores]
        while threads[-1] > 3:
            threads.append(threads[-1] // 2)
        found += [RuntimeOptions(count) for count in threads if count > 1]
    return tuple(found[:MOST_OPTIONS])


def matters(objective: Objective) -> bool:
    """True where speed is asked for at all."""
    return any(objective.names(metric) for metric in LATENCIES)


def best(
    objective: Objective, plain: Measurement | None, others: Mapping[RuntimeOptions, Measurement]
) -> RuntimeOptions:
    """The default options unless others are clearly faster and speed is still asked for.

    Speed is still asked for while a goal is about latency, or a bound is missed without.
    """
    default = RuntimeOptions()
    if plain is None or plain.latency_p95 is None:
        return default
    metric = next((m for m in LATENCIES if objective.names(m)), "")
    if not metric:
        return default
    mine = getattr(plain, metric)
    bound = next((c.bound for c in objective.constraints if c.metric == metric), None)
    wanted = metric in objective.goals or (bound is not None and mine.value > bound)
    if not wanted:
        return default
    chosen, fastest = default, mine
    for options, measured in others.items():
        figure = getattr(measured, metric)
        if measured.status != "measured" or figure is None:
            continue
        if figure.high < mine.low and figure.value < CLEARLY * mine.value and figure.value < fastest.value:
            chosen, fastest = options, figure
    return chosen
