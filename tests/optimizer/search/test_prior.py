"""What was measured of quantizers is added up, and refuses only what is slow beyond its spread."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shoal_optimizer.analysis import Analysis, Layer
from shoal_optimizer.search.prior import Key, PriorTable, Ratio, kind_of, tier_of

DYNAMIC = Key("dynamic", "onnx", "onnxruntime", "avx2", "convolutional")


def table(*ratios: float) -> PriorTable:
    found = PriorTable()
    for ratio in ratios:
        found.observe(DYNAMIC, ratio)
    return found


def test_what_is_much_slower_is_refused_with_its_figures() -> None:
    said = table(7.5, 8.0, 8.6).verdict(DYNAMIC)
    assert said.startswith("on AVX2 dynamic INT8 is 8x slower here than fp32 in onnxruntime")
    assert "3 measured" in said and said.endswith("not tried")


@pytest.mark.parametrize("ratios", [(), (8.0, 8.0), (0.4, 0.5, 0.6), (0.5, 2.0, 9.0), (1.2, 1.3, 1.25)])
def test_little_knowledge_and_wide_spread_refuse_nothing(ratios: tuple[float, ...]) -> None:
    assert table(*ratios).verdict(DYNAMIC) == ""


def test_another_instruction_set_is_another_entry() -> None:
    other = Key("dynamic", "onnx", "onnxruntime", "avx512vnni", "convolutional")
    assert table(8, 8, 8).verdict(other) == ""


@given(st.lists(st.floats(0.05, 50), min_size=1, max_size=20), st.integers(0, 20))
def test_tables_of_two_searches_add_up(values: list[float], cut: int) -> None:
    together, first, second = PriorTable(), PriorTable(), PriorTable()
    for place, value in enumerate(values):
        together.observe(DYNAMIC, value)
        (first if place < cut else second).observe(DYNAMIC, value)
    first.merge(PriorTable.from_json(second.to_json()))
    one, other = together.get(DYNAMIC), first.get(DYNAMIC)
    assert one is not None and other is not None and one.n == other.n == len(values)
    assert one.mean == pytest.approx(other.mean, abs=1e-9)
    assert one.squares == pytest.approx(other.squares, abs=1e-6)
    assert min(values) * 0.999 <= one.value <= max(values) * 1.001


@given(st.one_of(st.none(), st.integers(), st.lists(st.dictionaries(st.text(max_size=9), st.floats()))))
def test_any_json_is_read_or_left_aside(raw: object) -> None:
    assert len(PriorTable.from_json(raw)) == 0


@pytest.mark.parametrize("value", [0.0, -1.0, math.nan, math.inf])
def test_no_measurement_is_not_counted(value: float) -> None:
    assert len(table(value)) == 0
    assert Ratio().spread == math.inf


def test_tiers_are_those_of_class_names() -> None:
    assert tier_of(["avx2", "avx512f", "avx512_vnni"]) == "avx512vnni"
    assert (tier_of(["avx2"]), tier_of(["neon", "dotprod"]), tier_of([])) == ("avx2", "dotprod", "base")


def layer(kind: str, macs: int, output: tuple[int, ...]) -> Layer:
    return Layer(kind, kind, 1, macs, output, 4)


def test_kinds_of_networks() -> None:
    def analysis(share: float, *layers: Layer) -> Analysis:
        return Analysis(1, 4, sum(found.macs for found in layers), 1, share, layers)

    wide = layer("Conv2d", 32 * 64 * 9 * 32, (32, 8, 8))
    thin = layer("Conv2d", 32 * 64 * 9, (32, 8, 8))
    assert kind_of(analysis(1.0, wide, wide)) == "convolutional"
    assert kind_of(analysis(1.0, wide, thin)) == "depthwise"
    assert kind_of(analysis(0.0, layer("Linear", 100, (10,)))) == "dense"
    assert kind_of(analysis(0.0, layer("LSTM", 0, (10,)))) == "recurrent"
