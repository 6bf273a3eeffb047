"""What a check says: one line a question, each problem with its remedy."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from shoal_protos.errors import ShoalError

STATES = ("ok", "warning", "failed", "skipped")


@dataclass(frozen=True)
class Item:
    """`state`: ok, warning (may be meant), failed (must be mended) or skipped (something before failed)."""

    name: str
    state: str
    found: str
    remedy: str = ""


@dataclass
class CheckReport:
    """The whole check of one task. `facts` are figures for programs."""

    task: str
    items: list[Item] = field(default_factory=list)
    facts: dict[str, Any] = field(default_factory=dict)

    @property
    def ok(self) -> bool:
        """True when nothing must be mended; warnings do not count."""
        return all(item.state != "failed" for item in self.items)

    def add(self, name: str, found: str) -> None:
        self.items.append(Item(name, "ok", found))

    def warn(self, name: str, found: str, remedy: str) -> None:
        self.items.append(Item(name, "warning", found, remedy))

    def fail(self, name: str, found: str, remedy: str) -> None:
        self.items.append(Item(name, "failed", found, remedy))

    def attempt(self, name: str, question: Callable[[], None]) -> bool:
        """Asks one question; what it raises becomes its answer. True when nothing failed."""
        before = sum(item.state == "failed" for item in self.items)
        try:
            question()
        except ShoalError as error:
            self.fail(name, error.message, error.remedy)
        except Exception as error:
            self.fail(
                name,
                f"{type(error).__name__}: {str(error).splitlines()[0][:300] if str(error) else ''}",
                "Run the task file by itself to see the whole traceback.",
            )
        return sum(item.state == "failed" for item in self.items) == before

    def to_json(self) -> dict[str, Any]:
        items = [{"name": i.name, "state": i.state, "found": i.found, "remedy": i.remedy} for i in self.items]
        return {"task": self.task, "ok": self.ok, "checks": items, "facts": self.facts}
