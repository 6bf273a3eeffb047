from __future__ import annotations

import copy
import json
import multiprocessing
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from shoal_optimizer import sensitivity
from shoal_optimizer.sensitivity import SensitivityMap, channel_map
from shoal_optimizer.task import Task, load_task
from shoal_optimizer.techniques import Cancelled
from shoal_optimizer.techniques.allocation import between, least_loss, reaching, uniform
from shoal_optimizer.techniques.channels import Cost, Costs, Unit
from shoal_protos.errors import InvalidInput, Unsupported

QUADRANTS = Path(__file__).parent / "quadrants.py"


@pytest.fixture
def cached(quadrants: Task, tmp_path: Path) -> Task:
    task = copy.copy(quadrants)
    task.cache_dir = tmp_path
    return task


def test_every_layer_is_measured_at_every_ratio(quadrants: Task) -> None:
    found = channel_map(quadrants)
    assert set(found.layers) == set(found.widths) == {"0", "2.first", "4"} or len(found.layers) == 3
    for row in found.layers.values():
        assert len(row) >= 2 and all(-1 <= loss <= 1 for loss in row.values())
    assert found.metric == "accuracy" and found.items > 0
    assert found.baseline > 0.9


def test_a_layer_that_all_depends_on_matters_most(quadrants: Task) -> None:
    """One layer's channels are copies of each other, but for what each of them is multiplied by."""
    model = copy.deepcopy(quadrants.original)
    first = model.get_submodule("2.first")
    with torch.no_grad():
        first.weight.mul_(1e-4)  # type: ignore[union-attr,operator]
        model.get_submodule("2.norm").weight.mul_(1e-4)  # type: ignore[union-attr,operator]
    found = channel_map(quadrants, model=model)
    name = next(name for name in found.layers if name.startswith("2.first"))
    others = [row[0.5] for other, row in found.distances.items() if other != name]
    assert found.distances[name][0.5] < min(others)


def test_a_second_call_reads_what_the_first_measured(cached: Task, monkeypatch: pytest.MonkeyPatch) -> None:
    first = channel_map(cached)
    monkeypatch.setattr(sensitivity._Measure, "row", lambda self, unit: pytest.fail("measured again"))
    assert channel_map(cached) == first
    with pytest.raises(pytest.fail.Exception):
        channel_map(cached, ratios=(0.5,))  # another question


def test_after_a_stop_only_what_is_missing_is_measured(cached: Task) -> None:
    calls = iter([False, False, False, False, True])
    with pytest.raises(Cancelled):
        channel_map(cached, cancelled=lambda: next(calls, True))
    (folder,) = list(cached.cache_dir.iterdir())  # type: ignore[union-attr]
    kept = {path: path.stat().st_mtime_ns for path in folder.glob("*.json")}
    assert len(kept) == 1
    assert channel_map(cached) == channel_map(copy.copy(cached))
    assert all(path.stat().st_mtime_ns == time for path, time in kept.items())
    assert not list(folder.glob("*.partial"))


def test_a_damaged_file_is_measured_again(cached: Task) -> None:
    first = channel_map(cached)
    (folder,) = list(cached.cache_dir.iterdir())  # type: ignore[union-attr]
    path = next(folder.glob("*.json"))
    path.write_text("[[0.5, NaN")
    assert channel_map(cached) == first


def _measure(folder: str) -> dict[str, object]:
    torch.set_num_threads(1)
    task = load_task(QUADRANTS)
    task.cache_dir = Path(folder)
    return channel_map(task).to_json()


@pytest.mark.slow
def test_two_processes_share_one_cache(tmp_path: Path) -> None:
    with multiprocessing.get_context("spawn").Pool(2) as pool:
        one, two = pool.map(_measure, [str(tmp_path)] * 2)
    assert one == two
    assert not list(tmp_path.rglob("*.partial"))


def test_progress_rises_and_names_layers(quadrants: Task) -> None:
    said: list[tuple[float, str]] = []
    channel_map(quadrants, ratios=(0.5,), progress=lambda share, message: said.append((share, message)))
    assert [share for share, _ in said] == sorted(share for share, _ in said) and said[-1][0] == 1.0
    assert any("4 matters" in message for _, message in said)


def test_it_can_be_written_and_read(quadrants: Task) -> None:
    found = channel_map(quadrants, ratios=(0.5,))
    again = SensitivityMap.from_json(json.loads(json.dumps(found.to_json())))
    assert again.to_json() == found.to_json()
    with pytest.raises(InvalidInput, match="no sensitivity map"):
        SensitivityMap.from_json({"layers": 3})


def test_models_without_channels_and_onnx_files_are_refused(quadrants: Task) -> None:
    with pytest.raises(InvalidInput, match="no channels"):
        channel_map(quadrants, model=nn.Sequential(nn.Flatten(1), nn.Linear(64, 4)))

    class File(type(quadrants)):  # type: ignore[misc]
        has_module = False

    with pytest.raises(Unsupported, match="ONNX"):
        channel_map(File())


