"""How values look: pure functions that the templates use as filters. Times are Unix milliseconds."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from datetime import datetime, timezone
from typing import Any

from shoal_controller.api import schemas as s

STATUSES = ("healthy", "updating", "degraded", "drifting", "offline")
NONE = "–"


def total(status: s.Status) -> int:
    """Devices that belong to the fleet: revoked ones do not."""
    return sum(count for name, count in status.devices.items() if name in STATUSES)


def ago(ms: int | None, now_ms: int) -> str:
    """`4 s ago`, `3 min ago`, `2 d ago`; "never" for 0. The page's script keeps it counting."""
    if not ms:
        return "never"
    return f"{span(max(0, now_ms - ms))} ago"


def span(ms: float | None) -> str:
    """A duration in its largest sensible unit."""
    if ms is None:
        return NONE
    seconds = ms / 1000
    if seconds < 90:
        return f"{seconds:.0f} s"
    if seconds < 90 * 60:
        return f"{seconds / 60:.0f} min"
    if seconds < 36 * 3600:
        return f"{seconds / 3600:.0f} h"
    return f"{seconds / 86400:.0f} d"


def iso(ms: int) -> str:
    return datetime.fromtimestamp(ms / 1000, tz=timezone.utc).isoformat(timespec="seconds")


def clock(ms: int) -> str:
    """Day and time in UTC; the page's script turns it into the reader's own zone."""
    return datetime.fromtimestamp(ms / 1000, tz=timezone.utc).strftime("%-d %b %H:%M:%S") if ms else NONE


def num(value: float | int | None, digits: int = 3) -> str:
    """Three significant digits, thousands separated, never an exponent."""
    if value is None or value != value:
        return NONE
    if isinstance(value, int) or (float(value).is_integer() and abs(value) >= 10):
        return f"{int(value):,}"
    if value == 0:
        return "0"
    magnitude = abs(value)
    places = 0
    while magnitude < 10 ** (digits - 1 - places) and places < 6:
        places += 1
    text = f"{value:,.{places}f}"
    return text.rstrip("0").rstrip(".") if magnitude < 0.01 else text


def score(value: float | None) -> str:
    """A metric's value: shares as per cent, anything else as a number."""
    if value is None or value != value:
        return NONE
    return f"{value * 100:.1f} %" if 0 <= value <= 1 else num(value, 4)


def share(value: float | None) -> str:
    """A share 0..1 as per cent, finer below one per cent."""
    if value is None or value != value:
        return NONE
    return f"{value * 100:.2f} %" if 0 < value < 0.01 else f"{value * 100:.1f} %" if value else "0 %"


def signed(value: float | None, unit: str = "") -> str:
    """`+0.2`, `−11.8 %`, with a real minus sign."""
    if value is None or value != value:
        return NONE
    text = f"{abs(value):.1f}" if abs(value) >= 0.05 or value == 0 else f"{abs(value):.2f}"
    unit = {"points": "pt"}.get(unit, unit)
    sign = "−" if value < 0 else "+" if value > 0 else "±"
    return f"{sign}{text}{' ' + unit if unit else ''}"


def size(value: float | int | None) -> str:
    """Bytes, in decimal units as on disks and wires."""
    if value is None:
        return NONE
    amount = float(value)
    for unit in ("B", "kB", "MB", "GB"):
        if amount < 1000 or unit == "GB":
            return f"{amount:.0f} {unit}" if unit == "B" or amount >= 100 else f"{amount:.1f} {unit}"
        amount /= 1000
    return NONE


def interval(figure: s.Figure | None, kind: str = "num") -> str:
    """The 95 % interval of a figure, "" without one. `kind` is num or score."""
    if figure is None or figure.low is None or figure.high is None:
        return ""
    show = score if kind == "score" else num
    low, high = show(figure.low), show(figure.high)
    return f"{low.removesuffix(' %')} to {high}"


def words(name: str) -> str:
    """`rolled_back` -> `rolled back`."""
    return name.replace("_", " ")


def effect_name(name: str) -> str:
    return {"latency_p95": "p95 latency", "error_share": "Errors", "accuracy": "Accuracy"}.get(
        name, words(name)
    )


def class_parts(name: str) -> tuple[str, list[str]]:
    """`x86_64.avx512vnni.2c+onnxruntime+openvino` -> hardware and runtimes."""
    hardware, *runtimes = name.split("+")
    return hardware, runtimes


def recipe(steps: Iterable[Mapping[str, Any] | str]) -> str:
    """`channel pruning 50 % → static int8`."""
    parts = []
    for step in steps:
        if isinstance(step, str):
            parts.append(words(step))
            continue
        name = words(str(step.get("technique") or step.get("name") or step.get("kind") or "step"))
        options = step.get("parameters") or step.get("params") or step.get("options") or {}
        values = [_option(k, v) for k, v in options.items() if isinstance(v, (int, float, str))]
        parts.append(" ".join([name, *[v for v in values if v][:2]]))
    return " → ".join(parts) or "converted only"


