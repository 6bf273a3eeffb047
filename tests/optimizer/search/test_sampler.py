"""The sampler: known-good first, never twice, resumable, and it learns."""

from __future__ import annotations

import pytest

from shoal_optimizer.objective import parse
from shoal_optimizer.search import sampler
from shoal_optimizer.search.sampler import Told
from shoal_optimizer.search.space import EPOCHS, RATIOS, Params, Space

SPACE = Space(RATIOS, (True, False), EPOCHS, ())
OBJECTIVE = parse("accuracy>=0.94; minimise size")


def figures(params: Params) -> dict[str, float | None]:
    ratio = float(params["ratio"])
    return {"accuracy": 0.99 - 0.1 * ratio, "latency_p95": 1.5 - ratio, "size": 1e5 * (1.1 - ratio)}


def search(count: int, *, seed: int = 0, networks: int | None = None, start: int = 0) -> list[Params]:
    told: list[Told] = []
    for _ in range(count):
        params = sampler.propose(SPACE, OBJECTIVE, told, seed=seed, networks=networks)
        if params is None:
            break
        told.append(Told(params, figures(params)))
    return [t.params for t in told[start:]]


@pytest.mark.parametrize("networks", [None, 50])
def test_known_good_come_first_and_none_twice(networks: int | None) -> None:
    tried = search(12, networks=networks)
    assert tried[:2] == SPACE.known_good()
    assert len({tuple(sorted(p.items())) for p in tried}) == 12


@pytest.mark.parametrize("networks", [None, 50])
def test_the_same_results_give_the_same_next_network(networks: int | None) -> None:
    told = [Told(p, figures(p)) for p in search(8, networks=networks)]
    following = [sampler.propose(SPACE, OBJECTIVE, told, seed=0, networks=networks) for _ in range(2)]
    assert following[0] == following[1] is not None
    assert search(9, networks=networks)[8] == following[0]


def test_the_space_ends() -> None:
    small = Space((0.25, 0.5), (True,), (10,), ())
    told: list[Told] = []
    while (params := sampler.propose(small, OBJECTIVE, told)) is not None:
        told.append(Told(params, {"accuracy": None, "latency_p95": None, "size": float("nan")}))
    assert len(told) == 2


def test_nothing_to_train_proposes_nothing() -> None:
    assert sampler.propose(Space((), (True,), (10,), ()), OBJECTIVE, []) is None


def test_results_outside_the_space_are_ignored() -> None:
    told = [Told({"ratio": 0.11, "teacher": True, "epochs": 3}, {"accuracy": 0.5})]
    assert sampler.propose(SPACE, OBJECTIVE, told) == SPACE.known_good()[0]
