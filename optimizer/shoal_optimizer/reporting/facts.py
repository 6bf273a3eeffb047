"""What a report says in words: against the original, for whom, by which technique. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from shoal_optimizer.objective import show
from shoal_optimizer.reporting import text

Row = Mapping[str, Any]

TECHNIQUES = {
    "weight_pruning": "weight pruning",
    "channel_pruning": "channel pruning",
    "architecture": "architecture search",
    "distillation": "distillation",
    "quantization_aware": "int8-aware training",
}
PRECISIONS = {
    "fp32": "",
    "fp16": "fp16",
    "int8": "int8",
    "int8_weights": "int8 weights",
    "int4_weights": "int4 weights",
}
ALONE = "conversion only"


def value(row: Row | None, name: str) -> float | None:
    """A figure's value, None where it is unmeasured."""
    found = None if row is None else row.get(name)
    return None if found is None else float(found["value"])


def original(entry: Row) -> Row | None:
    """The original in fp32 in the fastest runtime of the class: what everything is compared with."""
    plain = [c for c in entry["candidates"] if c.get("plain") and c.get("precision") == "fp32"]
    return min(plain, key=lambda c: _or(value(c, "latency_p50"), 1e18), default=None)


def chosen(entry: Row) -> Row | None:
    return next((c for c in entry["candidates"] if c["name"] == entry["chosen"]), None)


def _or(found: float | None, other: float) -> float:
    return other if found is None else found


def ratio(base: float | None, mine: float | None) -> float | None:
    return None if base is None or mine is None or mine <= 0 else base / mine


# ---------------------------------------------------------------------------- the first five seconds


@dataclass(frozen=True)
class Tile:
    """One figure of the chosen variant and what it changed. `tone`: good, bad or "" (neither)."""

    name: str
    figure: str
    change: str
    detail: str
    tone: str = ""


def tiles(entry: Row, metric: str) -> list[Tile]:
    """Size, speed, metric and the class of the data that lost most, of what was chosen."""
    mine, base = chosen(entry), original(entry)
    if mine is None:
        return []
    found = [_size(mine, base), _latency(mine, base), _metric(mine, base, metric)]
    worst = _worst(mine, base)
    return [*found, worst] if worst else found


def _size(mine: Row, base: Row | None) -> Tile:
    smaller = ratio(None if base is None else base["size_bytes"], mine["size_bytes"])
    was = "" if base is None else f"from {show('size', float(base['size_bytes']))}"
    change = text.times(smaller, "smaller", "larger")
    return Tile("Size", show("size", float(mine["size_bytes"])), change, was, _tone(smaller))


def _latency(mine: Row, base: Row | None) -> Tile:
    p50, was = value(mine, "latency_p50"), value(base, "latency_p50")
    faster = ratio(was, p50)
    change = text.times(faster, "faster", "slower")
    detail = "" if was is None or base is None else f"from {show('latency_p50', was)} in {base['target']}"
    return Tile("Latency, median", show("latency_p50", p50), change, detail, _tone(faster))


def _metric(mine: Row, base: Row | None, metric: str) -> Tile:
    now, was = mine.get("accuracy"), None if base is None else base.get("accuracy")
    if now is None:
        return Tile(text.metric_label(metric), text.UNMEASURED, "", "no device has answered yet")
    spread = f"95 % interval {show('accuracy', now['low'])} to {show('accuracy', now['high'])}, n {now['n']}"
    if was is None:
        return Tile(text.metric_label(metric), show("accuracy", now["value"]), "", spread)
    change = now["value"] - was["value"]
    tone = "bad" if now["high"] < was["low"] else "good" if now["low"] > was["high"] else ""
    return Tile(text.metric_label(metric), show("accuracy", now["value"]), text.points(change), spread, tone)


def _worst(mine: Row, base: Row | None) -> Tile | None:
    changes = per_class(mine, base)
    if not changes:
        return None
    first = changes[0]
    if first.change is not None and first.change >= 0:
        return Tile("Worst class of the data", "none lost", "", "no class has a lower recall", "good")
    tone = "bad" if first.certain else ""
    change = text.points(first.change) if first.change is not None else ""
    detail = f"recall {text.percent(first.after['value'])}, n {first.after['n']}"
    return Tile("Worst class of the data", first.label, change, detail, tone)


def _tone(gain: float | None) -> str:
    return "" if gain is None else "good" if gain > 1.02 else "bad" if gain < 0.98 else ""


# ---------------------------------------------------------------------------- for whom


@dataclass(frozen=True)
class Change:
    """Recall of one class of the data, before and after. `certain`: the intervals do not touch."""

    label: str
    before: Row | None
    after: Row
    change: float | None
    certain: bool


def per_class(mine: Row, base: Row | None) -> list[Change]:
    """Every class of the data, the one that lost most first; without an original, the worst first."""
    was = {} if base is None else base.get("per_class", {})
    found = []
    for label, after in mine.get("per_class", {}).items():
        before = was.get(label)
        change = None if before is None else after["value"] - before["value"]
        certain = before is not None and after["high"] < before["low"]
        found.append(Change(label, before, after, change, certain))
    return sorted(found, key=lambda c: (_or(c.change, c.after["value"]), c.after["value"], c.label))