def _option(key: str, value: float | str) -> str:
    if isinstance(value, bool):
        return words(key) if value else ""
    if isinstance(value, float) and 0 < value < 1:
        return f"{value * 100:.0f} %"
    return str(value) if isinstance(value, str) else f"{value} {words(key)}"


def steps(progress: Mapping[str, Any], state: str) -> list[dict[str, Any]]:
    """The steps of an optimization: [{"name", "state", "message", "share", "ms"}] in order.

    Steps before the current one are done; the current one has the state of the whole.
    """
    listed = progress.get("steps") or ([progress["step"]] if progress.get("step") else [])
    rows: list[dict[str, Any]] = []
    for item in listed:
        row = dict(item) if isinstance(item, Mapping) else {"name": str(item)}
        row["name"] = str(row.get("name") or row.get("step") or "step")
        began = row.get("started_ms") or row.get("time_ms")
        ended = row.get("finished_ms") or row.get("ended_ms")
        row["ms"] = int(ended) - int(began) if began and ended else None
        rows.append(row)
    names = [row["name"] for row in rows]
    current = names.index(progress["step"]) if progress.get("step") in names else len(rows) - 1
    final = {"done": "done", "failed": "failed", "cancelled": "cancelled", "waiting": "waiting"}.get(state)
    for index, row in enumerate(rows):
        here = index == current
        row.setdefault("state", "done" if index < current or state == "done" else final or "running")
        if here:
            row["share"] = progress.get("share")
            row["message"] = row.get("message") or progress.get("message", "")
    return rows


