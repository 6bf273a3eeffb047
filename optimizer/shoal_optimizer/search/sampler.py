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
    from optuna.trial import FrozenTrial, Trial

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
    found = proposals(space, objective, told, seed=seed, networks=networks, count=1)
    return found[0] if found else None


def proposals(
    space: Space,
    objective: Objective,
    told: Sequence[Told],
    *,
    seed: int = 0,
    networks: int | None = None,
    count: int = 1,
) -> list[Params]:
    """Up to `count` different networks to choose the next one from, the sampler's first choice first.

    A known-good network that was not told yet has no rivals.
    """
    done = {_identity(result.params) for result in told}
    first = space.known_good()
    if networks is None or networks > len(first):
        first = [*first, *space.also_good()]
    for params in first:
        if _identity(params) not in done:
            return [params]
    if not space.ratios or len(done) >= space.size():
        return []
    from optuna.trial import TrialState

    study = _study(objective, seed * 100_003 + len(told), networks)
    for result in told:
        _tell(study, space, result)
    found: list[Params] = []
    for _ in range(_ASKS):
        trial = study.ask()
        params = _suggest(trial, space)
        if _identity(params) not in done and space.holds(params):
            found.append(params)
            done.add(_identity(params))
            if len(found) == count:
                return found
        study.tell(trial, state=TrialState.FAIL)
    untried = (params for params in space.every() if _identity(params) not in done)
    return found or [params for params in [next(untried, None)] if params is not None]


def _suggest(trial: Trial, space: Space) -> Params:
    """One network; a parameter is asked for only where its family has it, under a name of its own."""
    families = space.families
    family = str(trial.suggest_categorical("family", list(families)))
    params: dict[str, Any] = {"family": family}
    for name, values in families[family].items():
        params[name] = _one(trial, f"{family}.{name}", values)
    for name, values in space.shared.items():
        params[name] = _one(trial, name, values)
    return params


def _one(trial: Trial, name: str, values: Sequence[Any]) -> Any:
    """One of the values; where they are numbers in order, neighbours are known to be alike."""
    if _in_order(values):
        return values[trial.suggest_int(name, 0, len(values) - 1)]
    return trial.suggest_categorical(name, list(values))


def _fixed(params: Params, space: Space) -> dict[str, Any]:
    """What `_suggest` would have been told to give these parameters."""
    family = str(params.get("family", "pruned"))
    found: dict[str, Any] = {"family": family}
    own = space.families[family]
    for name, values in {**own, **space.shared}.items():
        key = f"{family}.{name}" if name in own else name
        found[key] = values.index(params[name]) if _in_order(values) else params[name]
    return found


def _in_order(values: Sequence[Any]) -> bool:
    """True for three numbers or more that rise or fall."""
    if len(values) < 3 or any(isinstance(v, bool) or not isinstance(v, int | float) for v in values):
        return False
    return list(values) in (sorted(values), sorted(values, reverse=True))


def _tell(study: Study, space: Space, result: Told) -> None:
    """Adds a result; unmeasured figures count as very bad."""
    if not space.holds(result.params):
        return
    values = {k: v for k, v in result.values.items() if v is not None and math.isfinite(v)}
    study.enqueue_trial(_fixed(result.params, space), user_attrs={"values": values})
    trial = study.ask()
    _suggest(trial, space)
    study.tell(trial, _costs(values, "wire" if space.sparsities else "size"))


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
    return tuple(sorted({"family": "pruned", **params}.items()))


def _study(objective: Objective, seed: int, networks: int | None) -> Study:
    try:
        import optuna
    except ImportError as error:
        raise MissingExtra("optimizer", "optuna") from error
    import warnings

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    constraints = _constraints(objective)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # `constraints_func`, `multivariate`, `group` are marked experimental
        sampler: optuna.samplers.BaseSampler
        if networks is not None and networks >= EVOLVE_ABOVE:
            sampler = optuna.samplers.NSGAIISampler(
                population_size=max(8, networks // 5), seed=seed, constraints_func=constraints
            )
        else:
            sampler = optuna.samplers.TPESampler(
                n_startup_trials=STARTUP,
                multivariate=True,
                group=True,
                seed=seed,
                constraints_func=constraints,
            )
        return optuna.create_study(directions=["minimize"] * 3, sampler=sampler)
