"""Where work is computed: in this process, in local processes, or on a Ray cluster.

Every one is a `concurrent.futures.Executor`, so that the search knows only `submit` and futures.
Functions and arguments must be picklable; a result or an exception comes back through the future.
"""

from __future__ import annotations

import logging
import multiprocessing
import os
import sys
import threading
from collections.abc import Callable
from concurrent.futures import Executor, Future, ProcessPoolExecutor
from typing import Any, ParamSpec, TypeVar

from shoal_protos.errors import InvalidInput, MissingExtra, Unavailable

P = ParamSpec("P")
T = TypeVar("T")

# Imported once by the fork server, so that each worker starts with torch already loaded.
_PRELOAD = ["torch"]
RETRIES = 2  # of a task whose Ray worker died


class InlineExecutor(Executor):
    """Runs each call at once in the caller's thread: one core, nothing to pickle, nothing to import."""

    def __init__(self) -> None:
        self._closed = False

    def submit(self, fn: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> Future[T]:
        if self._closed:
            raise RuntimeError("cannot schedule new futures after shutdown")
        future: Future[T] = Future()
        future.set_running_or_notify_cancel()
        try:
            future.set_result(fn(*args, **kwargs))
        except Exception as error:
            future.set_exception(error)
        return future

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        self._closed = True


class LocalProcesses(ProcessPoolExecutor):
    """Processes on this machine, forked from a small server that has no threads of its own."""

    def __init__(self, workers: int, *, preload: list[str] | None = None) -> None:
        context = multiprocessing.get_context("forkserver" if sys.platform == "linux" else "spawn")
        if sys.platform == "linux":
            context.set_forkserver_preload(_PRELOAD if preload is None else preload)
        super().__init__(workers, mp_context=context, initializer=_one_thread)


def _one_thread() -> None:
    """Workers share the machine's cores: each computes with one thread, and its prints go to stderr,
    since a job's stdout is its protocol."""
    os.environ["OMP_NUM_THREADS"] = "1"
    os.dup2(2, 1)
    torch = sys.modules.get("torch")
    if torch is not None:
        torch.set_num_threads(1)


class RayExecutor(Executor):
    """Workers of a Ray cluster; `address` as in `ray.init`, "" starts a local one on the loopback.

    Ray starts a task again whose worker was killed, `RETRIES` times; after that its future fails.
    """

    def __init__(self, address: str = "", *, cores_per_task: float = 1.0) -> None:
        try:
            import ray
        except ImportError as error:
            raise MissingExtra("ray", "ray") from error
        self._ray: Any = ray
        self._owns = not ray.is_initialized()
        if self._owns:
            _connect(ray, address)
        self._call: Any = ray.remote(num_cpus=cores_per_task, max_retries=RETRIES)(_call)
        self._lock = threading.Lock()
        self._futures: set[Future[Any]] = set()
        self._closed = False

    def submit(self, fn: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> Future[T]:
        with self._lock:
            if self._closed:
                raise RuntimeError("cannot schedule new futures after shutdown")
            future: Future[T] = self._call.remote(fn, args, kwargs).future()
            self._futures.add(future)
        future.add_done_callback(self._futures.discard)
        return future

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        with self._lock:
            self._closed = True
            futures = list(self._futures)
        for future in futures:
            if cancel_futures:
                future.cancel()
            elif wait:
                future.exception()
        if self._owns and self._ray.is_initialized():
            self._ray.shutdown()


def _connect(ray: Any, address: str) -> None:
    """Joins a cluster, or starts one of this machine's cores that nobody else can reach."""
    logging.getLogger("ray").setLevel(logging.ERROR)
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # its warning about accelerators
    if not address:
        ray.init(
            address="local",
            _node_ip_address="127.0.0.1",
            log_to_driver=False,
            include_dashboard=False,
            configure_logging=False,
        )
        return
    try:
        ray.init(address=address, log_to_driver=False, configure_logging=False)
    except Exception as error:
        raise Unavailable(
            f"The Ray cluster at {address} does not answer: {str(error).splitlines()[0][:200]}",
            "Check the address, and that both sides have the same versions of Ray and Python.",
        ) from error


def _call(fn: Callable[..., T], args: tuple[Any, ...], kwargs: dict[str, Any]) -> T:
    return fn(*args, **kwargs)


def check(name: str) -> None:
    """Raises InvalidInput where `make` would not know the name."""
    if name not in ("inline", "processes", "ray", "ray://local") and not name.startswith(("ray:", "ray://")):
        raise InvalidInput(
            f"Unknown executor '{name[:80]}'.", "Use processes, ray://local or ray://HOST:PORT."
        )


def make(name: str, *, workers: int = 1) -> Executor:
    """The executor called `name`: `inline`, `processes`, `ray://local` (a cluster of this machine, started
    and stopped with it), `ray://HOST:PORT` (Ray's client server) or `ray:HOST:PORT` (its own port).

    Raises:
        InvalidInput: no such executor.
        MissingExtra: Ray is asked for and isn't installed.
        Unavailable: the cluster does not answer.
    """
    check(name)
    if name == "inline" or (name == "processes" and workers <= 1):
        return InlineExecutor()
    if name == "processes":
        return LocalProcesses(workers)
    if name in ("ray", "ray:", "ray://local", "ray://"):
        return RayExecutor()
    return RayExecutor(name if name.startswith("ray://") else name.partition(":")[2])
