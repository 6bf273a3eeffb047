"""pip as the downloader of wheels for machines unlike this one, and its refusals in plain words."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import unquote, urlsplit

from packaging.requirements import Requirement
from packaging.utils import InvalidWheelFilename, parse_wheel_filename

from shoal_controller import wheel_files
from shoal_controller.wheel_closure import NEVER_IMPORTED, Target
from shoal_controller.wheel_files import glibc_of
from shoal_protos.errors import ShoalError, Unavailable, Unsupported

OLDEST_GLIBC = 5  # 2.5: manylinux1
NEWEST_GLIBC = 45
LEGACY = {17: "manylinux2014", 12: "manylinux2010", 5: "manylinux1"}
NOT_FOUND = re.compile(
    r"Could not find a version that satisfies the requirement (\S+).*?\(from versions: (.*?)\)"
)
NO_MATCH = re.compile(r"No matching distribution found for (\S+)")
DOWNLOADED = re.compile(r"^\s*Downloading (\S+\.whl) ")
CHOSEN = re.compile(r"^\s*(?:Saved|File was already downloaded) (.+\.whl)$")
NETWORK_WORDS = ("Failed to establish", "Temporary failure in name resolution", "timed out", "ProxyError")


@dataclass(frozen=True)
class Source:
    """Where wheels come from: the user's configured registry, or one folder and nothing else."""

    folder: Path | None = None

    def options(self) -> list[str]:
        return ["--no-index", "--find-links", str(self.folder)] if self.folder else []

    def environment(self, environ: Mapping[str, str]) -> dict[str, str]:
        """For a folder, no setting of this machine's pip may add another source."""
        if self.folder is None:
            return dict(environ)
        kept = {name: value for name, value in environ.items() if not name.startswith("PIP_")}
        return {**kept, "PIP_CONFIG_FILE": os.devnull}


def target_options(target: Target) -> list[str]:
    """What makes pip choose for the target instead of for this machine."""
    options = ["--only-binary=:all:", "--implementation", "cp", "--python-version", target.python]
    for abi in (target.tag, "abi3", "none"):
        options += ["--abi", abi]
    for minor in range(target.glibc[1], OLDEST_GLIBC - 1, -1):
        options += ["--platform", f"manylinux_2_{minor}_{target.platform}"]
        if minor in LEGACY:
            options += ["--platform", f"{LEGACY[minor]}_{target.platform}"]
    return [*options, "--platform", f"linux_{target.platform}"]


def download(
    wanted: Sequence[str],
    constraints: Sequence[str],
    target: Target,
    source: Source,
    folder: Path,
    say: Callable[[str], None],
) -> set[str]:
    """Downloads wheels for `wanted` (requirements, or paths of wheels with extras) and what they need.

    What is in `folder` already is not downloaded again.

    Returns:
        the names of the files in `folder` that answer `wanted`.

    Raises:
        Unsupported: something has no wheel for the target; the remedy names what fits.
        Unavailable: the registry cannot be reached.
    """
    with tempfile.TemporaryDirectory() as scratch:
        limits = Path(scratch) / "constraints.txt"
        limits.write_text("".join(f"{line}\n" for line in constraints))
        stand_ins(Path(scratch))
        command = ["download", "--dest", str(folder), "--constraint", str(limits)]
        command += ["--find-links", str(folder), "--find-links", scratch]
        code, lines = _run([*command, *source.options(), *target_options(target), *wanted], source, say)
    if code:
        raise explain("\n".join(lines), target, source, constraints)
    return {Path(found[1]).name for line in lines if (found := CHOSEN.match(line))}


def stand_ins(folder: Path) -> None:
    """Empty wheels of what is declared but never installed: a folder without it is whole all the same."""
    for name in sorted(frozenset().union(*NEVER_IMPORTED.values())):
        metadata = f"Metadata-Version: 2.1\nName: {name}\nVersion: 0\n\n"
        wheel_files.write(name, "0", {f"{name}-0.dist-info/METADATA": metadata.encode()}, folder)


def _run(arguments: Sequence[str], source: Source, say: Callable[[str], None]) -> tuple[int, list[str]]:
    """Runs pip; its exit code and output. Says each wheel that arrives."""
    process = subprocess.Popen(
        [sys.executable, "-m", "pip", "--disable-pip-version-check", "--no-input", *arguments],
        env={**source.environment(os.environ), "PIP_PROGRESS_BAR": "off", "PIP_NO_COLOR": "1"},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
    )
    lines: list[str] = []
    assert process.stdout is not None
    try:
        for line in process.stdout:
            lines.append(line.rstrip())
            found = DOWNLOADED.match(line)
            if found:
                say(f"  {found[1].rpartition('/')[2]}")
        return process.wait(), lines
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()
        process.stdout.close()


