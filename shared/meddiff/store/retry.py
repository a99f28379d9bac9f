"""How the store and Redis are asked again: exponential pauses with full jitter, until a deadline."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

T = TypeVar("T")


@dataclass(frozen=True)
class RetryPolicy:
    """The pause before retry n is uniform in [0, min(``longest``, ``first`` 2^n)] seconds. Retries end ``deadline``
    seconds after the first failure, so an upload may take as long as it needs."""

    first: float = 0.1
    longest: float = 4.0
    deadline: float = 30.0

    def __call__(self, attempt: Callable[[], T], transient: Callable[[Exception], bool]) -> T:
        """The result of ``attempt``. Raises its error where that is not ``transient`` or the deadline has passed."""
        failures = 0
        give_up = float("inf")
        while True:
            try:
                return attempt()
            except Exception as error:
                now = time.monotonic()
                give_up = min(give_up, now + self.deadline)
                if not transient(error) or now >= give_up:
                    raise
                pause = random.uniform(0, min(self.longest, self.first * 2**failures))
                time.sleep(min(pause, give_up - now))
                failures += 1
