"""`python -m shoal_controller`: the controller alone, in the foreground, until SIGTERM or Ctrl-C.

Takes the settings as flags (`--http-port 0`), as `SHOAL_*` variables or from `controller.toml`.
"""

from __future__ import annotations

import argparse
import asyncio
import dataclasses
import logging
import signal
import sys
from collections.abc import Sequence

from shoal_controller.app import Controller
from shoal_controller.settings import Settings
from shoal_protos.errors import ShoalError


def main(argv: Sequence[str] | None = None) -> int:
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    try:
        settings = Settings.load(vars(_parser().parse_args(argv)))
        asyncio.run(_serve(settings))
    except ShoalError as error:
        sys.stderr.write(f"{error}\n")
        return 1
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("shoal_controller", description="Runs a Shoal controller.")
    for field in dataclasses.fields(Settings):
        parser.add_argument(f"--{field.name.replace('_', '-')}", dest=field.name, default=None)
    return parser


async def _serve(settings: Settings) -> None:
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    controller = Controller(settings)
    await controller.start()
    sys.stdout.write(f"http://{settings.host}:{controller.ports['http']}\n")
    sys.stdout.flush()
    try:
        await stop.wait()
    finally:
        await controller.stop()


if __name__ == "__main__":
    sys.exit(main())
