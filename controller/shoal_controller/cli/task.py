"""`shoal task`: makes a task file of what one has, and tries it, both without a controller."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from shoal_controller.cli import exits, options, output
from shoal_controller.cli.output import Column
from shoal_protos.errors import InvalidInput, MissingExtra, ShoalError

if TYPE_CHECKING:
    from shoal_optimizer.checking import CheckReport
    from shoal_optimizer.scaffold import Scaffolded

app = typer.Typer(no_args_is_help=True, help="Your model as a file that Shoal takes: make one, try it.")

MARKS = {"ok": "✔", "warning": "!", "failed": "✘", "skipped": "○"}
STYLES = {"ok": "green", "warning": "yellow", "failed": "red", "skipped": "dim"}
COLUMNS = (
    Column("check", lambda item: item.name, "id"),
    Column("state", lambda item: item.state, "status"),
    Column("found", lambda item: item.found),
    Column("remedy", lambda item: item.remedy),
)


@app.command("new")
def new_task(
    source: Annotated[
        Path, typer.Argument(help="A folder of pictures (a sub-folder a class), a .csv, an .npz or an .onnx.")
    ],
    name: Annotated[str, typer.Option("--name", help="Name of the task; default: the source's.")] = "",
    out: Annotated[Path | None, typer.Option("--out", help="The task file; default NAME.py here.")] = None,
    model: Annotated[
        str, typer.Option("--model", help="Your network: FILE.py:function or module:function.")
    ] = "",
    weights: Annotated[
        Path | None, typer.Option("--weights", help="Its weights, saved as a state dict.")
    ] = None,
    target: Annotated[
        str, typer.Option("--target", help="Column of a CSV to predict; default: target, label, the last.")
    ] = "",
    kind: Annotated[str, typer.Option("--kind", help="Of an .npz: image, audio, series or tensor.")] = "",
    output_kind: Annotated[
        str, typer.Option("--output", help="logits (which class?) or values (how much?); default: guessed.")
    ] = "",
    size: Annotated[str, typer.Option("--size", help="Pictures are brought to HEIGHTxWIDTH.")] = "",
    sample_rate: Annotated[int, typer.Option("--sample-rate", help="Of audio or series, in Hz.", min=0)] = 0,
    data: Annotated[
        Path | None, typer.Option("--data", help="The .npz of an ONNX file that is not named like it.")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace a task that exists.")] = False,
    as_json: options.Json = False,
) -> None:
    """Looks at your data and writes a task file that works as it is and is yours to edit.

    Example: shoal task new photos/ --name signs --model net.py:make --weights signs.pt
    """
    scaffold = _optimizer("scaffold")
    with _counting("packing pictures") as progress:
        made = scaffold.new(
            source,
            name=name,
            out=out,
            model=model,
            weights=weights,
            data=data,
            target=target,
            kind=kind,
            output_kind=output_kind,
            size=parse_size(size),
            sample_rate=sample_rate,
            force=force,
            progress=progress,
        )
    if as_json:
        output.print_json(made.to_json())
    else:
        _tell(made)


@app.command("check")
def check_task(
    ctx: typer.Context,
    task: Annotated[Path, typer.Argument(help="A task file (.py), or an ONNX file with its .npz.")],
    as_json: options.Json = False,
    form: options.Format = "",
) -> None:
    """Tries one batch in seconds: what must be mended, what may be meant, how long things will take.

    Ends with code 1 when something must be mended. Example: shoal task check signs.py
    """
    checking = _optimizer("checking")
    with _steps() as progress:
        report = checking.check(task, progress=progress)
    form = output.resolve_form(form, as_json)
    if form == "json":
        output.print_json(report.to_json())
    elif form == "table":
        output.stdout().print(_table(report))
    else:
        output.show_many(report.items, COLUMNS, form=form)
    if form != "json":
        _conclude(ctx, report, task)
    if not report.ok:
        raise typer.Exit(exits.FAILED)


def parse_size(text: str) -> tuple[int, int] | None:
    """`96x128` -> (96, 128), `96` -> (96, 96). Raises InvalidInput."""
    if not text:
        return None
    parts = text.lower().split("x")
    try:
        numbers = [int(part) for part in parts]
    except ValueError:
        numbers = []
    if len(numbers) not in (1, 2) or not all(1 <= n <= 4096 for n in numbers):
        raise InvalidInput(f"'{text}' is no size.", "Write --size 96x128 (height, width) or --size 96.")
    return numbers[0], numbers[-1]


def _optimizer(name: str) -> Any:
    import importlib

    try:
        return importlib.import_module(f"shoal_optimizer.{name}")
    except ModuleNotFoundError as error:
        raise MissingExtra("optimizer", error.name or "shoal_optimizer") from error


# ---------------------------------------------------------------------------- what is said


def _tell(made: Scaffolded) -> None:
    width = max((len(name) for name, _ in made.facts), default=0)
    for name, text in made.facts:
        output.say(f"{name:<{width}}  {text}")
    for sentence in made.decided:
        output.say(f"- {sentence}")
    for sentence in made.warnings:
        output.say(f"! {sentence}", "yellow")
    task = _shown(made.task)
    print(task)  # noqa: T201
    if made.trains:
        output.say(f"Next: python {task}   (trains the network)\n      shoal task check {task}")
    else:
        output.say(f"Next: shoal task check {task}")


def _table(report: CheckReport) -> Any:
    from rich.table import Table
    from rich.text import Text

    grid = Table(box=None, pad_edge=False, show_header=False, padding=(0, 2, 0, 0))
    grid.add_column(no_wrap=True)
    grid.add_column(no_wrap=True)
    grid.add_column()
    for item in report.items:
        text = Text(item.found, style="dim" if item.state == "skipped" else "")
        if item.remedy:
            text.append(f"\n-> {item.remedy}", style=STYLES[item.state])
        grid.add_row(Text(MARKS[item.state], style=STYLES[item.state]), item.name, text)
    return grid


def _conclude(ctx: typer.Context, report: CheckReport, task: Path) -> None:
    failed = sum(item.state == "failed" for item in report.items)
    if failed:
        output.say(f"{failed} thing{'s' if failed > 1 else ''} to mend in {_shown(task)}.", "red")
        return
    for line in fleet_lines(ctx):
        output.say(line)
    shown = _shown(task)
    output.say(f"Next: shoal optimize {shown}   or   shoal model push {shown} --wait")


def fleet_lines(ctx: typer.Context) -> list[str]:
    """Which classes of the fleet plain variants would serve, if a controller answers at once."""
    from shoal_controller.cli.connect import resolve
    from shoal_controller.client import Client
    from shoal_optimizer.targets import litert

    try:
        target = resolve(ctx.find_root().obj or {})
        with Client(target.url, target.token, timeout_s=1.0) as client:
            classes = client.classes()
    except ShoalError:
        return []
    usable = {"onnxruntime", "openvino", *(["litert"] if litert.has_tools() else [])}
    served = [c for c in classes if usable & set(c.name.split("+")[1:])]
    others = [c for c in classes if c not in served]
    lines = [f"It would serve {c.name} ({c.devices} device{'s' if c.devices != 1 else ''})." for c in served]
    return lines + [f"Nothing is made for {c.name}: {_why(c.name)}" for c in others]


def _why(profile_class: str) -> str:
    """Why a class gets nothing."""
    if "litert" in profile_class.split("+")[1:]:
        return "LiteRT's tools are not installed here (docs/targets/litert.md)."
    return "no runtime of Shoal is there."


def _shown(path: Path) -> str:
    """The path as one would type it here."""
    try:
        return str(path.resolve().relative_to(Path.cwd()))
    except ValueError:
        return str(path)


@contextmanager
def _counting(title: str) -> Iterator[Callable[[int, int], None]]:
    """A bar for so many of so many; nothing where stderr is no terminal."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    console = output.stderr()
    columns = (TextColumn(title), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task: Any = None

        def advance(done: int, total: int) -> None:
            nonlocal task
            if task is None:
                task = bar.add_task(title, total=total)
            bar.update(task, completed=done)

        yield advance


@contextmanager
def _steps() -> Iterator[Callable[[str], None]]:
    console = output.stderr()
    if not console.is_terminal:
        yield lambda step: output.say(f"checking {step}")
        return
    with console.status("checking") as status:
        yield lambda step: status.update(f"checking {step}")
