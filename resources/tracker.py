"""Weights & Biases: offline unless `WANDB_MODE` says otherwise, and told nothing but numbers.

Runs are written below `WANDB_DIR`, else `DAGSTER_HOME`, in W&B's own format; `wandb sync` sends
them later. Its collection of surroundings (arguments, host, user, code, git) is off: a run says
what it is by the configuration given here, without secrets. `WANDB_MODE=disabled` imports nothing.
"""

import contextlib
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from resources.secrets import scrub_tree

MODES = ("online", "offline", "disabled")
PROJECT = "levanter"


class Tracker:
    """One run's numbers by step, and its summary."""

    def __init__(self, run: Any) -> None:
        """Takes a W&B run, or None to keep nothing."""
        self._run = run

    def log(self, step: int, numbers: Mapping[str, float]) -> None:
        """Adds the numbers of one step."""
        if self._run is not None:
            self._run.log(dict(numbers), step=step)

    def show(self, step: int, name: str, page: Path) -> None:
        """Adds an HTML page of one step."""
        if self._run is not None:
            import wandb

            # Shown in a frame of its own; W&B's own style would be put into the page.
            self._run.log({name: wandb.Html(page.read_text("utf-8"), inject=False)}, step=step)

    def summarize(self, facts: Mapping[str, Any]) -> None:
        """Sets what the run has come to."""
        if self._run is not None:
            self._run.summary.update(scrub_tree(facts))


@contextlib.contextmanager
def open_tracker(
    name: str, config: Mapping[str, Any], *, is_kept: bool = True
) -> Iterator[Tracker]:
    """Opens a run of the experiment `name`; it ends with the block, as failed if that raises.

    Args:
        name: of the experiment.
        config: all that says what the run is.
        is_kept: False in those of several processes that are not to tell of the run.
    """
    mode = os.environ.get("WANDB_MODE") or "offline"
    if mode not in MODES:
        raise ValueError(f"WANDB_MODE: {mode!r} is not one of {list(MODES)}.")
    if mode == "disabled" or not is_kept:
        yield Tracker(None)
        return
    # Read at import: without it, errors inside W&B are reported to its makers.
    os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
    import wandb

    run = wandb.init(
        project=os.environ.get("WANDB_PROJECT") or PROJECT,
        group=name,
        config=scrub_tree(config),
        dir=os.environ.get("WANDB_DIR") or os.environ.get("DAGSTER_HOME"),
        mode=mode,
        settings=wandb.Settings(
            silent=True,
            console="off",
            save_code=False,
            disable_code=True,
            disable_git=True,
            disable_job_creation=True,
            x_disable_meta=True,
            x_disable_machine_info=True,
        ),
    )
    try:
        yield Tracker(run)
    except BaseException:
        run.finish(exit_code=1)
        raise
    run.finish()
