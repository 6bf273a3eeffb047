"""The ready networks of `--quick`: ResNet-8 and ResNet-20 in PyTorch, weights from ONNX initializers.

Both files hold convolutions with their batch norms folded in, in the order in which they run; so do these
modules. `checked` asserts that both answer alike before anything is done with them.
"""

from __future__ import annotations

import io
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional

from compression_parts.networks import mean
from compression_parts.pictures import Pictures

CIFAR = "cifar10_jpeg.npz"
PARITY = 1e-3  # largest difference of logits, as a share of the largest logit


class Folded(nn.Module):
    """A residual block without batch norm. `ends`: pads as TensorFlow does, right and below only."""

    def __init__(self, channels_in: int, channels_out: int, stride: int, project: bool, ends: bool) -> None:
        super().__init__()
        self.stride, self.ends = stride, ends and stride == 2
        self.widened = 0 if project else channels_out - channels_in
        self.shortcut = nn.Conv2d(channels_in, channels_out, 1, stride) if project and stride == 2 else None
        self.first = nn.Conv2d(channels_in, channels_out, 3, stride, 0 if self.ends else 1)
        self.second = nn.Conv2d(channels_out, channels_out, 3, 1, 1)

    def forward(self, pictures: Tensor) -> Tensor:
        inner = functional.pad(pictures, (0, 1, 0, 1)) if self.ends else pictures
        inner = self.second(functional.relu(self.first(inner)))
        beside = pictures
        if self.shortcut is not None:
            beside = self.shortcut(pictures)
        elif self.stride == 2:
            half = self.widened // 2
            beside = functional.pad(pictures[:, :, ::2, ::2], (0, 0, 0, 0, half, half))
        return functional.relu(inner + beside)


class Ready(nn.Module):
    """Stem, three stages of widths 16, 32, 64, mean, linear. [n, 3, 32, 32] -> logits [n, 10]."""

    def __init__(self, blocks: int, project: bool, ends: bool) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, 1, 1)
        layers, before = [], 16
        for width in (16, 32, 64):
            for place in range(blocks):
                stride = 2 if width != 16 and not place else 1
                layers.append(Folded(before, width, stride, project, ends))
                before = width
        self.stages = nn.Sequential(*layers)
        self.head = nn.Linear(64, 10)

    def forward(self, pictures: Tensor) -> Tensor:
        found: Tensor = self.head(mean(self.stages(functional.relu(self.stem(pictures)))))
        return found


class Bytes(nn.Module):
    """ResNet-8 takes 0..255."""

    def forward(self, pictures: Tensor) -> Tensor:
        return pictures.to(torch.float32)


class Normalised(nn.Module):
    """ResNet-20 takes what torchvision's models do."""

    def forward(self, pictures: Tensor) -> Tensor:
        middle = torch.tensor([0.485, 0.456, 0.406]).reshape(1, 3, 1, 1)
        spread = torch.tensor([0.229, 0.224, 0.225]).reshape(1, 3, 1, 1)
        return (pictures.to(torch.float32) / 255 - middle) / spread


@dataclass(frozen=True)
class Source:
    file: str
    make: Callable[[], nn.Module]
    scale: Callable[[], nn.Module]


SOURCES = {
    "resnet8": Source("resnet8_mlperftiny_cifar10.onnx", lambda: Ready(1, True, True), Bytes),
    "resnet20": Source("resnet20_cifar10.onnx", lambda: Ready(3, False, False), Normalised),
}


def read_weights(network: nn.Module, graph: bytes) -> nn.Module:
    """Fills `network` from the initializers of an ONNX file whose weighted operators run in the order in
    which the network's layers were made; a shortcut's 1x1 convolution may come before or after.

    Raises:
        ValueError: the graph has other layers than the network.
    """
    import onnx
    from onnx import numpy_helper

    proto = onnx.load_from_string(graph).graph
    known = {item.name: numpy_helper.to_array(item) for item in proto.initializer}
    given = [
        (known[node.input[1]], known[node.input[2]])
        for node in proto.node
        if node.op_type in ("Conv", "Gemm")
    ]
    layers = [layer for layer in network.modules() if isinstance(layer, nn.Conv2d | nn.Linear)]
    if len(layers) != len(given):
        raise ValueError(f"the graph has {len(given)} weighted layers, the network {len(layers)}")
    with torch.no_grad():
        for number, (layer, (weight, bias)) in enumerate(zip(layers, given, strict=True)):
            if tuple(layer.weight.shape) != weight.shape:
                raise ValueError(
                    f"layer {number} is {tuple(layer.weight.shape)}, the graph's weight {weight.shape}"
                )
            layer.weight.copy_(torch.from_numpy(weight.copy()))
            assert layer.bias is not None
            layer.bias.copy_(torch.from_numpy(bias.copy()))
    return network.eval()


def checked(name: str, pictures: np.ndarray) -> nn.Module:
    """The network `name` with its weights, compared with ONNX Runtime on `pictures` uint8 [n, 3, 32, 32].

    Raises:
        ValueError: it answers differently.
    """
    import onnxruntime

    source = SOURCES[name]
    graph = (data_folder() / "models" / source.file).read_bytes()
    network = read_weights(source.make(), graph)
    with torch.inference_mode():
        inputs = source.scale()(torch.from_numpy(pictures))
        got = network(inputs).numpy()
    session = onnxruntime.InferenceSession(graph, providers=["CPUExecutionProvider"])
    wanted: Any = session.run(None, {session.get_inputs()[0].name: inputs.numpy()})[0]
    worst = float(np.abs(got - wanted).max() / np.abs(wanted).max())
    if not worst <= PARITY:
        raise ValueError(f"{name} in PyTorch differs from {source.file} by {worst:.2g} of the largest logit")
    return network


def data_folder() -> Path:
    """Raises FileNotFoundError when SHOAL_DATA names no folder with the ready networks."""
    named = Path(os.environ.get("SHOAL_DATA") or "shared/data")
    if not (named / "models").is_dir():
        raise FileNotFoundError(
            f"{named / 'models'} is missing: set SHOAL_DATA to the folder of the data pack"
        )
    return named


def cifar(part: str, rows: Sequence[int] | np.ndarray) -> Pictures:
    """CIFAR-10 pictures as JPEG has them; a part is "train" or "test"."""
    with np.load(data_folder() / CIFAR, allow_pickle=False) as stored:
        content, offsets = stored[f"{part}_bytes"], stored[f"{part}_offsets"]
        classes = stored[f"{part}_y"][rows].astype(np.int64)
    pictures = np.empty((len(rows), 3, 32, 32), np.uint8)
    for place, row in enumerate(rows):
        with Image.open(io.BytesIO(content[offsets[row] : offsets[row + 1]].tobytes())) as picture:
            pictures[place] = np.asarray(picture.convert("RGB")).transpose(2, 0, 1)
    return Pictures(pictures, classes)
