"""A profile of a few updates, as a trace that https://ui.perfetto.dev opens.

    <directory>/steps-<first>-<last>/trace.json.gz     for Perfetto, or chrome://tracing
    <directory>/steps-<first>-<last>/plugins/...       the same for XProf (TensorBoard)

Each update is a slice named `train` with its number as `step_num`; below it are the host's calls,
and on tracks of their own the operations of each device, by the names of the model's layers.
`docs/performance.md` tells how to read it. Training waits for the device before the first and after
the last of them, so that the trace holds these updates whole and nothing else.
"""

import contextlib
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax

TRACE = "trace.json.gz"
_log = logging.getLogger(__name__)


class Profiler:
    """Traces the updates of `steps`; others run as if it were not there."""

    def __init__(self, steps: range, directory: Path, *, resumed_from: int = 0) -> None:
        """Will write below `directory`; warns if a run has got past all of `steps` already."""
        self._steps = steps
        self._directory = directory / f"steps-{steps.start}-{steps.stop - 1}"
        self._is_running = False
        if steps and resumed_from >= steps[-1]:
            _log.warning(
                "trainer.profile_steps: steps %d to %d are made already, since training goes on "
                "from step %d; nothing is profiled.", steps[0], steps[-1], resumed_from,
            )  # fmt: skip

    @contextlib.contextmanager
    def step(self, update: int, before: Any) -> Iterator[None]:
        """Marks the dispatch of an update; the trace begins with the first of them.

        Args:
            update: its number.
            before: arrays to wait for first, so that earlier work is not in the trace.
        """
        if update not in self._steps:
            yield
            return
        if not self._is_running:
            jax.block_until_ready(before)
            options = jax.profiler.ProfileOptions()
            # Every Python call would be an event: the trace would be of the tracer.
            options.python_tracer_level = 0
            jax.profiler.start_trace(
                self._directory, create_perfetto_trace=True, profiler_options=options
            )
            self._is_running = True
        with jax.profiler.StepTraceAnnotation("train", step_num=update):
            yield

    def finish(self, update: int, after: Any) -> Path | None:
        """Returns the trace if `update` was the last, having waited for its results."""
        if not self._is_running or update != self._steps[-1]:
            return None
        jax.block_until_ready(after)
        return self.close()

    def close(self) -> Path | None:
        """Ends a trace that is running, even if not all its updates were made."""
        if not self._is_running:
            return None
        self._is_running = False
        jax.profiler.stop_trace()
        newest = max(
            self._directory.glob("plugins/profile/*/perfetto_trace.json.gz"),
            key=lambda path: path.stat().st_mtime_ns,
        )
        return newest.replace(self._directory / TRACE)
