"""Slots of Dagster's pools for work that a run does outside the step that has the pool.

An executor claims a slot for a step when it begins the step, by run and step key. What is claimed
here under the same two is therefore that very step's: the executor finds it claimed, and frees it
when the step has ended. Dagster has no public interface for this; the class below is the one that
its executors use, and this module is the only one that knows of it.
"""

import dagster as dg
from dagster._core.execution.plan.instance_concurrency_context import InstanceConcurrencyContext

ACCELERATOR = "accelerator"
"""The pool of the steps that compute on devices."""


class PoolSlot:
    """The slot that a step of a run will have, to be claimed ahead of it."""

    def __init__(
        self, instance: dg.DagsterInstance, run: dg.DagsterRun, step: str, pool: str
    ) -> None:
        """Claims nothing yet.

        Args:
            instance: whose pools count.
            run: that the step is of.
            step: its key.
            pool: of the step.
        """
        self._claims = InstanceConcurrencyContext(instance, run)
        self._step = step
        self._pool = pool

    @classmethod
    def of_asset(cls, context: dg.AssetExecutionContext, key: dg.AssetKey, pool: str) -> "PoolSlot":
        """Returns the slot of the step that makes an asset in the run of `context`."""
        return cls(context.instance, context.run, key.to_python_identifier(), pool)

    def claim(self) -> bool:
        """Takes the slot if it is free, and says whether it is taken; asks no more than it must."""
        return self._claims.claim(self._pool, self._step)

    def free(self) -> None:
        """Gives the slot back, or its place in the queue."""
        self._claims.free_step(self._step)
        self._claims.__exit__(None, None, None)
