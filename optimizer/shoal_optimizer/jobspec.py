"""`job.json` and the lines a job writes: the contract between the controller's worker and a job.

Pure parsing, no torch: the controller imports this module. The format is described in
docs/architecture.md; unknown fields are ignored, so an older optimizer reads a newer job.
"""

from __future__ import annotations

import base64
import binascii
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, cast

from shoal_protos.errors import InvalidInput

KINDS = ("ingest", "optimize", "adapt", "replay")
EVENTS = ("progress", "ingested", "variant", "trial", "waiting", "adapted", "replayed", "done", "error")

Kind = Literal["ingest", "optimize", "adapt", "replay"]


@dataclass(frozen=True)
class ProfileClass:
    """A profile class as the search sees it. `local` = this machine is of it, so that latency
    measured here may be claimed for it; `emulated` = only emulated devices are, so nobody can time it.
    `cores`: usable by a model; 0 = unknown. `providers`: runtime -> what it can compute on, its CPU first."""

    name: str
    isa: tuple[str, ...] = ()
    runtimes: Mapping[str, str] = field(default_factory=dict)  # runtime -> version
    local: bool = False
    emulated: bool = False
    cores: int = 0
    providers: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    @property
    def most_threads(self) -> int:
        """Threads that one model may have: the class's cores, as told or as its name says."""
        return self.cores or _cores_of(self.name)


@dataclass(frozen=True)
class RuntimeOptions:
    """How a runtime loads a bundle. `extra` as the agent's runtimes take it."""

    threads: int = 1
    extra: Mapping[str, str] = field(default_factory=dict)

    def __hash__(self) -> int:
        return hash(self.key)

    @property
    def default(self) -> bool:
        return self.threads == 1 and not self.extra

    @property
    def key(self) -> str:
        """Short text that tells options apart; "" for the default ones."""
        more = [f"{name}={value}" for name, value in sorted(self.extra.items())]
        return "" if self.default else ",".join([f"threads={self.threads}", *more])

    def to_json(self) -> dict[str, Any]:
        return {"threads": self.threads, "extra": dict(self.extra)}

    @classmethod
    def from_json(cls, raw: Mapping[str, Any] | None) -> RuntimeOptions:
        raw = raw or {}
        extra = raw.get("extra") or {}
        return cls(int(raw.get("threads") or 1), {str(k): str(v) for k, v in extra.items()})


@dataclass(frozen=True)
class Budget:
    minutes: float = 3.0
    trials: int = 6  # device trials asked for per class, at most
    networks: int | None = None  # trained networks, at most; None = as time and progress allow
    measurements: int | None = None  # bundles timed on this machine, at most
    bytes: int | None = None  # bundles and data that go to devices (or, without a fleet, are measured)


@dataclass(frozen=True)
class FieldData:
    """What the field looks like: merged input sketches, and recorded inputs if any left a device."""

    inputs: Path | None = None  # serialized shoal.v1.SketchSet
    samples: tuple[Path, ...] = ()  # .npz as in SampleNotice


@dataclass(frozen=True)
class Incumbent:
    """The bundle that serves a class now."""

    bundle: str
    layout: Path | None = None


@dataclass(frozen=True)
class JobSpec:
    kind: Kind
    id: str
    source: Path
    task: str
    seed: int = 0
    threads: int = 1
    weights: Path | None = None
    data: Path | None = None
    model: str = ""
    version: int = 0
    objective: str = ""
    classes: tuple[ProfileClass, ...] = ()
    budget: Budget = field(default_factory=Budget)
    # Answered trials: id -> serialized shoal.v1.TrialResult, None = no data.
    trial_results: Mapping[str, bytes | None] = field(default_factory=dict)
    field_data: FieldData = field(default_factory=FieldData)
    recipes: tuple[Mapping[str, Any], ...] = ()
    incumbents: Mapping[str, Incumbent] = field(default_factory=dict)
    knowledge: Path | None = None  # what earlier searches learned: `search.knowledge`
    executor: str = "processes"  # as `executors.make` takes it
    replay: Mapping[str, Any] = field(default_factory=dict)  # as `replay.order` makes it


def _need(raw: Mapping[str, Any], name: str, kind: type, where: str = "job.json") -> Any:
    value = raw.get(name)
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        raise InvalidInput(f"{where}: '{name}' must be a {kind.__name__}, not {type(value).__name__}.")
    return value


def _option(raw: Mapping[str, Any], name: str, kind: type, default: Any, where: str = "job.json") -> Any:
    return default if raw.get(name) is None else _need(raw, name, kind, where)


def _number(raw: Mapping[str, Any], name: str, default: float, where: str) -> float:
    value = raw.get(name, default)
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise InvalidInput(f"{where}: '{name}' must be a number, not {type(value).__name__}.")
    return float(value)


def _path(raw: Mapping[str, Any], name: str, base: Path) -> Path | None:
    text = _option(raw, name, str, "")
    return base / text if text else None


