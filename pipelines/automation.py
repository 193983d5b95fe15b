"""What a daemon starts by itself, each with a switch of its own in the UI, all off by default.

`<dataset>__new_files` looks at what files the sources of a dataset have, and starts its job when
they are others. A look reads no file: it goes by names, sizes and times, which are a hint and never
an identity, so the run may find that nothing has changed. Files that are still being copied change
from look to look; a run is requested when two looks in a row agree.

    cursor    {"number": requests so far, "ran": look that the last one was for, "seen": last look}
    run key   NUMBER-LOOK: a daemon that dies before it has kept the cursor starts no second run

`rerun_what_changed` starts one run of what is out of date and of all below it, such as after a
change to a tokenizer in its YAML file, or to the files of one that is taken from a path. Within the
run every asset looks itself up, so one that comes out unchanged ends the computing. An asset that
was never made is left to people. One whose run has failed waits until something about it changes
again, and one whose parent has failed a check until that passes.
"""

import functools
import json
import warnings
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import dagster as dg

from modeling import canonical
from modeling.experiment import Catalog
from pipelines.jobs import DATA
from pipelines.plan import Outside, tokenizer_now
from resources import materializations
from resources.secrets import scrub

if TYPE_CHECKING:
    from modeling.data.config import DatasetConfig

NEW_FILES = "__new_files"
RERUN = "rerun_what_changed"
_LOOK_EVERY_S = 60


def build_sensors(catalog: Catalog) -> list[dg.SensorDefinition]:
    """Returns the sensor of each dataset, and the one that evaluates `rerun_conditions`."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", dg.BetaWarning)
        rerun = dg.AutomationConditionSensorDefinition(
            RERUN,
            target=dg.AssetSelection.all(),
            run_tags={"levanter/command": RERUN},
            description="Makes anew what was made before and is out of date, and all below it.",
            emit_backfills=False,
            # The condition is code of ours, which the daemon's own process does not have.
            use_user_code_server=True,
        )
    return [*(_new_files(name, dataset) for name, dataset in catalog.datasets.items()), rerun]


def rerun_conditions(catalog: Catalog) -> Callable[[dg.AssetKey], dg.AutomationCondition]:
    """Returns what gives, for each asset that was made before, when it is to be made again."""
    by_files = {
        dg.AssetKey([name, "tokenizer"]): _rerun_condition(
            functools.partial(tokenizer_now, dataset)
        )
        for name, dataset in catalog.datasets.items()
        if getattr(dataset.tokenizer, "path", None) is not None
    }
    by_definition = _rerun_condition()
    return lambda key: by_files.get(key, by_definition)


def _rerun_condition(
    outside: Callable[[], Outside | None] | None = None,
) -> dg.AutomationCondition:
    when = dg.AutomationCondition
    is_above_asked_for = when.any_deps_match(when.will_be_requested())
    return (
        ~when.missing()
        & ~when.any_deps_missing()
        & ~when.in_progress()
        & ~when.any_deps_in_progress()
        & when.all_deps_blocking_checks_passed()
        # Last, for it keeps in mind what it has said when it is asked at all.
        & (is_above_asked_for | _NewlyOutOfDate(outside))
    ).with_label("out of date")


class _NewlyOutOfDate(dg.AutomationCondition):
    """Its definition or an input is not what it was made with, and no run was asked for that yet.

    Dagster's own `code_version_changed` compares with the last tick: it misses what was changed
    while the switch was off. This compares with the last materialization.
    """

    def __init__(self, outside: Callable[[], Outside | None] | None) -> None:
        """Asks `outside`, where there is one, what the asset's files are now."""
        self._outside = outside

    @property
    def name(self) -> str:
        return "newly_out_of_date"

    def evaluate(self, context: dg.AutomationContext) -> dg.AutomationResult:
        if context.candidate_subset.is_empty:
            return dg.AutomationResult(context, context.get_empty_subset(), cursor=context.cursor)
        reason = self._reason(context)
        is_new = reason is not None and reason != context.cursor
        subset = context.candidate_subset if is_new else context.get_empty_subset()
        return dg.AutomationResult(context, subset, cursor=reason)

    def _reason(self, context: dg.AutomationContext) -> str | None:
        """Returns a digest of what the asset would be made of now; None if it is what it was."""
        instance, node = context.asset_graph_view.instance, context.asset_graph.get(context.key)
        made = materializations.latest(instance, context.key)
        if made is None:
            return None
        above = {key: materializations.latest(instance, key) for key in node.parent_keys}
        inputs = {key.to_user_string(): now.data_version for key, now in above.items() if now}
        files = self._files_now(context)
        is_of_files = files is None or files == made.recipe_id
        if node.code_version == made.code_version and inputs == made.inputs and is_of_files:
            return None
        return canonical.digest("out_of_date/2", [node.code_version, inputs, files])

    def _files_now(self, context: dg.AutomationContext) -> str | None:
        """Returns the recipe of the files there are now; None where they decide nothing."""
        if self._outside is None:
            return None
        from modeling.data.pretrained import PretrainedTokenizerError

        try:
            now = self._outside()
        except PretrainedTokenizerError as error:
            # A run would fail of it: `levanter status` tells it, and the next tick looks again.
            context.log.warning(f"{context.key.to_user_string()}: {scrub(str(error))}")
            return None
        return None if now is None else now.recipe_id


def _new_files(name: str, dataset: "DatasetConfig") -> dg.SensorDefinition:
    @dg.sensor(
        name=f"{name}{NEW_FILES}",
        job_name=f"{name}{DATA}",
        minimum_interval_seconds=_LOOK_EVERY_S,
        description=f"Starts {name}{DATA} when the files of its sources are others.",
    )
    def new_files(context: dg.SensorEvaluationContext) -> dg.SensorResult | dg.SkipReason:
        # Imported here, as all that reads data is: Dagster loads this module with its code.
        from modeling.data import listing
        from modeling.data.sources import SourceError

        try:
            look = listing.glance(dataset.named_sources, validation=dataset.validation)
        except SourceError as error:
            return dg.SkipReason(f"{name} cannot be looked at: {scrub(str(error))}")
        known: dict[str, Any] = {"number": 0, "ran": None, "seen": None}
        known |= json.loads(context.cursor or "{}")
        now = json.dumps(known | {"seen": look.digest})
        files = f"{look.num_files} files"
        if look.digest == known["ran"]:
            return dg.SensorResult(skip_reason=f"{files}, as in the last run.", cursor=now)
        if look.digest != known["seen"]:
            return dg.SensorResult(
                skip_reason=f"{files}, others than before: run if the next look finds the same.",
                cursor=now,
            )
        number = known["number"] + 1
        request = dg.RunRequest(
            run_key=f"{number}-{look.digest}", tags={"levanter/files": look.digest[:12]}
        )
        asked = {"number": number, "ran": look.digest, "seen": look.digest}
        return dg.SensorResult(run_requests=[request], cursor=json.dumps(asked))

    return new_files
