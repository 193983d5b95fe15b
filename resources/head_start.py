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

Training waits for rows when it is faster. Tokenization waits when it is `max_eras_ahead` eras ahead
of what training asks for, so as to leave it the processors; and does not once training has ended.
"""

import contextlib
import json
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import dagster as dg
from pydantic import Field, PrivateAttr

from modeling import recipes
from modeling.artifacts import Artifact, Recipe, Workspace, write_durably
from modeling.experiment import ConfigError, ExperimentConfig
from resources.launcher import LauncherResource, Running
from resources.store import StoreResource

if TYPE_CHECKING:
    from modeling.data.config import DatasetConfig

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

    def teardown_after_execution(self, context: dg.InitResourceContext) -> None:
        """Ends what still trains when the run ends; what it has saved is kept."""
        if self._running is not None:
            self._running.stop()
        self._running = None
        self._release()

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
        splits: tuple[str, ...],
        tokenizer: Path,
    ) -> Callable[[Mapping[str, int]], None]:
        """Starts training; returns what tokenization calls, with tokens by split, to be slowed.

        Args:
            context: of the step that tokenizes.
            name: of the experiment.
            experiment: all of it.
            dataset: its dataset.
            launcher: starts the process.
            store: keeps its progress.
            tokenized: recipe of the tokenized corpus that is being made.
            progress: where its shards are committed.
            splits: what it will be made of.
            tokenizer: files of the tokenizer.

        Raises:
            ConfigError: this experiment cannot train before its cache is complete.
        """
        from modeling.data import growing

        train_splits = [split for split in splits if split.split("/")[0] == "train"]
        require_on_demand(experiment, dataset)
        numerics = launcher.numerics(experiment)
        stand_in = recipes.checkpoint_stand_in(experiment, tokenized.id)
        self._held = contextlib.ExitStack()
        report = context.log.info
        begun = store.open().begin(stand_in, numerics, lambda said: report(str(said)))
        space: Workspace = self._held.enter_context(begun)
        self._handoff = space.progress.parent
        (self._handoff / growing.FINISHED_FILE).unlink(missing_ok=True)
        # Training replaces it once it has started; until then it asks for nothing.
        write_durably(self._handoff / growing.DEMAND_FILE, dict.fromkeys(train_splits, 0))
        job = launcher.job(
            "train", name, experiment, space,
            numerics=numerics, handoff=self._handoff, tokens_in_progress=progress,
            splits=train_splits, tokenizer=tokenizer,
        )  # fmt: skip
        context.log.info(f"{name}: training begins as soon as its first rows are tokenized.")
        self._hear = lambda line: context.log.info(f"training: {line}")
        self._running = launcher.start(job, self._heard)
        return self._pace(context, experiment)

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

    def _pace(
        self, context: dg.AssetExecutionContext, experiment: ExperimentConfig
    ) -> Callable[[Mapping[str, int]], None]:
        from modeling.data import growing

        running, handoff = self._running, self._handoff
        assert running is not None
        assert handoff is not None
        demand_file = handoff / growing.DEMAND_FILE
        most = self.max_eras_ahead * experiment.trainer.data_order.era_rows

        def rows_ahead(tokens: Mapping[str, int]) -> int:
            demand = json.loads(demand_file.read_text(encoding="utf-8"))
            length = experiment.sequence_length
            # A source that lags behind is made at once, however far ahead the others are.
            return min(tokens[split] // length - wanted for split, wanted in demand.items())

        def pace(tokens: Mapping[str, int]) -> None:
            paused = False
            while running.is_alive and (ahead := rows_ahead(tokens)) > most:
                if not paused:
                    context.log.info(
                        f"tokenization pauses: it is {ahead:,} rows ahead of training, and "
                        f"{self.max_eras_ahead} eras, {most:,} rows, is the most."
                    )
                paused = True
                time.sleep(_POLL_S)

        return pace


def require_on_demand(experiment: ExperimentConfig, dataset: "DatasetConfig") -> None:
    """Makes sure that rows of this experiment are known before the cache is complete.

    Raises:
        ConfigError: they are not; says why.
    """
    trainer = experiment.trainer
    if experiment.packing != "concat":
        raise ConfigError(
            f"on demand: packing `{experiment.packing}` lays documents into rows when all of them "
            f"are there. Take packing: concat, or run without --on-demand."
        )
    if len(dataset.named_sources) > 1 and trainer.data_order.mixture is None:
        raise ConfigError(
            f"on demand: the order of {sorted(dataset.named_sources)} depends on how many rows "
            f"each has in the end, unless trainer.data_order.mixture gives their weights. Add "
            f"it, or run without --on-demand."
        )
    for field in ("eval_every_steps", "pictures_every_steps"):
        if getattr(trainer, field) is not None:
            raise ConfigError(
                f"on demand: trainer.{field}: the rows held out are known when the whole corpus is "
                f"tokenized. Leave it out, or run without --on-demand."
            )
    if trainer.initialize_from is not None:
        raise ConfigError(
            "on demand: trainer.initialize_from: whether its checkpoint has seen the same rows is "
            "known when the whole corpus is tokenized. Run without --on-demand."
        )
    if dataset.format.type in ("chat", "supervised"):
        raise ConfigError(
            f"on demand: documents of format `{dataset.format.type}` have loss masks, which are "
            f"not read before the tokenized corpus is complete. Run without --on-demand."
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
