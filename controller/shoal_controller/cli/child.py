"""Entry of the processes that `shoal up` supervises: `python -m shoal_controller.cli.child ROLE`.

A child ends when its supervisor is gone, writes its log to a file of the data directory (warnings also to
stderr), and tells that it is ready by one JSON line on the pipe named by `--ready-fd`.
"""

from __future__ import annotations

import argparse
import asyncio
import ctypes
import json
import logging
import logging.handlers
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

from shoal_controller.cli import exits

LOG_BYTES = 4 << 20  # a log file before it is rotated; two are kept
PR_SET_PDEATHSIG = 1


def die_with(parent: int) -> None:
    """Asks Linux to end this process with SIGTERM when `parent` ends; elsewhere nothing happens."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
        if os.getppid() != parent:  # it ended before we asked
            sys.exit(exits.INTERRUPTED)


def log_to(path: Path) -> None:
    """Everything from INFO to a rotating file, warnings and worse to stderr too."""
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    file = logging.handlers.RotatingFileHandler(path, maxBytes=LOG_BYTES, backupCount=1)
    file.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    terminal = logging.StreamHandler()
    terminal.setLevel(logging.WARNING)
    terminal.setFormatter(logging.Formatter("%(levelname)s %(name)s: %(message)s"))
    logging.basicConfig(level=logging.INFO, handlers=[file, terminal])
    logging.getLogger("alembic").setLevel(logging.WARNING)


async def serve_controller(ready_fd: int) -> None:
    """Runs the controller until SIGTERM or SIGINT."""
    from shoal_controller.app import Controller
    from shoal_controller.settings import Settings

    settings = Settings.load()
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    controller = Controller(settings)
    try:
        await controller.start()
        tell_ready(ready_fd, dict(controller.ports))
        await stop.wait()
    finally:
        await controller.stop()


def tell_ready(ready_fd: int, ports: dict[str, int]) -> None:
    if ready_fd >= 0:
        with os.fdopen(ready_fd, "w") as pipe:
            pipe.write(json.dumps(ports) + "\n")


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("role", choices=("controller", "worker"))
    parser.add_argument("--parent", type=int, required=True)
    parser.add_argument("--ready-fd", type=int, default=-1)
    arguments = parser.parse_args(argv)
    die_with(arguments.parent)
    log_to(Path(os.environ["SHOAL_HOME"]) / "logs" / f"{arguments.role}.log")
    try:
        if arguments.role == "controller":
            asyncio.run(serve_controller(arguments.ready_fd))
            return exits.OK
        from shoal_controller import worker

        return worker.main([])
    except KeyboardInterrupt:
        return exits.INTERRUPTED
    except Exception as error:
        logging.getLogger("shoal.up").info("Ended by an error", exc_info=True)
        exits.explain(error)
        # 4 would mean that a controller elsewhere does not answer.
        code = exits.code_of(error)
        return exits.FAILED if code == exits.UNREACHABLE else code


if __name__ == "__main__":
    sys.exit(main())
