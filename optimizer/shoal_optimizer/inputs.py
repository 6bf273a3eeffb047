"""Inputs that a task gives as files: decoded as clients decode them, by the task's own signature."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from shoal_optimizer.boxes import moved
from shoal_protos.bundle import Signature
from shoal_protos.errors import InvalidInput, Unsupported

FILE_KINDS = {"image": "a picture", "audio": "a .wav", "series": "a .wav"}


class Reader:
    """Turns a path or a Pillow image into the endpoint's input.

    Args:
        signature: what the task declares; its outputs do not matter.
        directory: where relative paths start.
    """

    def __init__(self, signature: Signature, directory: Path) -> None:
        self.signature, self.directory = signature, directory

    def read(self, value: Any, target: Any, where: str) -> tuple[Any, Any]:
        """(input, target) with a file's content in place of the file; anything else unchanged.

        Box targets of a picture are shares of it; they become shares of the input.

        Raises:
            InvalidInput: a file for a kind of input that has none, or one that cannot be decoded.
            FileNotFoundError: there is no such file.
        """
        if not _is_file(value):
            return value, target
        kind = self.signature.input_kind
        if kind not in FILE_KINDS or (kind != "image" and not isinstance(value, (str, Path))):
            raise InvalidInput(
                f"{where} gives {type(value).__name__} for an input of kind '{kind}'.",
                "Give arrays, or declare input_kind 'image' (pictures) or 'audio' (.wav files).",
            )
        source = self.directory / value if isinstance(value, (str, Path)) else value
        if isinstance(source, Path) and not source.is_file():
            raise FileNotFoundError(2, "No such file", str(source))
        try:
            if kind != "image":
                from shoal_agent import sounds

                return sounds.decode(source, self.signature), target
            return self._picture(source, target)
        except (InvalidInput, Unsupported) as error:
            raise InvalidInput(f"{where}: {error.message}", error.remedy) from error

    def _picture(self, source: Any, target: Any) -> tuple[np.ndarray, Any]:
        from shoal_agent import imaging

        if self.signature.output_kind != "boxes":
            return imaging.decode(source, self.signature), target
        placed = imaging.place(source, self.signature)
        return placed.tensor, moved(np.asarray(target, np.float32).reshape(-1, 5), placed)


def _is_file(value: Any) -> bool:
    """A path, or a Pillow image, recognised without importing Pillow."""
    return isinstance(value, (str, Path)) or (hasattr(value, "convert") and hasattr(value, "getbands"))


def by_name(items: np.ndarray, signature: Signature) -> dict[str, np.ndarray]:
    """Items [n, ...] as a runtime takes them: input's name -> [n, ...], contiguous.

    A model of several inputs has its items in one structured array, a field an input.
    """
    if items.dtype.names is None:
        return {signature.inputs[0].name: np.ascontiguousarray(items)}
    return {name: np.ascontiguousarray(items[name]) for name in items.dtype.names}


def step_of(signature: Signature, batch: int) -> int:
    """Items that one request may carry: `batch`, or what the signature fixes."""
    fixed = [spec.shape[0] for spec in signature.inputs if spec.shape and spec.shape[0] > 0]
    return min([batch, *fixed])
