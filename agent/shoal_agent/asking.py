"""`shoal-agent infer`: pictures, sounds or arrays in, names out; for a first try and for shell scripts."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shoal_agent import config as configs
from shoal_agent import joining
from shoal_protos.errors import InvalidInput, NotFound

if TYPE_CHECKING:
    from shoal_agent.client import Client
    from shoal_protos.bundle import Signature


def infer(options: argparse.Namespace) -> int:
    """Asks the agent of this machine (or `--address`) about each file and prints a line for each.

    One of several files that cannot be read is told and left out; the command then ends with code 1.
    """
    from shoal_agent.client import Client  # numpy: only here

    left_out = 0
    with Client(options.address or _own_address(options), model=options.model) as client:
        signature = _signature(client, options)
        files = list(_files(options.files))
        for path in files:
            try:
                answers = _ask(client, signature, path, options.top)
            except InvalidInput as error:
                if len(files) == 1:
                    raise
                print(f"shoal-agent: {error}", file=sys.stderr, flush=True)  # noqa: T201
                left_out += 1
                continue
            print(_as_json(path, answers) if options.json else _as_text(path, answers), flush=True)  # noqa: T201
    return 1 if left_out else 0


def _signature(client: Client, options: argparse.Namespace) -> Signature:
    try:
        return client.signature()
    except InvalidInput as error:
        if options.model:
            raise
        raise InvalidInput(error.message, "Name one with --model NAME.") from None


def _own_address(options: argparse.Namespace) -> str:
    """Where this machine's agent answers. Raises NotFound when none does."""
    config = configs.resolve({"state_dir": options.state_dir}, os.environ)
    ports = joining.written_status(config).get("ports") or {}
    if ports.get("http"):
        return f"{ports['host']}:{ports['http']}"
    raise NotFound(
        "No agent serves on this machine.",
        "Look at `shoal-agent status`, or name one with --address HOST:PORT.",
    )


def _files(names: list[str]) -> Iterator[Path]:
    """The files named, and those in the folders named."""
    for name in names:
        path = Path(name)
        if path.is_dir():
            found = sorted(
                item for item in path.iterdir() if item.is_file() and not item.name.startswith(".")
            )
            if not found:
                raise InvalidInput(f"{path} holds no file.")
            yield from found
        else:
            yield path


def _ask(client: Client, signature: Signature, path: Path, top: int) -> list[Any]:
    """Classes or boxes, best first; for a model of values its numbers."""
    source: Any = path
    if path.suffix == ".npy":
        source = _array(path)
    elif signature.input_kind == "tensor" and path.exists():
        declared = f"{signature.inputs[0].datatype} {list(signature.inputs[0].shape)}"
        raise InvalidInput(
            f"{path.name} is no array, and this model takes nothing else: {declared}.",
            "Save one with numpy.save('FILE.npy', array).",
        )
    kind = signature.output_kind
    if kind == "boxes":
        return list(client.detect(source))
    if kind == "logits":
        return list(client.classify(source, top=top))
    return [output.tolist() for output in client.infer(source).outputs.values()]


def _array(path: Path) -> Any:
    import numpy as np

    try:
        return np.load(path, allow_pickle=False)
    except FileNotFoundError:
        raise InvalidInput(f"There is no file {path}.") from None
    except (ValueError, EOFError, OSError) as error:
        raise InvalidInput(
            f"{path.name} is not an array of numbers: {error}", "Save it with numpy.save."
        ) from None


def _as_text(path: Path, answers: list[Any]) -> str:
    return f"{path.name}\t" + ("; ".join(_words(answer) for answer in answers) or "nothing found")


def _words(answer: Any) -> str:
    if hasattr(answer, "probability"):
        return f"{answer.label} {answer.probability:.0%}"
    if hasattr(answer, "score"):
        corners = ", ".join(f"{value:.0f}" for value in (answer.x1, answer.y1, answer.x2, answer.y2))
        return f"{answer.label} {answer.score:.0%} ({corners})"
    return str(answer)


def _as_json(path: Path, answers: list[Any]) -> str:
    values = [asdict(answer) if hasattr(answer, "label") else answer for answer in answers]
    return json.dumps({"file": str(path), "answers": values})
