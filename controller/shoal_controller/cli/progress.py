"""Progress bars of long work and the tree of an optimization."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from shoal_controller.cli import durations, exits, output
from shoal_controller.cli.watching import Watched, watch

if TYPE_CHECKING:
    from rich.progress import TaskID

    from shoal_controller.api import schemas
    from shoal_controller.client import Client
    from shoal_controller.sending import Sent

ENDED = ("done", "failed", "cancelled")
EXIT_CODES = {"done": exits.OK, "failed": exits.FAILED, "cancelled": exits.FAILED}
MARKS = {
    "done": "✔",
    "passed": "✔",
    "promoted": "✔",
    "running": "◐",
    "failed": "✘",
    "stopped": "✘",
    "stopping": "✘",
    "rolled_back": "✘",
    "aborted": "✘",
    "cancelled": "✘",
    "paused": "‖",
}


@contextlib.contextmanager
def upload() -> Iterator[Callable[[Sent], None]]:
    """A bar with rate and remaining time on stderr; without a terminal, a line for what is worth one."""
    console = output.stderr()
    if not console.is_terminal:
        yield _Lines()
        return
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
        TransferSpeedColumn,
    )

    columns = (
        TextColumn("uploading"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}", markup=False),
    )
    with Progress(*columns, console=console, transient=True) as bar:
        task: TaskID | None = None

        def show(sent: Sent) -> None:
            nonlocal task
            if task is None:  # the rate is of what this command sends
                task = bar.add_task("upload", total=sent.total, completed=sent.resumed, note="")
                _say_resumed(sent)
            bar.update(task, completed=sent.received, note=sent.note)

        yield show


class _Lines:
    """What a log should have of an upload: that it resumed, why it waits."""

    def __init__(self) -> None:
        self._note: str | None = None

    def __call__(self, sent: Sent) -> None:
        if self._note is None:
            _say_resumed(sent)
        if sent.note and sent.note != self._note:
            output.say(f"{_share(sent)}: {sent.note}.")
        self._note = sent.note


def _say_resumed(sent: Sent) -> None:
    if sent.resumed >= sent.total:
        output.say("The controller has these bytes already; nothing to upload.")
    elif sent.resumed:
        output.say(f"Going on where the last upload stopped, at {_share(sent)}.")


def _share(sent: Sent) -> str:
    return f"{output.size(sent.received)} of {output.size(sent.total)}"


def step_line(optimization: schemas.Optimization) -> str:
    """`o-0003 running: distil 40 % - epoch 4 of 10`, a line that only changes when something did."""
    progress = optimization.progress or {}
    step, share = progress.get("step") or "", progress.get("share")
    percent = f" {100 * share:.0f} %" if isinstance(share, int | float) else ""
    message = f" - {progress['message']}" if progress.get("message") else ""
    tail = f": {step}{percent}{message}" if step and optimization.state not in ENDED else ""
    return f"{optimization.id} {optimization.state}{tail}"


def steps_of(progress: dict[str, Any]) -> list[tuple[str, str, str]]:
    """Steps as (name, state, message), whatever detail the worker gave."""
    found = []
    for item in progress.get("steps") or []:
        if isinstance(item, dict):
            name = str(item.get("step") or item.get("name") or "")
            found.append((name, str(item.get("state") or "done"), str(item.get("message") or "")))
        else:
            found.append((str(item), "done", ""))
    step = str(progress.get("step") or "")
    if step and (not found or found[-1][0] != step):
        found.append((step, "running", str(progress.get("message") or "")))
    elif step:
        found[-1] = (step, "running", str(progress.get("message") or found[-1][2]))
    return found


def tree(optimization: schemas.Optimization) -> Any:
    """An optimization as a tree: its steps, the present one with its bar, then what it chose."""
    from rich.text import Text
    from rich.tree import Tree

    style = output.STATUS_STYLES.get(optimization.state, "")
    end = optimization.finished_ms or int(time.time() * 1000)
    age = durations.text((end - (optimization.started_ms or optimization.created_ms)) / 1000)
    head = Text.assemble(
        (optimization.id, "bold"),
        f"  {optimization.kind} {optimization.model} v{optimization.version}  ",
        (f"{MARKS.get(optimization.state, '○')} {optimization.state}", style),
        f"  {age}",
        (f"  {optimization.objective}", "dim"),
    )
    root = Tree(head, guide_style="dim")
    ended = optimization.state in ENDED
    for name, state, message in steps_of(optimization.progress or {}):
        shown = "done" if ended and state == "running" and optimization.state == "done" else state
        share = (optimization.progress or {}).get("share") if shown == "running" else None
        bar = f"  {'█' * round(20 * share):<20} {100 * share:.0f} %" if isinstance(share, int | float) else ""
        root.add(
            Text.assemble(
                (MARKS.get(shown, "○"), output.STATUS_STYLES.get(shown, "")),
                f" {name}{bar}  ",
                (message, "dim"),
            )
        )
    for sentence in choices(optimization):
        root.add(Text(f"→ {sentence}"))
    if optimization.error:
        root.add(Text(optimization.error, style="red"))
    return root


def choices(optimization: schemas.Optimization) -> list[str]:
    """What was chosen for each class, one sentence each."""
    found = []
    for name, choice in sorted((optimization.result or {}).get("choice", {}).items()):
        if isinstance(choice, dict):
            found.append(
                f"{name}: {choice.get('sentence') or choice.get('name') or choice.get('bundle', '')}"
            )
    return found


def follow_optimization(
    client: Client, optimization: str, *, form: str, timeout: str = ""
) -> schemas.Optimization:
    """Watches an optimization to its end. The form `progress` draws on stderr only, for commands that
    print something else afterwards."""
    watched = Watched(
        fetch=lambda: client.optimization(optimization),
        ended=lambda item: item.state in ENDED,
        draw=tree,
        line=step_line,
    )
    if form != "progress":
        return watch(watched, form=form, timeout=timeout)
    return _spin(watched, timeout)


def _spin(watched: Watched[schemas.Optimization], timeout: str) -> schemas.Optimization:
    console = output.stderr()
    if not console.is_terminal:
        quiet = Watched(watched.fetch, watched.ended, watched.draw, watched.line)
        return watch(quiet, form="silent", timeout=timeout)
    from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task("waiting", total=None)

        def fetch() -> schemas.Optimization:
            item = watched.fetch()
            share = (item.progress or {}).get("share")
            bar.update(
                task,
                description=step_line(item),
                total=1 if isinstance(share, int | float) else None,
                completed=share or 0,
            )
            return item

        return watch(
            Watched(fetch, watched.ended, watched.draw, watched.line), form="silent", timeout=timeout
        )
