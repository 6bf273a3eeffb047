"""Trains the originals: a fixed schedule, resumable between steps, kept by content."""

from __future__ import annotations

import hashlib
import json
import math
import os
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

Batch = Callable[[np.ndarray, int], tuple[Tensor, Tensor]]  # rows, seed -> inputs [n, ...], targets [n]


@dataclass(frozen=True)
class Schedule:
    """SGD with Nesterov momentum; the rate rises linearly over `warm` of the steps and falls as a cosine."""

    epochs: int = 5
    batch: int = 128
    learning_rate: float = 0.15
    warm: float = 0.25
    momentum: float = 0.9
    weight_decay: float = 5e-4
    smoothing: float = 0.05
    bfloat16: bool = False

    def rate(self, share: float) -> float:
        """The learning rate when this share of the steps is done."""
        if share < self.warm:
            return self.learning_rate * (0.04 + 0.96 * share / self.warm)
        return self.learning_rate * 0.5 * (1 + math.cos(math.pi * (share - self.warm) / (1 - self.warm)))


def key_of(network: nn.Module, schedule: Schedule, data: str, seed: int) -> str:
    """Digest of what decides the trained weights, save for the tool versions and the machine."""
    content = [str(network), asdict(schedule), data, seed]
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]


def has_bfloat16() -> bool:
    """True where the CPU multiplies bfloat16: elsewhere autocast is three times slower than float32."""
    try:
        flags = Path("/proc/cpuinfo").read_text()
    except OSError:
        return False
    return "avx512_bf16" in flags or "amx_bf16" in flags


def trained(
    make: Callable[[], nn.Module],
    count: int,
    batch: Batch,
    schedule: Schedule,
    *,
    data: str,
    seed: int,
    folder: Path,
    name: str,
    save_every: int = 100,
    say: Callable[[str], None] = print,
) -> tuple[nn.Module, float]:
    """The trained network in evaluation mode and the CPU seconds it took, from `folder` if it is there.

    What was stopped between two saves goes on from the last one and ends with the same weights.

    Args:
        count: items of the training data; `batch(rows, seed)` gives some of them, augmented.
        data: digest of the training data.

    Raises:
        RuntimeError: the loss is no longer finite.
    """
    torch.manual_seed(seed)
    network = make()
    stem = f"{name}-seed{seed}-{key_of(network, schedule, data, seed)}"
    done, partial = folder / f"{stem}.pt", folder / f"{stem}.part"
    if done.exists():
        stored = torch.load(done, weights_only=True)
        network.load_state_dict(stored["weights"])
        return network.eval(), float(stored["cpu_s"])
    network = network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    optimizer = torch.optim.SGD(
        network.parameters(),
        lr=schedule.learning_rate,
        momentum=schedule.momentum,
        weight_decay=schedule.weight_decay,
        nesterov=True,
    )
    step, spent = _resume(partial, network, optimizer)
    per_epoch = max(1, count // schedule.batch)
    steps = per_epoch * schedule.epochs
    begun = time.process_time() - spent
    while step < steps:
        loss = _step(network, optimizer, batch, schedule, count, seed, step, steps)
        step += 1
        if step % save_every == 0 or step == steps:
            spent = time.process_time() - begun
            state = {
                "weights": network.state_dict(), "optimizer": optimizer.state_dict(),
                "step": step, "cpu_s": spent,
            }  # fmt: skip
            write(partial, state)
            say(f"{name} seed {seed}: step {step} of {steps}, loss {loss:.3f}, {spent:.0f} CPU s")
    network = network.to(memory_format=torch.contiguous_format).eval()  # type: ignore[call-overload]
    write(done, {"weights": network.state_dict(), "cpu_s": spent})
    partial.unlink(missing_ok=True)
    return network, spent


def _step(
    network: nn.Module,
    optimizer: torch.optim.Optimizer,
    batch: Batch,
    schedule: Schedule,
    count: int,
    seed: int,
    step: int,
    steps: int,
) -> float:
    """One step. Which items and how they vary depend on seed and step alone."""
    epoch, place = divmod(step, max(1, count // schedule.batch))
    order = np.random.default_rng([seed, epoch]).permutation(count)
    rows = order[place * schedule.batch : (place + 1) * schedule.batch]
    inputs, targets = batch(rows, (seed * 1009 + 1) * 1_000_003 + step)
    for group in optimizer.param_groups:
        group["lr"] = schedule.rate(step / steps)
    network.train()
    inputs = inputs.contiguous(memory_format=torch.channels_last) if inputs.dim() == 4 else inputs
    with torch.autocast("cpu", torch.bfloat16, enabled=schedule.bfloat16):
        outputs = network(inputs).float()
    loss = functional.cross_entropy(outputs, targets, label_smoothing=schedule.smoothing)
    optimizer.zero_grad(set_to_none=True)
    loss.backward()  # type: ignore[no-untyped-call]
    torch.nn.utils.clip_grad_norm_(network.parameters(), 5.0)
    optimizer.step()
    value = float(loss.detach())
    if not math.isfinite(value):
        raise RuntimeError(f"the loss is {value} at step {step}: lower the schedule's learning rate")
    return value


def _resume(partial: Path, network: nn.Module, optimizer: torch.optim.Optimizer) -> tuple[int, float]:
    """(steps done, CPU seconds spent), the states read from `partial` when it is there."""
    if not partial.exists():
        return 0, 0.0
    stored: dict[str, Any] = torch.load(partial, weights_only=True)
    network.load_state_dict(stored["weights"])
    optimizer.load_state_dict(stored["optimizer"])
    return int(stored["step"]), float(stored["cpu_s"])


def write(path: Path, state: dict[str, Any]) -> None:
    """Whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    torch.save(state, temporary)
    temporary.replace(path)
