"""Compression: size, speed and accuracy kept of each technique alone and of the best combination."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from compression_parts import originals


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--originals", nargs="*", metavar="NETWORK:SEED", help="train these and stop")
    parser.add_argument("--checkpoints", type=Path, default=originals.checkpoints())
    options = parser.parse_args()
    torch.set_num_threads(1)
    for wanted in options.originals or []:
        name, _, seed = wanted.partition(":")
        _, spent = originals.original(name, int(seed), options.checkpoints)
        print(f"{wanted}: {spent:.0f} CPU s", flush=True)


if __name__ == "__main__":
    main()