def who(changes: Sequence[Change]) -> str:
    """One sentence on whom the change hits."""
    if not changes:
        return ""
    if changes[0].before is None:
        worst = changes[0]
        return f"The lowest recall is that of {worst.label}: {text.percent(worst.after['value'])}."
    lost = [c for c in changes if _or(c.change, 0) < 0]
    if not lost:
        return "No class of the data is recognised less often than by the original."
    worst = lost[0]
    certain = sum(c.certain for c in lost)
    beyond = (
        "none of them beyond the noise of so few items"
        if not certain
        else f"{certain} of them beyond the noise"
    )
    return (
        f"{len(lost)} of {len(changes)} classes lose recall, {beyond}. {worst.label} loses most: "
        f"{text.percent(worst.before['value'] if worst.before else None)} to "
        f"{text.percent(worst.after['value'])} of {worst.after['n']} items."
    )


# ---------------------------------------------------------------------------- by which technique


@dataclass(frozen=True)
class Technique:
    """The best candidate of one combination of techniques, against the original."""

    name: str
    row: Row
    count: int
    smaller: float | None
    lighter: float | None  # on the wire
    faster: float | None  # than fp32 in the fastest runtime
    faster_here: float | None  # than fp32 in the same runtime
    change: float | None  # of the metric


def technique_of(row: Row) -> str:
    """The combination that a candidate is of: "channel pruning + distillation + int8"."""
    names = [TECHNIQUES[s["technique"]] for s in row.get("recipe", ()) if s["technique"] in TECHNIQUES]
    dynamic = any(s.get("params", {}).get("method") == "dynamic" for s in row.get("recipe", ()))
    precision = PRECISIONS.get(row.get("precision", "fp32"), str(row.get("precision")))
    if precision:
        names.append(f"dynamic {precision}" if dynamic else precision)
    return " + ".join(dict.fromkeys(names)) or ALONE


def techniques(entry: Row) -> list[Technique]:
    """Each combination by its fastest candidate on the front, or its fastest at all; fewest steps first."""
    base = original(entry)
    groups: dict[str, list[Row]] = {}
    for row in entry["candidates"]:
        groups.setdefault(technique_of(row), []).append(row)
    found = []
    for name, rows in groups.items():
        best = min(rows, key=lambda r: (not r.get("on_front"), _or(value(r, "latency_p50"), 1e18), r["name"]))
        found.append(_technique(name, best, len(rows), entry, base))
    return sorted(found, key=lambda t: (t.name != ALONE, t.name.count("+"), t.name))


def _technique(name: str, row: Row, count: int, entry: Row, base: Row | None) -> Technique:
    same = [
        c for c in entry["candidates"]
        if c.get("plain") and c.get("precision") == "fp32" and c.get("target") == row.get("target")
    ]  # fmt: skip
    accuracy, was = value(row, "accuracy"), value(base, "accuracy")
    p50 = value(row, "latency_p50")
    return Technique(
        name,
        row,
        count,
        ratio(base["size_bytes"] if base else None, row["size_bytes"]),
        ratio(base["wire_bytes"] if base else None, row["wire_bytes"]),
        ratio(value(base, "latency_p50"), p50),
        ratio(value(same[0] if same else None, "latency_p50"), p50),
        None if accuracy is None or was is None else accuracy - was,
    )


# ---------------------------------------------------------------------------- the graph


@dataclass(frozen=True)
class LayerRow:
    """One layer of the original with the time of the operation that it became."""

    layer: Row
    us: float | None
    share: float | None
    note: str = ""


def layers(graph: Row) -> list[LayerRow]:
    """The layers with the runtime's times: an operation's time stands at its first layer with weights,
    and the layers fused into it say so."""
    homes: dict[str, tuple[Row, str]] = {}
    known = {layer["name"]: layer for layer in graph["original"]["layers"]}
    for operation in graph["operations"]:
        inside = [name for name in operation["layers"] if name in known]
        if inside:
            home = max(inside, key=lambda n: (known[n]["macs"], known[n]["parameters"], -inside.index(n)))
            for name in inside:
                if name not in homes or name == home:
                    homes[name] = operation, home
    found = []
    for name, layer in known.items():
        operation, home = homes.get(name, (None, ""))
        if operation is None:
            found.append(LayerRow(layer, None, None))
        elif home == name:
            found.append(LayerRow(layer, operation["us"], operation["share"]))
        else:
            found.append(LayerRow(layer, None, None, f"computed with {home}"))
    return found


def own_share(graph: Row) -> float:
    """Share of the time in operations that no layer of the model stands for: conversions and reorders."""
    known = {layer["name"] for layer in graph["original"]["layers"]}
    return float(sum(o["share"] for o in graph["operations"] if not known & set(o["layers"])))
