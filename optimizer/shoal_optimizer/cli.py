"""`shoal optimize TASK`: a whole search on this machine, without a controller.

The command is a thin follower of two jobs (ingest, then optimize) in child processes, the very ones
that a controller's worker starts. Their directories lie under `OUT/.shoal`, so the same command goes
on after Ctrl-C. Data goes to stdout, everything else to stderr.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from shoal_optimizer import jobspec, objective
from shoal_optimizer.jobspec import ProfileClass
from shoal_optimizer.jobstate import write_atomic
from shoal_protos.errors import Conflict, InvalidInput, ShoalError

if TYPE_CHECKING:
    from rich.console import Console

EXIT_INTERRUPTED = 130
GRACE_SECONDS = 5.0
SCRATCH = ".shoal"
_ISA = {
    "avx2": ("avx2",),
    "avxvnni": ("avx2", "avx_vnni"),
    "avx512": ("avx2", "avx512f", "avx512bw", "avx512vl"),
    "avx512vnni": ("avx2", "avx512f", "avx512bw", "avx512vl", "avx512_vnni"),
    "amx": ("avx2", "avx512f", "avx512bw", "avx512vl", "avx512_vnni", "amx_tile", "amx_int8"),
    "neon": ("neon",),
    "dotprod": ("neon", "dotprod"),
    "i8mm": ("neon", "dotprod", "i8mm"),
}


def optimize_command(
    task: Annotated[Path, typer.Argument(help="A task file (.py), or an ONNX file with its .npz.")],
    objective_text: Annotated[
        str, typer.Option("--objective", help='"accuracy>=0.97, latency_p95<=5ms; minimise size".')
    ] = "",
    classes: Annotated[
        list[str] | None,
        typer.Option(
            "--class", help="Profile class, e.g. x86_64.avx2.4c+openvino; repeatable. Default: this machine."
        ),
    ] = None,
    isa: Annotated[
        str,
        typer.Option("--isa", help="Features of the named classes, e.g. avx2,avx512_vnni. Default: by name."),
    ] = "",
    minutes: Annotated[float, typer.Option(help="Time for the search, at most.", min=0.01)] = 3.0,
    out: Annotated[Path | None, typer.Option(help="Folder of the results. Default: TASK-optimized.")] = None,
    seed: Annotated[int, typer.Option(help="Equal seeds give equal networks.")] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as one JSON document.")] = False,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with what --out holds, whatever the other options say.")
    ] = False,
) -> None:
    """Compresses and converts a model for this machine and keeps what is worth keeping.

    Example: shoal optimize examples/digits.py --objective "accuracy>=0.97; minimise size"
    """
    console = _stderr()
    follower = Follower(console)
    target = (out or Path(f"{task.stem}-optimized")).resolve()
    try:
        result = optimize(
            task,
            objective_text=objective_text,
            classes=classes or [],
            isa=[part.strip() for part in isa.split(",") if part.strip()],
            minutes=minutes,
            out=target,
            seed=seed,
            resume=resume,
            follow=follower,
        )
    except KeyboardInterrupt:
        follower.close()
        _say(console, f"Stopped. Nothing is lost: go on with the same command and --out {out or target.name}")
        raise typer.Exit(EXIT_INTERRUPTED) from None
    finally:
        follower.close()
    show(result, as_json=as_json, console=console)


# ---------------------------------------------------------------------------- the work


def optimize(
    task: Path,
    *,
    objective_text: str = "",
    classes: Sequence[str] = (),
    isa: Sequence[str] = (),
    minutes: float = 3.0,
    out: Path,
    seed: int = 0,
    resume: bool = False,
    follow: Callable[[Mapping[str, Any]], None] = lambda event: None,
) -> dict[str, Any]:
    """Runs (or goes on with) ingest and search in `out`, and lays out the kept bundles.

    Args:
        follow: gets every event of the jobs.

    Returns:
        {"model", "objective", "sentence", "baseline", "classes": [{"name", "front", "choice", "serve"}],
        "report", "out"}.

    Raises:
        InvalidInput: an option, the task file or a class is wrong.
        Conflict: `out` holds another search.
        ShoalError: a job failed; the message is the job's.
    """
    task = task.resolve()
    if not task.is_file():
        raise InvalidInput(f"There is no task file '{task}'.", "Check the path; `shoal task new` makes one.")
    settings: dict[str, Any] = {
        "task": str(task),
        "objective": str(objective.parse(objective_text)),
        "classes": [_as_json(c) for c in machine_classes(classes, isa)],
        "minutes": minutes,
        "seed": seed,
    }
    settings = _agree(out, settings, resume)
    base = {
        "seed": settings["seed"],
        "threads": min(2, os.cpu_count() or 1),
        "source": str(Path(settings["task"]).parent),
        "task": Path(settings["task"]).name,
        "objective": settings["objective"],
        "classes": settings["classes"],
    }
    budget = {"minutes": settings["minutes"], "trials": 0}  # no fleet: this machine measures
    ingested = _one(
        run_job(
            out / SCRATCH / "ingest", {**base, "kind": "ingest", "id": "ingest", "budget": budget}, follow
        ),
        "ingested",
    )
    files = ingested["files"]
    done = _one(
        run_job(
            out / SCRATCH / "optimize",
            {**base, "kind": "optimize", "id": "optimize", "budget": budget, **files},
            follow,
        ),
        "done",
    )
    return _lay_out(out, settings, ingested, done)


def machine_classes(names: Sequence[str], isa: Sequence[str] = ()) -> list[ProfileClass]:
    """The named classes, or this machine's with every runtime it has.

    Raises:
        InvalidInput: a class without a runtime, of an unknown kind, or no runtime is installed here.
    """
    from shoal_agent import profile

    machine = profile.measure()
    own = profile.class_of(machine)
    hardware = own.partition("+")[0]
    versions = {runtime.name: runtime.version for runtime in machine.runtimes}
    if not names and not versions:
        raise InvalidInput(
            "No runtime is installed on this machine.", "Install one with: pip install 'shoal[onnxruntime]'"
        )
    found = []
    for name in names or [own]:
        kind, _, runtimes = name.partition("+")
        wanted = [part for part in runtimes.split("+") if part]
        if not wanted:
            raise InvalidInput(f"The class '{name}' names no runtime.", f"Write it like {own}.")
        same = kind == hardware and not isa
        features = tuple(machine.isa_features) if same else tuple(isa) or _features(kind, name)
        found.append(
            ProfileClass(
                name,
                features,
                {runtime: versions.get(runtime, "") for runtime in wanted},
                local=same and set(wanted) <= set(versions),
            )
        )
    return found


def _features(hardware: str, name: str) -> tuple[str, ...]:
    tier = hardware.split(".")[1] if "." in hardware else ""
    if tier not in _ISA and tier != "base":
        raise InvalidInput(
            f"The class '{name}' has an unknown instruction set '{tier}'.",
            f"Known are {', '.join(_ISA)}; or name the features with --isa.",
        )
    return _ISA.get(tier, ())


def _as_json(profile_class: ProfileClass) -> dict[str, Any]:
    return {
        "name": profile_class.name,
        "isa": list(profile_class.isa),
        "runtimes": dict(profile_class.runtimes),
        "local": profile_class.local,
    }


def _agree(out: Path, settings: dict[str, Any], resume: bool) -> dict[str, Any]:
    """The settings to work with: those that `out` was started with, or these for a new one.

    Raises:
        Conflict: `out` holds a search with other settings, or files that aren't ours.
    """
    path = out / SCRATCH / "settings.json"
    if path.is_file():
        try:
            stored: dict[str, Any] = json.loads(path.read_bytes())
        except ValueError as error:
            raise Conflict(f"{path} cannot be read.", f"Remove {out} or use another --out.") from error
        different = [key for key in settings if stored.get(key) != settings[key]]
        if different and not resume:
            raise Conflict(
                f"{out} holds a search with another {' and '.join(different)}.",
                "Add --resume to go on with that one, or use another --out.",
            )
        return stored
    if resume:
        raise Conflict(f"{out} holds no search to go on with.", "Leave --resume away to start one.")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise Conflict(f"{out} exists and is not a search's folder.", "Use another --out.")
    write_atomic(path, json.dumps(settings, indent=1).encode())
    return settings


def run_job(
    folder: Path, spec: Mapping[str, Any], follow: Callable[[Mapping[str, Any]], None]
) -> list[dict[str, Any]]:
    """Runs one job to its end and returns its events, progress left out. A finished one isn't run again.

    Raises:
        ShoalError: the job said `error`, or died.
    """
    finished = folder / "events.json"
    if finished.is_file():
        kept: list[dict[str, Any]] = json.loads(finished.read_bytes())
        return kept
    folder.mkdir(parents=True, exist_ok=True)
    write_atomic(folder / "job.json", json.dumps(spec, indent=1).encode())
    events = []
    for event in _events(folder):
        follow(event)
        if event["event"] == "error":
            raise ShoalError(event["message"], event["remedy"])
        if event["event"] != "progress":
            events.append(event)
    write_atomic(finished, json.dumps(events).encode())
    return events


def _events(folder: Path) -> Iterator[dict[str, Any]]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    environment.setdefault("XDG_CACHE_HOME", str(Path.home() / ".cache"))
    with (folder / "log.txt").open("ab") as log:
        child = subprocess.Popen(
            [sys.executable, "-m", "shoal_optimizer.jobs", str(folder)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=log,
            env=environment,
            start_new_session=True,  # Ctrl-C is ours to pass on
        )
        try:
            assert child.stdout is not None
            for line in child.stdout:
                yield jobspec.parse_event(line.decode())
            code = child.wait()
        finally:
            _end(child)
    if code not in (0, 1):
        raise ShoalError(
            f"The {folder.name} job ended with code {code}.",
            f"Look into {folder / 'log.txt'}, then try again.",
        )


def _end(child: subprocess.Popen[bytes]) -> None:
    if child.poll() is None:
        child.terminate()
        try:
            child.wait(GRACE_SECONDS)
        except subprocess.TimeoutExpired:
            child.kill()
            child.wait()
    if child.stdout is not None:
        child.stdout.close()


def _one(events: Sequence[dict[str, Any]], name: str) -> dict[str, Any]:
    for event in events:
        if event["event"] == name:
            return event
    raise ShoalError(f"The job ended without saying '{name}'.", "Remove the --out folder and start again.")


# ---------------------------------------------------------------------------- results


def _lay_out(
    out: Path, settings: Mapping[str, Any], ingested: Mapping[str, Any], done: Mapping[str, Any]
) -> dict[str, Any]:
    """Puts kept bundles and the report where people look, and returns the result."""
    classes = []
    for name, front in done["fronts"].items():
        entries = [{**entry, "layout": str(_place(out, Path(entry["layout"])))} for entry in front]
        choice = done["choice"].get(name)
        chosen = next((e for e in entries if choice and e["bundle"] == choice["bundle"]), None)
        serve = f"shoal-agent serve {_shown(Path(chosen['layout']))}" if chosen else ""
        classes.append({"name": name, "front": entries, "choice": choice, "serve": serve})
    for kind, path in done["report"].items():
        shutil.copyfile(path, out / f"report.{kind}")
    report = json.loads((out / "report.json").read_bytes())
    return {
        "model": report["model"],
        "objective": settings["objective"],
        "sentence": report["sentence"],
        "baseline": {k: v for k, v in ingested["baseline"].items() if k != "per_class"},
        "classes": classes,
        "report": {kind: str(out / f"report.{kind}") for kind in done["report"]},
        "out": str(out),
    }


def _place(out: Path, layout: Path) -> Path:
    """A bundle's layout under `OUT/bundles`: hard links where the disk allows, else copies."""
    target = out / "bundles" / layout.name
    if not target.exists():
        partial = target.with_name(f".{target.name}.partial")
        shutil.rmtree(partial, ignore_errors=True)
        partial.parent.mkdir(parents=True, exist_ok=True)
        try:
            shutil.copytree(layout, partial, copy_function=os.link)
        except (OSError, shutil.Error):
            shutil.rmtree(partial, ignore_errors=True)
            shutil.copytree(layout, partial)
        partial.replace(target)
    return target


