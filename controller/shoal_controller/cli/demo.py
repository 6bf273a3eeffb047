"""`shoal demo`: the whole story on this machine."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from shoal_protos.errors import MissingExtra, NotFound

if TYPE_CHECKING:
    from shoal_controller.demo.stage import Stage


def demo(
    once: Annotated[
        bool, typer.Option("--once", help="End with the story; code 1 at a broken promise.")
    ] = False,
    task: Annotated[Path | None, typer.Option("--task", help="Another task; default: the digits.")] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the figures to this file.")] = None,
    home: Annotated[
        Path | None, typer.Option("--home", help="Scratch directory; default: a new one.")
    ] = None,
    keep: Annotated[bool, typer.Option("--keep", help="Keep the scratch directory.")] = False,
    minutes: Annotated[float, typer.Option("--minutes", help="Time for the search.", min=0.1)] = 1.0,
) -> None:
    """Plays the whole story: train, push, optimize, roll out, watch, notice a change, improve.

    Three real agents, real data, public commands only. It stays up until Ctrl-C; with --once it ends.

    Example: shoal demo --once --json figures.json
    """
    from shoal_controller.demo import story
    from shoal_controller.demo.narrator import Narrator
    from shoal_controller.demo.scene import Plan

    check_installed()
    plan = Plan(
        task=find_task(task),
        root=(home or story.scratch()).absolute(),
        json=json_file,
        keep=keep or home is not None,
        minutes=minutes,
    )
    narrator = Narrator()
    narrator.title(
        "Shoal demo",
        [("task", str(plan.task)), ("scratch", f"{plan.root}{'' if plan.keep else ' (removed at the end)'}")],
    )

    def stay(stage: Stage) -> None:
        narrator.note("Everything stays up. Ctrl-C ends it.", "bold")
        while True:
            stage.check_alive()
            time.sleep(0.5)

    story.play(plan, narrator, None if once else stay)


def check_installed() -> None:
    """Raises MissingExtra before anything starts, not in the middle of the story."""
    from importlib.util import find_spec

    for module in ("torch", "onnxruntime", "openvino", "tritonclient", "sklearn"):
        if find_spec(module) is None:
            raise MissingExtra("dev", module)


def find_task(task: Path | None) -> Path:
    """The task that was named, else the digits of this checkout or of the installed package."""
    if task is not None:
        if not task.is_file():
            raise NotFound(f"There is no task file {task}.", "Check the path.")
        return task.absolute()
    import shoal_controller

    package = Path(shoal_controller.__file__).parent
    for folder in (package / "examples", package.parent.parent / "examples", Path("examples").absolute()):
        if (folder / "digits.py").is_file():
            return folder / "digits.py"
    raise NotFound("The digits task is not here.", "Run it in a checkout, or name a task with --task.")
