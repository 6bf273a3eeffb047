"""Training networks side by side, in other processes or on a Ray cluster.

An order carries everything that a worker needs: paths where it shares our disk, else the files
themselves. A worker that dies costs its network one more try, here; nothing else is lost.
"""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor, Future
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from shoal_optimizer.jobspec import JobSpec
from shoal_optimizer.recipe import Recipe

log = logging.getLogger(__name__)

MOST_BYTES = 1 << 30  # of files sent along


@dataclass(frozen=True)
class Order:
    """One network to train. `files`: path below the task's folder -> content, for workers elsewhere."""

    name: str
    steps: tuple[dict[str, Any], ...]
    source: str
    task: str
    weights: str
    data: str
    seed: int = 0
    seconds: float | None = None
    files: dict[str, bytes] = field(default_factory=dict)

    def packed(self) -> Order:
        """The same with its files inside, for workers that do not share this disk."""
        root = Path(self.source)
        paths = {p.relative_to(root).as_posix(): p for p in sorted(root.rglob("*")) if p.is_file()}
        if sum(p.stat().st_size for p in paths.values()) > MOST_BYTES:
            paths = {self.task: root / self.task}  # its data travel as the job's files anyway
        files = {f"source/{name}": path.read_bytes() for name, path in paths.items()}
        files["weights"] = Path(self.weights).read_bytes()
        files["data"] = Path(self.data).read_bytes()
        return replace(self, files=files)


@dataclass(frozen=True)
class Trained:
    """What a worker gives back: the module as `save_module` writes it."""

    module: bytes
    seconds: float
    notes: tuple[str, ...]
    threads: int


def order_of(spec: JobSpec, recipe: Recipe, seconds: float | None = None) -> Order:
    """The order for the training part of a recipe."""
    return Order(
        recipe.name,
        tuple(recipe.training.to_json()),
        str(spec.source),
        spec.task,
        str(spec.weights),
        str(spec.data),
        spec.seed,
        seconds,
    )


def train(order: Order) -> Trained:
    """Trains one network; runs in the worker."""
    if order.files:
        with tempfile.TemporaryDirectory(prefix="shoal-train-") as folder:
            for name, content in order.files.items():
                path = Path(folder) / name
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(content)
            root = Path(folder)
            source, weights, data = (str(root / name) for name in ("source", "weights", "data"))
            return _train(replace(order, files={}, source=source, weights=weights, data=data))
    return _train(order)


def _train(order: Order) -> Trained:
    import torch

    from shoal_optimizer.recipe import apply
    from shoal_optimizer.task import load_task, save_module

    task = load_task(
        Path(order.source) / order.task, seed=order.seed, weights=Path(order.weights), data=Path(order.data)
    )
    recipe = Recipe.from_json(list(order.steps), order.name)
    applied = apply(recipe, task, seed=order.seed, seconds=order.seconds)
    assert applied.model is not None
    with tempfile.TemporaryDirectory(prefix="shoal-trained-") as folder:
        path = Path(folder) / "module.pt"
        save_module(applied.model, path)
        return Trained(path.read_bytes(), applied.seconds, tuple(applied.notes), torch.get_num_threads())


def results(
    orders: Sequence[Order],
    open_executor: Callable[[int], Executor],
    workers: int,
    *,
    say: Callable[[str], None] = lambda text: None,
) -> Iterator[tuple[Order, Trained | Exception]]:
    """Each order with what came of it, in the order given.

    A worker that dies (killed, out of memory) takes down a local pool: its networks are tried once
    more, one by one in a new pool, so that only the one that kills its worker fails.
    """
    waiting: list[Order] = []
    with open_executor(min(workers, len(orders))) as pool:
        futures = [(order, _submit(pool, order)) for order in orders]
        for order, future in futures:
            found = _outcome(future)
            if isinstance(found, Exception) and died(found):
                say(f"the worker of {order.name} died; it is tried again")
                waiting.append(order)
            else:
                yield order, found
    for order in waiting:
        with open_executor(1) as pool:
            yield order, _outcome(_submit(pool, order))


def _submit(pool: Executor, order: Order) -> Future[Trained]:
    try:
        return pool.submit(train, order)
    except Exception as error:  # the pool broke before this one
        future: Future[Trained] = Future()
        future.set_exception(error)
        return future


def _outcome(future: Future[Trained]) -> Trained | Exception:
    try:
        return future.result()
    except Exception as error:
        return error


def died(error: BaseException) -> bool:
    """True when the process that computed is gone, rather than its work having failed."""
    return type(error).__name__ in (
        "BrokenProcessPool", "WorkerCrashedError", "NodeDiedError", "OutOfMemoryError",
        "LocalRayletDiedError", "ActorDiedError", "OwnerDiedError", "ObjectLostError",
    )  # fmt: skip
