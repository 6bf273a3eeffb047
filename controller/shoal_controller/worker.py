"""The worker: a process of its own that takes queued work and runs each piece as a child process.

`python -m shoal_controller.worker --home DIR`. The controller never imports torch, and neither does
this; the child (`python -m shoal_optimizer.jobs JOBDIR`) does, with limits, without keys, database or
settings. A lease in the database says who works on what: the work of a killed worker is taken up
again, and the child, which saves as it goes, continues where it was.
"""

from __future__ import annotations

import argparse
import contextlib
import logging
import os
import resource
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from sqlalchemy import select
from sqlalchemy.orm import Session

from shoal_agent import profile
from shoal_controller import job_events, job_files, optimizations
from shoal_controller.blobs import BlobStore
from shoal_controller.clock import Clock, now_ms
from shoal_controller.job_output import Reader
from shoal_controller.settings import Settings, prepare_home
from shoal_controller.store.repositories import Store
from shoal_controller.store.tables import Optimization
from shoal_protos.errors import InvalidInput, ShoalError
from shoal_protos.v1.profile_pb2 import Profile

log = logging.getLogger("shoal.worker")

LEASE_SECONDS = 20
RENEW_SECONDS = 5.0
POLL_SECONDS = 0.5  # between looks at an empty queue
READ_SECONDS = 0.2  # between looks at a child's output
MAX_ATTEMPTS = 5  # times one piece of work may take its worker down with it
LOG_TAIL_BYTES = 16 << 10
GRACE_SECONDS = 5.0
MAX_HOURS = 12.0

# What a child may know of our environment.
PASSED = (
    "PATH",
    "LANG",
    "LC_ALL",
    "TZ",
    "PYTHONPATH",
    "VIRTUAL_ENV",
    "LD_LIBRARY_PATH",
    "CUDA_VISIBLE_DEVICES",
)


@dataclass(frozen=True)
class Limits:
    """Of one child process."""

    open_files: int = 4096
    file_bytes: int = 64 << 30
    memory_bytes: int = 0  # of address space; 0 = the machine's
    hours: float = MAX_HOURS
    nice: int = 5  # the fleet's doors and local agents go first


