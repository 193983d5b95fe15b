"""Training that begins before its token cache is complete: beside the tokenization, in one run.

    tokenized_corpus  |--- tokenizes, commits shard after shard ---|
    token_cache                                                    |-|
    checkpoint              |--- trains on what is committed ---------------------| publishes

A run with the tag `levanter/on_demand` = EXPERIMENT starts training from within the step of the
tokenized corpus, in a process of its own, under a stand-in for the recipe that is not known yet.
The steps stay what they are and materialize one after another. That of the checkpoint waits for the
head start to end, and then does what it always does: it takes up the progress that was made under
the stand-in, makes sure by its evidence that it was made of these rows, and publishes it. So
whoever is killed, and however the run is started again, the same bits come of it.

Training waits for rows when it is faster. Tokenization goes on with the source that training waits
for, or else with the one that is least ahead of what it asks for; splits that are evaluated on
during training come before all, for they are read as a whole. It waits when each source is
`max_eras_ahead` eras ahead, so as to leave training the processors; and does not while training
waits, nor once it has ended.

Training holds the pool slot that its step would hold, and hands it to that step. While another run
has it, tokenization goes on without training, which begins as soon as the slot is free.
"""

import contextlib
import dataclasses
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import dagster as dg
from pydantic import Field, PrivateAttr

from modeling import recipes
from modeling.artifacts import Artifact, Recipe, Workspace, write_durably
from modeling.experiment import ConfigError, ExperimentConfig
from resources.launcher import LauncherResource, Running
from resources.pools import ACCELERATOR, PoolSlot
from resources.store import StoreResource

if TYPE_CHECKING:
    from modeling.data.config import DatasetConfig
    from modeling.data.tokenized import Pace

ON_DEMAND_TAG = "levanter/on_demand"
_POLL_S = 0.1


class HeadStartResource(dg.ConfigurableResource):
    """The training that this run has started early, if any."""

    max_eras_ahead: int = Field(
        default=4, description="Eras that tokenization may be ahead of training.", ge=1
    )
    _running: Running | None = PrivateAttr(default=None)
    _held: contextlib.ExitStack | None = PrivateAttr(default=None)
    _handoff: Path | None = PrivateAttr(default=None)
    _hear: Callable[[str], None] | None = PrivateAttr(default=None)
    _slot: PoolSlot | None = PrivateAttr(default=None)

    def teardown_after_execution(self, context: dg.InitResourceContext) -> None:
        """Ends what still trains when the run ends; what it has saved is kept."""
        if self._running is not None:
            self._running.stop()
        self._running = None
        self._release()
        if self._slot is not None:
            self._slot.free()
        self._slot = None

    def begin(
        self,
        context: dg.AssetExecutionContext,
        name: str,
        experiment: ExperimentConfig,
        dataset: "DatasetConfig",
        launcher: LauncherResource,
        store: StoreResource,
        *,
        tokenized: Recipe,
        progress: Path,
        text_bytes: Mapping[str, int],
        files: Mapping[str, Path],
    ) -> "Pace":
        """Starts training as soon as an accelerator is free; returns what slows tokenization.

        Args:
            context: of the step that tokenizes.
            name: of the experiment.
            experiment: all of it.
            dataset: its dataset.
            launcher: starts the process.
            store: keeps its progress.
            tokenized: recipe of the tokenized corpus that is being made.
            progress: where its shards are committed.
            text_bytes: of the splits that it will be made of.
            files: of the tokenizer, and of the checkpoint to begin with, if any.

        Raises:
            ConfigError: this experiment cannot train before its cache is complete.
        """
        from modeling.data import growing

        require_on_demand(experiment)
        cache = dataset.cache(experiment.sequence_length, experiment.packing)
        splits = {split: size for split, size in text_bytes.items() if _is_read(split, experiment)}
        numerics = launcher.numerics(experiment)
        stand_in = recipes.checkpoint_stand_in(experiment, tokenized.id)
        self._held = contextlib.ExitStack()
        report = context.log.info
        begun = store.open().begin(stand_in, numerics, lambda said: report(str(said)))
        space: Workspace = self._held.enter_context(begun)
        handoff = self._handoff = space.progress.parent
        growing.clear(handoff)
        job = launcher.job(
            "train", name, experiment, space,
            numerics=numerics, handoff=handoff, tokens_in_progress=progress, shares=splits,
            token_cache_config=dataclasses.asdict(cache), has_loss_mask=dataset.has_loss_mask,
            **files,
        )  # fmt: skip
        self._hear = lambda line: context.log.info(f"training: {line}")
        slot = PoolSlot.of_asset(context, dg.AssetKey([name, "checkpoint"]), ACCELERATOR)
        self._slot = slot

        def start() -> Running | None:
            if self._running is None and slot.claim():
                context.log.info(
                    f"{name}: training begins as soon as its first rows are tokenized."
                )
                self._running = launcher.start(job, self._heard)
            return self._running

        if start() is None:
            context.log.info(
                f"{name}: training begins when pool {ACCELERATOR} has a slot; tokenization does "
                f"not wait for it."
            )
        most = self.max_eras_ahead * experiment.trainer.data_order.era_rows
        return _Pacer(context, start, handoff, tuple(splits), experiment.sequence_length, most)

    def tokenized(self, corpus: Path) -> None:
        """Tells training where the whole tokenized corpus is."""
        from modeling.data import growing

        self._hear = None
        if self._handoff is not None:
            where = {"tokenized_corpus": str(corpus)}
            write_durably(self._handoff / growing.FINISHED_FILE, where)

    def finish(self, context: dg.AssetExecutionContext) -> None:
        """Waits until the training that was begun early has ended, well or not."""
        if self._running is None:
            return
        self._hear = lambda line: context.log.info(line)
        try:
            self._running.wait()
        except (dg.Failure, dg.RetryRequested) as error:
            context.log.warning(
                f"The training that was begun early has ended: {error.__cause__ or error}. What "
                f"it has saved is gone on with."
            )
        self._running = None
        self._release()

    def _heard(self, line: str) -> None:
        if self._hear is not None:
            self._hear(line)

    def _release(self) -> None:
        if self._held is not None:
            self._held.close()
        self._held = self._handoff = self._hear = None


