from __future__ import annotations

import json
import math
import time
from itertools import permutations

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from shoal_optimizer.search import latency
from shoal_optimizer.search.kernels import Kernel
from shoal_optimizer.search.latency import LatencyTable
from shoal_protos.errors import InvalidInput


def network(width: int, depth: int, side: int = 32, operator: str = "conv") -> list[Kernel]:
    """A plain convolutional network's kernels."""
    shape = (1, width, side, side)
    size = width * side * side
    layers = [
        Kernel(operator, shape, shape, macs=9 * width * size, weight_bytes=36 * width * width, reads=size)
    ] * depth
    return [
        *layers,
        Kernel("gemm", (1, width), (1, 10), macs=10 * width, weight_bytes=40 * width, reads=width),
    ]


def takes(found: list[Kernel], speed: float = 1.0) -> float:
    """A device that is not the prior: milliseconds."""
    return speed * sum(0.004 + k.macs * 4e-8 + k.weight_bytes * 1e-8 + k.reads * 6e-8 for k in found)


NETWORKS = [network(w, d) for w, d in ((8, 2), (16, 2), (16, 5), (32, 3), (48, 2), (64, 4), (24, 7))]


def learned(name: str = "pi", speed: float = 1.0, count: int = 7) -> LatencyTable:
    table = LatencyTable()
    for found in NETWORKS[:count]:
        table.observe(name, "onnxruntime", found, takes(found, speed))
    return table


def test_unseen_networks_are_predicted_with_an_honest_error() -> None:
    table = learned()
    for width, depth in ((16, 3), (32, 6), (56, 3), (64, 2)):
        found = network(width, depth)
        predicted = table.predict("pi", "onnxruntime", found)
        assert predicted is not None
        off = abs(predicted.ms / takes(found) - 1)
        assert off < 0.15
        assert predicted.relative_error < 0.5
        assert off < 3 * predicted.relative_error + 0.02


def test_it_says_nothing_where_it_knows_too_little() -> None:
    found = network(16, 3)
    assert LatencyTable().predict("pi", "onnxruntime", found) is None
    assert learned(count=2).predict("pi", "onnxruntime", found) is None
    table = learned()
    assert table.predict("pi", "openvino", found) is None  # another runtime
    assert table.predict("jetson", "onnxruntime", found) is None  # a class that nothing ran on
    assert table.predict("pi", "onnxruntime", network(16, 3, operator="depthwise")) is None
    assert table.predict("pi", "onnxruntime", []) is None
    int8 = [Kernel(k.operator, k.given, k.made, "int8", k.macs, k.weight_bytes, k.reads) for k in found]
    assert table.predict("pi", "onnxruntime", int8) is None
    same = LatencyTable()
    for _ in range(5):
        same.observe("pi", "onnxruntime", found, 1.0)
    assert same.predict("pi", "onnxruntime", found) is None  # one network, however often


def test_one_measurement_on_a_new_class_scales_what_others_taught() -> None:
    table = learned()
    table.observe("slow", "onnxruntime", NETWORKS[2], takes(NETWORKS[2], 5.0))
    found = network(32, 6)
    predicted = table.predict("slow", "onnxruntime", found)
    assert predicted is not None
    assert predicted.ms == pytest.approx(takes(found, 5.0), rel=0.3)
    assert predicted.relative_error >= 0.5  # nothing could be left out


def test_the_latest_measurements_correct_the_table() -> None:
    table = learned()
    found = network(32, 6)
    before = table.predict("pi", "onnxruntime", found)
    for width in (20, 28, 36, 44, 52, 60):  # the device got warm
        table.observe("pi", "onnxruntime", network(width, 3), takes(network(width, 3), 1.6))
    after = table.predict("pi", "onnxruntime", found)
    assert before is not None and after is not None
    assert abs(after.ms / takes(found, 1.6) - 1) < 0.6 * abs(before.ms / takes(found, 1.6) - 1)


def test_far_beyond_what_was_measured_the_error_grows() -> None:
    table = learned()
    near = table.predict("pi", "onnxruntime", network(64, 3))
    far = table.predict("pi", "onnxruntime", network(256, 20))
    assert near is not None and far is not None
    assert far.relative_error > 3 * near.relative_error


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    times=st.lists(st.floats(0.01, 500), min_size=4, max_size=7),
    factor=st.floats(1, 50),
    place=st.integers(0, 3),
    data=st.data(),
)
def test_more_work_in_one_kernel_never_takes_less(
    times: list[float], factor: float, place: int, data: st.DataObject
) -> None:
    table = LatencyTable()
    for found, ms in zip(NETWORKS, times, strict=False):
        table.observe("c", "r", found, ms)
    found = network(data.draw(st.integers(1, 100)), 3)
    kernel = found[place]
    more = [*found]
    more[place] = Kernel(
        kernel.operator, kernel.given, kernel.made, kernel.precision, int(kernel.macs * factor),
        kernel.weight_bytes, kernel.reads,
    )  # fmt: skip
    less, greater = table.predict("c", "r", found), table.predict("c", "r", more)
    assert less is None or (greater is not None and greater.ms >= less.ms * (1 - 1e-9) > 0)