# ---------------------------------------------------------------------------- refusals


def explain(output: str, target: Target, source: Source, constraints: Sequence[str] = ()) -> ShoalError:
    """pip's refusal in plain words, with what would fit."""
    refused = NOT_FOUND.search(output)
    if any(word in output for word in NETWORK_WORDS) and (not refused or refused[2] == "none"):
        return Unavailable(
            "The package registry cannot be reached.",
            "Check the network and pip's settings, or take the wheels from a folder: --from DIR",
        )
    where = f"for {target.platform} with Python {target.python} and glibc {text_of(target.glibc)}"
    place = f"in {source.folder}" if source.folder else "in the registry"
    if refused is not None:
        wanted = refused[1].rstrip(";")
        return Unsupported(
            f"There is no wheel of {wanted} {where} {place}.",
            remedy(wanted, target, source),
        )
    for line in constraints:  # pip calls a constraint that no wheel meets a conflict
        name = Requirement(line).name
        if _probe(line, target, source) is None:
            fits = _probe(name, target, source)
            return Unsupported(
                f"There is no wheel of {line} {where} {place}.",
                f"The newest that fits is {fits[0]}: use --constraint '{name}=={fits[0]}'"
                if fits
                else remedy(name, target, source),
            )
    return Unsupported("pip could not put the set together:\n" + tail(output), conflict_remedy(output))


def remedy(wanted: str, target: Target, source: Source) -> str:
    """What fits instead of the requirement `wanted`: a newer glibc, another runtime, or nothing."""
    name = Requirement(wanted).name
    newer = _probe(wanted, Target(target.platform, target.python, (2, NEWEST_GLIBC)), source)
    if newer is not None:
        version, glibc = newer[0], text_of(newer[1])
        return f"{name} {version} asks for glibc {glibc}: if the devices have it, add --glibc {glibc}"
    extra = runtime_of(name)
    if extra:
        others = [
            other
            for other, package in RUNTIMES.items()
            if other != extra and _probe(package, target, source) is not None
        ]
        if others:
            return f"Leave it out; what fits these devices: --extra {' or --extra '.join(others)}"
        return "No runtime has a wheel for these devices; use another Python or a 64-bit system (aarch64)."
    if source.folder:
        again = f"shoal controller wheels add --platform {target.platform} --python {target.python}"
        return f"Put it there, or fill the store from the registry: {again}"
    return no_wheel(target)


def no_wheel(target: Target) -> str:
    """What to do where the registry has nothing of what every agent needs."""
    if target.platform in ("armv7l", "armv6l", "i686"):
        return "Every agent needs it, so 32-bit systems cannot run one; install a 64-bit system (aarch64)."
    return "Every agent needs it; choose another --python (3.10 to 3.13 have wheels for aarch64 and x86_64)."


RUNTIMES: Mapping[str, str] = {
    "onnxruntime": "onnxruntime",
    "openvino": "openvino",
    "litert": "ai-edge-litert",
}


def runtime_of(package: str) -> str:
    """The extra whose runtime `package` is; "" if it is none."""
    return next((extra for extra, name in RUNTIMES.items() if name == package), "")


def _probe(name: str, target: Target, source: Source) -> tuple[str, tuple[int, int]] | None:
    """The newest version of a package that has a wheel for `target`, and the glibc that it asks for."""
    with tempfile.TemporaryDirectory() as scratch:
        report = Path(scratch) / "report.json"
        command = ["install", "--quiet", "--dry-run", "--no-deps", "--ignore-installed"]
        command += ["--target", str(Path(scratch) / "site"), "--report", str(report)]
        code, _ = _run([*command, *source.options(), *target_options(target), name], source, lambda _: None)
        if code or not report.exists():
            return None
        item = json.loads(report.read_text())["install"][0]
    file = unquote(urlsplit(item["download_info"]["url"]).path).rpartition("/")[2]
    try:
        _, version, _, tags = parse_wheel_filename(file)
    except InvalidWheelFilename:
        return None
    return str(version), min((glibc_of(tag.platform) for tag in tags), default=(0, 0))


def conflict_remedy(output: str) -> str:
    if "conflicting dependencies" in output:
        return "Loosen --constraint; the lines above name the requirements that exclude each other."
    return "Mend what pip names, then run the command again; what was downloaded is kept."


def tail(output: str) -> str:
    """The lines of pip that matter."""
    lines = [line for line in output.splitlines() if line.strip() and not line.startswith("WARNING")]
    errors = [line for line in lines if line.startswith("ERROR")]
    return "\n".join((errors or lines)[-6:])


def text_of(glibc: tuple[int, int]) -> str:
    return f"{glibc[0]}.{glibc[1]}"
