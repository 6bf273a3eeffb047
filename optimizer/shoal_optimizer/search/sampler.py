"""Which network to train next. Optuna decides; what it was told decides what it says.

The study lives in memory and is rebuilt from the told results for each question, so a search that was
killed goes on exactly as it would have.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from shoal_optimizer.objective import Objective
from shoal_optimizer.search.space import Params, Space
from shoal_protos.errors import MissingExtra

if TYPE_CHECKING:
    from optuna import Study
    from optuna.distributions import BaseDistribution
    from optuna.trial import FrozenTrial

STARTUP = 6  # told results before TPE models anything
EVOLVE_ABOVE = 40  # networks that the budget allows: with many, NSGA-II covers the front more evenly
_ASKS = 24  # tries to find a network that was not trained yet
_UNMEASURED = 1e9


@dataclass(frozen=True)
class Told:
    """One network's best export under the objective: metric -> value, as the objective names them."""

    params: Params
    values: Mapping[str, float | None]


def propose(
    space: Space,
    objective: Objective,
    told: Sequence[Told],
    *,
    seed: int = 0,
    networks: int | None = None,
) -> Params | None:
    """The next network: known-good ones first, never one that was told; None when none is left.

    Args:
        told: results so far, in order. Equal arguments give an equal answer.
        networks: how many the budget allows; None = unknown.
    """
    done = {_identity(result.params) for result in told}
    for params in space.known_good():
        if _identity(params) not in done:
            return params
    if not space.ratios or len(done) >= space.size():
        return None
    from optuna.trial import TrialState

    distributions = _distributions(space)
    study = _study(objective, seed * 100_003 + len(told), networks)
    for result in told:
        _tell(study, distributions, space, result)
    for _ in range(_ASKS):
        trial = study.ask(distributions)
        params = dict(trial.params)
        if _identity(params) not in done:
            return params
        study.tell(trial, state=TrialState.FAIL)
    return _first_untried(space, done)


def _tell(study: Study, distributions: dict[str, BaseDistribution], space: Space, result: Told) -> None:
    """Adds a result; unmeasured figures count as very bad."""
    if not _fits(result.params, space):
        return
    values = {k: v for k, v in result.values.items() if v is not None and math.isfinite(v)}
    study.enqueue_trial(dict(result.params), user_attrs={"values": values})
    study.tell(study.ask(distributions), _costs(values, "wire" if space.sparsities else "size"))


def _first_untried(space: Space, done: set[tuple[Any, ...]]) -> Params | None:
    every = (
        {"ratio": ratio, "teacher": teacher, "epochs": epochs, **sparse}
        for ratio in space.ratios
        for epochs in space.epochs
        for teacher in space.teacher
        for sparse in ([{"sparsity": share} for share in space.sparsities] or [{}])
    )
    return next((params for params in every if _identity(params) not in done), None)


def _constraints(objective: Objective) -> Callable[[FrozenTrial], Sequence[float]]:
    """Optuna's convention: at most 0 = met. Unmeasured counts as met: nothing is known against it."""

    def excesses(trial: FrozenTrial) -> Sequence[float]:
        values = trial.user_attrs.get("values", {})
        return [
            constraint.excess(values[constraint.metric]) if constraint.metric in values else 0.0
            for constraint in objective.constraints
        ] or [0.0]

    return excesses


def _costs(values: Mapping[str, float], size: str = "size") -> list[float]:
    accuracy = values.get("accuracy")
    return [
        1.0 - accuracy if accuracy is not None else _UNMEASURED,
        values.get("latency_p95", _UNMEASURED),
        values.get(size, _UNMEASURED),
    ]


def _identity(params: Params) -> tuple[Any, ...]:
    return tuple(sorted(params.items()))


def _fits(params: Params, space: Space) -> bool:
    return (
        params.get("ratio") in space.ratios
        and params.get("teacher") in space.teacher
        and params.get("epochs") in space.epochs
        and ("sparsity" in params) == bool(space.sparsities)
        and params.get("sparsity", 0.0) in (space.sparsities or (0.0,))
    )


def _distributions(space: Space) -> dict[str, BaseDistribution]:
    from optuna.distributions import CategoricalDistribution, FloatDistribution

    if not space.ratios:
        return {}
    steps = {round(b - a, 6) for a, b in zip(space.ratios, space.ratios[1:], strict=False)}
    ratio: BaseDistribution
    if len(steps) == 1:
        ratio = FloatDistribution(space.ratios[0], space.ratios[-1], step=steps.pop())
    else:
        ratio = CategoricalDistribution(space.ratios)
    sparse: dict[str, BaseDistribution] = (
        {"sparsity": CategoricalDistribution(space.sparsities)} if space.sparsities else {}
    )
    return {
        "ratio": ratio,
        "teacher": CategoricalDistribution(space.teacher),
        "epochs": CategoricalDistribution(space.epochs),
        **sparse,
    }


def _study(objective: Objective, seed: int, networks: int | None) -> Study:
    try:
        import optuna
    except ImportError as error:
        raise MissingExtra("optimizer", "optuna") from error
    import warnings

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    constraints = _constraints(objective)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # `constraints_func` and `multivariate` are marked experimental
        sampler: optuna.samplers.BaseSampler
        if networks is not None and networks >= EVOLVE_ABOVE:
            sampler = optuna.samplers.NSGAIISampler(
                population_size=max(8, networks // 5), seed=seed, constraints_func=constraints
            )
        else:
            sampler = optuna.samplers.TPESampler(
                n_startup_trials=STARTUP, multivariate=True, seed=seed, constraints_func=constraints
            )
        return optuna.create_study(directions=["minimize"] * 3, sampler=sampler)
