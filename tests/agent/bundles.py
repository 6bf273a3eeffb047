"""Small real bundles for tests: ONNX models made with `onnx`, IR made with `openvino`."""

from __future__ import annotations

import functools
import io
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from shoal_protos.bundle import (
    Bundle,
    BundleConfig,
    GoldenCases,
    Lineage,
    RuntimeNeed,
    Signature,
    TensorSpec,
    open_bundle,
    write_bundle,
)

Array = np.ndarray[Any, Any]
CLASSES = 10
SIDE = 8
IMAGE = Signature(
    inputs=(TensorSpec("image", "UINT8", (-1, SIDE, SIDE, 1), "NHWC", 0.0, 16.0),),
    outputs=(TensorSpec("logits", "FP32", (-1, CLASSES)),),
    input_kind="image",
    output_kind="logits",
    labels=tuple(f"digit-{i}" for i in range(CLASSES)),
    color="gray",
)
VECTOR = Signature(
    inputs=(TensorSpec("x", "FP32", (-1, 64)),),
    outputs=(TensorSpec("y", "FP32", (-1, CLASSES)),),
    output_kind="logits",
)


def weights(seed: int = 0) -> dict[str, Array]:
    random = np.random.default_rng(seed)
    return {
        "conv": random.normal(0, 0.3, (4, 1, 3, 3)).astype(np.float32),
        "dense": random.normal(0, 0.3, (4 * SIDE * SIDE, CLASSES)).astype(np.float32),
    }


def images(count: int, seed: int = 1) -> Array:
    return np.random.default_rng(seed).integers(0, 17, (count, SIDE, SIDE, 1), dtype=np.uint8)


def expected(batch: Array, seed: int = 0) -> Array:
    """The model's answer, by numpy alone."""
    values = weights(seed)
    x = np.pad(batch[..., 0].astype(np.float32) / 16, ((0, 0), (1, 1), (1, 1)))
    windows = np.lib.stride_tricks.sliding_window_view(x, (3, 3), axis=(1, 2))
    planes = np.maximum(np.einsum("nhwij,cij->nchw", windows, values["conv"][:, 0]), 0)
    return np.asarray(planes.reshape(len(batch), -1) @ values["dense"], np.float32)


def image_graph(seed: int = 0) -> onnx.ModelProto:
    """uint8 NHWC in; transposed to NCHW inside, convolved, flattened."""
    values = weights(seed)
    nodes = [
        helper.make_node("Cast", ["image"], ["f"], to=TensorProto.FLOAT),
        helper.make_node("Mul", ["f", "scale"], ["u"]),
        helper.make_node("Transpose", ["u"], ["t"], perm=[0, 3, 1, 2]),
        helper.make_node("Conv", ["t", "conv"], ["c"], pads=[1, 1, 1, 1]),
        helper.make_node("Relu", ["c"], ["r"]),
        helper.make_node("Flatten", ["r"], ["flat"]),
        helper.make_node("MatMul", ["flat", "dense"], ["logits"]),
    ]
    constants = {**values, "scale": np.asarray(1 / 16, np.float32)}
    graph = helper.make_graph(
        nodes,
        "image",
        [helper.make_tensor_value_info("image", TensorProto.UINT8, ["N", SIDE, SIDE, 1])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["N", CLASSES])],
        [numpy_helper.from_array(value, name) for name, value in constants.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)


def vector_graph(width: int = 64, depth: int = 1) -> onnx.ModelProto:
    random = np.random.default_rng(3)
    nodes, constants, last = [], [], "x"
    for level in range(depth):
        size = CLASSES if level == depth - 1 else width
        shape = (64 if level == 0 else width, size)
        weight = random.normal(0, shape[0] ** -0.5, shape).astype(np.float32)
        constants.append(numpy_helper.from_array(weight, f"w{level}"))
        out = "y" if level == depth - 1 else f"h{level}"
        nodes.append(helper.make_node("MatMul", [last, f"w{level}"], [out]))
        last = out
    graph = helper.make_graph(
        nodes,
        "vector",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", 64])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["N", CLASSES])],
        constants,
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)


