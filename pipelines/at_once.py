"""`python -m pipelines.at_once job launch ...`: Dagster's command, past the queue of its instance.

An instance that queues runs for a daemon has them executed in the daemon's own checkout and
environment, which a change given on a command line never reaches. A run that is launched from here
begins at once, in a code server of this checkout and with this environment. The pools of the
instance hold for it as for any other run; only the queue's limits do not.

Which coordinator an instance has is not for Dagster's command to choose, so it is put in its place
here, by a private property: this module is the only one that knows of it.
"""

import sys

import dagster as dg
from dagster._cli import main
from dagster._core.run_coordinator import DefaultRunCoordinator


class _AtOnce(DefaultRunCoordinator):
    """Hands each run to the launcher of its instance."""


def _coordinator(instance: dg.DagsterInstance) -> _AtOnce:
    coordinator = _AtOnce()
    coordinator.register_instance(instance)
    return coordinator


if __name__ == "__main__":
    dg.DagsterInstance.run_coordinator = property(_coordinator)  # pyright: ignore[reportAttributeAccessIssue]
    sys.exit(main())
