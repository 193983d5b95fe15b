"""What is done beside the updates now and then: losses on validation rows, pictures of foresight.

Both are programs of their own over the state that an update leaves: they are put on the device's
queue behind that update and before the next, and read when the next one is queued already, so that
the device never waits for the host. They draw from no stream that training draws from, and the
update's program does not know of them: the bits of training are the same with and without.

What fails in a hook, also in the thread that draws, ends the run: a loss that cannot be taken is
news.
"""

import dataclasses
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array

import haliax as hax
from haliax import Axis
from haliax.partitioning import axis_mapping, sharding_for_axis
from modeling.data.loader import TrainingData
from modeling.data.rows import Columns, Rows, spread_rows
from modeling.data.splits import VALIDATION, role_of
from modeling.models.lm import next_token_loss
from modeling.training.accounting import Ledger
from modeling.training.config import TrainerConfig
from modeling.training.examples import example_of, row_shapes
from modeling.training.mesh import Layout
from modeling.training.observer import Observer
from modeling.training.precision import Policy
from modeling.training.processes import placed
from modeling.training.state import Blueprint

Decode = Callable[[Sequence[int]], str]
PICTURE_ROWS = 2
PICTURE_TOKENS = 256


@dataclasses.dataclass(frozen=True)
class Setting:
    """What hooks know of the run."""

    trainer: TrainerConfig
    blueprint: Blueprint
    layout: Layout
    Batch: Axis
    Pos: Axis
    cache: TrainingData
    decode: Decode | None
    """Gives the text of ids; pictures need it."""
    directory: Path
    """Pictures go to `step-<n>.html` here."""


@dataclasses.dataclass(frozen=True)
class _Evaluation:
    update: int
    sums: Mapping[str, Sequence[tuple[Array, Array]]]


@dataclasses.dataclass(frozen=True)
class _Picture:
    update: int
    foreseen: tuple[Array, Array, Array]


class Hooks:
    """The hooks of one process; use it in a `with` block."""

    def __init__(
        self,
        setting: Setting,
        observer: Observer,
        ledger: Ledger,
        evaluations: list[dict[str, Any]],
    ) -> None:
        """Compiles what the configuration asks for.

        Args:
            setting: what to look at.
            observer: hears of what was found.
            ledger: accounts for the time.
            evaluations: takes `{"step": n, "losses": {split: nats per token}}`, in order.
        """
        self._setting = setting
        self._observer = observer
        self._ledger = ledger
        self._waiting: deque[_Evaluation | _Picture] = deque()
        self._drawing: deque[tuple[int, Future[Path]]] = deque()
        self._drawer = ThreadPoolExecutor(1, thread_name_prefix="pictures")
        self._evaluations = evaluations
        self._splits = _validation_splits(setting)
        self._evaluate = _compile_losses(setting) if setting.trainer.eval_every_steps else None
        self._foresee = (
            _compile_foresight(setting) if setting.trainer.pictures_every_steps else None
        )

    def after(self, update: int, arrays: Sequence[Any]) -> None:
        """Queues what is due after `update`, whose results `arrays` are or will be."""
        trainer = self._setting.trainer
        if self._evaluate is not None and _is_due(update, trainer.eval_every_steps, trainer):
            self._waiting.append(self._evaluation(update, arrays))
        if self._foresee is not None and _is_due(update, trainer.pictures_every_steps, trainer):
            self._waiting.append(_Picture(update, self._foresee(list(arrays))))

    def collect(self, *, until: int, finish: bool = False) -> None:
        """Reads what was queued after updates up to `until`; `finish` waits for pictures too."""
        while self._waiting and self._waiting[0].update <= until:
            match self._waiting.popleft():
                case _Evaluation() as evaluation:
                    with self._ledger.spending("evaluation"):
                        self._read(evaluation)
                case _Picture() if jax.process_index() > 0:
                    continue  # The first process draws it.
                case _Picture(update, foreseen):
                    with self._ledger.spending("pictures"):
                        found = jax.device_get(foreseen)
                    self._drawing.append((update, self._drawer.submit(self._draw, update, found)))
        while self._drawing and (finish or self._drawing[0][1].done()):
            update, drawing = self._drawing.popleft()
            self._observer.wrote("picture", update, str(drawing.result()))

    def __enter__(self) -> "Hooks":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._drawer.shutdown(wait=True, cancel_futures=True)

    def _evaluation(self, update: int, arrays: Sequence[Any]) -> _Evaluation:
        setting, evaluate = self._setting, self._evaluate
        assert evaluate is not None
        sums = {}
        for split, indices in self._splits.items():
            sums[split] = [
                evaluate(
                    list(arrays), _filled(setting, split, indices[start:][: setting.Batch.size])
                )
                for start in range(0, len(indices), setting.Batch.size)
            ]
        return _Evaluation(update, sums)

    def _read(self, evaluation: _Evaluation) -> None:
        losses = {}
        for split, batches in evaluation.sums.items():
            nats, weights = np.asarray(jax.device_get(batches), np.float64).sum(axis=0)
            if not (np.isfinite(nats) and weights > 0):
                raise ValueError(
                    f"step {evaluation.update}: the loss on `{split}` is {nats} over {weights} "
                    f"tokens. Lower optimizer.learning_rate, or hold out rows with tokens to "
                    f"predict."
                )
            losses[split] = float(nats / weights)
        self._evaluations.append({"step": evaluation.update, "losses": losses})
        self._observer.evaluated(evaluation.update, losses)

    def _draw(self, update: int, foreseen: tuple[np.ndarray, np.ndarray, np.ndarray]) -> Path:
        from modeling.evaluation import heat_map
        from modeling.evaluation.foresight import views_of

        rows, decode = _picture_rows(self._setting), self._setting.decode
        assert decode is not None
        page = heat_map.page(
            f"Step {update}",
            views_of(rows, *foreseen, decode=decode),
            caption="How well the model foresees each token of these validation rows.",
        )
        path = self._setting.directory / f"step-{update:06d}.html"
        path.parent.mkdir(parents=True, exist_ok=True)
        attempt = path.with_suffix(".part")
        attempt.write_text(page, encoding="utf-8")
        return attempt.replace(path)


