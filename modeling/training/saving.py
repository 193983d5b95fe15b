"""When a run saves: after given updates, and when enough time has gone by since it last did.

Which updates those are follows from the experiment alone; the time decides nothing but when else to
save, so that a run saved by the clock has the bits of one that was not.
"""

import time
from collections.abc import Callable

from modeling.training.config import TrainerConfig

PINNED_BY = "trainer.keep"
"""Why a checkpoint stays that no one has pinned by hand."""


class SaveSchedule:
    """The times to save of one run."""

    def __init__(
        self, trainer: TrainerConfig, *, clock: Callable[[], float] = time.monotonic
    ) -> None:
        """Begins now.

        Args:
            trainer: says how often.
            clock: gives seconds that never go back, as those of the day may.
        """
        self._trainer = trainer
        self._clock = clock
        self._since = clock()

    def is_permanent(self, update: int) -> bool:
        """Whether the state after an update is to stay for ever."""
        for rule in self._trainer.keep:
            if rule.until is None or update <= rule.until:
                return update % rule.every == 0
        return False

    def is_due(self, update: int) -> bool:
        """Whether the update alone, on every process the same, says to save after it."""
        every = self._trainer.save_every_steps
        is_regular = every is not None and update % every == 0
        return is_regular or update == self._trainer.num_train_steps or self.is_permanent(update)

    def time_is_up(self) -> bool:
        """Whether `save_interval` has gone by, said once; the next interval begins then."""
        seconds = self._trainer.save_interval_s
        if seconds is None or self._clock() - self._since < seconds:
            return False
        self.begin_interval()
        return True

    def begin_interval(self) -> None:
        """Counts time from now on."""
        self._since = self._clock()
