"""`shoal optimize TASK`: a whole search on this machine, without a controller.

The command is a thin follower of two jobs (ingest, then optimize) in child processes, the very ones
that a controller's worker starts. Their directories lie under `OUT/.shoal`, so the same command goes
on after Ctrl-C. Data goes to stdout, everything else to stderr.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from shoal_optimizer import executors, objective, replay
from shoal_optimizer.cli_classes import machine_classes
from shoal_optimizer.cli_jobs import one, run_job
from shoal_optimizer.cli_show import Follower, say, show, show_replay, shown, stderr
from shoal_optimizer.jobspec import ProfileClass
from shoal_optimizer.jobstate import write_atomic
from shoal_optimizer.reporting import facts
from shoal_optimizer.search import knowledge
from shoal_protos.errors import Conflict, InvalidInput

EXIT_DIFFERENT, EXIT_INTERRUPTED = 1, 130
SCRATCH = ".shoal"
__all__ = ["machine_classes", "optimize", "optimize_command", "replay_variant"]


def optimize_command(
    task: Annotated[
        Path | None,
        typer.Argument(help="A task file (.py), or an ONNX file with its .npz.", show_default=False),
    ] = None,
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
    trials: Annotated[
        int | None, typer.Option("--trials", help="Variants that are timed, at most.", min=1)
    ] = None,
    max_bytes: Annotated[
        int | None, typer.Option("--max-bytes", help="Bytes of variants that are timed, at most.", min=1)
    ] = None,
    executor: Annotated[
        str,
        typer.Option("--executor", help="Where networks train: processes, ray://local or ray://HOST:PORT."),
    ] = "processes",
    out: Annotated[Path | None, typer.Option(help="Folder of the results. Default: TASK-optimized.")] = None,
    seed: Annotated[int, typer.Option(help="Equal seeds give equal networks.")] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as one JSON document.")] = False,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with what --out holds, whatever the other options say.")
    ] = False,
    replay_report: Annotated[
        Path | None,
        typer.Option("--replay", help="A report.json: make a variant of it again and compare every byte."),
    ] = None,
    variant: Annotated[
        str, typer.Option("--variant", help="Which one to make again. Default: the chosen one.")
    ] = "",
) -> None:
    """Compresses and converts a model for this machine and keeps what is worth keeping.

    Example: shoal optimize examples/digits.py --objective "accuracy>=0.97; minimise size"
    """
    if replay_report is not None:
        raise typer.Exit(_replay(replay_report, task, variant, out, as_json=as_json))
    if task is None:
        raise InvalidInput("No task is named.", "Give a task file, or --replay with a report.json.")
    console = stderr()
    follower = Follower(console)
    target = (out or Path(f"{task.stem}-optimized")).resolve()
    try:
        result = optimize(
            task,
            objective_text=objective_text,
            classes=classes or [],
            isa=[part.strip() for part in isa.split(",") if part.strip()],
            minutes=minutes,
            trials=trials,
            max_bytes=max_bytes,
            executor=executor,
            out=target,
            seed=seed,
            resume=resume,
            follow=follower,
        )
    except KeyboardInterrupt:
        follower.close()
        say(console, f"Stopped. Nothing is lost: go on with the same command and --out {out or target.name}")
        raise typer.Exit(EXIT_INTERRUPTED) from None
    finally:
        follower.close()
    show(result, as_json=as_json, console=console)


def _replay(report: Path, task: Path | None, variant: str, out: Path | None, *, as_json: bool) -> int:
    """Makes a variant again; 0 = every byte is equal."""
    console = stderr()
    follower = Follower(console)
    try:
        result = replay_variant(report, task=task, variant=variant, out=out, follow=follower)
    except KeyboardInterrupt:
        follower.close()
        say(console, "Stopped. The same command starts again.")
        return EXIT_INTERRUPTED
    finally:
        follower.close()
    show_replay(result, as_json=as_json, console=console)
    return 0 if result["equal"] else EXIT_DIFFERENT


def replay_variant(
    report: Path,
    *,
    task: Path | None = None,
    variant: str = "",
    out: Path | None = None,
    follow: Callable[[Mapping[str, Any]], None] = lambda event: None,
) -> dict[str, Any]:
    """Makes a variant of a report again, in a job of its own, and compares it.

    Args:
        task: the task file; None = where the report says it lay, seen from the report.
        variant: a name or the start of a digest; "" = the chosen one.
        out: folder for the bundle; None = `replayed-NAME` beside the report.

    Returns:
        As `replay.Verdict.to_json`, with "layout" (of the bundle made) and "out".

    Raises:
        InvalidInput, NotFound: the report, the variant or the task file is not there.
        Conflict: the task's data are not those of the report, or `out` is in use.
        ShoalError: it cannot be made here.
    """
    data = replay.read(report)
    order = replay.order(data, variant)
    if task is None:
        path = order.lineage.get("task_path")
        if not path:
            raise InvalidInput("The report does not say where its task lies.", "Name the task file as well.")
        task = report.parent / str(path)
    task = task.resolve()
    if not task.is_file():
        raise InvalidInput(f"There is no task file '{task}'.", "Name the task file as well.")
    target = (out or report.parent / f"replayed-{order.variant['name']}").resolve()
    scratch = target / SCRATCH / "replay"
    if target.exists() and any(target.iterdir()) and not (target / SCRATCH).is_dir():
        raise Conflict(f"{target} exists and is not a replay's folder.", "Use another --out.")
    shutil.rmtree(scratch, ignore_errors=True)  # made again means from the start
    spec = {
        "kind": "replay",
        "id": "replay",
        "seed": order.lineage["seed"],
        "threads": order.threads,
        "source": str(task.parent),
        "task": task.name,
        "version": {"model": order.lineage.get("model", ""), "number": order.lineage.get("version", 0)},
        "replay": order.to_json(),
        "budget": {"minutes": 60},
    }
    found = one(run_job(scratch, spec, follow), "replayed")
    result = {name: value for name, value in found.items() if name != "event"}
    shutil.rmtree(target / "bundles", ignore_errors=True)
    result["layout"] = str(_place(target, Path(found["layout"])))
    write_atomic(target / "replay.json", json.dumps(result, indent=1).encode())
    return {**result, "out": str(target)}


# ---------------------------------------------------------------------------- the work


def optimize(
    task: Path,
    *,
    objective_text: str = "",
    classes: Sequence[str] = (),
    isa: Sequence[str] = (),
    minutes: float = 3.0,
    trials: int | None = None,
    max_bytes: int | None = None,
    executor: str = "processes",
    out: Path,
    seed: int = 0,
    resume: bool = False,
    follow: Callable[[Mapping[str, Any]], None] = lambda event: None,
) -> dict[str, Any]:
    """Runs (or goes on with) ingest and search in `out`, and lays out the kept bundles.

    Args:
        trials, max_bytes: variants that are timed here, at most, and their bytes.
        executor: where networks train, as `executors.make` takes it.
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
        "trials": trials,
        "max_bytes": max_bytes,
        "seed": seed,
    }
    executors.check(executor)
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
    budget |= {"measurements": settings.get("trials"), "bytes": settings.get("max_bytes")}
    more = {"knowledge": str(_known(out)), "executor": executor}
    ingested = one(
        run_job(
            out / SCRATCH / "ingest", {**base, "kind": "ingest", "id": "ingest", "budget": budget}, follow
        ),
        "ingested",
    )
    files = ingested["files"]
    done = one(
        run_job(
            out / SCRATCH / "optimize",
            {**base, "kind": "optimize", "id": "optimize", "budget": budget, **files, **more},
            follow,
        ),
        "done",
    )
    if done.get("knowledge"):
        knowledge.merge(knowledge.of_this_machine(), Path(done["knowledge"]), job=str(out))
    return _lay_out(out, settings, ingested, done)


