"""Compression: size, speed and accuracy kept of each technique alone and of the best combination."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from compression_parts import originals, recipes, rows, searching, subjects
from shoal_optimizer.recipe import Recipe


def say(text: str) -> None:
    print(text, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--originals", nargs="*", metavar="NETWORK:SEED", help="train these and stop")
    parser.add_argument("--rows", nargs="*", metavar="NETWORK:SEED:ROW", help="make these and stop")
    parser.add_argument("--checkpoints", type=Path, default=originals.checkpoints())
    options = parser.parse_args()
    torch.set_num_threads(1)
    for wanted in options.originals or []:
        name, _, seed = wanted.partition(":")
        _, spent = originals.original(name, int(seed), options.checkpoints)
        print(f"{wanted}: {spent:.0f} CPU s", flush=True)
    for wanted in options.rows or []:
        name, seed, row = wanted.split(":")
        subject, _ = subjects.subject(name, int(seed), options.checkpoints)
        recipe = recipes.ROWS[name].get(row, Recipe())
        if row == searching.ROW:
            recipe = searching.searched(subject, say)
        say(str(rows.made(subject, row, recipe, say)))


if __name__ == "__main__":
    main()
