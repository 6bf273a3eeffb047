"""Dynamic int8 for ONNX Runtime: weights are stored as int8, activations get their range at each call.

It needs no calibration data and is for matrix products and LSTMs. Convolutions become ConvInteger, which was
measured 3 to 8 times slower than float, so they are left alone here and refused by the technique.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shoal_protos.errors import InvalidInput, MissingExtra

if TYPE_CHECKING:
    from shoal_optimizer.targets.onnx import Scheme

KINDS = ("MatMul", "Gemm", "LSTM", "Attention")


def quantized(graph: bytes, scheme: Scheme, excluded: list[str]) -> bytes:
    """The graph with dynamic int8 matrix products and LSTMs.

    Args:
        excluded: names of the nodes that stay in float.

    Raises:
        InvalidInput: nothing in the graph can be quantized so.
    """
    try:
        from onnxruntime.quantization import QuantType, quantize_dynamic
    except ImportError as error:
        raise MissingExtra("optimizer", "onnxruntime") from error
    import onnx

    with tempfile.TemporaryDirectory(prefix="shoal-quantize-") as name:
        source, target = Path(name) / "float.onnx", Path(name) / "int8.onnx"
        source.write_bytes(folded(graph))
        quantize_dynamic(
            str(source),
            str(target),
            op_types_to_quantize=list(KINDS),
            per_channel=True,
            reduce_range=scheme.reduce_range,
            weight_type=QuantType.QInt8,
            nodes_to_exclude=excluded,
            # A product of two activations has no weight to store and gains nothing.
            extra_options={"MatMulConstBOnly": True},
        )
        made = target.read_bytes()
    if not any(_integer(node) for node in onnx.load_from_string(made).graph.node):
        raise InvalidInput(
            "The model has no matrix product or LSTM with stored weights: dynamic int8 changes nothing.",
            "Use the method minmax.",
        )
    return made


def folded(graph: bytes) -> bytes:
    """The graph with stored weights where the exporter left a computation on weights, as before an LSTM."""
    import onnx
    from onnxscript import optimizer

    model = onnx.load_from_string(graph)
    largest = max((len(item.raw_data) for item in model.graph.initializer), default=0)
    done = optimizer.optimize(model, input_size_limit=largest + 1, output_size_limit=largest + 1)
    content: bytes = done.SerializeToString()
    return content


def _integer(node: Any) -> bool:
    return node.op_type in ("MatMulInteger", "DynamicQuantizeLSTM", "QAttention")
