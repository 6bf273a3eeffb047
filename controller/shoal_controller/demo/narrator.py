"""How the story is told: a line a chapter with its time, a few indented lines of evidence."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator

from rich.console import Console
from rich.text import Text

WIDTH = 100


class Narrator:
    """Prints chapters as they end; on a terminal a spinner shows the present one."""

    def __init__(self, console: Console | None = None) -> None:
        self.console = console or Console(highlight=False)
        self.started = time.monotonic()
        self._number = 0

    @property
    def elapsed(self) -> float:
        return time.monotonic() - self.started

    def title(self, text: str, lines: list[tuple[str, str]]) -> None:
        self.console.print()
        self.console.print(Text(text, style="bold"))
        for name, value in lines:
            self.console.print(Text.assemble((f"  {name:<11}", "dim"), value), soft_wrap=True)
        self.console.print()

    @contextlib.contextmanager
    def chapter(self, text: str) -> Iterator[None]:
        """One step of the story: said when it begins, with its time when it ended."""
        self._number += 1
        began = time.monotonic()
        self.console.print(
            Text.assemble(
                (f"{self._number:>2} ", "cyan bold"), (text, "bold"), (f"  {self.elapsed:.0f} s", "dim")
            )
        )
        if self.console.is_terminal:
            with self.console.status("", spinner="dots"):
                yield
        else:
            yield
        self.note(f"({time.monotonic() - began:.1f} s)", "dim")

    def note(self, text: str, style: str = "") -> None:
        self.console.print(Text(f"   {text}", style=style), soft_wrap=True)

    def bar(self, name: str, share: float, text: str, style: str = "green") -> None:
        """A horizontal bar of 40 cells for a share 0..1."""
        filled = round(40 * max(0.0, min(1.0, share)))
        self.console.print(
            Text.assemble(f"   {name:<10}", ("█" * filled, style), ("░" * (40 - filled), "dim"), f"  {text}")
        )
