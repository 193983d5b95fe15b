"""Batches by step: the rows that the data order gives, read ahead in one background thread.

`batch(step)` is a pure function, so the loader's whole state is one cursor, the number of rows
consumed: a run that resumes at step k draws what the uninterrupted run drew.
"""

from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType

from modeling.data.cache import TokenCache
from modeling.data.corpus import TRAIN
from modeling.data.order import RowOrder
from modeling.data.rows import Columns, Rows
from modeling.training.config import DataOrderConfig


class TrainLoader:
    """The training batches of a cache, by step."""

    def __init__(self, cache: TokenCache, order_config: DataOrderConfig, batch_size: int) -> None:
        """Draws `batch_size` rows a step from the training split of `cache`."""
        self._cache = cache
        self._order = RowOrder(order_config, cache.num_rows(TRAIN), cache.content_id)
        self.batch_size = batch_size

    @property
    def columns(self) -> Columns:
        """Which columns the batches have besides tokens."""
        return self._cache.columns

    def batch(self, step: int) -> Rows:
        """Returns the rows of one step, counted from 0."""
        rows = self._order.rows_at(self.cursor(step), self.batch_size)
        return self._cache.rows(TRAIN, rows)

    def cursor(self, step: int) -> int:
        """Returns how many rows the steps before `step` have consumed."""
        return step * self.batch_size

    def stream(self, start_step: int, *, prefetch: int = 2) -> "BatchStream":
        """Returns the batches from `start_step` on, `prefetch` of them made ahead.

        Use it in a `with` statement; leaving that ends the background thread.
        """
        return BatchStream(self, start_step, prefetch)


class BatchStream:
    """An endless iterator over batches; an error of the background thread is raised by `next`."""

    def __init__(self, loader: TrainLoader, start_step: int, prefetch: int) -> None:
        """See `TrainLoader.stream`."""
        if start_step < 0 or prefetch < 1:
            raise ValueError(
                f"start_step {start_step} must be at least 0 and prefetch {prefetch} at least 1."
            )
        self._loader = loader
        self._prefetch = prefetch
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
            self._worker.shutdown(wait=True, cancel_futures=True)
            self._worker = None
            self._pending.clear()

    def __iter__(self) -> "BatchStream":
        return self

    def __next__(self) -> Rows:
        if self._worker is None:
            raise ValueError("the stream is not open; iterate over it inside its `with` statement.")
        batch = self._pending.popleft().result()
        self.step += 1
        self._fill(self._worker)
        return batch

    def _fill(self, worker: ThreadPoolExecutor) -> None:
        while len(self._pending) < self._prefetch:
            self._pending.append(worker.submit(self._loader.batch, self._next_submitted))
            self._next_submitted += 1
