"""Batches by step: the rows that the data order gives, read ahead in one background thread.

`batch(step)` is a pure function, so the loader's whole state is one cursor, the number of rows
consumed: a run that resumes at step k draws what the uninterrupted run drew, on however many
processes and devices. A process may ask for its own rows of a batch alone; no other is read.

Nothing is done row by row in Python: the order is computed in windows, rows are gathered by source.
"""

from collections import deque
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor, wait
from functools import partial
from types import TracebackType
from typing import Any, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Integer

from modeling.data.mixture import Draw, data_order
from modeling.data.order import EpochLimitError
from modeling.data.rows import Columns, Rows
from modeling.data.splits import TRAIN, role_of, source_of
from modeling.training.config import BatchSchedule, DataOrderConfig

Indices = Integer[np.ndarray, " rows"]
RowsOfBatch = Callable[[int], Indices]
"""Takes the size of a batch and returns which of its rows are wanted."""


@runtime_checkable
class RowSource(Protocol):
    """What a loader draws from: a token cache, finished or growing."""

    @property
    def splits(self) -> tuple[str, ...]:
        """Names of the splits."""
        ...

    @property
    def sequence_length(self) -> int:
        """Tokens of a row."""
        ...

    @property
    def columns(self) -> Columns:
        """Which columns rows have besides their tokens."""
        ...

    def known_rows(self, split: str, wanted: int) -> int:
        """Returns how many rows a split has: at least `wanted`, or all; may wait for them."""
        ...

    def share(self, split: str) -> int:
        """Returns how much of an epoch's beginning a split is, beside what others are."""
        ...

    def rows(self, split: str, indices: Integer[np.ndarray, " rows"]) -> Rows:
        """Returns rows of a split."""
        ...

    def stop_waiting(self) -> None:
        """Ends the wait of any other thread in `known_rows`, by an error there."""
        ...


@runtime_checkable
class TrainingData(RowSource, Protocol):
    """Rows to train on, and what proves which they were."""

    @property
    def vocab_size(self) -> int:
        """Ids are below it."""
        ...

    def num_rows(self, split: str) -> int:
        """Returns how many rows a split has in all; may wait until that is known."""
        ...

    def evidence(self) -> Mapping[str, Any]:
        """Returns what proves which rows these are, for a checkpoint to keep."""
        ...

    def refusal(self, seen: Mapping[str, Any]) -> str | None:
        """Returns why work with this evidence was done on other rows; None if on these."""
        ...


class TrainLoader:
    """The training batches of a cache, by step."""

    def __init__(
        self, cache: RowSource, config: DataOrderConfig, batches: BatchSchedule | int
    ) -> None:
        """Draws from the training splits of `cache` in the order of `config`.

        Args:
            cache: where the rows are.
            config: seed, eras, weights.
            batches: rows a step, by step.

        Raises:
            ValueError: the weights do not fit the sources.
        """
        self._cache = cache
        self._batches = BatchSchedule(batches) if isinstance(batches, int) else batches
        self._split_of = {
            source_of(split): split for split in cache.splits if role_of(split) == TRAIN
        }
        sources = {
            source: partial(cache.known_rows, split) for source, split in self._split_of.items()
        }
        shares = {source: cache.share(split) for source, split in self._split_of.items()}
        self._order = data_order(config, sources, self._batches, shares)

    @property
    def columns(self) -> Columns:
        """Which columns the batches have besides tokens."""
        return self._cache.columns

    def batch(self, step: int, rows: Indices | None = None) -> Rows:
        """Returns the rows of one step, counted from 0.

        Args:
            step: updates made before.
            rows: which rows of the batch, in which order; all by default.
        """
        size = self._batches.size(step)
        draws = self._order.draws(self.cursor(step), size)
        if rows is None and len(draws) == 1:
            return self._cache.rows(self._split_of[draws[0].source], draws[0].rows)
        return self._assembled(draws, np.arange(size) if rows is None else rows, size)

    def size(self, step: int) -> int:
        """Returns how many rows the batch of a step has."""
        return self._batches.size(step)

    def cursor(self, step: int) -> int:
        """Returns how many rows the steps before `step` have consumed."""
        return self._batches.cursor(step)

    def epochs(self, step: int) -> dict[str, float]:
        """Returns how often the rows of each source are drawn by the first `step` updates."""
        return self._order.epochs(self.cursor(step))

    def require_epochs(self, num_steps: int, max_epochs: int) -> None:
        """Makes sure, before any work, that a run draws no source more often than it may.

        Raises:
            EpochLimitError: naming the source that it would draw most.
        """
        source, epochs = max(self.epochs(num_steps).items(), key=lambda item: item[1])
        if epochs > max_epochs:
            raise EpochLimitError(
                f"trainer.data_order.max_epochs: {num_steps:,} steps draw each row of source "
                f"{source!r} {epochs:.2f} times on average, and {max_epochs} is the limit. Train "
                f"fewer steps, lower the source's weight, add data, or raise max_epochs."
            )

    def stream(
        self, start_step: int, *, prefetch: int = 2, rows: RowsOfBatch | None = None
    ) -> "BatchStream":
        """Returns the batches from `start_step` on, `prefetch` of them made ahead.

        Use it in a `with` statement; leaving that ends the background thread.
        """
        return BatchStream(self, start_step, prefetch, rows)

    def stop_waiting(self) -> None:
        """Ends a wait for rows that are not written yet."""
        self._cache.stop_waiting()

    def _assembled(self, draws: list[Draw], wanted: Indices, size: int) -> Rows:
        """Returns the wanted rows, each source's gathered at once and put in their places."""
        found = _empty(len(wanted), self._cache.sequence_length, self._cache.columns)
        draw_of, row_at = np.empty(size, np.int64), np.empty(size, np.int64)
        for index, draw in enumerate(draws):
            draw_of[draw.places], row_at[draw.places] = index, draw.rows
        for index, draw in enumerate(draws):
            here = np.flatnonzero(draw_of[wanted] == index)
            if len(here):
                part = self._cache.rows(self._split_of[draw.source], row_at[wanted[here]])
                for whole, piece in zip(found, part, strict=True):
                    if whole is not None:
                        whole[here] = piece
        return found