def _known(out: Path) -> Path:
    """What this machine knew when the search began: a later start must not find anything else."""
    kept = out / SCRATCH / knowledge.FILE
    if not kept.exists():
        source = knowledge.of_this_machine()
        write_atomic(kept, source.read_bytes() if source.is_file() else b"{}")
    return kept


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


# ---------------------------------------------------------------------------- results


def _lay_out(
    out: Path, settings: Mapping[str, Any], ingested: Mapping[str, Any], done: Mapping[str, Any]
) -> dict[str, Any]:
    """Puts kept bundles and the report where people look, and returns the result."""
    report = json.loads(Path(done["report"]["json"]).read_bytes())
    reported = {entry["name"]: entry for entry in report["classes"]}
    classes = []
    for name, front in done["fronts"].items():
        entries = [{**entry, "layout": str(_place(out, Path(entry["layout"])))} for entry in front]
        choice = done["choice"].get(name)
        original = facts.original(reported[name])
        entries = [{**entry, "against_original": against(entry, original)} for entry in entries]
        chosen = next((e for e in entries if choice and e["bundle"] == choice["bundle"]), None)
        serve = f"shoal-agent serve {shown(Path(chosen['layout']))}" if chosen else ""
        classes.append(
            {
                "name": name,
                "front": entries,
                "choice": choice,
                "original": None if original is None else _original(original),
                "serve": serve,
            }
        )
    shutil.copyfile(done["report"]["html"], out / "report.html")
    # Seen from the report, so that a folder can be moved as a whole.
    report["lineage"]["task_path"] = os.path.relpath(settings["task"], out)
    write_atomic(out / "report.json", json.dumps(report, indent=1, sort_keys=True).encode())
    return {
        "model": report["model"],
        "metric": report["metric"],
        "objective": settings["objective"],
        "sentence": report["sentence"],
        "baseline": {k: v for k, v in ingested["baseline"].items() if k != "per_class"},
        "classes": classes,
        "report": {kind: str(out / f"report.{kind}") for kind in done["report"]},
        "out": str(out),
    }


def _original(row: Mapping[str, Any]) -> dict[str, Any]:
    """What everything is compared with, as an entry of a front."""
    return {
        "name": row["name"],
        "accuracy": facts.value(row, "accuracy"),
        "latency_p50_ms": facts.value(row, "latency_p50"),
        "latency_p95_ms": facts.value(row, "latency_p95"),
        "size_bytes": row["size_bytes"],
        "memory_bytes": facts.value(row, "memory"),
    }


def against(entry: Mapping[str, Any], original: Mapping[str, Any] | None) -> dict[str, float | None]:
    """How many times smaller and faster an entry is than the original, and what its metric gained."""
    if original is None:
        return {"smaller": None, "faster": None, "accuracy": None}
    base = _original(original)
    both = entry["accuracy"] is not None and base["accuracy"] is not None
    return {
        "smaller": facts.ratio(base["size_bytes"], entry["size_bytes"]),
        "faster": facts.ratio(base["latency_p50_ms"], entry["latency_p50_ms"]),
        "accuracy": entry["accuracy"] - base["accuracy"] if both else None,
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