@settings(max_examples=60, deadline=None)
@given(
    losses=st.lists(st.floats(-0.1, 1.0), min_size=3, max_size=3),
    ratios=st.lists(st.floats(0, 1), min_size=2, max_size=2),
)
def test_expected_losses_never_fall_when_more_goes(losses: list[float], ratios: list[float]) -> None:
    row = dict(zip((0.25, 0.5, 0.75), losses, strict=True))
    found = SensitivityMap({"a": row}, {"a": dict.fromkeys(row, 0.1)}, {"a": 16}, "accuracy", 1.0, 9)
    low, high = sorted(ratios)
    assert 0 <= found.loss("a", low) <= found.loss("a", high) + 1e-12
    assert found.loss("unknown", 0.5) == found.loss("a", 0.5)


# ---------------------------------------------------------------------------- allocation


def network(*widths: int) -> Costs:
    """A chain of linear layers, each `widths[i]` wide, before one with ten outputs."""
    units, layers, before = [], {}, 3
    for number, width in enumerate(widths):
        after = f"l{number + 1}"
        units.append(Unit(f"l{number}", width, 1, {f"l{number}": width}, {after: width}))
        layers[f"l{number}"] = Cost(before * width, before * width, width, before)
        before = width
    layers[f"l{len(widths)}"] = Cost(before * 10, before * 10, 10, before)
    return Costs(layers, tuple(units))


def test_most_goes_where_least_is_lost() -> None:
    costs = network(64, 64, 64)
    price = {"l0": 10.0, "l1": 0.1, "l2": 1.0}
    widths = least_loss(
        costs, 0.5 * costs.of({}, "macs"), "macs", lambda u, w: price[u.name] * (1 - w / u.width), 8
    )
    assert widths["l0"] == 64 and widths["l1"] < widths["l2"] <= 64


def test_a_flat_stretch_is_not_passed_by() -> None:
    """The first quarter is dear, the next ones are free: a greedy step of one width would never start."""
    costs = network(64, 64)

    def loss(unit: Unit, width: int) -> float:
        if unit.name == "l0":
            return 0.0 if width == 64 else 1.0
        return 2.5 * (1 - width / 64)

    widths = least_loss(costs, 0.3 * costs.of({}, "macs"), "macs", loss, 8)
    assert widths["l0"] <= 24 and widths["l1"] > 48


@settings(max_examples=80, deadline=None)
@given(
    widths=st.lists(st.integers(4, 80), min_size=1, max_size=4),
    round_to=st.sampled_from((1, 4, 8, 16)),
    share=st.floats(0, 0.9),
    seed=st.integers(0, 99),
)
def test_the_limit_is_met_or_refused(widths: list[int], round_to: int, share: float, seed: int) -> None:
    costs = network(*widths)
    generator = torch.Generator().manual_seed(seed)
    weight = {u.name: float(torch.rand(1, generator=generator)) for u in costs.units}
    limit = (1 - share) * costs.of({}, "parameters")

    def loss(unit: Unit, width: int) -> float:
        return weight[unit.name] * (1 - width / unit.width)

    least = costs.of(uniform(costs.units, 1.0, round_to, 0.9), "parameters")
    if least > limit * 1.000001:
        with pytest.raises(InvalidInput, match="of the parameters cannot go"):
            least_loss(costs, limit, "parameters", loss, round_to, 0.9)
        with pytest.raises(InvalidInput, match="of the parameters cannot go"):
            reaching(costs, share, "parameters", round_to, 0.9)
        return
    found = least_loss(costs, limit, "parameters", loss, round_to, 0.9)
    even = reaching(costs, share, "parameters", round_to, 0.9)
    for chosen in (found, even):
        assert costs.of(chosen, "parameters") <= limit * 1.000001
        for unit in costs.units:
            assert chosen[unit.name] == unit.width or chosen[unit.name] % round_to == 0
            assert chosen[unit.name] >= min(unit.width, 0.1 * unit.width)


@settings(max_examples=60, deadline=None)
@given(width=st.integers(8, 96), ratio=st.floats(0, 0.95), rounds=st.integers(1, 5))
def test_rounds_go_down_step_by_step_to_the_last_width(width: int, ratio: float, rounds: int) -> None:
    unit = Unit("a", width, 1, {}, {})
    last = {"a": unit.kept(ratio, 8)}
    seen = [width]
    for number in range(1, rounds + 1):
        now = Unit("a", seen[-1], 1, {}, {})
        seen.append(between({"a": width}, last, number / rounds, [now], 8)["a"])
    assert seen == sorted(seen, reverse=True) and seen[-1] == last["a"]


def test_grouped_channels_stay_multiples_of_both() -> None:
    unit = Unit("a", 48, 6, {}, {})
    assert unit.kept(0.5, 8) % 24 == 0
    assert all(width % 24 == 0 for width in unit.widths(8))