@functools.cache
def image_ir(seed: int = 0) -> tuple[bytes, bytes]:
    """The same model with another inner layout: NHWC throughout, one dense kernel for each shift."""
    import openvino as ov
    from openvino import opset13 as ops

    values = weights(seed)
    image = ops.parameter([-1, SIDE, SIDE, 1], np.uint8, name="image")
    unit = ops.multiply(ops.convert(image, np.float32), np.float32(1 / 16))
    padded = ops.pad(
        unit, np.asarray([0, 1, 1, 0]), np.asarray([0, 1, 1, 0]), "constant", np.asarray(0, np.float32)
    )
    planes = None
    for row in range(3):
        for column in range(3):
            cut = ops.slice(
                padded,
                np.asarray([row, column]),
                np.asarray([row + SIDE, column + SIDE]),
                np.asarray([1, 1]),
                np.asarray([1, 2]),
            )
            term = ops.multiply(cut, values["conv"][:, 0, row, column].reshape(1, 1, 1, 4))
            planes = term if planes is None else ops.add(planes, term)
    dense = values["dense"].reshape(4, SIDE, SIDE, CLASSES).transpose(1, 2, 0, 3).reshape(-1, CLASSES)
    flat = ops.reshape(ops.relu(planes), np.asarray([0, SIDE * SIDE * 4]), True)
    logits = ops.matmul(flat, np.ascontiguousarray(dense), False, False)
    logits.output(0).get_tensor().set_names({"logits"})
    image.output(0).get_tensor().set_names({"image"})
    model = ov.Model([logits], [image], "image")
    with tempfile.TemporaryDirectory() as folder:
        ov.save_model(model, str(Path(folder) / "model.xml"), compress_to_fp16=False)
        return (Path(folder) / "model.xml").read_bytes(), (Path(folder) / "model.bin").read_bytes()


def quantized(model: onnx.ModelProto, samples: Array) -> onnx.ModelProto:
    """int8 QDQ form of a one-input model."""
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static

    name = model.graph.input[0].name

    class Reader(CalibrationDataReader):  # type: ignore[misc]
        def __init__(self) -> None:
            self.items: Iterator[Array] = iter(samples)

        def get_next(self) -> dict[str, Array] | None:
            item = next(self.items, None)
            return None if item is None else {name: item[None]}

    with tempfile.TemporaryDirectory() as folder:
        source, target = Path(folder) / "in.onnx", Path(folder) / "out.onnx"
        onnx.save(model, str(source))
        quantize_static(
            str(source),
            str(target),
            Reader(),
            quant_format=QuantFormat.QDQ,
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
            reduce_range=True,
        )
        return onnx.load(str(target))


def npz(arrays: Mapping[str, Array]) -> bytes:
    stream = io.BytesIO()
    np.savez(stream, allow_pickle=False, **arrays)
    return stream.getvalue()


def write(
    folder: Path,
    files: Mapping[str, bytes],
    *,
    signature: Signature = IMAGE,
    runtime: str = "onnxruntime",
    golden: Mapping[str, Array] | None = None,
    name: str = "digits",
    version: int = 1,
    **need: Any,
) -> Bundle:
    content = dict(files)
    cases = None
    if golden is not None:
        content["golden.npz"] = npz(golden)
        cases = GoldenCases("golden.npz")
    model_file = next(title for title in files if title.endswith((".onnx", ".xml", ".tflite")))
    config = BundleConfig(
        signature=signature,
        runtime=RuntimeNeed(runtime, model_file, **need),
        name=f"{name} v{version}",
        golden=cases,
        lineage=Lineage(model=name, model_version=version),
    )
    return open_bundle(folder, write_bundle(folder, config, content))


def image_golden(seed: int = 0, count: int = 8) -> dict[str, Array]:
    batch = images(count, seed=5)
    return {"input:image": batch, "output:logits": expected(batch, seed)}


def onnx_bundle(folder: Path, *, seed: int = 0, runtime: str = "onnxruntime", **more: Any) -> Bundle:
    """The digits-like model as ONNX, for either runtime."""
    more.setdefault("golden", image_golden(seed))
    return write(folder, {"model.onnx": image_graph(seed).SerializeToString()}, runtime=runtime, **more)


def ir_bundle(folder: Path, *, seed: int = 0, **more: Any) -> Bundle:
    """The same model as OpenVINO IR, of another inner layout."""
    xml, weights_file = image_ir(seed)
    more.setdefault("golden", image_golden(seed))
    return write(folder, {"model.xml": xml, "model.bin": weights_file}, runtime="openvino", **more)


def int8_bundle(folder: Path, *, runtime: str = "onnxruntime", **more: Any) -> Bundle:
    model = quantized(image_graph(), images(32))
    more.setdefault("golden", image_golden())
    return write(folder, {"model.onnx": model.SerializeToString()}, runtime=runtime, precision="int8", **more)


def vector_bundle(folder: Path, *, width: int = 64, depth: int = 1, **more: Any) -> Bundle:
    """64 floats in, 10 logits out: the smallest model, whose time per item falls with the batch."""
    graph = vector_graph(width, depth)
    return write(folder, {"model.onnx": graph.SerializeToString()}, signature=VECTOR, **more)