_rows = st.lists(
    st.tuples(st.sampled_from(["a", "b"]), st.integers(1, 40), st.integers(1, 6), st.floats(0.01, 100)),
    max_size=12,
)


def _table(rows: list[tuple[str, int, int, float]]) -> LatencyTable:
    table = LatencyTable()
    for name, width, depth, ms in rows:
        table.observe(name, "r", network(width, depth), ms)
    return table


@settings(max_examples=40, deadline=None)
@given(_rows)
def test_a_table_comes_back_from_json(rows: list[tuple[str, int, int, float]]) -> None:
    table = _table(rows)
    text = json.dumps(table.to_json())
    back = LatencyTable.from_json(json.loads(text))
    assert json.dumps(back.to_json()) == text
    assert back.predict("a", "r", network(7, 3)) == table.predict("a", "r", network(7, 3))


@settings(max_examples=40, deadline=None)
@given(_rows, _rows, _rows)
def test_merging_does_not_depend_on_the_order(
    one: list[tuple[str, int, int, float]],
    two: list[tuple[str, int, int, float]],
    three: list[tuple[str, int, int, float]],
) -> None:
    tables = [_table(rows) for rows in (one, two, three)]
    results = {json.dumps(a.merge(b).merge(c).to_json()) for a, b, c in permutations(tables)}
    results.add(json.dumps(tables[0].merge(tables[1].merge(tables[2])).to_json()))
    assert len(results) == 1
    whole = tables[0].merge(tables[1])
    assert whole.merge(tables[0]).to_json() == whole.to_json()  # nothing is counted twice


def test_what_a_job_learned_counts_as_later() -> None:
    known = learned()
    fresh = known.later()
    assert len(fresh) == 0
    for width in (20, 28, 36, 44):
        fresh.observe("pi", "onnxruntime", network(width, 3), takes(network(width, 3), 2.0))
    merged, found = known.merge(fresh), network(32, 6)
    assert len(merged) == 11
    before, after = known.predict("pi", "onnxruntime", found), merged.predict("pi", "onnxruntime", found)
    assert before is not None and after is not None
    assert after.ms > 1.2 * before.ms


def test_its_size_is_bounded_and_the_latest_stay() -> None:
    table = LatencyTable()
    for number in range(120):
        table.observe("c", "r", network(1 + number % 100, 2), 1.0 + number)
    assert len(table) == latency.MOST_NETWORKS
    kept = {row[3] for row in table.to_json()["rows"]}
    assert max(kept) == 120.0 and min(kept) == 121.0 - latency.MOST_NETWORKS
    for number in range(80):
        table.observe(f"class {number}", "r", network(8, 2), 1.0)
    assert len(table) <= latency.MOST_PAIRS - 1 + latency.MOST_NETWORKS
    assert len(json.dumps(table.to_json())) < 200_000


@pytest.mark.parametrize("ms", [0.0, -1.0, math.nan, math.inf])
def test_what_is_no_time_is_refused(ms: float) -> None:
    with pytest.raises(InvalidInput, match="no measurement"):
        LatencyTable().observe("c", "r", network(8, 2), ms)


@pytest.mark.parametrize(
    "raw",
    [
        {"version": 1},
        {"version": 1, "rows": [1]},
        {"version": 1, "rows": [["c", "r", {"conv/fp32": [1, 2, 3]}, 1.0, 1, False]]},
        {"version": 1, "rows": [["c", "r", {"conv/fp32": [1, 2, 3, -4]}, 1.0, 1, False]]},
        {"version": 1, "rows": [["c", "r", {"conv/fp32": [1, 2, 3, 4]}, 0.0, 1, False]]},
        {"version": 1, "rows": [["c", "r", {"conv/fp32": [1, 2, 3, math.nan]}, 1.0, 1, False]]},
    ],
)
def test_damaged_tables_are_refused(raw: dict[str, object]) -> None:
    with pytest.raises(InvalidInput, match="no latency table"):
        LatencyTable.from_json(raw)


def test_a_table_of_another_version_is_empty() -> None:
    assert len(LatencyTable.from_json({"version": 99, "rows": "anything"})) == 0