def _is_due(update: int, every: int | None, trainer: TrainerConfig) -> bool:
    return every is not None and (update % every == 0 or update == trainer.num_train_steps)


def _validation_splits(setting: Setting) -> dict[str, np.ndarray]:
    """Returns the rows to evaluate on, by split."""
    trainer, cache = setting.trainer, setting.cache
    if trainer.eval_every_steps is None and trainer.pictures_every_steps is None:
        return {}
    found = {}
    for split in cache.splits:
        if role_of(split) == VALIDATION and (available := cache.num_rows(split)):
            found[split] = spread_rows(available, trainer.eval_max_rows)
    if not found:
        raise ValueError(
            f"trainer.eval_every_steps, trainer.pictures_every_steps: no validation split of the "
            f"token cache has a row ({list(cache.splits)}). Raise validation.fraction of the "
            f"dataset, or leave both out."
        )
    return found


def _filled(setting: Setting, split: str, indices: np.ndarray) -> Rows:
    """Returns these rows and, up to a whole batch, rows in which nothing is to be predicted."""
    rows = setting.cache.rows(split, indices)
    missing = setting.Batch.size - len(indices)
    mask = np.ones(rows.tokens.shape, bool) if rows.loss_mask is None else rows.loss_mask

    def filled(column: np.ndarray) -> np.ndarray:
        return np.concatenate([column, np.zeros_like(column[:1]).repeat(missing, axis=0)])

    segments = None if rows.segment_ids is None else filled(rows.segment_ids)
    return Rows(filled(rows.tokens), segments, filled(mask))


def _compile_losses(setting: Setting) -> Callable[[list[Any], Rows], tuple[Array, Array]]:
    """Compiles the sums of losses in nats and of weights over a batch."""
    blueprint, layout, policy = setting.blueprint, setting.layout, Policy.parse(setting.trainer.mp)
    Batch, Pos = setting.Batch, setting.Pos

    def sums(arrays: Sequence[Any], rows: Rows) -> tuple[Array, Array]:
        model = policy.cast_to_compute(blueprint.unflatten(arrays).model)
        with axis_mapping(layout.compute):
            return next_token_loss(model, example_of(rows, Batch, Pos))

    columns = Columns(segment_ids=setting.cache.columns.segment_ids, loss_mask=True)
    split = sharding_for_axis((Batch, Pos), layout.compute, layout.mesh)
    with jax.set_mesh(layout.mesh):
        compiled = (
            jax.jit(sums, in_shardings=(list(blueprint.shardings.values()), split))
            .lower(blueprint.arrays, row_shapes(Batch, Pos, columns))
            .compile()
        )
    return lambda arrays, rows: compiled(
        arrays, jax.tree_util.tree_map(lambda column: placed(column, split), rows)
    )


def _picture_rows(setting: Setting) -> Rows:
    split = next(iter(_validation_splits(setting)))
    rows = setting.cache.rows(split, np.arange(min(PICTURE_ROWS, setting.cache.num_rows(split))))
    segments = rows.segment_ids
    return Rows(
        rows.tokens[:, :PICTURE_TOKENS],
        None if segments is None else segments[:, :PICTURE_TOKENS],
    )


def _compile_foresight(setting: Setting) -> Callable[[list[Any]], tuple[Array, Array, Array]]:
    """Compiles how well the model foresees the tokens of the rows that are drawn."""
    from modeling.evaluation.foresight import foreseen

    if setting.decode is None:
        raise ValueError(
            "trainer.pictures_every_steps: pictures show text, so that training needs the "
            "tokenizer; pass `decode`, or leave pictures out."
        )
    blueprint, layout, policy = setting.blueprint, setting.layout, Policy.parse(setting.trainer.mp)
    rows = _picture_rows(setting)
    axes = Axis("row", len(rows.tokens)), setting.Pos.resize(rows.tokens.shape[1])
    tokens = hax.named(rows.tokens, axes)
    segments = None if rows.segment_ids is None else hax.named(rows.segment_ids, axes)

    def seen(arrays: Sequence[Any]) -> tuple[Array, Array, Array]:
        model = policy.cast_to_compute(blueprint.unflatten(arrays).model)
        with axis_mapping(layout.compute):
            taken, likeliest, ids = foreseen(model, tokens, segments)
        return taken.array, likeliest.array, ids.array

    everywhere = NamedSharding(layout.mesh, PartitionSpec())
    shardings = list(blueprint.shardings.values())
    with jax.set_mesh(layout.mesh):
        return (
            jax.jit(seen, in_shardings=(shardings,), out_shardings=everywhere)
            .lower(blueprint.arrays)
            .compile()
        )
