"""More threads and accelerators are tried where they may pay and taken where they clearly do."""

from __future__ import annotations

from shoal_optimizer.jobspec import ProfileClass, RuntimeOptions
from shoal_optimizer.meter import Figure, Measurement
from shoal_optimizer.objective import parse
from shoal_optimizer.search import options

FOUR = ProfileClass("x86_64.avx2.4c+onnxruntime", ("avx2",), {"onnxruntime": "1"})
TWO, ALL = RuntimeOptions(2), RuntimeOptions(4)


def measured(ms: float, error: float = 0.02) -> Measurement:
    figure = Figure(ms, ms * (1 - error), ms * (1 + error), 100)
    return Measurement("b", "c", "timing", "measured", "local", figure, figure)


def test_small_networks_and_single_cores_are_left_alone() -> None:
    assert options.worth_trying(FOUR, "onnxruntime", 1_000_000) == ()
    assert options.worth_trying(ProfileClass("x.1c+onnxruntime"), "onnxruntime", 10**9) == ()
    assert options.worth_trying(FOUR, "onnxruntime", 10**9) == (ALL, TWO)


def test_accelerators_come_first_and_the_cpu_is_no_option() -> None:
    board = ProfileClass("a.2c", providers={"onnxruntime": ("CPUExecutionProvider", "CUDAExecutionProvider")})
    found = options.worth_trying(board, "onnxruntime", 0)
    assert found == (RuntimeOptions(1, {"provider": "CUDAExecutionProvider"}),)
    assert options.worth_trying(board, "openvino", 0) == ()


def test_cores_are_taken_only_for_speed_that_is_asked_for() -> None:
    faster = {TWO: measured(6.0), ALL: measured(4.0)}
    assert options.best(parse("minimise latency_p95"), measured(10.0), faster) == ALL
    assert options.best(parse("minimise size"), measured(10.0), faster).default
    assert options.best(parse("latency_p95<=5ms; minimise size"), measured(10.0), faster) == ALL
    assert options.best(parse("latency_p95<=50ms; minimise size"), measured(10.0), faster).default


def test_noise_takes_no_core() -> None:
    objective = parse("minimise latency_p95")
    assert options.best(objective, measured(10.0), {TWO: measured(9.5)}).default
    assert options.best(objective, measured(10.0, 0.5), {TWO: measured(7.0, 0.5)}).default
    assert options.best(objective, None, {TWO: measured(1.0)}).default


def test_options_survive_json_and_have_short_keys() -> None:
    full = RuntimeOptions(4, {"provider": "GPU"})
    assert RuntimeOptions.from_json(full.to_json()) == full and full.key == "threads=4,provider=GPU"
    assert RuntimeOptions.from_json(None).default and RuntimeOptions().key == ""
