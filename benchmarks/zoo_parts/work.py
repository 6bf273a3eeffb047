"""One model of the zoo: data, Shoal with its defaults, the ways by hand, and what each is worth."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from shoal_optimizer import cli
from shoal_optimizer.evaluation import score
from shoal_optimizer.task import Task, load_task
from zoo_parts import byhand, fetch
from zoo_parts.byhand import Case, Feed
from zoo_parts.inputs import Data
from zoo_parts.models import Model

MINUTES = 3.0  # the default of `shoal optimize`
LITERT = "not applicable: the model comes as ONNX only, litert-torch takes PyTorch"
OLIVE = (
    "not tried: its ONNX static quantization is the quantize_static that is measured here, and its package "
    "was not installed beside the benchmark"
)


def build(model: Model, folder: Path) -> dict[str, Any]:
    """Everything but the timing; what an earlier start finished is read."""
    folder.mkdir(parents=True, exist_ok=True)
    done = folder / "built.json"
    if done.is_file():
        found: dict[str, Any] = json.loads(done.read_bytes())
        return found
    file = fetch.fetch(model, folder)
    data = model.data()
    write_data(file, data)
    task = load_task(file)
    baseline = score(task, task.predict(None, task.required("evaluation").inputs), _targets(task))  # type: ignore[arg-type]
    bound = baseline.value - model.drop
    began = time.monotonic()
    shoal = _shoal(file, bound, folder / "shoal")
    spent = time.monotonic() - began
    rows = _by_hand(model, file, task, data, folder)
    result = {
        "name": model.name,
        "package": model.package or "SHOAL_DATA/models",
        "file": model.file,
        "sha256": model.sha256,
        "licence": model.licence,
        "judged": model.judged,
        "metric": baseline.metric,
        "items": baseline.n,
        "baseline": baseline.value,
        "objective": f"accuracy>={bound:.5f}; minimise latency_p50",
        "bound": bound,
        "size_bytes": file.stat().st_size,
        "shoal": shoal | {"minutes": MINUTES, "seconds": round(spent, 1)},
        "by_hand": rows,
        "litert": LITERT,
        "olive": OLIVE,
    }
    done.write_text(json.dumps(result, indent=1))
    return result


def _targets(task: Task) -> np.ndarray[Any, Any]:
    return task.required("evaluation").targets


def write_data(file: Path, data: Data) -> None:
    """The `.npz` beside the model, as a user would write it; without labels the fp32 model's answers."""
    import onnxruntime

    target = file.with_suffix(".npz")
    if target.is_file():
        return
    targets = data.targets
    if targets is None:
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 4
        session = onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
        output = data.judged or session.get_outputs()[0].name
        answers = [session.run([output], feed)[0] for feed in feeds(data, data.evaluation, session)]
        targets = np.concatenate(answers)
        targets = targets.argmax(-1) if data.argmax else targets
    suffix = f":{data.name}" if data.name else ""
    arrays: dict[str, Any] = {
        f"inputs{suffix}": data.evaluation,
        f"calibration{suffix}": data.calibration,
        f"targets:{data.judged}" if data.judged else "targets": targets,
        **{f"fixed:{name}": value for name, value in data.fixed.items()},
    }
    partial = target.with_suffix(".partial.npz")
    np.savez(partial, **arrays)
    partial.replace(target)


def feeds(data: Data, items: np.ndarray[Any, Any], session: Any) -> list[Feed]:
    """Single items as the file's own inputs take them."""
    name = data.name or session.get_inputs()[0].name
    return [{name: items[i : i + 1], **data.fixed} for i in range(len(items))]


def _shoal(file: Path, bound: float, out: Path) -> dict[str, Any]:
    """`shoal optimize MODEL.onnx --objective "accuracy>=BOUND; minimise latency_p50"`."""
    try:
        result = cli.optimize(
            file,
            objective_text=f"accuracy>={bound:.5f}; minimise latency_p50",
            minutes=MINUTES,
            out=out,
        )
    except Exception as error:
        return {"failed": f"{type(error).__name__}: {str(error)[:300]}"}
    entry = result["classes"][0]
    choice = entry["choice"]
    chosen = next((e for e in entry["front"] if choice and e["bundle"] == choice["bundle"]), None)
    if chosen is None:
        return {"failed": "nothing could be exported"}
    return {
        "chosen": chosen["name"],
        "target": chosen["target"],
        "precision": chosen["precision"],
        "accuracy": chosen["accuracy"],
        "int8_share": chosen["int8_share"],
        "size_bytes": chosen["size_bytes"],
        "layout": chosen["layout"],
        "options": (choice.get("options") or {}),
        "feasible": choice["feasible"],
        "sentence": choice["sentence"],
        "front": [
            {k: e[k] for k in ("name", "accuracy", "latency_p50_ms", "size_bytes")} for e in entry["front"]
        ],
    }


def _by_hand(model: Model, file: Path, task: Task, data: Data, folder: Path) -> dict[str, Any]:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    session = onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
    output = data.judged or session.get_outputs()[0].name
    case = Case(file, feeds(data, data.calibration, session), output)
    judged = feeds(data, data.evaluation, session)
    rows: dict[str, Any] = {}
    for name, (runtime, suffix, make) in byhand.WAYS.items():
        target = file if make is None else folder / f"{name.replace(' ', '-').replace(',', '')}{suffix}"
        try:
            if make is not None:
                make(case, target)
            run = byhand.load(runtime, target, output)
            answers = np.concatenate([run(feed) for feed in judged])
            rows[name] = {
                "runtime": runtime,
                "file": target.name,
                "output": output,
                "accuracy": task.measured(answers, _targets(task)),
                "size_bytes": target.with_suffix(".bin").stat().st_size
                if suffix == ".xml"
                else target.stat().st_size,
            }
        except Exception as error:
            told = str(error).strip().splitlines() or [""]
            told = [line.replace(f"{folder}/", "") for line in told]  # no path of this machine
            rows[name] = {"failed": f"{type(error).__name__}: {told[0][:200]}"}
    return rows


def counted(built: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """The ways by hand that keep the accuracy that the objective asks for."""
    return {
        name: row
        for name, row in built["by_hand"].items()
        if "failed" not in row and row["accuracy"] >= built["bound"] - 1e-9
    }
