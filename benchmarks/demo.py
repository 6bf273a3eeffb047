"""The whole story, several times: `shoal demo --once` from start to end, its figures gathered.

    python benchmarks/demo.py [--rounds 3] [--quick] [--json FILE]

Each round is a fresh fleet in a fresh directory that trains anew from the same seed. With several
rounds a figure is the mean with Student's 95 % interval over rounds, which says how it repeats, not
how well 350 test images know an accuracy; with one round it is that round's own interval.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from scipy import stats

AIMS = {
    "speedup_over_pytorch": (">=", 10.0),
    "size_ratio": ("<=", 0.10),
    "accuracy_drop_points": ("<=", 1.0),
    "recovered_share": (">=", 0.8),
    "first_variant_s": ("<=", 60.0),
    "agent_start_s": ("<=", 3.0),
    "supervisor_rss_mb": ("<=", 52.0),
    "idle_bytes_per_s": ("<=", 60.0),
    "story_s": ("<=", 240.0),
}


def one_round(directory: Path, number: int) -> dict[str, Any]:
    """Plays the story once and returns its document; raises CalledProcessError if it broke a promise."""
    path = directory / f"round-{number}.json"
    command = [sys.executable, "-m", "shoal_controller.cli.main", "demo", "--once", "--json", str(path)]
    subprocess.run(command, check=True, timeout=900, stdout=sys.stderr)
    document: dict[str, Any] = json.loads(path.read_text())
    return document


def gather(rounds: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Mean and interval over rounds; a single round keeps its own interval and n."""
    if len(rounds) == 1:
        figures: dict[str, dict[str, Any]] = rounds[0]["figures"]
        return figures
    gathered = {}
    for key, first in rounds[0]["figures"].items():
        values = [float(document["figures"][key]["value"]) for document in rounds]
        mean = statistics.fmean(values)
        half = statistics.stdev(values) / len(values) ** 0.5 * float(stats.t.ppf(0.975, len(values) - 1))
        gathered[key] = {
            "value": mean,
            "unit": first["unit"],
            "low": mean - half,
            "high": mean + half,
            "n": len(values),
        }
    return gathered


def table(figures: dict[str, dict[str, Any]]) -> str:
    """A Markdown table for people."""
    lines = ["| figure | value | 95 % interval | n | aim | met |", "|---|---|---|---|---|---|"]
    for key, figure in figures.items():
        interval = f"{figure['low']:.3g} to {figure['high']:.3g}" if "low" in figure else ""
        aim, met = "", ""
        if key in AIMS:
            sign, limit = AIMS[key]
            aim = f"{sign} {limit:g}"
            met = "yes" if (figure["value"] >= limit if sign == ">=" else figure["value"] <= limit) else "no"
        n = figure.get("n", 1)
        lines.append(f"| {key} | {figure['value']:.3g} {figure['unit']} | {interval} | {n} | {aim} | {met} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--quick", action="store_true", help="one round")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        count = 1 if options.quick else options.rounds
        rounds = [one_round(Path(directory), number) for number in range(count)]
    figures = gather(rounds)
    text = table(figures)
    print(text)
    if options.json:
        document = {"benchmark": "demo", "figures": figures, "context": rounds[-1]["context"]}
        options.json.write_text(json.dumps(document, indent=1) + "\n")
        options.json.with_suffix(".md").write_text(f"# demo\n\n{text}\n")


if __name__ == "__main__":
    main()
