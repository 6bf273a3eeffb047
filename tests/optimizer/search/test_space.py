"""The space follows the model's widths and the classes' runtimes."""

from __future__ import annotations

from shoal_optimizer.analysis import Analysis, Layer
from shoal_optimizer.jobspec import Budget, ProfileClass
from shoal_optimizer.objective import parse
from shoal_optimizer.search import engine, fidelity, frontier, sampler, space

ORT = ProfileClass("a+onnxruntime", ("avx2",), {"onnxruntime": "1"}, local=True)
BOTH = ProfileClass("a+onnxruntime+openvino", ("avx2",), {"onnxruntime": "1", "openvino": "1"}, local=True)
ARM = ProfileClass("b+onnxruntime", ("neon",), {"onnxruntime": "1"})


def analysis(*widths: int) -> Analysis:
    layers = tuple(Layer(f"l{i}", "Conv2d", 100, 1000, (w, 8, 8), 4) for i, w in enumerate(widths))
    return Analysis(100_000, 400_000, 1000 * len(widths), 1, 1.0, layers)


def test_narrow_models_are_pruned_less() -> None:
    wide = space.build(analysis(64, 128), [ORT], trainable=True)
    narrow = space.build(analysis(16, 16), [ORT], trainable=True)
    assert wide.ratios == space.RATIOS and max(narrow.ratios) <= 0.5
    assert space.build(analysis(64), [ORT], trainable=False).ratios == ()


def test_the_first_guesses_are_in_the_space() -> None:
    for widths in ((64, 128), (16, 16), (12, 12)):
        found = space.build(analysis(*widths), [ORT], trainable=True)
        assert all(params["ratio"] in found.ratios for params in found.known_good())
    assert [p["ratio"] for p in space.build(analysis(64), [ORT], trainable=True).known_good()] == [0.5, 0.625]


def test_classes_share_exports() -> None:
    exports = space.exports_for([ORT, BOTH, ARM])
    by = {(e.target, e.precision, e.isa): {c.name for c in e.classes} for e in exports}
    assert by["onnxruntime", "fp32", ()] == {ORT.name, BOTH.name, ARM.name}  # one float file for all
    assert by["onnxruntime", "int8", ("avx2",)] == {ORT.name, BOTH.name}
    assert by["onnxruntime", "int8", ("neon",)] == {ARM.name}
    assert by["openvino", "fp32", ()] == {BOTH.name}
    assert len({e.key for e in exports}) == len(exports)


def test_equal_networks_have_equal_keys_and_names() -> None:
    first, second = (space.network({"ratio": 0.375, "teacher": t, "epochs": 10}) for t in (True, False))
    assert first.name == "pruned37_5" and second.name == "pruned37_5-alone" and first.key != second.key
    whole = space.complete(first, "int8")
    assert whole.precision == "int8" and whole.training.key == first.key
    assert space.complete(whole, "int8") == whole and space.complete(first, "fp32") == first


def test_the_budget_bounds_the_networks() -> None:
    assert engine.networks_for(Budget(0.01)) == 0  # conversion only
    assert engine.networks_for(Budget(3.0)) == 2
    assert engine.networks_for(Budget(30.0)) == 29
    assert engine.networks_for(Budget(30.0, networks=4)) == 4


def test_what_cannot_be_small_enough_is_not_trained() -> None:
    assert "size" in fidelity.refusal(analysis(64), parse("size<=50kB; minimise latency_p95"))
    assert fidelity.refusal(analysis(64), parse("size<=500kB")) == ""
    assert fidelity.refusal(analysis(64), parse("latency_p95<=1us")) == ""  # counted work is only a guess


def test_single_weights_are_pruned_only_where_bytes_on_the_wire_count() -> None:
    plain = space.build(analysis(64), [ORT], trainable=True)
    sparse = space.build(analysis(64), [ORT], trainable=True, sparse=True)
    assert plain.sparsities == () and all("sparsity" not in params for params in plain.known_good())
    assert sparse.size() == 3 * plain.size()
    recipe = space.network(sparse.known_good()[0])
    assert [step.technique for step in recipe.steps] == ["channel_pruning", "distillation", "weight_pruning"]
    assert recipe.steps[-1].params["sparsity"] == 0.8 and recipe.name == "pruned50-zeros80"
    assert space.build(analysis(64), [ORT], trainable=False, sparse=True).sparsities == ()


def test_every_sparse_network_is_proposed_once() -> None:
    found = space.Space((0.5,), (True,), (6,), (), (0.8, 0.0))
    objective = parse("minimise wire")
    told: list[sampler.Told] = []
    while (params := sampler.propose(found, objective, told)) is not None:
        told.append(sampler.Told(params, {"accuracy": 0.9, "latency_p95": 1.0, "wire": 9.0}))
    assert sorted(result.params["sparsity"] for result in told) == [0.0, 0.8]
    assert {space.network(result.params).name for result in told} == {"pruned50-e6", "pruned50-e6-zeros80"}


def test_compressed_size_decides_only_where_the_objective_names_it() -> None:
    figures = {"accuracy": frontier.Estimate(0.9), "latency_p95": frontier.Estimate(1.0)}
    same = figures | {"size": frontier.Estimate(9.0), "memory": None}
    dense = frontier.Point("dense", same | {"wire": frontier.Estimate(8.0)})
    sparse = frontier.Point("sparse", same | {"wire": frontier.Estimate(3.0)})
    asked, other = parse("wire<=4B; minimise latency_p95"), parse("minimise size")
    assert [p.key for p in frontier.front([dense, sparse], metrics=frontier.metrics_for(asked))] == ["sparse"]
    assert len(frontier.front([dense, sparse], metrics=frontier.metrics_for(other))) == 2
    assert asked.choose(map(frontier.as_objective_point, [dense, sparse])).key == "sparse"
