"""What searches learn and hand on: latency tables and quantizer priors, in one JSON file.

A job reads the file it is given, learns, and writes only what it learned itself to `out/knowledge.json`;
`merge` adds that to the keeper's file, once for each job however often it is said. Without torch.
"""

from __future__ import annotations

import fcntl
import json
import logging
import os
from collections.abc import Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shoal_optimizer.jobstate import write_atomic
from shoal_optimizer.search.latency import LatencyTable
from shoal_optimizer.search.prior import PriorTable
from shoal_protos.errors import ShoalError

if TYPE_CHECKING:
    from collections.abc import Iterator

log = logging.getLogger(__name__)

FILE = "knowledge.json"
SCHEMA = 1
MOST_BYTES = 32 << 20
MOST_JOBS = 500  # whose ids are remembered, so that nothing is added twice


class Knowledge:
    """Tables to ask (what was known and what was learned) and tables to hand on (what was learned)."""

    def __init__(self, latency: LatencyTable | None = None, priors: PriorTable | None = None) -> None:
        self.latency = latency or LatencyTable()
        self.priors = priors or PriorTable()
        self.learned_latency = self.latency.later()
        self.learned_priors = PriorTable()

    @classmethod
    def read(cls, path: Path | None) -> Knowledge:
        """An unreadable or missing file is no knowledge: a search needs none."""
        raw = _load(path)
        return cls(_latency(raw), PriorTable.from_json(raw.get("priors")))

    def write_learned(self, path: Path, job: str) -> None:
        """Writes what this job learned, whatever it knew before."""
        content = {
            "schema": SCHEMA,
            "job": job,
            "latency": self.learned_latency.to_json(),
            "priors": self.learned_priors.to_json(),
        }
        write_atomic(path, json.dumps(content).encode())


def of_this_machine() -> Path:
    """Where `shoal optimize` keeps what it learned here."""
    root = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return Path(root) / "shoal" / FILE


def merge(keeper: Path, learned: Path, *, job: str = "") -> bool:
    """Adds what a job learned to a keeper's file; False if that was done before or there is nothing.

    Several processes may do it at once.

    Args:
        job: what tells this search from others; "" = the job's own id.
    """
    new = _load(learned)
    job = job or str(new.get("job") or "")
    if not new or not job:
        return False
    keeper.parent.mkdir(parents=True, exist_ok=True)
    with _locked(keeper.with_suffix(".lock")):
        old = _load(keeper)
        jobs = [str(name) for name in old.get("jobs") or []]
        if job in jobs:
            return False
        priors = PriorTable.from_json(old.get("priors"))
        priors.merge(PriorTable.from_json(new.get("priors")))
        content = {
            "schema": SCHEMA,
            "jobs": [*jobs, job][-MOST_JOBS:],
            "latency": _latency(old).merge(_latency(new)).to_json(),
            "priors": priors.to_json(),
        }
        write_atomic(keeper, json.dumps(content).encode())
    return True


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    with path.open("w") as stream:
        fcntl.flock(stream, fcntl.LOCK_EX)
        yield


def _load(path: Path | None) -> dict[str, Any]:
    if path is None:
        return {}
    try:
        if path.stat().st_size > MOST_BYTES:
            log.warning("%s is too large to be knowledge; it is left aside", path)
            return {}
        raw = json.loads(path.read_bytes())
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        log.warning("%s cannot be read as knowledge: %s", path, error)
        return {}
    return raw if isinstance(raw, dict) and raw.get("schema") == SCHEMA else {}


def _latency(raw: Mapping[str, Any]) -> LatencyTable:
    found = raw.get("latency")
    try:
        return LatencyTable.from_json(found) if isinstance(found, Mapping) else LatencyTable()
    except ShoalError as error:
        log.warning("a latency table is left aside: %s", error)
        return LatencyTable()
