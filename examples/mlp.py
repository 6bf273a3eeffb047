"""The first example of every course: a perceptron 784-256-128-10 on Fashion-MNIST, pruned by torch itself.

python examples/mlp.py --download      fetch the pictures once, train (a minute), write mlp.pt, compress it
shoal optimize examples/mlp.py         compress it for this machine

It is written as people write it before they know Shoal: `prune.l1_unstructured(amount=0.3)` is still a
mask on each layer, and the distillation loss (alpha 0.7, T 4) is typed out. Shoal takes the model as it
is: the masks become permanent, and later steps keep their zeros.

Fashion-MNIST (Zalando, MIT licence): 60 000 pictures of clothes of 28x28 pixels to learn from, 10 000 to
judge by. public_data.py says where `fashion_mnist.npz` is looked for. Debian has the archives in the package
dataset-fashion-mnist: point SHOAL_DATA at the folder with the four .gz files, and nothing is downloaded.

SHOAL_QUICK=1 takes every twentieth picture and one epoch: enough to see that everything runs.
"""

from __future__ import annotations

import argparse
import copy
import gzip
import os
from functools import cache
from pathlib import Path

import numpy as np
import torch
from public_data import Archive, DataSet, locate
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils import prune

from shoal_optimizer import Task, TensorSpec, targets
from shoal_optimizer.evaluation import evaluate_exported
from shoal_optimizer.recipe import Recipe, Step, apply

HERE = Path(__file__).parent
WEIGHTS = HERE / "mlp.pt"
QUICK = bool(os.environ.get("SHOAL_QUICK"))
SIZE = 28
LABELS = (
    "t-shirt", "trousers", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot",
)  # fmt: skip

# ---------------------------------------------------------------------------- data

_BASE = "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/"
_FILES = {
    "train_x": Archive(_BASE + "train-images-idx3-ubyte.gz", "8d4fb7e6c68d591d4c3dfef9ec88bf0d"),
    "train_y": Archive(_BASE + "train-labels-idx1-ubyte.gz", "25c81989df183df01b3e8a0aad5dffbe"),
    "test_x": Archive(_BASE + "t10k-images-idx3-ubyte.gz", "bef4ecab320f06d8554ea6380940ec79"),
    "test_y": Archive(_BASE + "t10k-labels-idx1-ubyte.gz", "bb300cfdad3c16e7a12a480ee83cd310"),
}


def pack(places: list[Path], target: Path) -> None:
    """Writes `target` from the four public files."""
    arrays = {name: read_idx(locate(places, archive.name)) for name, archive in _FILES.items()}
    np.savez_compressed(target, **arrays)  # type: ignore[arg-type]


def read_idx(path: Path) -> np.ndarray:
    """A gzip-compressed IDX file of bytes: two zeros, type 8, number of dimensions, their sizes, content."""
    content = gzip.decompress(path.read_bytes())
    if content[:3] != b"\0\0\x08":
        raise RuntimeError(f"{path.name} is no IDX file of bytes; remove it and try again")
    shape = np.frombuffer(content, ">u4", content[3], 4)
    return np.frombuffer(content, np.uint8, offset=4 + 4 * content[3]).reshape(tuple(shape))


DATA = DataSet(
    "fashion_mnist.npz", "Fashion-MNIST", "github.com/zalandoresearch/fashion-mnist", "mlp.py",
    tuple(_FILES.values()), pack,
)  # fmt: skip


@cache
def stored() -> dict[str, np.ndarray]:
    """The packed arrays by name, once."""
    with np.load(DATA.find(HERE), allow_pickle=False) as packed:
        return {name: packed[name] for name in packed.files}


def split(part: str) -> tuple[np.ndarray, np.ndarray]:
    """Pictures [n, 28, 28, 1] uint8 and classes [n] int64 of one part.

    Every sixth training picture judges while training ("evaluation"); "thinned" is a quarter of the rest,
    which keeps fine-tuning short; "holdout" is the published test set.
    """
    source = "test" if part == "holdout" else "train"
    pictures, classes = stored()[f"{source}_x"], stored()[f"{source}_y"]
    number = np.arange(len(classes))
    if source == "train":
        number = number[(number % 6 == 0) == (part == "evaluation")]
        number = number[::4] if part == "thinned" else number
    number = number[::20] if QUICK else number
    return pictures[number, :, :, None], classes[number].astype(np.int64)


# ---------------------------------------------------------------------------- network


class Scale(nn.Module):
    """From bytes to -1..1."""

    def forward(self, pictures: Tensor) -> Tensor:
        return pictures.to(torch.float32) / 127.5 - 1


def network() -> nn.Sequential:
    return nn.Sequential(
        nn.Flatten(1),
        nn.Linear(784, 256),
        nn.ReLU(),
        nn.Linear(256, 128),
        nn.ReLU(),
        nn.Linear(128, 10),
    )


