"""Finds, downloads and packs the public data sets of signs.py, spoken_digits.py and bearings.py.

Each set is one `.npz` file, looked for beside the example, in the folder that SHOAL_DATA names, and in
the cache. Where it is missing, `python examples/NAME.py --download` fetches the public archives into the
cache, goes on where it was cut off, checks them, and packs the file beside the example, from where
`shoal model push` takes it along. Archives that already lie in SHOAL_DATA are packed without a download.

Nothing of these sets comes with Shoal: they are free for research, see each example for its source.
"""

from __future__ import annotations

import hashlib
import os
import sys
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path
from typing import Any

CHUNK = 1 << 18
TIMEOUT_S = 60.0


class DamagedDownload(RuntimeError):
    """What was fetched is not what the archive's publisher announced."""


@dataclass(frozen=True)
class Archive:
    """One public file. `md5`: "" where the publisher's file has none that is known."""

    url: str
    md5: str = ""

    @property
    def name(self) -> str:
        return self.url.rpartition("/")[2]


@dataclass(frozen=True)
class DataSet:
    """A packed set: `pack(folders, target)` writes `file` from archives lying in one of `folders`."""

    file: str
    title: str
    page: str
    script: str  # the example that downloads it
    archives: tuple[Archive, ...]
    pack: Callable[[list[Path], Path], None]

    def find(self, here: Path) -> Path:
        """The packed file. Raises FileNotFoundError that names both ways to get it."""
        for folder in folders(here):
            if (folder / self.file).is_file():
                return folder / self.file
        raise FileNotFoundError(
            f"{self.title} is missing: {self.file} is neither beside the example, nor in SHOAL_DATA, nor in "
            f"the cache. Run `python {self.script} --download` to fetch it ({self.page}), or set SHOAL_DATA "
            f"to a folder that holds {self.file}"
        )

    def ensure(self, here: Path, download: bool) -> Path:
        """The packed file beside the example; with `download`, made from the archives if it is missing.

        Raises:
            FileNotFoundError: it is missing and `download` is not set.
            DamagedDownload: an archive is not what it should be.
            OSError: the network or the disk refuses.
        """
        try:
            return self.find(here)
        except FileNotFoundError:
            if not download:
                raise
        target = here / self.file
        places = folders(here)
        for archive in self.archives:
            if not any((place / archive.name).is_file() for place in places):
                fetch(archive, cache())
        print(f"packing {target.name}", file=sys.stderr)
        partial = target.with_suffix(".part.npz")
        self.pack(places, partial)
        partial.replace(target)
        return target


def cache() -> Path:
    """Where archives are kept: $XDG_CACHE_HOME/shoal-examples, else under ~/.cache."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "shoal-examples"


def folders(here: Path) -> list[Path]:
    """Where data are looked for, in this order: beside the example, SHOAL_DATA, the cache."""
    named = os.environ.get("SHOAL_DATA")
    return [here, *([Path(named)] if named else []), cache()]


def locate(places: list[Path], name: str) -> Path:
    """The archive `name` in the first folder that has it. Raises FileNotFoundError."""
    for place in places:
        if (place / name).is_file():
            return place / name
    raise FileNotFoundError(f"{name} is in none of {', '.join(map(str, places))}")


# ---------------------------------------------------------------------------- downloading


def fetch(archive: Archive, folder: Path) -> Path:
    """Downloads into `folder`, going on at what an earlier attempt left.

    Raises:
        DamagedDownload: the MD5 differs; what was fetched is removed.
        OSError: the server cannot be reached or breaks off; run it again to go on.
    """
    target, partial = folder / archive.name, folder / f"{archive.name}.part"
    folder.mkdir(parents=True, exist_ok=True)
    have = partial.stat().st_size if partial.exists() else 0
    request = urllib.request.Request(archive.url, headers={"Range": f"bytes={have}-"} if have else {})
    try:
        with urllib.request.urlopen(request, timeout=TIMEOUT_S) as answer:
            resumed = answer.status == 206
            total = int(answer.headers.get("Content-Length") or 0) + (have if resumed else 0)
            with partial.open("ab" if resumed else "wb") as stream:
                for done in _pour(answer, stream):
                    _progress(archive.name, (have if resumed else 0) + done, total)
    except urllib.error.HTTPError as error:
        if error.code != 416:  # 416: everything was there already
            raise OSError(f"{archive.url} answers {error.code} {error.reason}; try again later") from error
    except (urllib.error.URLError, HTTPException) as error:
        raise OSError(f"{archive.url} broke off: {error}; run it again to go on") from error
    else:
        if total and partial.stat().st_size != total:
            raise OSError(
                f"{archive.url} broke off at {partial.stat().st_size} of {total} bytes; run it again to go on"
            )
    if archive.md5 and _md5(partial) != archive.md5:
        partial.unlink()
        raise DamagedDownload(f"{archive.name} has another MD5 than {archive.md5}; it was removed, try again")
    partial.replace(target)
    return target


def _pour(source: Any, stream: Any) -> Iterator[int]:
    """Copies in pieces, giving the bytes so far after each."""
    done = 0
    while piece := source.read(CHUNK):
        stream.write(piece)
        done += len(piece)
        yield done


def _progress(name: str, done: int, total: int) -> None:
    if sys.stderr.isatty():
        of = f" of {total / 1e6:.0f}" if total else ""
        print(f"\r{name}: {done / 1e6:.0f}{of} MB", end="", file=sys.stderr, flush=True)


def _md5(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, lambda: hashlib.md5(usedforsecurity=False)).hexdigest()