class Worker:
    """Takes one piece of work at a time until told to stop.

    Args:
        command: what is started with the job's directory as its last argument.
    """

    def __init__(
        self,
        store: Store,
        blobs: BlobStore,
        jobs_dir: Path,
        *,
        clock: Clock = now_ms,
        machine: Profile | None = None,
        command: Sequence[str] = (sys.executable, "-u", "-m", "shoal_optimizer.jobs"),
        limits: Limits | None = None,
        threads: int = 0,
    ) -> None:
        self.store = store
        self.blobs = blobs
        self.jobs_dir = jobs_dir
        self.clock = clock
        self.machine = machine or profile.measure()
        self.command = list(command)
        self.limits = limits or Limits()
        self.threads = threads or max(1, self.machine.cores)
        self.name = f"{socket.gethostname()}:{os.getpid()}:{os.urandom(4).hex()}"
        self._stop = threading.Event()

    # ------------------------------------------------------------------ the queue

    def serve(self) -> None:
        """Works until `stop`."""
        log.info("worker %s is ready, %d threads a job", self.name, self.threads)
        while not self._stop.is_set():
            try:
                worked = self.work_once()
            except ShoalError as error:
                log.warning("%s", error)
                worked = False
            except Exception:
                log.exception("The worker goes on after an error of its own")
                worked = False
                self._stop.wait(2.0)
            if not worked:
                self._stop.wait(POLL_SECONDS)

    def stop(self) -> None:
        """Ends the present child and gives its work back to the queue."""
        self._stop.set()

    def work_once(self) -> bool:
        """Does the next piece of work, if there is one; returns whether there was."""
        job = self._lease()
        if job is None:
            return False
        log.info("takes %s", job)
        directory = self.jobs_dir / job
        try:
            self._do(job, directory)
        except ShoalError as error:
            self._fail(job, str(error))
        self._tidy(job, directory)
        return True

    def _lease(self) -> str | None:
        with self.store.write() as session:
            row = self._next(session)
            if row is None:
                return None
            attempts = int(row.spec.get("attempts", 0)) + (1 if row.state == "running" else 0)
            if attempts >= MAX_ATTEMPTS:
                text = f"Its worker died {attempts} times while working on it. Look at the machine's memory."
                job_events.fail(session, row, self.clock, text)
                return None
            row.spec = {**row.spec, "attempts": attempts}
            row.result = {k: v for k, v in row.result.items() if k != "waiting"}
            row.started_ms = row.started_ms or self.clock()
            row.lease_owner, row.lease_until_ms = self.name, self.clock() + LEASE_SECONDS * 1000
            if row.state != "running":
                row.state = "running"
                optimizations.note(session, row, "started", actor=f"worker:{self.name.split(':')[0]}")
            return row.id

    def _next(self, session: Session) -> Optimization | None:
        rows = session.scalars(
            select(Optimization)
            .where(Optimization.state.in_(("queued", "running")))
            .order_by(Optimization.created_ms, Optimization.id)
        )
        for row in rows:
            if row.state == "queued" or row.lease_until_ms < self.clock() or _owner_is_dead(row.lease_owner):
                return row
        return None

    def _renew(self, job: str) -> bool:
        """Keeps the lease; False when the work is no longer ours or was cancelled."""
        with self.store.write() as session:
            row = session.get(Optimization, job)
            if row is None or row.state != "running" or row.lease_owner != self.name:
                return False
            row.lease_until_ms = self.clock() + LEASE_SECONDS * 1000
            return True

    # ------------------------------------------------------------------ one piece of work

    def _do(self, job: str, directory: Path) -> None:
        directory.mkdir(parents=True, exist_ok=True, mode=0o700)
        _end_orphan(directory)
        output = directory / "events.jsonl"
        importer = job_events.Importer(self.store, self.blobs, self.clock, job, directory, self.machine)
        reader = Reader(output, importer, self._read_so_far(job))
        reader.drain()  # what a child wrote while its worker was dead
        with self.store.read() as session:
            row = session.get(Optimization, job)
            assert row is not None
            if row.state != "running":
                return
            job_files.prepare(session, self.blobs, directory, row, self.machine, threads=self.threads)
        child = self._start(directory, output)
        try:
            finished = self._watch(job, child, reader)
        finally:
            _end(child)
            with contextlib.suppress(OSError):
                (directory / "child.pid").unlink()
        if not finished:
            self._give_back(job)
            return
        reader.drain(last=True)
        with self.store.write() as session:
            row = session.get(Optimization, job)
            assert row is not None
            text = _tail(directory / "child.log")
            job_events.after_exit(session, row, self.clock, child.returncode, text, self.machine)

    def _read_so_far(self, job: str) -> int:
        with self.store.read() as session:
            row = session.get(Optimization, job)
            assert row is not None
            return int(row.progress.get("read", 0))

    def _start(self, directory: Path, output: Path) -> subprocess.Popen[bytes]:
        environment = {name: os.environ[name] for name in PASSED if name in os.environ}
        environment |= {
            "HOME": str(directory),
            "TMPDIR": str(directory / "tmp"),
            "OMP_NUM_THREADS": str(self.threads),
            "PYTHONUNBUFFERED": "1",
        }
        with output.open("ab") as out, (directory / "child.log").open("ab") as err:
            child = subprocess.Popen(
                [*self.command, str(directory)],
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=err,
                env=environment,
                cwd=directory,
                start_new_session=True,
            )
        (directory / "child.pid").write_text(str(child.pid))
        self._limit(child.pid)
        return child

    def _limit(self, pid: int) -> None:
        wanted = {resource.RLIMIT_CORE: 0, resource.RLIMIT_NOFILE: self.limits.open_files}
        wanted[resource.RLIMIT_FSIZE] = self.limits.file_bytes
        if self.limits.memory_bytes:
            wanted[resource.RLIMIT_AS] = self.limits.memory_bytes
        with contextlib.suppress(OSError, ValueError, AttributeError):  # ended already, or not Linux
            for kind, value in wanted.items():
                resource.prlimit(pid, kind, (value, value))
            os.setpriority(os.PRIO_PROCESS, pid, self.limits.nice)

    def _watch(self, job: str, child: subprocess.Popen[bytes], reader: Reader) -> bool:
        """Follows a child to its end; False when its work was taken back (stop, cancel, lease lost)."""
        renewed = started = time.monotonic()
        while child.poll() is None:
            if self._stop.is_set():
                return False
            if time.monotonic() - renewed >= RENEW_SECONDS or reader.drain():
                renewed = time.monotonic()
                if not self._renew(job):
                    return False
            if time.monotonic() - started > self.limits.hours * 3600:
                raise InvalidInput(
                    f"The job took longer than {self.limits.hours:g} hours.", "Give it a smaller budget."
                )
            self._stop.wait(READ_SECONDS)
        return True

    def _give_back(self, job: str) -> None:
        with self.store.write() as session:
            row = session.get(Optimization, job)
            if row is not None and row.state == "running" and row.lease_owner == self.name:
                optimizations.requeue(
                    session, row, actor=f"worker:{self.name.split(':')[0]}", reason="the worker stopped"
                )

    def _fail(self, job: str, text: str) -> None:
        log.warning("%s failed: %s", job, text)
        with self.store.write() as session:
            row = session.get(Optimization, job)
            if row is not None and row.state == "running":
                job_events.fail(session, row, self.clock, text)

    def _tidy(self, job: str, directory: Path) -> None:
        """Everything kept is in blobs and rows; of a failed job the log stays."""
        with self.store.read() as session:
            row = session.get(Optimization, job)
            state = row.state if row is not None else "cancelled"
        if state in ("done", "cancelled"):
            shutil.rmtree(directory, ignore_errors=True)
        elif state == "failed":
            for name in ("source", "in", "out", "tmp"):
                shutil.rmtree(directory / name, ignore_errors=True)


