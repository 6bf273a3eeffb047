from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shoal_agent.telemetry.intervals import wilson
from shoal_optimizer import targets
from shoal_optimizer.evaluation import bootstrap, evaluate_exported, evaluate_model, score
from shoal_optimizer.task import Task


@given(st.integers(1, 5000).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_wilson_holds_the_share_and_narrows_with_n(pair: tuple[int, int]) -> None:
    right, n = pair
    low, high = wilson(right, n)
    assert 0 <= low <= right / n + 1e-12
    assert right / n - 1e-12 <= high <= 1
    wider = wilson(right / 10, n / 10) if n >= 10 else (0.0, 1.0)  # type: ignore[arg-type]
    assert high - low <= wider[1] - wider[0] + 1e-9


def test_wilson_known_value_and_no_data() -> None:
    # Newcombe (1998), example: 81 of 263 -> 0.2553 to 0.3662.
    assert list(wilson(81, 263)) == pytest.approx([0.2553, 0.3662], abs=1e-4)
    assert wilson(0, 0) == (0.0, 1.0)


def test_bootstrap_is_deterministic_and_about_right() -> None:
    values = np.random.default_rng(0).normal(3.0, 1.0, 400)
    one = bootstrap(lambda chosen: float(values[chosen].mean()), 400, seed=1)
    assert one == bootstrap(lambda chosen: float(values[chosen].mean()), 400, seed=1)
    assert one[0] < values.mean() < one[1]
    assert one[1] - one[0] == pytest.approx(2 * 1.96 / 20, rel=0.25)


def test_accuracy_with_recall_of_each_class(quadrants: Task) -> None:
    outputs = np.eye(4)[[0, 1, 1, 3]]
    result = score(quadrants, outputs, np.array([0, 1, 0, 3]))
    assert (result.metric, result.value, result.n) == ("accuracy", 0.75, 4)
    assert result.low < 0.75 < result.high
    assert result.per_class == {"upper left": (0.5, 2), "upper right": (1.0, 1), "lower right": (1.0, 1)}
    assert result.to_json()["per_class"]["upper left"] == {"recall": 0.5, "n": 2}


def test_a_metric_of_the_users_own_gets_a_bootstrap_interval(
    quadrants: Task, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        type(quadrants), "metric", lambda self, outputs, targets: -float(np.abs(outputs - targets).mean())
    )
    random = np.random.default_rng(0)
    result = score(quadrants, random.normal(size=200), np.zeros(200))
    assert result.metric == "metric"
    assert result.low < result.value < result.high < 0
    assert result.per_class == {}


def test_the_deployed_form_scores_like_torch(quadrants: Task) -> None:
    exported = targets.find("onnxruntime").export(quadrants.original, quadrants)
    deployed, original = evaluate_exported(quadrants, exported), evaluate_model(quadrants, quadrants.original)
    assert deployed == original
    assert original.value > 0.9
    assert original.standard_error > 0