def flatten(values: Mapping[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    """Nested evidence as readable pairs; long lists are counted, not printed."""
    pairs: list[tuple[str, str]] = []
    for key, value in values.items():
        name = f"{prefix}{words(str(key))}"
        if isinstance(value, Mapping):
            pairs += flatten(value, f"{name} · ")
        elif isinstance(value, bool) or value is None:
            pairs.append((name, {True: "yes", False: "no", None: NONE}[value]))
        elif isinstance(value, (int, float)):
            unit = next((u for u in _UNITS if str(key).endswith(f"_{u}")), "")
            label = name.removesuffix(words(f"_{unit}")) if unit else name
            pairs.append(
                (label, f"{_figure(str(key), value)} {_UNITS[unit]}" if unit else _figure(str(key), value))
            )
        elif isinstance(value, (list, tuple)):
            flat = all(isinstance(item, (str, int, float)) for item in value)
            shown = ", ".join(num(i) if isinstance(i, (int, float)) else i for i in value) if flat else ""
            pairs.append((name, shown if flat and len(value) <= 6 else f"{len(value)} values"))
        elif str(value):
            text = str(value)
            pairs.append((name, f"{text[:19]}…" if text.startswith("sha256:") else text))
    return pairs


_SHARES = ("value", "low", "high", "limit", "expected", "expected_low", "before", "after")
_UNITS = {"s": "s", "percent": "%", "points": "points", "celsius": "°C"}


def _figure(key: str, value: float) -> str:
    if key.endswith("_ms"):
        return clock(int(value)) if value > 1e11 else f"{num(value)} ms"
    if key.endswith("share") or key.startswith("accuracy") or (key in _SHARES and 0 <= value <= 1):
        return score(value)
    if key.endswith("bytes"):
        return size(value)
    return num(value)


def limit(objective: str, metric: str) -> tuple[str, float] | None:
    """The bound an objective puts on `latency_p95` (in ms) or `accuracy`: ("<=", 5.0), or None."""
    found = re.search(rf"\b{metric}\s*(<=|>=|<|>)\s*([0-9.]+)\s*(us|ms|s|%)?", objective)
    if not found:
        return None
    scale = {"us": 1e-3, "s": 1e3, "%": 0.01}.get(found[3] or "", 1.0)
    return found[1], float(found[2]) * scale


def gates(values: Mapping[str, Any]) -> list[tuple[str, str]]:
    """A rollout's limits and deadlines as readable pairs; gates this page does not know keep their names."""
    pairs = []
    for name, (label, text) in _GATES.items():
        value = values.get(name)
        if isinstance(value, (int, float)) and value:
            amount = f"{value * 100:g}" if "share" in name or name in _RATIOS else f"{value:g}"
            pairs.append((label, text.format(amount)))
    return pairs + flatten(
        {k: v for k, v in values.items() if k not in _GATES and k not in ("seed", "group_by")}
    )


_RATIOS = ("latency_p95_increase", "accuracy_drop")
_GATES = {
    "max_failed_share": ("Failed devices", "at most {} % of a wave"),
    "latency_p95_increase": ("p95 latency", "at most {} % slower on the same devices"),
    "latency_floor_ms": ("Small rises", "below {} ms harm nobody"),
    "latency_limit_ms": ("Objective", "p95 at most {} ms"),
    "error_share_increase": ("Errors", "at most {} pt more"),
    "accuracy_drop": ("Accuracy", "at most {} pt lower"),
    "min_requests": ("Latency counts", "from {} requests a device"),
    "min_labels": ("Accuracy counts", "from {} labels a wave"),
    "settle_s": ("Settles for", "{} s after the last switch"),
    "observe_s": ("Decided after", "{} s with what there is"),
    "silent_s": ("Silent after", "{} s without contact"),
    "update_s": ("Update fails after", "{} s"),
    "max_unavailable": ("Unavailable at once", "at most {}"),
}


def change(event: s.Event) -> str:
    """What an event changed, on one line: `state open → acting`."""
    before, after = dict(flatten(event.before or {})), dict(flatten(event.after or {}))
    parts = []
    for name in [*after, *(n for n in before if n not in after)]:
        old, new = before.get(name), after.get(name)
        if old != new:
            parts.append(f"{name} {old} → {new}" if old and new else f"{name} {new or f'{old} →'}")
    return ", ".join(parts)


def story_figure(kind: str, name: str, value: float | None) -> tuple[str, str]:
    """A figure of the story with its label; a rollout's figures are effects."""
    if kind == "rollout" and name in ("latency_p95", "error_share", "accuracy"):
        return effect_name(name), signed(value, "%" if name == "latency_p95" else "points")
    label = words(name) if name.replace("_", "") not in ("psi", "ks") else name.upper()
    return label, _figure(name, value) if value is not None else "no data"


def by_reason(devices: Iterable[s.RolloutDevice]) -> list[tuple[str, list[s.RolloutDevice]]]:
    """Devices that did not take the new variant, grouped by why, largest group first."""
    groups: dict[str, list[s.RolloutDevice]] = {}
    for device in devices:
        if device.state in ("failed", "silent", "no_traffic") or (
            device.state == "rolled_back" and device.reason
        ):
            groups.setdefault(device.reason or device.state, []).append(device)
    return sorted(groups.items(), key=lambda group: (-len(group[1]), group[0]))


def wave_title(index: int, name: str) -> str:
    """`Wave 1` for waves that are named by their size, else the wave's own name."""
    return f"Wave {index + 1}" if name.rstrip("%").replace(".", "", 1).isdigit() else name


def wave_size(name: str) -> str:
    """What a wave that is named by its size reaches: `1 device`, `25 % of the rest`."""
    if name.isdigit():
        return plural(int(name), "device")
    return f"{name.rstrip('%')} % of the devices" if name.endswith("%") else ""


def touched(rollout: s.Rollout) -> dict[str, int]:
    """How many devices an action on this rollout touches."""
    switched = sum(wave.switched for wave in rollout.waves)
    begun = sum(w.devices for w in rollout.waves if w.state not in ("waiting",))
    return {"switched": switched, "begun": begun, "rest": sum(w.devices for w in rollout.waves) - begun}


def sample_value(datatype: str) -> str:
    return {"UINT8": "0", "INT64": "0", "INT32": "0", "BOOL": "false", "BYTES": '""'}.get(datatype, "0.0")


def series(rows: Iterable[Mapping[str, Any]], key: str) -> list[Any]:
    """One value a row; None where a row does not have it."""
    return [row.get(key) for row in rows]


def commands(text: str) -> list[tuple[str, bool]]:
    """A note cut where its command lines begin and end: [(text, is it a command)].

    A command begins with `shoal ` after a colon, a semicolon or a comma, and ends at the next of them,
    at a bracket or at the sentence's end.
    """
    found: list[tuple[str, bool]] = []
    at = 0
    for match in re.finditer(r"(?<=[:;,] )shoal(?:-agent)? .+?(?=\s*[(;,]|\.?\s*$|\.\s)", text):
        found += [(text[at : match.start()], False), (match[0], True)]
        at = match.end()
    return [(part, command) for part, command in [*found, (text[at:], False)] if part]


def plural(count: int, noun: str) -> str:
    """`1 device`, `1,204 devices`."""
    word = (
        noun
        if count == 1
        else noun[:-1] + "ies"
        if noun.endswith("y")
        else f"{noun}{'es' if noun.endswith('s') else 's'}"
    )
    return f"{count:,} {word}"


FILTERS = {
    "span": span, "iso": iso, "clock": clock, "num": num, "score": score, "share": share, "signed": signed,
    "size": size, "interval": interval, "words": words, "effect_name": effect_name,
    "class_parts": class_parts, "recipe": recipe,
    "steps": steps, "gates": gates, "change": change, "flatten": flatten, "plural": plural,
    "sample_value": sample_value, "series": series, "commands": commands,
}  # fmt: skip
