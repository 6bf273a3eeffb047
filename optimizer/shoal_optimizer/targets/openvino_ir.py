"""OpenVINO's own format (IR): made from the float ONNX graph, int8 and 4-bit weights by NNCF.

Models are read with `Core.read_model`, the reader behind `openvino.convert_model` without its telemetry.
"""

from __future__ import annotations

import contextlib
import io
import logging
import os
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from shoal_protos.errors import MissingExtra, Unsupported

if TYPE_CHECKING:
    from shoal_optimizer.targets.base import Calibration
    from shoal_optimizer.targets.onnx import Scheme

EXTRA = "openvino-export"
XML, BIN = "model.xml", "model.bin"
METHODS = ("minmax", "percentile")
OUTLIERS = 1e-5  # share of values that "percentile" cuts at each end, as ONNX Runtime's 99.999
# Activations with negative values, where symmetric ranges waste half of the codes (NNCF's advice).
_ASYMMETRIC = ("Gelu", "Erf", "Elu", "PRelu", "LeakyRelu", "HardSwish", "Sigmoid", "Mish", "Swish")
_NARROW = {"INT16": 5, "UINT16": 4}  # onnx.TensorProto types that need a way by INT32
_INT32 = 6


def has_nncf() -> bool:
    """True when NNCF can be imported; asks without importing, which takes seconds."""
    from importlib.util import find_spec

    return find_spec("nncf") is not None


def _openvino() -> Any:
    try:
        import openvino
    except ImportError as error:
        raise MissingExtra(EXTRA, "openvino") from error
    return openvino


def _nncf() -> Any:
    os.environ.setdefault("NNCF_CI", "1")  # else it reports its use to its makers
    try:
        import nncf
    except ImportError as error:
        raise MissingExtra(EXTRA, "nncf") from error
    nncf.set_log_level(logging.ERROR)
    return nncf


def versions() -> dict[str, str]:
    """Versions of the tools, for the lineage."""
    from importlib.metadata import PackageNotFoundError, version

    found = {}
    for name in ("openvino", "nncf"):
        with contextlib.suppress(PackageNotFoundError):
            found[name] = version(name)
    return found


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Progress bars go to standard output, which is a job's protocol."""
    from shoal_optimizer.targets.onnx import quiet

    with quiet(), contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        yield


# ---------------------------------------------------------------------------- ONNX in, files out


def widened(graph: bytes) -> bytes:
    """The ONNX graph with 16-bit integer inputs cast to INT32 first, unchanged where there are none.

    OpenVINO's low-precision passes take INT16, a scale and a quantized layer for quantized data and
    then refuse the graph (2026.4: "unexpected precision i16").
    """
    import onnx

    model = onnx.load_from_string(graph)
    constants = {item.name for item in model.graph.initializer}
    changed = False
    for item in model.graph.input:
        if item.name in constants or item.type.tensor_type.elem_type not in _NARROW.values():
            continue
        wide = f"{item.name}_int32"
        for node in model.graph.node:
            for place, name in enumerate(node.input):
                if name == item.name:
                    node.input[place] = wide
        model.graph.node.insert(
            0, onnx.helper.make_node("Cast", [item.name], [wide], f"{item.name}_widened", to=_INT32)
        )
        changed = True
    content: bytes = model.SerializeToString(deterministic=True)
    return content if changed else graph


def read(graph: bytes) -> Any:
    """An `openvino.Model` of an ONNX graph. NNCF writes into the constants of a model that it was given,
    also through clones: read anew for each use."""
    openvino = _openvino()
    with tempfile.TemporaryDirectory(prefix="shoal-openvino-") as folder:
        path = Path(folder) / "model.onnx"
        path.write_bytes(graph)
        return openvino.Core().read_model(str(path))


def saved(model: Any, graph: bytes) -> dict[str, bytes]:
    """The IR files of a model that was made of `graph`; equal models give equal bytes."""
    openvino = _openvino()
    _settle_names(model, graph)
    with tempfile.TemporaryDirectory(prefix="shoal-openvino-") as folder:
        openvino.save_model(model, str(Path(folder) / XML), compress_to_fp16=False)
        text = (Path(folder) / XML).read_text()
        return {XML: _slim(text).encode(), BIN: (Path(folder) / BIN).read_bytes()}


def _settle_names(model: Any, graph: bytes) -> None:
    """Gives operations that no ONNX name is known for one by place: OpenVINO numbers them on through a
    process's life."""
    import onnx

    proto = onnx.load_from_string(graph).graph
    known = {node.name for node in proto.node} | {name for node in proto.node for name in node.output}
    known |= {item.name for items in (proto.input, proto.output, proto.initializer) for item in items}
    for place, operation in enumerate(model.get_ordered_ops()):
        if operation.get_friendly_name().partition("/")[0] not in known:
            operation.set_friendly_name(f"{operation.get_type_name()}-{place}")


def _slim(xml: str) -> str:
    """The text without indentation and without the tools' settings behind the graph: a third less."""
    head, mark, tail = xml.rpartition("\n\t<rt_info>")
    if mark and "</edges>" in head:
        xml = head + tail.partition("\n\t</rt_info>")[2]
    return re.sub(r"\n\t+", "\n", xml)


