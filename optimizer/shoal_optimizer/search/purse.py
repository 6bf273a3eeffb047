"""The budget of a search: how much of its time, measurements and bytes is left."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from shoal_optimizer.jobspec import Budget

if TYPE_CHECKING:
    from shoal_optimizer.search.candidate import Candidate

PLAIN_ONLY_MINUTES = 0.05  # a budget below it asks for conversion only
LEAST_TRAINING = 4.0  # seconds below which a training teaches nothing
FIRST_SHARE = 0.4  # of the whole time that the first network gets at least
SETTLE_SECONDS = 4.0  # an unhurried measurement in a process of its own, with its start
MOST_SETTLING = 0.25  # of the whole time that is kept for those


def networks_for(budget: Budget) -> int:
    """How many networks a budget allows: the two known-good ones, and one a minute beyond three.

    Time is a ceiling as well; this keeps a short search short on tasks that train in seconds.
    """
    if budget.minutes < PLAIN_ONLY_MINUTES:
        return 0
    return budget.networks if budget.networks is not None else 2 + max(0, int(budget.minutes) - 3)


@dataclass
class Purse:
    """What is left. `used` gives the seconds used so far, earlier starts of the job included."""

    budget: Budget
    used: Callable[[], float]
    form_seconds: float = 0.0  # the longest time that one export with its judging took

    @property
    def total(self) -> float:
        return self.budget.minutes * 60

    @property
    def left(self) -> float:
        """Seconds until the budget's end."""
        return max(0.0, self.total - self.used())

    def settling(self, kept: int, classes: int) -> float:
        """Seconds kept back for measuring what may be kept."""
        return min(MOST_SETTLING * self.total, SETTLE_SECONDS * kept * max(1, classes))

    def training(self, forms: int, kept: int, classes: int, *, first: bool) -> float:
        """Seconds that the next training may take so that its exports and the end fit in; 0 = none.

        The first network is always tried: without it a short search would find nothing.
        """
        free = self.left - self.settling(kept, classes) - forms * self.form_seconds
        if first:
            return max(free, FIRST_SHARE * self.total, LEAST_TRAINING)
        return free if free >= LEAST_TRAINING else 0.0

    @property
    def over(self) -> bool:
        """True when the time for making candidates is used up."""
        return self.left <= self.form_seconds

    def refused(self, candidate: Candidate, known: Iterable[Candidate], measured: Iterable[str]) -> str:
        """Why a candidate is not measured any more, "" while the budget lasts.

        Args:
            known: candidates so far. measured: digests of the bundles that were measured.
        """
        done = set(measured)
        if candidate.bundle in done:
            return ""
        if self.budget.measurements is not None and len(done) >= self.budget.measurements:
            return f"the budget of {self.budget.measurements} measurements is used"
        if self.budget.bytes is not None:
            sent = sum({c.bundle: c.size_bytes for c in known if c.bundle in done}.values())
            if sent + candidate.size_bytes > self.budget.bytes:
                wanted = sent + candidate.size_bytes
                return f"with it {wanted} bytes would be measured, the budget is {self.budget.bytes}"
        return ""
