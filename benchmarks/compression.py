"""Compression: size, speed and accuracy kept of each technique alone and of the best combination.

    python benchmarks/compression.py [--json docs/results/compression.json]
    python benchmarks/compression.py --quick          six rows of two ready networks, in minutes
    python benchmarks/compression.py --timing-only    times what is finished again, trains nothing

The full one trains three networks on German traffic signs with three seeds each: about two CPU hours on
one thread. It goes on where it was stopped, and finished rows are kept by content in the checkpoints'
folder. SHOAL_DATA names the folder of the data, see examples/signs.py and examples/public_data.py.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from compression_parts import (
    figures,
    originals,
    page,
    quick,
    recipes,
    rows,
    searching,
    subjects,
    timing,
)  # fmt: skip
from shoal_controller.demo.figures import context
from shoal_optimizer.recipe import Recipe

RESULTS = Path(__file__).resolve().parents[1] / "docs" / "results" / "compression.json"
PREFIXES = {
    "resnet18": "",
    "wide": "wide.",
    "mobilenet": "mobilenet.",
    "resnet8": "",
    "resnet20": "resnet20.",
}
# What matters most first: a run that is cut off has the main network with all its rows.
ORDER = ("resnet18", "wide", "mobilenet")
NOTES = """\
Size: file bytes over those of the original's fp32 ONNX file, uncompressed (wire: gzip over gzip). Weight
pruning's size is that of the gzip-compressed file: its zeros take their bytes in an uncompressed one, and no
dense runtime computes faster for them, so no speed is claimed. Speed: medians at batch 1 on one thread, all
rows, seeds and runtimes in the same interleaved rounds; the interval is that of the median ratio within
rounds. Accuracy kept: right answers on the test set over the original's, in the row's own runtime; 95 %
bootstrap interval over pictures and seeds. Each recovery is one epoch towards the original's answers. Choices
were made on the validation split by track; the test set was looked at once a row. Combined removes all blocks
with an identity shortcut (in the wide network: channels first), recovers, removes channels, recovers, and
quantizes to int8."""


def say(text: str) -> None:
    print(text, flush=True)


QUICK_NOTE = "Quick: ready networks, training capped; not the figures to quote."


class Work:
    """What is finished so far, and what is not."""

    def __init__(self) -> None:
        self.subjects: dict[tuple[str, int], rows.Subject] = {}
        self.rows: dict[tuple[str, int], dict[str, dict[str, Any]]] = {}
        self.originals: dict[tuple[str, int], float] = {}
        self.missing: list[str] = []

    def add(self, subject: rows.Subject, recipe_of: Mapping[str, Recipe], *, train: bool) -> None:
        """Makes the rows of one original, or takes those that are there."""
        place = (subject.network, subject.seed)
        self.subjects[place] = subject
        found = self.rows.setdefault(place, {})
        for name, recipe in {rows.ORIGINAL: Recipe(), **recipe_of}.items():
            row = rows.made(subject, name, recipe, say) if train else rows.stored(subject, name, recipe)
            if row is None:
                self.missing.append(f"{subject.network} seed {subject.seed} {name}")
            else:
                found[name] = row

    def complete(self) -> dict[tuple[str, int], dict[str, dict[str, Any]]]:
        """Originals of which at least one row is there."""
        return {
            place: found for place, found in self.rows.items() if rows.ORIGINAL in found and len(found) > 1
        }

    def document(self, rounds: int) -> dict[str, Any]:
        """Times what is there and puts all figures together."""
        done = self.complete()
        times = timing.timed(self.subjects, done, rounds)
        found: dict[str, dict[str, Any]] = {}
        grouped: dict[str, dict[int, dict[str, dict[str, Any]]]] = {}
        for (network, seed), row in done.items():
            grouped.setdefault(network, {})[seed] = row
        for network, seeds in grouped.items():
            folder = self.subjects[network, next(iter(seeds))].folder
            found |= figures.of_network(network, PREFIXES[network], seeds, times, folder)
        hours = figures.cpu_hours(grouped, self.originals, self._candidates())
        found["cpu_hours"] = figures.figure(hours, hours, hours, 1, "h")
        forms = {
            f"{network}.seed{seed}": {
                name: {"forms": row["forms"], "recipe": row["recipe"], "notes": row["notes"]}
                for name, row in there.items()
            }
            for (network, seed), there in done.items()
        }
        return {
            "benchmark": "compression", "figures": found, "context": context(), "rows": forms,
            "missing": self.missing,
        }  # fmt: skip

    def _candidates(self) -> float:
        """CPU seconds of the networks that the search trained and did not take."""
        return sum(
            searching.spent(subject, {row["folder"] for row in self.rows[place].values()})
            for place, subject in self.subjects.items()
            if subject.seed == 0
        )


def full(options: argparse.Namespace, *, train: bool) -> Work:
    """Every network and seed, the results written after each."""
    work, folder = Work(), options.checkpoints
    for network in options.networks:
        search: Recipe | None = None
        for seed in options.seeds:
            if not train and not originals.finished(network, seed, folder):
                work.missing.append(f"{network} seed {seed}")
                continue
            subject, spent = subjects.subject(network, seed, folder)
            work.originals[network, seed] = spent
            wanted = dict(recipes.ROWS[network])
            if network == "resnet18":
                first = subject if seed == 0 else subjects.subject(network, 0, folder)[0]
                search = search or (searching.searched(first, say) if train else searching.known(first))
                if search is None:
                    work.missing.append(f"{network} seed {seed} {searching.ROW}")
                else:
                    wanted[searching.ROW] = search
            work.add(subject, wanted, train=train)
            if train and options.json and options.partial:
                publish(work, options, [f"{network} and later: seeds after {seed}"])
    return work


def publish(work: Work, options: argparse.Namespace, later: list[str]) -> None:
    if not work.complete():
        say("Nothing is finished yet.")
        return
    document = work.document(options.rounds)
    notes = [NOTES if not options.quick else QUICK_NOTE]
    text = page.write(options.json, document, work.missing + later, notes, judged=not options.quick)
    say(text)
    say(f"CPU hours in all: {document['figures']['cpu_hours']['value']:.2f}")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="ready networks, capped training")
    parser.add_argument("--timing-only", action="store_true", help="train nothing, time what is finished")
    parser.add_argument("--networks", nargs="+", default=list(ORDER), choices=ORDER)
    parser.add_argument("--seeds", nargs="+", type=int, default=list(originals.SEEDS))
    parser.add_argument("--originals", nargs="+", metavar="NETWORK:SEED", help="train these and stop")
    parser.add_argument("--partial", action="store_true", help="write results after each network and seed")
    parser.add_argument("--rounds", type=int, default=timing.ROUNDS, help="interleaved rounds of timing")
    parser.add_argument("--steps", type=int, default=quick.Caps.steps, help="of a recovery in --quick")
    parser.add_argument("--json", type=Path, help=f"where results go; {RESULTS.name} beside docs otherwise")
    parser.add_argument(
        "--checkpoints", type=Path, default=originals.checkpoints(), help="where trained networks are kept"
    )
    options = parser.parse_args()
    torch.set_num_threads(1)
    begun = time.perf_counter()
    try:
        if options.originals:
            for name, _, seed in (item.partition(":") for item in options.originals):
                originals.original(name, int(seed), options.checkpoints)
            return
        if options.quick:
            options.json = options.json or options.checkpoints / "quick.json"
            work = Work()
            caps = quick.Caps(steps=options.steps)
            if options.steps < quick.Caps.steps:  # a try: the pictures in proportion
                caps = quick.Caps(("resnet8",), 640, 200, 300, 128, options.steps)
            for name in caps.networks:
                subject = quick.subject(name, caps, options.checkpoints / "quick")
                work.add(subject, recipes.quick_rows(caps.steps), train=True)
        else:
            options.json = options.json or RESULTS
            work = full(options, train=not options.timing_only)
        publish(work, options, [])
    except FileNotFoundError as error:
        raise SystemExit(str(error)) from error
    say(f"{time.perf_counter() - begun:.0f} s, load {os.getloadavg()[0]:.1f}")


if __name__ == "__main__":
    main()
