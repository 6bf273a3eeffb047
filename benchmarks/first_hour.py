"""The first hour, by the README alone: from a clean clone to a picture's name on a freshly joined device.

    python benchmarks/first_hour.py [--quick] [--json FILE]

Replays the commands of the README's first hour in bare homes (see replay.py). `--quick` uses this
virtual environment instead of making a new one, and leaves out what only that says.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from datetime import datetime, timezone
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlparse

import replay

REPOSITORY = Path(__file__).resolve().parent.parent
AIMS = {"commands": 8, "first_variant_s": 60, "join_s": 30, "install_mb": 190}
PUSH, TOKEN = "shoal model push", "shoal token create"


class Hour:
    """Plays the steps one after the other and keeps what each took."""

    def __init__(self, rooms: replay.Rooms, quick: bool) -> None:
        self.rooms, self.quick = rooms, quick
        self.figures: dict[str, tuple[float, str]] = {}
        self.answers = ""
        self._join_line = ""
        self._activate = f". {sys.prefix}/bin/activate && " if quick else ". .venv/bin/activate && "

    def play(self, steps: list[replay.Step]) -> None:
        """Raises RuntimeError with the output of the command that failed."""
        self.figures["commands"] = (len(steps), "count")
        first = next(place for place, step in enumerate(steps) if step.where == "server")
        with contextlib.ExitStack() as stack:
            laptop = replay.Terminal(self.rooms.clone, self.rooms.laptop_environment, echo)
            stack.callback(laptop.close)
            self._set_up(laptop, steps[:first])
            log = stack.enter_context((self.rooms.laptop / "up.log").open("w"))
            say(f"(own terminal) $ {steps[first].text}")
            stack.enter_context(replay.server(self.rooms, steps[first].text, self._activate, log))
            board = replay.Terminal(self.rooms.board, self.rooms.board_environment, echo)
            stack.callback(board.close)
            stack.callback(self._leave)
            for step in steps[first + 1 :]:
                self._step(board if step.where == "board" else laptop, step)
            self.figures["install_mb"] = (replay.disk_mb(self.rooms.prefix), "MB")

    def _set_up(self, laptop: replay.Terminal, steps: list[replay.Step]) -> None:
        if self.quick:
            laptop.type(self._activate.removesuffix(" && "))
            for step in steps:
                if "venv" not in step.text and "pip install" not in step.text:
                    self._step(laptop, step)
            return
        seconds = downloaded = 0.0
        for step in steps:
            say(f"$ {step.text}")
            output, took = laptop.type(step.text)
            seconds += took
            downloaded += downloaded_mb(output)
        self.figures["setup_s"] = (seconds, "s")
        downloaded += local_wheels_mb(self.rooms.pip_report)
        self.figures["downloaded_mb"] = (downloaded, "MB")

    def _step(self, terminal: replay.Terminal, step: replay.Step) -> None:
        text = self._join_line if replay.JOIN_LINE in step.text else replay.localized(step.text)
        say(f"({step.where}) $ {step.text}" + (f"   [here: {text}]" if text != step.text else "")[:200])
        if "pictures" in text and step.where == "board":
            say("    (copies the pictures to the board)")
            shutil.copytree(self.rooms.clone / "pictures", self.rooms.board / "pictures")
        started = time.monotonic()
        output, seconds = terminal.type(text)
        if TOKEN in text:
            self._join_line = next(line for line in output.splitlines() if "sha256sum" in line)
        if replay.JOIN_LINE in step.text:
            self.figures["join_s"] = (seconds, "s")
        if PUSH in text:
            wait_until_served(self.rooms)
            self.figures["first_variant_s"] = (time.monotonic() - started, "s")
        if step.where == "board":
            self.answers = output

    def _leave(self) -> None:
        """The board leaves, also after a failure: nothing stays behind on this machine."""
        agent = self.rooms.prefix / "agent/current/bin/shoal-agent"
        if agent.exists():
            command = [str(agent), "leave", "--purge", "--yes"]
            subprocess.run(command, env=self.rooms.board_environment, timeout=60, check=False)


def wait_until_served(rooms: replay.Rooms, seconds: float = 180.0) -> None:
    """Until the device serves a variant that passed its probe. Raises RuntimeError when it doesn't."""
    url = f"{rooms.laptop_environment['SHOAL_URL']}/api/v1/devices"
    deadline = time.monotonic() + seconds
    while True:
        with urllib.request.urlopen(url, timeout=10) as answer:
            devices = json.load(answer)["items"]
        if any(p["step"].lower().endswith("commit") for d in devices for p in d["placements"]):
            return
        if time.monotonic() > deadline:
            raise RuntimeError(f"No device serves a variant: {json.dumps(devices)[:2000]}")
        time.sleep(0.25)


def downloaded_mb(output: str) -> float:
    """Megabytes that pip says it downloaded."""
    units = {"B": 1e-6, "kB": 1e-3, "MB": 1.0, "GB": 1e3}
    found = re.findall(r"Downloading \S+ \(([0-9.]+) (B|kB|MB|GB)\)", output)
    return sum(float(number) * units[unit] for number, unit in found)


def local_wheels_mb(report: Path) -> float:
    """Megabytes that pip took from folders on this machine instead of downloading them."""
    urls = [item["download_info"]["url"] for item in json.loads(report.read_text())["install"]]
    paths = [Path(unquote(urlparse(url).path)) for url in urls if url.startswith("file:")]
    return sum(path.stat().st_size for path in paths if path.is_file()) / 1e6


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def echo(line: str) -> None:
    say(f"    {line.rstrip()}")


@contextlib.contextmanager
def directory() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="shoal-first-hour-") as name:
        yield Path(name)


def document(figures: dict[str, tuple[float, str]]) -> dict[str, Any]:
    cpu = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"],
        capture_output=True,
        text=True,
        check=False,
        cwd=REPOSITORY,
    )
    return {
        "benchmark": "first_hour",
        "figures": {key: {"value": value, "unit": unit, "n": 1} for key, (value, unit) in figures.items()},
        "context": {
            "cpu": cpu.group(1) if cpu else "",
            "cores": os.cpu_count(),
            "load": os.getloadavg()[0],
            "python": platform.python_version(),
            "commit": commit.stdout.strip(),
            "date": datetime.now(timezone.utc).date().isoformat(),
            "substituted": [replacement for _, replacement in replay.SUBSTITUTES],
        },
    }


def table(figures: dict[str, tuple[float, str]]) -> str:
    lines = ["| figure | value | aim | met |", "|---|---|---|---|"]
    for key, (value, unit) in figures.items():
        aim = AIMS.get(key)
        verdict = "" if aim is None else "yes" if value <= aim else "no"
        lines.append(f"| {key} | {value:.3g} {unit} | {'' if aim is None else f'<= {aim}'} | {verdict} |")
    return "\n".join(lines)


def play(quick: bool) -> Hour:
    """Replays the README of this repository's last commit; what fails raises RuntimeError."""
    steps = replay.steps((REPOSITORY / "README.md").read_text())
    with directory() as root:
        hour = Hour(replay.make_rooms(root, REPOSITORY), quick)
        hour.play(steps)
    return hour


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--quick", action="store_true", help="use this virtual environment")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    hour = play(options.quick)
    print(table(hour.figures))
    print(f"\nThe board answered:\n{hour.answers}")
    if options.json:
        options.json.write_text(json.dumps(document(hour.figures), indent=1) + "\n")
        options.json.with_suffix(".md").write_text(f"# first_hour\n\n{table(hour.figures)}\n")


if __name__ == "__main__":
    main()
