"""Everything about this device for somebody far away: doctor's checks, facts, the last transitions.

The supervisor starts `python -m shoal_agent.diagnosis --state-dir DIR` as a short child process, and
`shoal-agent doctor --json` prints the same object.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from shoal_agent import config as configs
from shoal_agent import doctor, joining, reporting, transitions
from shoal_agent.checks import FAILED, Check
from shoal_agent.config import Config
from shoal_agent.doctor import Patient
from shoal_protos.errors import ShoalError


def diagnose(who: Patient) -> dict[str, Any]:
    """`{"checks": [...], "facts": {...}, "transitions": [...]}` (docs/architecture.md)."""
    checks = doctor.examine(who)
    return {
        "checks": [asdict(check) for check in checks],
        "facts": facts(who.config),
        "transitions": transitions.read(who.config.paths.transitions),
    }


def failed(checks: Sequence[Check]) -> bool:
    return any(check.state == FAILED for check in checks)


def facts(config: Config) -> dict[str, Any]:
    """What the supervisor last wrote, the measured profile, and what lies on disk."""
    value = dict(joining.written_status(config))
    value["profile"] = _profile(config)
    value["files"] = sizes(config.paths.root)
    value["settings"] = {name: setting for name, setting in vars(config).items() if name != "state_dir"}
    return value


def _profile(config: Config) -> dict[str, Any] | None:
    """The remembered profile; measuring takes too long here."""
    from shoal_protos.v1 import profile_pb2

    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        stored = json.loads(config.paths.profile_cache.read_bytes())
        return reporting.profile_json(profile_pb2.Profile.FromString(bytes.fromhex(stored["profile"])))
    return None


def sizes(root: Path) -> dict[str, int]:
    """Bytes under each room of the state directory."""
    found = {}
    with contextlib.suppress(OSError):
        for room in sorted(root.iterdir()):
            if room.is_dir() and room.name != "identity":
                found[room.name] = sum(_size(path) for path in room.rglob("*"))
    return found


def _size(path: Path) -> int:
    """0 for what is no file, or is gone by now."""
    with contextlib.suppress(OSError):
        return path.lstat().st_size if path.is_file() else 0
    return 0


def as_json(value: dict[str, Any], limit: int = 0) -> str:
    """One line of JSON, at most `limit` bytes (0 = any): the oldest transitions go first."""
    text = json.dumps(value)
    steps = list(value["transitions"])
    while limit and len(text) > limit and steps:
        steps = steps[(len(steps) + 1) // 2 :]
        text = json.dumps({**value, "transitions": steps})
    if limit and len(text) > limit:
        text = json.dumps({**value, "transitions": [], "facts": {}})
    return text


def main(arguments: Sequence[str]) -> int:
    """The child. Exit code 0 = all is well, 1 = something failed, 2 = it could not look."""
    parser = argparse.ArgumentParser(prog="shoal-agent diagnosis")
    parser.add_argument("--state-dir", required=True)
    parser.add_argument("--limit", type=int, default=0, help="bytes of the answer")
    options = parser.parse_args(list(arguments))
    try:
        config = configs.resolve({"state_dir": options.state_dir}, os.environ)
    except ShoalError as error:
        sys.stderr.write(f"{error}\n")
        return 2
    value = diagnose(doctor.patient(config, os.environ))
    sys.stdout.write(as_json(value, options.limit) + "\n")
    return 1 if any(check["state"] == FAILED for check in value["checks"]) else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