def _owner_is_dead(owner: str) -> bool:
    """True if the lease's owner was a process of this machine that is gone."""
    host, _, rest = owner.partition(":")
    pid = rest.partition(":")[0]
    if host != socket.gethostname() or not pid.isdigit():
        return False
    try:
        os.kill(int(pid), 0)
    except ProcessLookupError:
        return True
    except PermissionError:
        pass
    return False


def _end_orphan(directory: Path) -> None:
    """Ends the child that a killed worker left behind: two must not work in one directory."""
    try:
        pid = int((directory / "child.pid").read_text())
        command = Path(f"/proc/{pid}/cmdline").read_bytes()
    except (OSError, ValueError):
        return
    if str(directory).encode() in command.split(b"\0"):
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(pid, signal.SIGKILL)
        deadline = time.monotonic() + GRACE_SECONDS
        while Path(f"/proc/{pid}").exists() and time.monotonic() < deadline:
            if "State:\tZ" in _status(pid):
                break
            time.sleep(0.05)


def _status(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return ""


def _end(child: subprocess.Popen[bytes]) -> None:
    if child.poll() is not None:
        return
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child.pid, signal.SIGTERM)
    try:
        child.wait(GRACE_SECONDS)
    except subprocess.TimeoutExpired:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child.pid, signal.SIGKILL)
        child.wait()


def _tail(path: Path) -> str:
    try:
        with path.open("rb") as stream:
            stream.seek(max(0, path.stat().st_size - LOG_TAIL_BYTES))
            return stream.read().decode(errors="replace")
    except OSError:
        return ""


def main(argv: Sequence[str] | None = None) -> int:
    """Works until SIGTERM or SIGINT."""
    parser = argparse.ArgumentParser(prog="shoal-worker")
    parser.add_argument("--home")
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--once", action="store_true", help="do one piece of work and end")
    arguments = parser.parse_args(argv)
    settings = Settings.load({"home": arguments.home})
    prepare_home(settings)
    store = Store.open(settings.database_url)
    blobs = BlobStore(settings.blobs_dir, lease_seconds=settings.blob_lease_seconds)
    worker = Worker(store, blobs, settings.jobs_dir, threads=arguments.threads)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: worker.stop())
    try:
        if arguments.once:
            worker.work_once()
        else:
            worker.serve()
    finally:
        store.close()
    return 0


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    sys.exit(main())
