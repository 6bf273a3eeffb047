"""The emulated board for tests: built once, or the test is skipped with the reason why it cannot be."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.emulation import root


def board() -> root.Board:
    try:
        return root.board()
    except root.CannotEmulate as reason:
        pytest.skip(f"no emulated aarch64 here: {reason}")


def shoal_site(folder: Path) -> Path:
    """Shoal's own packages of this checkout, installed apart into `folder`."""
    try:
        return root.install_shoal(folder)
    except root.CannotEmulate as reason:
        pytest.skip(f"Shoal's wheel cannot be built here: {reason}")
