"""Training that begins before its corpus is tokenized: when, what comes of it, and after a kill."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time

import dagster as dg
import pytest

from modeling.experiment import ConfigError, load_catalog
from pipelines.staleness import stale_assets
from resources.head_start import HeadStartResource, require_on_demand
from resources.launcher import LauncherResource
from resources.pools import ACCELERATOR, PoolSlot
from tests.pipelines.conftest import CATALOG

STAGES = [("tales", "raw_corpus"), ("tales", "tokenizer"), ("tales", "tokenized_corpus"),
          ("tales", "token_cache", "L32"), ("tiny", "checkpoint")]  # fmt: skip
CLOSE = HeadStartResource(max_eras_ahead=1)
"""One era is 32 rows, the run takes four of them, the corpus has far more: tokenization cannot end
before training has, for it is not let more than an era ahead."""


def story(chain, run_id):
    """Returns what happened in a run: messages, and keys of assets as they were materialized."""
    told = []
    with chain.instance() as instance:
        for entry in instance.all_logs(run_id):
            event = entry.dagster_event
            if event is None:
                told.append(entry.user_message)
            elif event.event_type_value == "ASSET_MATERIALIZATION":
                told.append(event.asset_key.to_user_string())
    return told


def slots(chain):
    """Returns the steps that hold slots of the accelerators, or wait for one."""
    with chain.instance() as instance:
        info = instance.event_log_storage.get_concurrency_info(ACCELERATOR)
    return {slot.step_key for slot in info.claimed_slots} | {
        step.step_key for step in info.pending_steps
    }


def index(told, *words):
    (first, *_) = [i for i, line in enumerate(told) if all(word in line for word in words)]
    return first


def test_training_ends_before_tokenization_does_and_gives_what_it_always_gives(
    chain, first_run, empty_chain
):
    result = empty_chain.run(select=STAGES, job="tiny__on_demand", head_start=CLOSE)
    assert result.success
    assert [check for check in result.get_asset_check_evaluations() if not check.passed] == []

    expected, found = chain.metadata_of(first_run), empty_chain.metadata_of(result)
    assert set(found) == {"/".join(key) for key in STAGES}
    for key, shown in found.items():
        assert shown["was"] == "built"
        for what in ("content_id", "recipe_id", "numerics"):
            assert shown[what] == expected[key][what], key
    for event in result.get_asset_materialization_events():
        key = event.asset_key.to_user_string()
        assert event.materialization.tags["dagster/data_version"] == expected[key]["content_id"]

    told = story(empty_chain, result.run_id)
    begun = index(told, "training begins as soon as its first rows are tokenized")
    first_step = index(told, "training: step 1 of 16")
    last_step = index(told, "training: step 16 of 16")
    tokenized = told.index("tales/tokenized_corpus")
    assert begun < first_step < last_step < tokenized
    assert index(told, "tokenization pauses", "32 rows are the most") < last_step
    order = [told.index("/".join(key)) for key in STAGES[2:]]
    assert order == sorted(order)

    losses = found["tiny/checkpoint"]["loss_curve"], expected["tiny/checkpoint"]["loss_curve"]
    assert losses[0] == losses[1]
    with empty_chain.instance() as instance:
        stale = stale_assets(empty_chain.defs(), instance)
    assert not {dg.AssetKey(list(key)) for key in STAGES} & set(stale)
    assert not list((empty_chain.store_directory / "work").glob("*/*/progress"))
    assert slots(empty_chain) == set()


def test_training_killed_while_the_corpus_grows_is_gone_on_with_by_an_ordinary_run(
    chain, first_run, empty_chain
):
    killed = empty_chain.run(
        select=STAGES,
        job="tiny__on_demand",
        variables={"LEVANTER_FAULT": "during-write@12"},
        head_start=CLOSE,
        launcher=LauncherResource(max_retries=0),
    )
    assert not killed.success
    assert set(empty_chain.was(killed)) == {"/".join(key) for key in STAGES[:-1]}
    told = story(empty_chain, killed.run_id)
    ended = index(told, "training that was begun early has ended", "SIGKILL")
    assert told.index("tales/token_cache/L32") < ended
    again = empty_chain.run(select=STAGES)
    assert again.success
    shown = empty_chain.metadata_of(again)["tiny/checkpoint"]
    assert shown["resumed_from"] == 8
    assert shown["content_id"] == chain.metadata_of(first_run)["tiny/checkpoint"]["content_id"]


def committed(chain, step):
    work = chain.store_directory / "work"
    return list(work.glob(f"*/*/progress/checkpoints/*/step-{step:06d}.*/COMMIT"))


@pytest.mark.slow
def test_a_run_killed_as_a_whole_loses_nothing_that_was_committed(chain, first_run, empty_chain):
    run = subprocess.Popen(
        [sys.executable, "-m", "pipelines.cli", "run", "tiny", "--on-demand"],
        env=os.environ | empty_chain.environment(),
        start_new_session=True,
    )
    deadline = time.monotonic() + 240
    while not committed(empty_chain, 4):
        assert run.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.02)
    os.kill(run.pid, signal.SIGKILL)
    run.wait()
    again = empty_chain.run(select=STAGES, job="tiny__on_demand", head_start=CLOSE)
    assert again.success
    shown = empty_chain.metadata_of(again)
    assert shown["tiny/checkpoint"]["resumed_from"] >= 4
    expected = chain.metadata_of(first_run)
    for key in ("tales/tokenized_corpus", "tiny/checkpoint"):
        assert shown[key]["content_id"] == expected[key]["content_id"]


def of_records(chain, directory):
    """Two sources of prompts with completions, one wholly before the other, and looks on the way.

    Neither has a weight, so an era holds rows of both.
    """
    sources = {}
    for name, digits in (("early", "0123"), ("late", "45")):
        lines = [
            json.dumps({"prompt": line, "completion": f" {line.lower()}"})
            for path in sorted(chain.texts.glob(f"[{digits}]?.txt"))
            for line in path.read_text().splitlines()
        ]
        (directory / f"{name}.jsonl").write_text("\n".join(lines))
        paths = [str(directory / f"{name}.jsonl")]
        sources[name] = {"type": "files", "paths": paths, "format": "jsonl"}
    return [
        "dataset.source=null",
        f"dataset.sources={json.dumps(sources)}",
        "dataset.format.type=supervised",
        "trainer.eval_every_steps=8",
        "trainer.pictures_every_steps=16",
    ]


def packed(chain, directory):
    """Whole documents; of so few all are in one window, which is known at the end."""
    rows = {"length": 32, "packing": "documents"}
    return ["packing=documents", f"dataset.sequence_lengths={json.dumps([rows])}"]


def encoded_by_ray(chain, directory):
    return ["dataset.compute={type: ray, max_workers: 2}"]


@pytest.mark.parametrize(
    ("case", "cache", "is_early"),
    [
        (of_records, "L32", True),
        pytest.param(packed, "L32_documents", False, marks=pytest.mark.slow),
        pytest.param(encoded_by_ray, "L32", True, marks=pytest.mark.slow),
    ],
)
def test_what_is_trained_early_is_what_is_trained_late(
    case, cache, is_early, chain, empty_chain, tmp_path
):
    changes = case(chain, tmp_path)
    stages = [*STAGES[:3], ("tales", "token_cache", cache), STAGES[4]]
    early = empty_chain.run(*changes, select=stages, job="tiny__on_demand", head_start=CLOSE)
    assert early.success
    told = story(empty_chain, early.run_id)
    if is_early:
        last_step = index(told, "training: step 16 of 16")
        assert last_step < told.index("tales/tokenized_corpus")
    afresh = dataclasses.replace(
        empty_chain, home=tmp_path / "late" / "home", store_directory=tmp_path / "late" / "store"
    )
    late = afresh.run(*changes, select=stages)
    assert late.success
    shown = empty_chain.metadata_of(early)["tiny/checkpoint"]
    expected = afresh.metadata_of(late)["tiny/checkpoint"]
    for what in ("content_id", "recipe_id", "loss_curve"):
        assert shown[what] == expected[what]
    assert shown.get("validation_loss") == expected.get("validation_loss")


def test_training_does_not_begin_while_another_run_has_the_accelerator(first_run, empty_chain):
    other = dg.DagsterRun(job_name="other", run_id="00000000-0000-4000-8000-000000000000")
    with empty_chain.instance() as instance:
        assert PoolSlot(instance, other, "other__checkpoint", ACCELERATOR).claim()
    result = empty_chain.run(select=STAGES[:3], job="tiny__on_demand", head_start=CLOSE)
    assert result.success
    told = story(empty_chain, result.run_id)
    assert index(told, "training begins when pool accelerator has a slot") >= 0
    assert not [line for line in told if "training begins as soon as" in line]
    assert slots(empty_chain) == {"other__checkpoint"}


def test_a_checkpoint_that_has_to_have_seen_the_same_rows_is_refused():
    catalog = load_catalog(CATALOG)
    require_on_demand(catalog.experiments["tiny"])
    begun = f'{{"checkpoint": "{"e2" * 32}"}}'
    catalog = load_catalog(CATALOG, {"tiny": [f"trainer.initialize_from={begun}"]})
    with pytest.raises(ConfigError, match=r"trainer\.initialize_from: whether its checkpoint"):
        require_on_demand(catalog.experiments["tiny"])
    for more in ("trainer.initialize_from.weights_only=true",
                 "trainer.initialize_from.allow_changed=[data]"):  # fmt: skip
        changes = [f"trainer.initialize_from={begun}", more]
        require_on_demand(load_catalog(CATALOG, {"tiny": changes}).experiments["tiny"])
