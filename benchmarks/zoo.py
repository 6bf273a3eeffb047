"""The zoo: pretrained models that nobody tuned for, Shoal's defaults against the best way by hand.

    SHOAL_DATA=... python benchmarks/zoo.py                  everything; goes on where it stopped
    SHOAL_DATA=... python benchmarks/zoo.py --timing-only    the clock again, on a quiet machine
    SHOAL_DATA=... python benchmarks/zoo.py --models magika,dnsmos

Every model gets `shoal optimize MODEL.onnx` with an objective that allows one point of its metric, no
training, and every way by hand that `zoo_parts/byhand.py` knows. A way that loses more than the objective
allows does not count. Then all that count are timed in the same interleaved rounds on one thread.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from zoo_parts import fetch, page
from zoo_parts.models import MODELS, Model, named

RESULTS = Path(__file__).resolve().parents[1] / "docs" / "results"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--models", default="", help="names, comma-separated; all without it")
    parser.add_argument("--timing-only", action="store_true", help="time again what is built")
    parser.add_argument("--seconds", type=float, default=12.0, help="of timing a model (default 12)")
    parser.add_argument("--work", type=Path, default=fetch.cache() / "work", help="where models are built")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of zoo.json and zoo.md")
    parser.add_argument("--worker", default="", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        return _worker(named(options.worker)[0], options)
    for model in named(options.models):
        _in_a_process(model, options)
        _write(options)
    return 0


def _in_a_process(model: Model, options: argparse.Namespace) -> None:
    """A model that brings its process down costs that model only."""
    command = [sys.executable, __file__, "--worker", model.name, "--work", str(options.work)]
    command += ["--seconds", str(options.seconds)]
    command += ["--timing-only"] if options.timing_only else []
    done = subprocess.run(command, stdin=subprocess.DEVNULL)
    if done.returncode:
        print(f"{model.name}: ended with {done.returncode}", file=sys.stderr, flush=True)


def _worker(model: Model, options: argparse.Namespace) -> int:
    from zoo_parts import clock, work

    folder = options.work / model.name
    if not options.timing_only:
        work.build(model, folder)
    timing = folder / "timing.json"
    if options.timing_only or not timing.is_file():
        found = clock.measure(model, folder, options.seconds)
        found["context"] = page.context()
        timing.write_text(json.dumps(found, indent=1))
    row = json.loads(timing.read_bytes())
    print(f"{model.name}: {row.get('speedup', 0):.2f}x of {row['best']}", flush=True)
    return 0


def _write(options: argparse.Namespace) -> None:
    rows = [row for model in MODELS if (row := _row(options.work / model.name)) is not None]
    timed = [row for row in rows if "speedup" in row["timing"]]
    if not timed:
        return
    speedups = [row["timing"]["speedup"] for row in timed]
    worst = min(timed, key=lambda row: row["timing"]["speedup"])
    result: dict[str, Any] = {
        "zoo.models": len(timed),
        "zoo.median_speedup_over_best_by_hand": round(statistics.median(speedups), 3),
        "zoo.worst": round(worst["timing"]["speedup"], 3),
        "zoo.worst_model": worst["name"],
        "made": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "context": timed[-1]["timing"]["context"],
        "rows": rows,
    }
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "zoo.json").write_text(json.dumps(result, indent=1) + "\n")
    (options.out / "zoo.md").write_text(page.render(result))


def _row(folder: Path) -> dict[str, Any] | None:
    built, timing = folder / "built.json", folder / "timing.json"
    if not built.is_file() or not timing.is_file():
        return None
    row: dict[str, Any] = json.loads(built.read_bytes())
    row["shoal"].pop("layout", None)
    return {**row, "timing": json.loads(timing.read_bytes())}


if __name__ == "__main__":
    sys.exit(main())
