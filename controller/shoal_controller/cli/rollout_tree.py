"""A rollout as a tree of waves, and as one line."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

from shoal_controller.cli import durations, output
from shoal_controller.cli.output import Column
from shoal_controller.cli.progress import MARKS

if TYPE_CHECKING:
    from collections.abc import Sequence

    from shoal_controller.api import schemas

BAR = 20

WAVE_COLUMNS = (
    Column("wave", lambda w: w.name),
    Column("state", lambda w: w.state),
    Column("devices", lambda w: w.devices, "number"),
    Column("switched", lambda w: w.switched, "number"),
    Column("failed", lambda w: w.failed, "number"),
    Column("decision", lambda w: w.decision),
    Column("sentence", lambda w: w.sentence),
)


def dots(waves: Sequence[schemas.Wave]) -> str:
    """One mark a wave: `✔✔◐○`."""
    return "".join(MARKS.get(wave.state, "○") for wave in waves)


def effect_text(effect: schemas.Effect) -> str:
    """`latency_p95 -11.8 % [-14.9, -8.7]`; what is not known is said so."""
    if effect.value is None:
        return f"{effect.name} no data yet"
    interval = (
        f" [{effect.low:+.1f}, {effect.high:+.1f}]"
        if effect.low is not None and effect.high is not None
        else ""
    )
    return f"{effect.name} {effect.value:+.1f} {effect.unit}{interval}"


def line(rollout: schemas.Rollout) -> str:
    """One line that only changes when something happened: for logs and pipes."""
    waves = "; ".join(
        f"{wave.name} {wave.state} {wave.switched}/{wave.devices}"
        + (f" {wave.failed} failed" if wave.failed else "")
        for wave in rollout.waves
    )
    return f"{rollout.id} {rollout.state}: {waves}. {rollout.sentence}".strip()


def tree(rollout: schemas.Rollout) -> Any:
    """The tree of `shoal rollout get`."""
    from rich.text import Text
    from rich.tree import Tree

    style = output.STATUS_STYLES.get(rollout.state, "")
    end = rollout.finished_ms or int(time.time() * 1000)
    head = Text.assemble(
        (rollout.id, "bold"),
        f"  {rollout.endpoint}  {rollout.from_label or 'nothing'} → {rollout.to_label}  ",
        (f"{MARKS.get(rollout.state, '○')} {rollout.state}", style),
        f"  {durations.text((end - rollout.created_ms) / 1000)}",
    )
    if gates := gate_text(rollout.gates):
        head.append(f"   gate: {gates}", "dim")
    root = Tree(head, guide_style="dim")
    width = max((len(wave.name) for wave in rollout.waves), default=0)
    for wave in rollout.waves:
        branch = root.add(wave_text(wave, width))
        details = "   ".join(effect_text(effect) for effect in wave.effects)
        arrow = f"   → {wave.decision}" if wave.decision else ""
        if details or wave.sentence:
            branch.add(Text(f"{details or wave.sentence}{arrow}"))
        for device in rollout.devices:
            if device.wave == rollout.waves.index(wave) and device.reason:
                branch.add(Text(f"{device.name}: {device.state} - {device.reason}", style="red"))
    if rollout.sentence:
        root.add(Text(rollout.sentence, style="italic"))
    return root


def gate_text(gates: dict[str, Any]) -> str:
    return ", ".join(f"{key} {value}" for key, value in gates.items() if isinstance(value, int | float | str))


def wave_text(wave: schemas.Wave, width: int) -> Any:
    from rich.text import Text

    filled = round(BAR * wave.switched / wave.devices) if wave.devices else 0
    text = Text.assemble(
        (MARKS.get(wave.state, "○"), output.STATUS_STYLES.get(wave.state, "")),
        f" {wave.name:<{width}}  ",
        ("█" * filled + " " * (BAR - filled), "cyan"),
        f"  {wave.switched:,}/{wave.devices:,}",
    )
    if wave.failed:
        text.append(f"  {wave.failed} failed", "red")
    return text
