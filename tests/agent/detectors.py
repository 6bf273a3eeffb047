"""A tiny detector for tests: its candidates are the coloured rectangles of a picture."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
from onnx import TensorProto, helper, numpy_helper
from PIL import Image, ImageDraw

from shoal_protos.bundle import BoxRule, Bundle, Signature, TensorSpec
from tests.agent import bundles

WIDTH, HEIGHT, CELL = 128, 96, 16
CELLS = (WIDTH // CELL) * (HEIGHT // CELL)
LABELS = ("red", "blue")
SIGNATURE = Signature(
    inputs=(TensorSpec("image", "UINT8", (-1, HEIGHT, WIDTH, 3), "NHWC", 0.0, 255.0),),
    outputs=(TensorSpec("boxes", "FP32", (-1, CELLS, 6)),),
    input_kind="image",
    output_kind="boxes",
    labels=LABELS,
    color="rgb",
    resize="letterbox",
    boxes=BoxRule(score_threshold=0.5, iou_threshold=0.3, max_boxes=10),
)


def detector_bundle(folder: Path) -> Bundle:
    """Each cell of 16 pixels proposes itself; its score for a class is how red or blue its mean is."""
    mix = np.zeros((2, 3, 1, 1), np.float32)
    mix[0, :, 0, 0], mix[1, :, 0, 0] = (1, -0.5, -0.5), (-0.5, -0.5, 1)
    y, x = np.meshgrid(np.arange(HEIGHT // CELL), np.arange(WIDTH // CELL), indexing="ij")
    corners = np.stack([x, y, x + 1, y + 1], -1).reshape(1, -1, 4).astype(np.float32)
    corners *= np.asarray([CELL / WIDTH, CELL / HEIGHT] * 2, np.float32)
    constants = {"mix": mix, "corners": corners, "scale": np.asarray(1 / 255, np.float32)}
    constants["flat"] = np.asarray([0, 2, -1], np.int64)
    constants["zero"] = np.asarray(0, np.float32)
    nodes = [
        helper.make_node("Cast", ["image"], ["f"], to=TensorProto.FLOAT),
        helper.make_node("Mul", ["f", "scale"], ["u"]),
        helper.make_node("Transpose", ["u"], ["t"], perm=[0, 3, 1, 2]),
        helper.make_node("AveragePool", ["t"], ["p"], kernel_shape=[CELL, CELL], strides=[CELL, CELL]),
        helper.make_node("Conv", ["p", "mix"], ["c"]),
        helper.make_node("Relu", ["c"], ["r"]),
        helper.make_node("Reshape", ["r", "flat"], ["s"]),
        helper.make_node("Transpose", ["s"], ["scores"], perm=[0, 2, 1]),
        # Corners for every picture of the batch: 0 * one score column + corners.
        helper.make_node("ReduceMax", ["scores"], ["one"], axes=[2], keepdims=1),
        helper.make_node("Mul", ["one", "zero"], ["nothing"]),
        helper.make_node("Add", ["nothing", "corners"], ["where"]),
        helper.make_node("Concat", ["where", "scores"], ["boxes"], axis=2),
    ]
    graph = helper.make_graph(
        nodes,
        "detector",
        [helper.make_tensor_value_info("image", TensorProto.UINT8, ["N", HEIGHT, WIDTH, 3])],
        [helper.make_tensor_value_info("boxes", TensorProto.FLOAT, ["N", CELLS, 6])],
        [numpy_helper.from_array(value, name) for name, value in constants.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    return bundles.write(
        folder, {"model.onnx": model.SerializeToString()}, signature=SIGNATURE, name="shapes"
    )


def scene(width: int = 640, height: int = 480) -> Image.Image:
    """A red square of a cell's size at the left, a blue one at the right, on gray."""
    image = Image.new("RGB", (width, height), (128, 128, 128))
    draw = ImageDraw.Draw(image)
    side = CELL * width // WIDTH
    draw.rectangle((side, side, 2 * side - 1, 2 * side - 1), fill=(255, 0, 0))
    draw.rectangle((5 * side, 3 * side, 6 * side - 1, 4 * side - 1), fill=(0, 0, 255))
    return image


def encoded(image: Image.Image, form: str = "PNG", **options: object) -> bytes:
    stream = io.BytesIO()
    image.save(stream, form, **options)
    return stream.getvalue()