# ---------------------------------------------------------------------------- NNCF


def refusal(calibration: Calibration) -> str:
    """Why NNCF can't follow this calibration, "" when it can."""
    if calibration.pinned:
        return "nncf.quantize takes no learned ranges"
    if calibration.method not in METHODS:
        return f"NNCF does not choose ranges by '{calibration.method}'"
    return "" if has_nncf() else f"NNCF is not installed (pip install 'shoal[{EXTRA}]')"


def quantized(graph: bytes, calibration: Calibration, scheme: Scheme) -> Any:
    """A model with FakeQuantize operations where OpenVINO's CPU plug-in wants them.

    The layers of preprocess, postprocess and `calibration.keep_float` stay in float. Ranges are the
    smallest and largest values seen: NNCF's default, the mean of each item's, cost 4 to 14 dB of
    signal-to-noise on five of six measured networks.

    Raises:
        Unsupported: see `refusal`.
    """
    reason = refusal(calibration)
    if reason:
        raise Unsupported(f"OpenVINO's own int8 can't be made: {reason}.")
    nncf = _nncf()
    with _quiet():
        model = read(graph)
        inputs = calibration.inputs
        items = nncf.Dataset(
            [np.ascontiguousarray(inputs[place : place + 1]) for place in range(len(inputs))]
        )
        return nncf.quantize(
            model,
            items,
            preset=_preset(nncf, graph),
            model_type=nncf.ModelType.TRANSFORMER if _attends(graph) else None,
            target_device=nncf.TargetDevice.CPU,
            subset_size=len(inputs),
            ignored_scope=_ignored(nncf, model, graph, calibration.keep_float),
            advanced_parameters=_advanced(nncf, calibration.method, scheme),
        )


def _advanced(nncf: Any, method: str, scheme: Scheme) -> Any:
    from nncf.quantization.range_estimator import (
        AggregatorType,
        RangeEstimatorParameters,
        RangeEstimatorParametersSet,
        StatisticsCollectorParameters,
        StatisticsType,
    )

    ranges = RangeEstimatorParametersSet.MINMAX
    if method == "percentile":
        end = StatisticsCollectorParameters(
            statistics_type=StatisticsType.QUANTILE,
            aggregator_type=AggregatorType.MEAN,
            quantile_outlier_prob=OUTLIERS,
        )
        ranges = RangeEstimatorParameters(min=end, max=end)
    # Halved weights where 16-bit sums would overflow: x86 without VNNI.
    fix = nncf.OverflowFix.ENABLE if scheme.reduce_range else nncf.OverflowFix.DISABLE
    return nncf.AdvancedQuantizationParameters(overflow_fix=fix, activations_range_estimator_params=ranges)


def _preset(nncf: Any, graph: bytes) -> Any:
    import onnx

    kinds = {node.op_type for node in onnx.load_from_string(graph).graph.node}
    presets = nncf.QuantizationPreset
    return presets.MIXED if kinds & set(_ASYMMETRIC) else presets.PERFORMANCE


def _attends(graph: bytes) -> bool:
    """True when the graph multiplies two activations and has a softmax: attention."""
    import onnx

    proto = onnx.load_from_string(graph).graph
    stored = {item.name for item in proto.initializer}
    products = any(node.op_type == "MatMul" and not stored & set(node.input) for node in proto.node)
    return products and any(node.op_type == "Softmax" for node in proto.node)


def _ignored(nncf: Any, model: Any, graph: bytes, keep_float: tuple[str, ...] = ()) -> Any:
    """The operations that stay in float, by the names that OpenVINO kept of the ONNX nodes."""
    from shoal_optimizer.targets.onnx import excluded_nodes

    known = {operation.get_friendly_name() for operation in model.get_ops()}
    names = sorted(known & {*excluded_nodes(graph), *keep_float})
    return nncf.IgnoredScope(names=names, validate=False)


def four_bit_weights(graph: bytes, keep_float: tuple[str, ...] = ()) -> Any:
    """A model whose matrix products have symmetric int4 weights, and its convolutions int8 ones.

    Raises:
        MissingExtra: NNCF is not installed.
        Unsupported: no weight of the model takes 4 bits.
    """
    nncf = _nncf()
    with _quiet():
        model = read(graph)
        made = nncf.compress_weights(
            model,
            mode=nncf.CompressWeightsMode.INT4_SYM,
            group_size=-1,  # one scale a row: the groups of language models don't divide small layers
            ratio=1.0,
            all_layers=True,
            ignored_scope=_ignored(nncf, model, graph, keep_float),
        )
    constants = [operation for operation in made.get_ops() if operation.get_type_name() == "Constant"]
    if not any(item.get_element_type().get_type_name() in ("i4", "u4") for item in constants):
        raise Unsupported(
            "No weight of this model is stored in 4 bits by NNCF.",
            "Use the precision int8_weights: 4 bits are for matrix products.",
        )
    return made