def masked(model: nn.Sequential, amount: float = 0.3) -> nn.Sequential:
    """The model with the smallest weights of each layer masked, as torch's pruning tutorial does it."""
    for layer in model:
        if isinstance(layer, nn.Linear):
            prune.l1_unstructured(layer, name="weight", amount=amount)  # type: ignore[no-untyped-call]
    return model


def distillation_loss(
    student: Tensor, teacher: Tensor, targets: Tensor, alpha: float = 0.7, temperature: float = 4.0
) -> Tensor:
    """(1 - alpha) * cross-entropy + alpha * T^2 * KL(teacher || student), both softened by T."""
    soft = functional.kl_div(
        functional.log_softmax(student / temperature, dim=1),
        functional.softmax(teacher / temperature, dim=1),
        reduction="batchmean",
    )
    return (1 - alpha) * functional.cross_entropy(student, targets) + alpha * temperature**2 * soft


def fit(model: nn.Module, epochs: int, teacher: nn.Module | None = None, batch: int = 128) -> None:
    """Trains in place, towards the teacher's answers where there is one."""
    pictures, classes = split("training")
    inputs, targets = Scale()(torch.from_numpy(pictures)), torch.from_numpy(classes)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    model.train()
    for _ in range(1 if QUICK else epochs):
        for chosen in torch.split(torch.randperm(len(inputs)), batch):
            outputs = model(inputs[chosen])
            if teacher is None:
                loss = functional.cross_entropy(outputs, targets[chosen])
            else:
                with torch.no_grad():
                    wanted = teacher(inputs[chosen])
                loss = distillation_loss(outputs, wanted, targets[chosen])
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
    model.eval()


def train() -> nn.Module:
    """A dense teacher, then a copy of it with a third of its weights masked, taught by it."""
    torch.manual_seed(0)
    teacher = network()
    fit(teacher, epochs=10)
    student = masked(copy.deepcopy(teacher))
    fit(student, epochs=5, teacher=teacher)
    return student


class Clothes(Task):
    """Which piece of clothing is on the picture?"""

    input = TensorSpec("picture", "UINT8", (-1, SIZE, SIZE, 1), "NHWC", low=0, high=255)
    input_kind = "image"
    output_kind = "logits"
    color = "gray"
    resize = "stretch"
    labels = LABELS
    files = ("public_data.py",)
    optional_files = ("mlp.pt", "fashion_mnist.npz")

    def model(self) -> nn.Module:
        if not WEIGHTS.exists():
            return train()
        model = masked(network(), 0.0)  # the file holds masks too
        model.load_state_dict(torch.load(WEIGHTS, weights_only=True))
        return model

    def preprocess(self) -> nn.Module:
        return Scale()

    def training(self):  # type: ignore[no-untyped-def]
        return split("thinned")

    def evaluation(self):  # type: ignore[no-untyped-def]
        return split("evaluation")

    def holdout(self):  # type: ignore[no-untyped-def]
        return split("holdout")


# ---------------------------------------------------------------------------- the script

DYNAMIC = Step("quantization", {"method": "dynamic"})
EPOCHS = 1 if QUICK else 6
RECIPES = (
    Recipe((), "as it is"),
    Recipe((DYNAMIC,), "dynamic int8"),
    Recipe((Step("weight_pruning", {"sparsity": 0.8, "epochs": EPOCHS}), DYNAMIC), "80% zeros, dynamic int8"),
    Recipe(
        (
            Step("channel_pruning", {"ratio": 0.5}),
            Step("distillation", {"epochs": EPOCHS, "alpha": 0.7, "temperature": 4.0}),
            DYNAMIC,
        ),
        "half as wide, distilled, dynamic int8",
    ),
)


def compress(task: Task) -> list[str]:
    """Applies each recipe and gives a line about it: file, file compressed for sending, accuracy."""
    lines = []
    for recipe in RECIPES:
        applied = apply(recipe, task)
        made = targets.find("onnxruntime").export(applied.model, task, applied.precision, applied.calibration)
        score = evaluate_exported(task, made, task.required("holdout"))
        lines.append(
            f"{recipe.name:38}{made.size_bytes / 1000:7.0f} kB {made.wire_bytes / 1000:7.0f} kB sent "
            f"{score.value:7.3f} right"
        )
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description="Trains and compresses the perceptron.")
    parser.add_argument("--download", action="store_true", help="fetch the public data set if it is missing")
    options = parser.parse_args()
    try:
        DATA.ensure(HERE, options.download)
    except (OSError, RuntimeError) as error:
        raise SystemExit(str(error)) from error
    torch.save(train().state_dict(), WEIGHTS)
    print(f"{WEIGHTS.name} written")
    for line in compress(Clothes()):
        print(line, flush=True)


if __name__ == "__main__":
    main()
