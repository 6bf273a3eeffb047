"""A job's process for tests: the contract of `shoal_optimizer.jobs` without a model in it.

What it does is said by the task's text: `fail`, `crash`, `garbage`, `sleep`, `trial`, `escape`, `leak`.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

from tests.controller.world import make_bundle


def say(event: str, **fields: object) -> None:
    print(json.dumps({"event": event, **fields}), flush=True)


def figures(local: bool, p95: float, accuracy: float) -> dict[str, object]:
    if not local:
        return {"accuracy": None, "latency": None, "source": "unmeasured"}
    return {
        "accuracy": {"value": accuracy, "low": accuracy - 0.01, "high": accuracy + 0.01, "n": 400},
        "latency": {
            "p50_ms": p95 * 0.8,
            "p95_ms": p95,
            "p95_low_ms": p95 * 0.95,
            "p95_high_ms": p95 * 1.05,
            "n": 200,
        },
        "source": "local",
    }


def variants(
    folder: Path, spec: dict[str, Any], names: dict[str, tuple[float, float]], *, plain: bool
) -> dict[str, list[dict[str, Any]]]:
    fronts: dict[str, list[dict[str, Any]]] = {}
    for profile_class in spec["classes"]:
        runtime = next(iter(profile_class["runtimes"]))
        for name, (p95, accuracy) in names.items():
            layout = folder / "out" / f"{name}-{runtime}"
            label = f"{name} {spec['version']['number']} {spec['kind']} {spec['seed']}"
            digest = make_bundle(layout, label, runtime)
            say(
                "variant",
                bundle=digest,
                layout=str(layout),
                name=f"{name}-{runtime}",
                target=runtime,
                precision="fp32",
                recipe=[{"technique": name, "params": {}}],
                size_bytes=1000,
                wire_bytes=900,
                plain=plain,
                classes={profile_class["name"]: figures(profile_class["local"], p95, accuracy)},
            )
            fronts.setdefault(profile_class["name"], []).append(
                {"bundle": digest, "accuracy": accuracy, "latency_p95_ms": p95}
            )
    return fronts


def done(folder: Path, fronts: dict[str, list[dict[str, Any]]]) -> None:
    (folder / "out" / "report.html").write_text("<h1>report</h1>")
    (folder / "out" / "report.json").write_text("{}")
    choice = {
        name: {"bundle": front[0]["bundle"], "feasible": True, "sentence": "best"}
        for name, front in fronts.items()
        if front
    }
    report = {"html": str(folder / "out" / "report.html"), "json": str(folder / "out" / "report.json")}
    say("done", fronts=fronts, choice=choice, report=report)


def main(folder: Path) -> int:
    spec = json.loads((folder / "job.json").read_text())
    text = (Path(spec["source"]) / spec["task"]).read_text()
    (folder / "starts").open("a").write("x")
    starts = len((folder / "starts").read_text())
    print("a log line", file=sys.stderr, flush=True)
    say("progress", step="analyse", share=0.5, message="looking")
    if "fail" in text:
        say("error", message="model() raised ValueError: no.", remedy="Mend model().", field="model()")
        return 1
    if "crash" in text:
        print("Segmentation something", file=sys.stderr, flush=True)
        os.kill(os.getpid(), 11)
    if "garbage" in text:
        print("hello, I am a library that prints", flush=True)
    if "escape" in text:
        say(
            "ingested",
            signature={},
            metric="accuracy",
            baseline={},
            analysis={},
            files={"weights": "/etc/passwd"},
        )
    if "leak" in text:
        say("error", message="environment: " + " ".join(sorted(os.environ)), remedy="", field="")
        return 1
    if "sleep" in text and starts == 1:
        for i in range(600):
            say("progress", step="train", share=i / 600, message=f"epoch {i}")
            time.sleep(0.1)
    if spec["kind"] == "ingest":
        (folder / "out" / "weights.pt").write_bytes(b"weights")
        (folder / "out" / "data.npz").write_bytes(b"data")
        from tests.controller.world import signature_json

        say(
            "ingested",
            signature=signature_json(),
            metric="accuracy",
            baseline={"value": 0.99, "low": 0.98, "high": 1.0, "n": 400},
            analysis={"parameters": 10},
            files={"weights": str(folder / "out" / "weights.pt"), "data": str(folder / "out" / "data.npz")},
        )
        done(folder, variants(folder, spec, {"plain": (2.0, 0.99)}, plain=True))
        return 0
    if spec["kind"] == "adapt":
        kept = "worse" not in text
        (folder / "out" / "adapted.pt").write_bytes(b"adapted" + Path(spec["weights"]).read_bytes())
        field = Path(spec["field"]["inputs"]).stat().st_size
        say(
            "adapted",
            files={"weights": str(folder / "out" / "adapted.pt"), "data": str(Path(spec["data"]))},
            baseline={"value": 0.97, "low": 0.96, "high": 0.98, "n": 400},
            evidence={
                "method": "matched",
                "before": 0.7,
                "after": 0.95,
                "labels": len(spec["field"]["samples"]),
                "bytes": field,
            },
            kept=kept,
            sentence="Adapted: 70 % to 95 % on matched data."
            if kept
            else "The adapted original was no better.",
        )
        done(folder, variants(folder, spec, {"adapted": (1.0, 0.95)}, plain=False) if kept else {})
        return 0
    fronts = variants(folder, spec, {"pruned": (1.0, 0.985), "int8": (1.5, 0.99)}, plain=False)
    if "trial" in text:
        wanted = {f"t{i}": c for i, c in enumerate(spec["classes"])}
        if not set(wanted) <= set(spec["trial_results"]):
            for key, c in wanted.items():
                say(
                    "trial",
                    id=key,
                    bundle=fronts[c["name"]][0]["bundle"],
                    **{"class": c["name"]},
                    kind="timing",
                    incumbent="",
                    dataset=None,
                )
            say("waiting", trials=list(wanted))
            return 0
        say(
            "progress",
            step="answers",
            share=1,
            message=json.dumps({k: v is not None for k, v in spec["trial_results"].items()}),
        )
    done(folder, fronts)
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
