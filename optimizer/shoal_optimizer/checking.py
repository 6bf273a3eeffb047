"""`shoal task check`: tries everything that a push will need on one batch, in seconds.

Each question is asked even if an earlier one failed, as far as that makes sense; each problem says what
to mend.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from shoal_optimizer.checks import data, exporting, model, source
from shoal_optimizer.checks.report import CheckReport as CheckReport
from shoal_optimizer.checks.report import Item as Item
from shoal_optimizer.task import Task, load_task
from shoal_optimizer.weights import require_torch
from shoal_protos.errors import InvalidInput, ShoalError

EPOCHS = 10.0  # what one network of a search trains, about
STEADY, WORST = 0.7, 3.0  # a guess's range: a busy machine is slower, not faster


def check(
    path: Path,
    *,
    progress: Callable[[str], None] = lambda step: None,
) -> CheckReport:
    """Tries a task file (or ONNX file) and reports what it found; never raises for what the task does wrong.

    Args:
        progress: gets the name of each step before it is done.

    Raises:
        InvalidInput: there is no such file.
    """
    path = Path(path).resolve()
    if not path.is_file():
        raise InvalidInput(f"There is no task file '{path}'.", "Check the path; `shoal task new` makes one.")
    report = CheckReport(str(path))
    python = path.suffix != ".onnx"
    progress("files")
    declared = report.attempt("files", lambda: source.check_files(report, path))
    if python and declared:
        report.attempt("imports", lambda: source.check_imports(report, path))
    progress("importing")
    with source.watch_opening(path) as opened:
        task = _load(report, path)
        if task is not None:
            _ask(report, task, progress)
        else:
            _skip(report, "data", "model", "metric", "export")
    if python and declared:
        report.attempt("reads", lambda: source.check_opened(report, opened))
    return report


def _load(report: CheckReport, path: Path) -> Task | None:
    try:
        require_torch()
        task = load_task(path)
    except ShoalError as error:
        report.fail("declarations", error.message, error.remedy)
        return None
    kind = f"{task.input_kind} in, {task.output_kind} out"
    labels = f", {len(task.labels)} labels" if task.labels else ""
    report.add("declarations", f"{type(task).__name__}: {kind}{labels}")
    for note in getattr(task, "notes", ()):
        report.add("declarations", note)
    return task


def _ask(report: CheckReport, task: Task, progress: Callable[[str], None]) -> None:
    cut = data.limit(task)
    progress("data")
    if not report.attempt("data", lambda: data.check_inputs(report, task, cut)):
        _skip(report, "targets", "model", "metric", "export")
        return
    report.attempt("targets", lambda: data.check_targets(report, task, cut))
    progress("model")
    if task.has_module and not report.attempt("preprocess", lambda: model.check_preprocess(report, task)):
        _skip(report, "model", "metric", "export")
        return
    if not report.attempt("model", lambda: _model(report, task)):
        _skip(report, "metric", "export")
        return
    progress("metric")
    report.attempt("metric", lambda: model.check_metric(report, task))
    if task.has_module and task.data("training") is not None:
        report.attempt("training", lambda: model.check_training(report, task))
    progress("export")
    report.attempt("export", lambda: exporting.check_export(report, task))
    if report.ok:
        report.attempt("time", lambda: _estimate(report))


def _model(report: CheckReport, task: Task) -> None:
    """Like `check_model`; weights of another network are explained in the words of a person."""
    try:
        model.check_model(report, task)
    except InvalidInput as error:
        if "loading state_dict" not in error.message:
            raise
        raise InvalidInput(
            f"The weights are of another network: {_told(error.message)}",
            (
                "Make the network that these weights were trained in, with the same arguments, "
                "or name the right weights."
            ),
        ) from error


def _told(message: str) -> str:
    """The first lines of torch's complaint, names of tensors included."""
    lines = [line.strip() for line in message.splitlines()[1:] if line.strip()]
    shown = " ".join(line if len(line) < 160 else f"{line[:157]}..." for line in lines[:2])
    return f"{shown} ({len(lines)} complaints in all)" if len(lines) > 2 else shown


def _skip(report: CheckReport, *names: str) -> None:
    for name in names:
        report.items.append(Item(name, "skipped", "not tried: something before it must be mended"))


def _estimate(report: CheckReport) -> None:
    """Minutes that this machine will take, as ranges, from what the check measured."""
    facts = report.facts
    items = facts["items"]
    judging = items["evaluation"]
    export = facts.get("export_s", 0.0)
    judged = judging * facts.get("onnx_item_s", 0.0)
    ingest = judging * facts["item_s"] + export + 5.0  # a process that imports torch
    plain = 2 * judged + 5.0  # two runtimes, golden cases, sketches; the graph is there
    network = EPOCHS * items["training"] * facts.get("step_item_s", 0.0) + export + 2 * judged
    facts["minutes"] = {
        "ingest": [STEADY * ingest / 60, WORST * ingest / 60],
        "plain": [STEADY * plain / 60, WORST * plain / 60],
        "network": [STEADY * network / 60, WORST * network / 60],
    }
    text = f"ingest {_span(ingest)}, plain variants {_span(plain)}, a trained candidate {_span(network)}"
    report.add("time", f"{text} on this machine")


def _span(seconds: float) -> str:
    low, high = STEADY * seconds, WORST * seconds
    if high < 90:
        return f"{low:.0f} to {high:.0f} s"
    return (
        f"{low / 60:.1f} to {high / 60:.1f} min"
        if high < 5400
        else f"{low / 3600:.1f} to {high / 3600:.1f} h"
    )