class _Pacer:
    """Chooses the split that tokenization goes on with, and holds it up: see the module."""

    def __init__(
        self,
        context: dg.AssetExecutionContext,
        start: Callable[[], Running | None],
        handoff: Path,
        splits: tuple[str, ...],
        row_tokens: int,
        most_rows: int,
    ) -> None:
        """Paces for a training.

        Args:
            context: hears of pauses.
            start: returns the training, begun now if it was not and can be.
            handoff: where training says what it asks for.
            splits: that it reads.
            row_tokens: tokens of a row.
            most_rows: rows of a source that tokenization may be ahead.
        """
        self._context = context
        self._start = start
        self._handoff = handoff
        self._splits = splits
        self._row_tokens = row_tokens
        self._most_rows = most_rows
        self._chosen: Counter[str] = Counter()

    def __call__(self, tokens: Mapping[str, int], left: Sequence[str]) -> str:
        """See `modeling.data.tokenized.Pace`."""
        split = self._choose(tokens, [split for split in left if split in self._splits]) or left[0]
        self._chosen[split] += 1
        return split

    def _choose(self, tokens: Mapping[str, int], left: Sequence[str]) -> str | None:
        from modeling.data.growing import Demand

        has_paused = False
        while left:
            demand = Demand.read(self._handoff)
            asked = [split for split in left if split in demand.waited_for]
            asked += [split for split in left if not is_trained_on(split)]
            if asked:
                return asked[0]
            ahead = {split: tokens[split] // self._row_tokens - demand.rows.get(split, 0)
                     for split in left}  # fmt: skip
            # Of those as far, the one chosen least often: of what is under way nothing is known.
            split = min(left, key=lambda split: (ahead[split], self._chosen[split]))
            training = self._start()
            if training is None or not training.is_alive or ahead[split] <= self._most_rows:
                return split
            if demand.waited_for:  # for what is being encoded, elsewhere, or has no document left
                return split
            if not has_paused:
                self._context.log.info(
                    f"tokenization pauses: it is {ahead[split]:,} rows ahead of training, and "
                    f"{self._most_rows:,} rows are the most."
                )
            has_paused = True
            time.sleep(_POLL_S)
        return None


def is_trained_on(split: str) -> bool:
    """Whether a split is one of those that updates are made with."""
    from modeling.data.splits import TRAIN, role_of

    return role_of(split) == TRAIN


def _is_read(split: str, experiment: ExperimentConfig) -> bool:
    """Whether training reads a split: others than its own if it evaluates or draws meanwhile."""
    trainer = experiment.trainer
    looks = trainer.eval_every_steps is not None or trainer.pictures_every_steps is not None
    return looks or is_trained_on(split)


def require_on_demand(experiment: ExperimentConfig) -> None:
    """Makes sure that an experiment can begin before its token cache has a content id.

    Raises:
        ConfigError: it cannot; says why.
    """
    wanted = experiment.trainer.initialize_from
    if wanted is not None and wanted.goes_on and "data" not in wanted.allow_changed:
        raise ConfigError(
            "on demand: trainer.initialize_from: whether its checkpoint has seen the same rows is "
            "known when the whole corpus is tokenized. Run without --on-demand, take its weights "
            "alone with weights_only: true, or name `data` in allow_changed."
        )


def stand_ins(
    experiment: ExperimentConfig, tokenized: Artifact, store: StoreResource
) -> list[Recipe]:
    """Returns the recipes under which training may have begun before `tokenized` was complete."""
    return [
        recipes.checkpoint_stand_in(experiment, record["recipe_id"])
        for record in store.open().records()
        if (record["kind"], record["content_id"]) == (tokenized.kind, tokenized.content_id)
    ]
