"""The model of `bundles` as `.tflite`, written operation by operation with LiteRT's own schema."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import numpy as np

from shoal_protos.bundle import Bundle
from tests.agent import bundles
from tests.agent.bundles import CLASSES, SIDE, Array

FILE = "model.tflite"
_WIDTH = 4  # channels of the convolution


class Builder:
    """One subgraph. Shapes are written for a batch of one; `single` closes the batch to that."""

    def __init__(self, single: bool = False) -> None:
        from ai_edge_litert import schema_py_generated as schema

        self.schema = schema
        self.single = single
        self.graph = schema.SubGraphT()
        self.graph.tensors, self.graph.operators = [], []
        self.buffers = [schema.BufferT()]
        self.codes: list[int] = []

    def tensor(
        self,
        name: str,
        kind: Any,
        shape: tuple[int, ...] = (),
        value: Array | None = None,
        scales: Any = None,
        zero: int = 0,
        fixed: bool = False,
    ) -> int:
        made = self.schema.TensorT()
        made.name, made.type = name, getattr(self.schema.TensorType, kind)
        made.shape = list(shape if value is None else value.shape)
        if value is None and not self.single and not fixed:
            made.shapeSignature = [-1, *shape[1:]]
        if value is not None:
            buffer = self.schema.BufferT()
            buffer.data = np.frombuffer(np.ascontiguousarray(value).tobytes(), np.uint8)
            made.buffer = len(self.buffers)
            self.buffers.append(buffer)
        if scales is not None:
            made.quantization = self.schema.QuantizationParametersT()
            made.quantization.scale = np.atleast_1d(np.asarray(scales, np.float32))
            made.quantization.zeroPoint = np.full(made.quantization.scale.shape, zero, np.int64)
        self.graph.tensors.append(made)
        return len(self.graph.tensors) - 1

    def operation(self, kind: str, inputs: list[int], output: int, options: str = "", **values: Any) -> int:
        code = getattr(self.schema.BuiltinOperator, kind)
        if code not in self.codes:
            self.codes.append(code)
        made = self.schema.OperatorT()
        made.opcodeIndex, made.inputs, made.outputs = self.codes.index(code), inputs, [output]
        if options:
            made.builtinOptionsType = getattr(self.schema.BuiltinOptions, options)
            made.builtinOptions = getattr(self.schema, f"{options}T")()
            for key, value in values.items():
                setattr(made.builtinOptions, key, value)
        self.graph.operators.append(made)
        return output

    def finish(self, inputs: dict[str, int], outputs: dict[str, int], named: bool = True) -> bytes:
        import flatbuffers

        self.graph.inputs, self.graph.outputs = list(inputs.values()), list(outputs.values())
        model = self.schema.ModelT()
        model.version, model.description = 3, "test"
        model.operatorCodes = [self._code(code) for code in self.codes]
        model.subgraphs, model.buffers = [self.graph], self.buffers
        signature = self.schema.SignatureDefT()
        signature.signatureKey, signature.subgraphIndex = "serving_default", 0
        signature.inputs, signature.outputs = self._names(inputs), self._names(outputs)
        model.signatureDefs = [signature] if named else []
        builder = flatbuffers.Builder(1 << 16)
        builder.Finish(model.Pack(builder), b"TFL3")
        return bytes(builder.Output())

    def _code(self, code: int) -> Any:
        made = self.schema.OperatorCodeT()
        made.builtinCode, made.deprecatedBuiltinCode, made.version = code, min(code, 127), 1
        if code in (self.schema.BuiltinOperator.CONV_2D, self.schema.BuiltinOperator.FULLY_CONNECTED):
            made.version = 4
        return made

    def _names(self, tensors: dict[str, int]) -> list[Any]:
        found = []
        for name, index in tensors.items():
            made = self.schema.TensorMapT()
            made.name, made.tensorIndex = name, index
            found.append(made)
        return found


@functools.cache
def image_model(seed: int = 0, single: bool = False, int8: bool = False, named: bool = True) -> bytes:
    """uint8 NHWC in, float32 logits out, as `bundles.expected` computes them; int8 in the middle or not."""
    values = bundles.weights(seed)
    kernel = values["conv"].transpose(0, 2, 3, 1)
    flat = values["dense"].reshape(_WIDTH, SIDE, SIDE, CLASSES).transpose(1, 2, 0, 3).reshape(-1, CLASSES)
    matrix = np.ascontiguousarray(flat.T)
    b = Builder(single)
    image, size = (1, SIDE, SIDE, 1), (1, SIDE, SIDE, _WIDTH)
    pixels = b.tensor("image", "UINT8", image)
    floats = b.operation("CAST", [pixels], b.tensor("floats", "FLOAT32", image))
    scale = b.tensor("scale", "FLOAT32", value=np.asarray(1 / 16, np.float32))
    unit = b.operation("MUL", [floats, scale], b.tensor("unit", "FLOAT32", image), "MulOptions")
    kind, steps = ("INT8", _ranges(seed)) if int8 else ("FLOAT32", (None, None, None))
    zeros = (-128, -128, 0) if int8 else (0, 0, 0)
    first = unit
    if int8:
        first = b.operation("QUANTIZE", [unit], b.tensor("q", kind, image, None, steps[0], zeros[0]))
    planes = b.operation(
        "CONV_2D",
        [first, *_parameters(b, "conv", kernel, steps[0])],
        b.tensor("planes", kind, size, None, steps[1], zeros[1]),
        "Conv2DOptions",
        padding=b.schema.Padding.SAME,
        strideW=1,
        strideH=1,
        fusedActivationFunction=b.schema.ActivationFunctionType.RELU,
    )
    wanted = b.tensor(
        "shape", "INT32", value=np.asarray([1 if single else -1, SIDE * SIDE * _WIDTH], np.int32)
    )
    row = b.operation(
        "RESHAPE",
        [planes, wanted],
        b.tensor("row", kind, (1, SIDE * SIDE * _WIDTH), None, steps[1], zeros[1]),
    )
    last = b.operation(
        "FULLY_CONNECTED",
        [row, *_parameters(b, "dense", matrix, steps[1])],
        b.tensor("sums", kind, (1, CLASSES), None, steps[2], zeros[2]),
        "FullyConnectedOptions",
    )
    if int8:
        last = b.operation("DEQUANTIZE", [last], b.tensor("sums_f", "FLOAT32", (1, CLASSES)))
    return b.finish({"image": pixels}, {"logits": last}, named)


@functools.cache
def weight_only_model(dynamic: bool = False) -> bytes:
    """One matrix product on flattened pixels whose weights are stored as int8; `dynamic` = and used so."""
    random = np.random.default_rng(5)
    b, size = Builder(), SIDE * SIDE
    pixels = b.tensor("image", "UINT8", (1, SIDE, SIDE, 1))
    floats = b.operation("CAST", [pixels], b.tensor("floats", "FLOAT32", (1, SIDE, SIDE, 1)))
    wanted = b.tensor("shape", "INT32", value=np.asarray([-1, size], np.int32))
    row = b.operation("RESHAPE", [floats, wanted], b.tensor("row", "FLOAT32", (1, size)))
    whole = random.integers(-127, 128, (CLASSES, size)).astype(np.int8)
    weights = b.tensor("dense", "INT8", value=whole, scales=0.01)
    if not dynamic:
        made = b.tensor("dense_f", "FLOAT32", (CLASSES, size), fixed=True)
        weights = b.operation("DEQUANTIZE", [weights], made)
    bias = b.tensor("bias", "FLOAT32", value=np.zeros(CLASSES, np.float32))
    logits = b.operation(
        "FULLY_CONNECTED",
        [row, weights, bias],
        b.tensor("sums", "FLOAT32", (1, CLASSES)),
        "FullyConnectedOptions",
    )
    return b.finish({"image": pixels}, {"logits": logits})


def _parameters(b: Builder, name: str, weights: Array, step: float | None) -> list[int]:
    """Weights and a zero bias, by one scale for each output channel where `step` is the input's scale."""
    zero = np.zeros(len(weights))
    if step is None:
        return [
            b.tensor(name, "FLOAT32", value=weights),
            b.tensor(f"{name}_bias", "FLOAT32", value=zero.astype(np.float32)),
        ]
    scales = np.abs(weights).reshape(len(weights), -1).max(1) / 127
    whole = np.rint(weights / scales.reshape(-1, *[1] * (weights.ndim - 1))).astype(np.int8)
    return [
        b.tensor(name, "INT8", value=whole, scales=scales),
        b.tensor(f"{name}_bias", "INT32", value=zero.astype(np.int32), scales=scales * step),
    ]


def _ranges(seed: int) -> tuple[float, float, float]:
    """Scales of pixels (0 to 1), planes (0 and up) and logits (both signs) that hold the test images."""
    logits = np.abs(bundles.expected(bundles.images(64), seed)).max()
    planes = np.clip(bundles.weights(seed)["conv"], 0, None).sum((1, 2, 3)).max()
    return 1 / 255, float(planes) / 255, float(logits) * 1.2 / 127


def bundle(folder: Path, *, seed: int = 0, single: bool = False, **more: Any) -> Bundle:
    """The digits-like model for LiteRT; `single` = a file of a fixed batch of one."""
    more.setdefault("golden", bundles.image_golden(seed))
    return bundles.write(folder, {FILE: image_model(seed, single)}, runtime="litert", **more)


def int8_bundle(folder: Path, **more: Any) -> Bundle:
    more.setdefault("golden", bundles.image_golden())
    return bundles.write(folder, {FILE: image_model(int8=True)}, runtime="litert", precision="int8", **more)