class BatchStream:
    """An endless iterator over batches; an error of the background thread is raised by `next`."""

    def __init__(
        self, loader: TrainLoader, start_step: int, prefetch: int, rows: RowsOfBatch | None
    ) -> None:
        """See `TrainLoader.stream`."""
        if start_step < 0 or prefetch < 1:
            raise ValueError(
                f"start_step {start_step} must be at least 0 and prefetch {prefetch} at least 1."
            )
        self._loader = loader
        self._prefetch = prefetch
        self._rows = rows
        self._next_submitted = start_step
        self._pending: deque[Future[Rows]] = deque()
        self._worker: ThreadPoolExecutor | None = None
        self.step = start_step
        """The step of the batch that `next` returns."""

    @property
    def cursor(self) -> int:
        """Rows consumed: all that is needed to go on from here."""
        return self._loader.cursor(self.step)

    def __enter__(self) -> "BatchStream":
        self._worker = ThreadPoolExecutor(max_workers=1, thread_name_prefix="batches")
        self._fill(self._worker)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._worker is not None:
            self._loader.stop_waiting()
            self._worker.shutdown(wait=True, cancel_futures=True)
            self._worker = None
            self._pending.clear()

    def __iter__(self) -> "BatchStream":
        return self

    def __next__(self) -> Rows:
        batch = self.take(lambda: False)
        assert batch is not None
        return batch

    def take(self, is_stopping: Callable[[], bool]) -> Rows | None:
        """Returns the next batch; None if `is_stopping` says so while there is none yet."""
        if self._worker is None:
            raise ValueError("the stream is not open; iterate over it inside its `with` statement.")
        first = self._pending[0]
        # Asked first, since setting up a wait takes longer than making a batch.
        while not first.done() and not wait([first], timeout=0.1).done:
            if is_stopping():
                return None
        batch = self._pending.popleft().result()
        self.step += 1
        self._fill(self._worker)
        return batch

    def _fill(self, worker: ThreadPoolExecutor) -> None:
        while len(self._pending) < self._prefetch:
            step = self._next_submitted
            part = () if self._rows is None else (self._rows(self._loader.size(step)),)
            self._pending.append(worker.submit(self._loader.batch, step, *part))
            self._next_submitted += 1


def rows_of_process(sharding: Any, num_rows: int, row_length: int) -> Indices:
    """Returns which rows of a batch this process's devices hold, in order.

    Args:
        sharding: the `jax.sharding.Sharding` of a batch.
        num_rows: rows of the whole batch.
        row_length: tokens of a row.
    """
    held = np.zeros(num_rows, bool)
    for index in sharding.addressable_devices_indices_map((num_rows, row_length)).values():
        held[index[0]] = True
    return np.flatnonzero(held)


def _empty(num_rows: int, length: int, columns: Columns) -> Rows:
    shape = num_rows, length
    return Rows(
        np.empty(shape, np.int32),
        np.empty(shape, np.int32) if columns.segment_ids else None,
        np.empty(shape, bool) if columns.loss_mask else None,
    )