def _shown(path: Path) -> str:
    """The path as one would type it here."""
    try:
        return str(path.relative_to(Path.cwd()))
    except ValueError:
        return str(path)


def show(result: Mapping[str, Any], *, as_json: bool, console: Console) -> None:
    """Prints a result: JSON if asked, a table on a terminal, tab-separated text when piped."""
    if as_json:
        sys.stdout.write(json.dumps(result, indent=2, ensure_ascii=False) + "\n")
        return
    terminal = sys.stdout.isatty() and os.environ.get("TERM") != "dumb"
    if terminal:
        _print_tables(result)
    else:
        _print_rows(result)
    for entry in result["classes"]:
        if entry["choice"] is None:
            _say(console, f"{entry['name']}: nothing could be exported for this class.")
            continue
        _say(console, entry["choice"]["sentence"])
        _say(console, f"Serve it with: {entry['serve']}")
    _say(console, f"Report: {_shown(Path(result['report']['html']))}")


def _cells(entry: Mapping[str, Any]) -> list[str]:
    return [
        objective.show("accuracy", entry["accuracy"]),
        objective.show("latency_p50", entry["latency_p50_ms"]),
        objective.show("latency_p95", entry["latency_p95_ms"]),
        objective.show("size", float(entry["size_bytes"])),
        objective.show("memory", entry["memory_bytes"]),
    ]