def test_profiled_kernels_help_where_networks_are_few() -> None:
    """Two networks cannot tell a convolution's cost from a matrix product's; a profile can."""

    def event(number: int, kernel: Kernel) -> dict[str, object]:
        given = [{"float": list(kernel.given)}]
        if kernel.operator == "conv":
            given.append({"float": [kernel.made[1], kernel.given[1], 3, 3]})
        args = {
            "op_name": "Conv" if kernel.operator == "conv" else "Gemm",
            "input_type_shape": given,
            "output_type_shape": [{"float": list(kernel.made)}],
        }
        return {"cat": "Node", "name": f"{number}_kernel_time", "dur": 1000 * takes([kernel]), "args": args}

    def profile(found: list[Kernel]) -> str:
        return json.dumps([event(number, kernel) for number, kernel in enumerate(found)])

    wide = [
        Kernel("gemm", (1, 2048), (1, 2048), macs=1 << 22, weight_bytes=1 << 24, reads=2048),
        *network(16, 2),
    ]
    plain, helped = learned(count=3), learned(count=3)
    helped.observe_profile("pi", "onnxruntime", profile(wide), ms=takes(wide))
    off = []
    for table in (plain, helped):
        predicted = table.predict("pi", "onnxruntime", wide)
        assert predicted is not None
        off.append(abs(math.log(predicted.ms / takes(wide))))
    assert off[1] < off[0]


# ---------------------------------------------------------------------------- real measurements


def graph(width: int, depth: int, operator: str) -> bytes:
    """A convolution that halves 64x64 pixels, and `depth` more: 3x3, 1x1, or each channel by itself."""
    from onnx import TensorProto, helper, numpy_helper

    nodes, weights, last = [], [], "picture"
    for number in range(depth + 1):
        kernel = 1 if operator == "pointwise" and number else 3
        groups = width if operator == "depthwise" and number % 2 else 1
        shape = (width, 3 if number == 0 else width // groups, kernel, kernel)
        weights.append(numpy_helper.from_array(np.full(shape, 0.01, np.float32), f"weight{number}"))
        nodes.append(
            helper.make_node(
                "Conv", [last, f"weight{number}"], [f"made{number}"], group=groups,
                strides=[1 if number else 2] * 2, pads=[kernel // 2] * 4,
            )
        )  # fmt: skip
        nodes.append(helper.make_node("Relu", [f"made{number}"], [f"kept{number}"]))
        last = f"kept{number}"
    nodes.append(helper.make_node("GlobalAveragePool", [last], ["answer"]))
    given = helper.make_tensor_value_info("picture", TensorProto.FLOAT, ["batch", 3, 64, 64])
    made = helper.make_tensor_value_info("answer", TensorProto.FLOAT, ["batch", width, 1, 1])
    whole = helper.make_graph(nodes, "network", [given], [made], weights)
    content: bytes = helper.make_model(
        whole, opset_imports=[helper.make_opsetid("", 20)], ir_version=10
    ).SerializeToString()
    return content


SHAPES = (
    (8, 2, "conv"), (4, 80, "pointwise"), (64, 3, "conv"), (48, 1, "conv"), (4, 60, "pointwise"),
    (8, 1, "conv"),
    (16, 30, "depthwise"), (8, 50, "depthwise"), (24, 2, "conv"), (64, 2, "conv"), (4, 20, "conv"),
    (8, 30, "conv"), (32, 12, "pointwise"), (64, 6, "pointwise"), (96, 2, "conv"), (4, 20, "depthwise"),
)  # fmt: skip


def test_real_networks_are_predicted_better_than_by_counting_multiply_adds() -> None:
    """Half of the networks teach, half are asked for: long and thin ones against short and wide ones."""
    import onnxruntime
    from scipy.stats import spearmanr

    graphs = [graph(*shape) for shape in SHAPES]
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    sessions = [onnxruntime.InferenceSession(g, options, providers=["CPUExecutionProvider"]) for g in graphs]
    feed = {"picture": np.zeros((1, 3, 64, 64), np.float32)}
    least = [math.inf] * len(sessions)
    for _ in range(25):  # interleaved: a busy moment hits all of them
        for number, session in enumerate(sessions):
            started = time.perf_counter()
            session.run(None, feed)
            least[number] = min(least[number], 1000 * (time.perf_counter() - started))
    found = [latency.kernels(content) for content in graphs]
    table = LatencyTable()
    for kernels, ms in zip(found[::2], least[::2], strict=True):
        table.observe("here", "onnxruntime", kernels, ms)
    asked = [table.predict("here", "onnxruntime", kernels) for kernels in found[1::2]]
    told = [prediction.ms for prediction in asked if prediction is not None]
    assert len(told) == len(SHAPES) // 2
    assert float(spearmanr(told, least[1::2]).statistic) > 0.7
    macs = [sum(kernel.macs for kernel in kernels) for kernels in found]
    rate = float(np.median([ms / count for count, ms in zip(macs[::2], least[::2], strict=True)]))
    counted = [rate * count for count in macs[1::2]]
    assert _off(told, least[1::2]) < _off(counted, least[1::2])


def _off(told: list[float], true: list[float]) -> float:
    """Mean absolute logarithm of told over true."""
    return float(np.mean(np.abs(np.log(np.array(told) / np.array(true)))))