def _class(raw: Any, i: int) -> ProfileClass:
    where = f"job.json: classes[{i}]"
    if not isinstance(raw, Mapping):
        raise InvalidInput(f"{where} must be an object.")
    runtimes = _option(raw, "runtimes", dict, {}, where)
    return ProfileClass(
        name=_need(raw, "name", str, where),
        isa=tuple(str(feature) for feature in _option(raw, "isa", list, [], where)),
        runtimes={str(name): str(version) for name, version in runtimes.items()},
        local=_option(raw, "local", bool, False, where),
        emulated=_option(raw, "emulated", bool, False, where),
        cores=int(_number(raw, "cores", 0, where)),
        providers={
            str(name): tuple(str(p) for p in values)
            for name, values in _option(raw, "providers", dict, {}, where).items()
            if isinstance(values, list)
        },
    )


def _cores_of(name: str) -> int:
    """ "x86_64.avx2.4c+onnxruntime" -> 4; 1 where the name does not say it."""
    for part in name.partition("+")[0].split("."):
        if part.endswith("c") and part[:-1].isdigit():
            return max(1, int(part[:-1]))
    return 1


def _budget(raw: Mapping[str, Any]) -> Budget:
    where = "job.json: budget"
    minutes = _number(raw, "minutes", Budget.minutes, where)
    trials = int(_number(raw, "trials", Budget.trials, where))
    if minutes <= 0 or trials < 0:
        raise InvalidInput(f"{where}: minutes must be above 0 and trials at least 0.")

    def count(name: str, least: int) -> int | None:
        return None if raw.get(name) is None else max(int(_number(raw, name, least, where)), least)

    return Budget(minutes, trials, count("networks", 1), count("measurements", 1), count("bytes", 0))


def _trial_results(raw: Mapping[str, Any]) -> dict[str, bytes | None]:
    return {trial: None if text is None else _base64(trial, text) for trial, text in raw.items()}


def _base64(trial: str, text: Any) -> bytes:
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, TypeError, ValueError) as error:
        raise InvalidInput(f"job.json: trial_results['{trial}'] is not base64: {error}.") from error


def _incumbents(raw: Mapping[str, Any], base: Path) -> dict[str, Incumbent]:
    result = {}
    for name, entry in raw.items():
        if not isinstance(entry, Mapping):
            raise InvalidInput(f"job.json: incumbents['{name}'] must be an object.")
        bundle = _option(entry, "bundle", str, "", f"job.json: incumbents['{name}']")
        if bundle:
            result[name] = Incumbent(bundle, _path(entry, "layout", base))
    return result


def parse(data: bytes | str, base: Path) -> JobSpec:
    """Reads `job.json`; relative paths are below `base`.

    Raises:
        InvalidInput: not JSON, or a field is missing or of the wrong type.
    """
    try:
        raw = json.loads(data)
    except ValueError as error:
        raise InvalidInput(f"job.json is not JSON: {error}.") from error
    if not isinstance(raw, dict):
        raise InvalidInput("job.json must be an object.")
    kind = _need(raw, "kind", str)
    if kind not in KINDS:
        raise InvalidInput(f"job.json: unknown kind '{kind}'.", f"Use one of {', '.join(KINDS)}.")
    version = _option(raw, "version", dict, {})
    field_raw = _option(raw, "field", dict, {})
    return JobSpec(
        kind=cast(Kind, kind),
        id=str(raw.get("id", "")),
        source=base / _need(raw, "source", str),
        task=_need(raw, "task", str),
        seed=int(_number(raw, "seed", 0, "job.json")),
        threads=max(int(_number(raw, "threads", 1, "job.json")), 1),
        weights=_path(raw, "weights", base),
        data=_path(raw, "data", base),
        model=str(version.get("model", "")),
        version=int(version.get("number") or 0),
        objective=_option(raw, "objective", str, ""),
        classes=tuple(_class(entry, i) for i, entry in enumerate(_option(raw, "classes", list, []))),
        budget=_budget(_option(raw, "budget", dict, {})),
        trial_results=_trial_results(_option(raw, "trial_results", dict, {})),
        field_data=FieldData(
            _path(field_raw, "inputs", base),
            tuple(base / str(p) for p in _option(field_raw, "samples", list, [])),
        ),
        recipes=tuple(_option(raw, "recipes", list, [])),
        incumbents=_incumbents(_option(raw, "incumbents", dict, {}), base),
        knowledge=_path(raw, "knowledge", base),
        executor=_option(raw, "executor", str, "processes") or "processes",
        replay=_option(raw, "replay", dict, {}),
    )


def read(directory: Path) -> JobSpec:
    """Reads `directory/job.json`. Raises InvalidInput."""
    try:
        data = (directory / "job.json").read_bytes()
    except OSError as error:
        raise InvalidInput(f"{directory} has no readable job.json: {error.strerror}.") from error
    return parse(data, directory)


def event_line(event: str, **fields: Any) -> str:
    """One line of a job's output. NaN and infinity become null: they aren't JSON."""
    assert event in EVENTS, event
    return json.dumps({"event": event, **_plain(fields)}, allow_nan=False) + "\n"


def parse_event(line: str) -> dict[str, Any]:
    """Reads one line of a job's output. Raises InvalidInput."""
    try:
        value = json.loads(line)
    except ValueError as error:
        raise InvalidInput(f"Not a job's output line: {line[:80]!r}.") from error
    if not isinstance(value, dict) or value.get("event") not in EVENTS:
        raise InvalidInput(f"Not a job's output line: {line[:80]!r}.")
    return value


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, float) and (value != value or value in (float("inf"), float("-inf"))):
        return None
    return value