def _print_tables(result: Mapping[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console(file=sys.stdout, highlight=False)
    for entry in result["classes"]:
        table = Table(title=entry["name"], title_justify="left", box=None, pad_edge=False)
        table.add_column("")
        table.add_column("candidate", no_wrap=True)
        for name in ("accuracy", "p50", "p95", "size", "memory"):
            table.add_column(name, justify="right", no_wrap=True)
        for row in entry["front"]:
            chosen = entry["choice"] is not None and row["bundle"] == entry["choice"]["bundle"]
            table.add_row("✔" if chosen else "", row["name"], *_cells(row), style="bold" if chosen else "")
        console.print(table)


def _print_rows(result: Mapping[str, Any]) -> None:
    names = ["class", "name", "chosen", "accuracy", "latency_p50_ms", "latency_p95_ms", "size_bytes"]
    names += ["memory_bytes", "layout"]
    lines = ["\t".join(names)]
    for entry in result["classes"]:
        for row in entry["front"]:
            chosen = entry["choice"] is not None and row["bundle"] == entry["choice"]["bundle"]
            values = {**row, "class": entry["name"], "chosen": "yes" if chosen else "no"}
            lines.append("\t".join("" if values[n] is None else str(values[n]) for n in names))
    sys.stdout.write("\n".join(lines) + "\n")


# ---------------------------------------------------------------------------- progress


def _stderr() -> Console:
    from rich.console import Console

    return Console(file=sys.stderr, highlight=False)


def _say(console: Console, text: str) -> None:
    console.print(text, markup=False, soft_wrap=True)


class Follower:
    """Shows a job's progress: one bar on a terminal, a line for each new step when piped."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._bar: Any = None
        self._task: Any = None
        self._last = ""

    def __call__(self, event: Mapping[str, Any]) -> None:
        if event["event"] == "variant":
            self._note(f"made {event['name']}, {objective.show('size', float(event['size_bytes']))}")
        elif event["event"] == "ingested":
            base = event["baseline"]
            interval = f"{base['low']:.3f} to {base['high']:.3f}"
            self._note(f"the original: {event['metric']} {base['value']:.4g} ({interval})")
        elif event["event"] == "progress":
            self._progress(event["step"], event["share"], event["message"])

    def _note(self, text: str) -> None:
        _say(self._bar.console if self._bar is not None else self._console, text)

    def _progress(self, step: str, share: float | None, message: str) -> None:
        if not self._console.is_terminal:
            if step != self._last:
                self._last = step
                _say(self._console, f"{step}: {message}" if message else step)
            return
        if self._bar is None:
            from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

            self._bar = Progress(
                TextColumn("{task.description:<9}"),
                BarColumn(bar_width=24),
                TimeElapsedColumn(),
                TextColumn("{task.fields[message]}", markup=False),
                console=self._console,
                transient=True,
            )
            self._bar.start()
            self._task = self._bar.add_task(step, total=1.0, message="")
        self._bar.update(
            self._task,
            description=step,
            message=message,
            total=None if share is None else 1.0,
            completed=share or 0.0,
        )

    def close(self) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None
