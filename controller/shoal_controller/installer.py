"""Renders the installer that a bare device runs, and the one line that fetches, checks and starts it.

What is trusted: the line pins the installer's SHA-256, the installer pins every wheel's. So door 8441 may
be plain HTTP, and no secret goes through it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
import re
from collections.abc import Sequence
from importlib import resources
from pathlib import Path

from shoal_controller import wheels
from shoal_controller.wheels import Set
from shoal_protos import __version__
from shoal_protos.errors import NotFound

PLACE = 'PAYLOAD = json.loads(r"""{}""")'
FOLDER = "installers"
KEPT = 200  # renderings; a set changes rarely
FIRST_SET = "shoal controller wheels add --platform aarch64 --python 3.13"


def render(sets: Sequence[Set]) -> str:
    """The installer's text for these sets: the same sets, the same text."""
    payload = {
        "version": __version__,
        "left_out": list(wheels.LEFT_OUT),
        "sets": [
            {
                "platform": item.platform,
                "python": item.python,
                "glibc": item.glibc,
                "extras": list(item.extras),
                "installed_bytes": item.installed_bytes,
                "files": [dataclasses.asdict(file) for file in item.files],
            }
            for item in sets
        ],
    }
    text = json.dumps(payload, indent=1)
    assert '"""' not in text, "JSON that would end the string that holds it"
    template = resources.files("shoal_controller").joinpath("installer_template.py").read_text()
    assert template.count(PLACE) == 1
    return template.replace(PLACE, PLACE.replace("{}", text))


def publish(directory: Path) -> str:
    """Renders the installer for all present sets and keeps it under its SHA-256, which is returned.

    Raises:
        NotFound: there are no wheels yet.
    """
    found = wheels.sets(directory)
    if not found:
        raise NotFound("This controller has no wheels for devices yet.", f"Run: {FIRST_SET}")
    text = render(found).encode()
    digest = hashlib.sha256(text).hexdigest()
    path = directory / FOLDER / f"{digest}.py"
    if not path.exists():
        path.parent.mkdir(mode=0o700, exist_ok=True)
        temporary = path.with_suffix(f".{os.getpid()}.tmp")
        temporary.write_bytes(text)
        temporary.replace(path)
        _forget_oldest(path.parent)
    return digest


def find(directory: Path, sha256: str) -> Path:
    """A rendering by its digest. Raises NotFound."""
    path = directory / FOLDER / f"{sha256}.py"
    if not re.fullmatch(r"[0-9a-f]{64}", sha256) or not path.is_file():
        raise NotFound(
            "This controller has no such installer any more.",
            "Make a new line with: shoal token create --join",
        )
    return path


def line(url: str, sha256: str, token: str) -> str:
    """What a person pastes on a bare board: fetch, check, run. curl or wget, past any proxy; isolated, for
    beside a file in /tmp there may be modules of somebody else's."""
    source = f"{url}/installer/{sha256}"
    return (
        f"f=$(mktemp) && (curl -fsS --noproxy '*' {source} -o $f || wget --no-proxy -qO $f {source}) && "
        f'echo "{sha256}  $f" | sha256sum -c --quiet && SHOAL_JOIN_TOKEN={token} python3 -I $f {url}'
    )


def _forget_oldest(folder: Path) -> None:
    by_age = sorted(folder.glob("*.py"), key=lambda path: path.stat().st_mtime)
    for path in by_age[:-KEPT]:
        with contextlib.suppress(FileNotFoundError):
            path.unlink()
