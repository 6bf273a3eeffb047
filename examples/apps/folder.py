"""Names for a folder of pictures, as a table on the screen or as CSV.

    pip install 'shoal[client]'
    python folder.py PICTURES                      # a table
    python folder.py PICTURES --csv > names.csv    # for a spreadsheet
    python folder.py PICTURES --server camera-3:8000 --model signs

A picture that cannot be read gets its reason instead of a name; the others go on.
"""

from __future__ import annotations

import argparse
import csv
import sys
from collections.abc import Iterator
from pathlib import Path

from shoal_agent.client import Client
from shoal_protos.errors import InvalidInput, ShoalError

ENDINGS = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff"}


def names(client: Client, folder: Path) -> Iterator[tuple[str, str, str]]:
    """(file, name, probability or why there is none) of every picture."""
    detects = client.signature().output_kind == "boxes"
    for path in sorted(folder.iterdir()):
        if path.suffix.lower() not in ENDINGS:
            continue
        try:
            if detects:  # a detector: one line for every box
                for box in client.detect(path):
                    where = f"{box.x1:.0f},{box.y1:.0f},{box.x2:.0f},{box.y2:.0f}"
                    yield path.name, f"{box.label} at {where}", f"{box.score:.2f}"
            else:
                best = client.classify(path)[0]
                yield path.name, best.label, f"{best.probability:.2f}"
        except InvalidInput as error:  # this picture's fault
            yield path.name, "", str(error)


def main() -> int:
    parser = argparse.ArgumentParser(description="Names for a folder of pictures.")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--server", default="localhost", help="where the agent is [%(default)s]")
    parser.add_argument("--model", default="", help="the endpoint; not needed where there is only one")
    parser.add_argument("--csv", action="store_true", help="write CSV")
    options = parser.parse_args()
    if not options.folder.is_dir():
        sys.exit(f"{options.folder} is no folder.")
    try:
        with Client(options.server, model=options.model) as client:
            rows = names(client, options.folder)
            if options.csv:
                writer = csv.writer(sys.stdout)
                writer.writerow(("file", "name", "probability"))
                writer.writerows(rows)
            else:
                for file, name, probability in rows:
                    print(f"{file:30} {name:30} {probability}")
    except ShoalError as error:  # no agent, no model, not a model for pictures
        sys.exit(str(error))
    return 0


if __name__ == "__main__":
    sys.exit(main())
