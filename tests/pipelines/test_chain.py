"""From texts to a Hugging Face model, through Dagster: what is computed, what is not, and when."""

import base64
import dataclasses
import json
import math
import shutil
from xml.etree import ElementTree

import dagster as dg

from assets.checkpoint import initial_checkpoint
from modeling.training.config import InitializeFromConfig
from pipelines.instance import CHECKOUT
from pipelines.lineage import lineage
from resources.store import StoreResource

DATA = [("tales", "raw_corpus"), ("tales", "tokenizer"), ("tales", "tokenized_corpus"),
        ("tales", "token_cache", "L32")]  # fmt: skip
EVERYTHING = {
    "tales/raw_corpus", "tales/tokenizer", "tales/tokenized_corpus", "tales/token_cache/L32",
    "tiny/checkpoint", "tiny/eval_report", "tiny/hf_model",
}  # fmt: skip


def test_the_job_makes_every_asset_and_every_check_passes(chain, first_run):
    assert chain.was(first_run) == dict.fromkeys(EVERYTHING, "built")
    checks = first_run.get_asset_check_evaluations()
    assert {check.asset_key.to_user_string() for check in checks} == EVERYTHING
    assert [check.check_name for check in checks if not check.passed] == []


def test_the_data_version_is_the_content_id(chain, first_run):
    shown = chain.metadata_of(first_run)
    for event in first_run.get_asset_materialization_events():
        version = event.materialization.tags["dagster/data_version"]
        assert version == shown[event.asset_key.to_user_string()]["content_id"]
        assert len(version) == 64


def test_what_an_asset_shows(chain, first_run):
    shown = chain.metadata_of(first_run)
    assert shown["tales/raw_corpus"]["documents/train"] == 55
    assert shown["tales/raw_corpus"]["dagster/row_count"] == 60
    assert shown["tales/tokenizer"]["vocab_size"] == 320
    rows = shown["tales/token_cache/L32"]
    assert rows["train/tokens"] == 32 * rows["train/rows"]
    assert shown["tiny/checkpoint"]["loss_last"] < shown["tiny/checkpoint"]["loss_first"]
    assert list(shown["tiny/checkpoint"])[-1] == "arrays", "the longest table stands last"
    report = shown["tiny/eval_report"]
    assert math.isclose(report["perplexity"], math.exp(report["loss"]))
    files = [record.data["path"] for record in shown["tiny/hf_model"]["inventory"].records]
    assert {"config.json", "model.safetensors", "tokenizer.json"} < set(files)


def test_every_asset_shows_its_inputs_its_cost_and_a_table_or_picture(chain, first_run):
    for event in first_run.get_asset_materialization_events():
        name, shown = event.asset_key.to_user_string(), event.materialization.metadata
        record = chain.store.record(shown["recipe_id"].value, shown["numerics"].value)
        inputs = {row.data["input"]: row.data["content_id"] for row in shown["inputs"].records}
        expected = record["recipe"]["inputs"]
        assert inputs == {role: given["content_id"] for role, given in expected.items()}
        assert bool(inputs) == (name != "tales/raw_corpus")
        cost = {part: shown[f"cost/{part}"].value for part in ("wall_s", "cpu_s", "device_s")}
        assert cost == record["provenance"]["cost"]
        assert cost["cpu_s"] > 0
        assert (cost["device_s"] > 0) == (event.asset_key.path[0] == "tiny"), name
        tables = [key for key, value in shown.items() if isinstance(value, dg.TableMetadataValue)]
        pictures = [key for key, value in shown.items() if "](data:image/" in str(value.value)]
        assert len(tables) + len(pictures) > 1, f"{name} shows nothing beside its inputs"


def test_training_costs_all_devices_of_its_mesh(chain, first_run):
    shown = chain.metadata_of(first_run)["tiny/checkpoint"]
    spent = sum(value for name, value in shown.items() if name.startswith("seconds/"))
    assert math.isclose(shown["cost/device_s"], 2 * spent, abs_tol=0.01)


def test_pictures_are_whole_files(chain, first_run):
    shown = chain.metadata_of(first_run)
    for asset, name in (
        ("tales/tokenized_corpus", "document_lengths"),
        ("tales/token_cache/L32", "document_lengths"),
        ("tiny/checkpoint", "loss_curve"),
        ("tiny/eval_report", "token_probabilities"),
    ):
        _, _, encoded = shown[asset][name].rstrip(")").partition(";base64,")
        content = base64.b64decode(encoded, validate=True)
        assert ElementTree.fromstring(content).tag == "{http://www.w3.org/2000/svg}svg"


def test_no_record_and_no_event_holds_where_this_checkout_is(chain, first_run):
    place = str(CHECKOUT / "assets").encode()
    kept = [*chain.home.rglob("*.db*"), *chain.store_directory.glob("recipes/*/*/*.json")]
    assert len(kept) > 7
    assert [path for path in kept if place in path.read_bytes()] == []


def test_training_is_tracked_offline(chain, first_run):
    (log,) = (chain.home / "wandb").glob("offline-run-*/run-*.wandb")
    kept = log.read_bytes()
    for words in (
        b"train/loss",
        b"throughput/tokens_per_second",
        b"seconds_per_step",
        b"learning_rate",
        b"loss_last",
    ):
        assert words in kept


def test_a_second_run_computes_nothing(chain, first_run):
    again = chain.run()
    assert again.success
    assert chain.was(again) == dict.fromkeys(EVERYTHING, "reused")
    before, after = chain.metadata_of(first_run), chain.metadata_of(again)
    assert {k: v["content_id"] for k, v in after.items()} == {
        k: v["content_id"] for k, v in before.items()
    }


def test_a_tokenizer_that_comes_out_equal_makes_nothing_below_anew(other_instance):
    """No pair of bytes occurs just twice, so the threshold of three gives the same merges."""
    result = other_instance.run("dataset.tokenizer.min_frequency=3", select=DATA)
    assert result.success
    assert other_instance.was(result) == {
        "tales/raw_corpus": "reused",
        "tales/tokenizer": "built",
        "tales/tokenized_corpus": "reused",
        "tales/token_cache/L32": "reused",
    }


def test_a_changed_file_is_noticed_by_the_next_run(other_instance, tmp_path):
    shutil.copytree(other_instance.texts, tmp_path / "texts")
    other = dataclasses.replace(other_instance, texts=tmp_path / "texts")
    assert set(other.was(other.run(select=DATA)).values()) == {"reused"}, "a folder is no change"
    (tmp_path / "texts" / "07.txt").write_text("The old king went under the sea.\n")
    result = other.run(select=DATA)
    assert result.success
    assert set(other.was(result).values()) == {"built"}


def test_a_run_of_one_asset_takes_what_earlier_runs_left(chain, first_run):
    result = chain.run(select=[("tales", "tokenized_corpus")])
    assert result.success
    assert chain.was(result) == {"tales/tokenized_corpus": "reused"}


def test_a_bfloat16_export_equals_the_rounded_weights(other_instance):
    result = other_instance.run("export.dtype=bfloat16")
    assert result.success
    built = [key for key, state in other_instance.was(result).items() if state == "built"]
    assert built == ["tiny/hf_model"]
    shown = other_instance.metadata_of(result)["tiny/hf_model"]
    assert shown["dtype"] == "bfloat16"


def test_an_asset_whose_parent_was_never_made_says_what_to_do(empty_chain):
    result = empty_chain.run(select=[("tales", "tokenizer")])
    (failure,) = result.get_step_failure_events()
    assert "tales/raw_corpus has never been materialized here" in str(
        failure.event_specific_data.error.to_string()
    )


def test_training_killed_midway_is_retried_and_ends_with_the_same_bits(
    chain, first_run, empty_chain
):
    result = empty_chain.run(
        select=[*DATA, ("tiny", "checkpoint")], variables={"LEVANTER_FAULT": "after-commit@8"}
    )
    assert result.success
    (retry,) = [event for event in result.all_events if event.is_step_up_for_retry]
    assert "SIGKILL" in retry.step_retry_data.error.to_string()
    shown = empty_chain.metadata_of(result)["tiny/checkpoint"]
    assert shown["was"] == "built"
    assert shown["resumed_from"] == 8
    uninterrupted = chain.metadata_of(first_run)["tiny/checkpoint"]
    assert uninterrupted["resumed_from"] == 0
    assert shown["content_id"] == uninterrupted["content_id"]


def test_two_stores_give_the_same_content_ids(chain, first_run, empty_chain):
    result = empty_chain.run(select=DATA)
    expected, found = chain.metadata_of(first_run), empty_chain.metadata_of(result)
    assert {key: found[key]["content_id"] for key in found} == {
        key: expected[key]["content_id"] for key in found
    }


def test_the_record_tells_where_an_artifact_comes_from(chain, first_run):
    checkpoint = first_run.asset_value(dg.AssetKey(["tiny", "checkpoint"]))
    record = chain.store.record(checkpoint.recipe_id, checkpoint.numerics)
    provenance = record["provenance"]
    assert provenance["packages"]["jax"].count(".") == 2
    assert provenance["times"]["seconds"] > 0
    assert len(provenance["git"]["commit"]) == 40
    assert str(chain.texts) not in json.dumps(record["recipe"])


def test_a_run_begins_with_another_checkpoint_and_reports_an_average(chain, other_instance):
    known = chain.artifact("tiny", "checkpoint")
    begun = {"checkpoint": known.content_id, "weights_only": True}
    changes = (
        f"trainer.initialize_from={json.dumps(begun)}",
        "trainer.ema={}", "evaluation.weights=ema",
    )  # fmt: skip
    made = [*DATA, ("tiny", "checkpoint"), ("tiny", "eval_report")]
    result = other_instance.run(*changes, select=made)
    assert result.success
    built = {key for key, was in other_instance.was(result).items() if was == "built"}
    assert built == {"tiny/checkpoint", "tiny/eval_report"}
    store = other_instance.store
    own, report = (other_instance.artifact("tiny", name) for name in ("checkpoint", "eval_report"))
    record = store.record(own.recipe_id, own.numerics)
    assert record["recipe"]["inputs"]["initial_checkpoint"]["content_id"] == known.content_id
    inputs = {child.role: child.record for child in lineage(store, own.content_id).inputs}
    assert inputs["initial_checkpoint"]["content_id"] == known.content_id
    assert inputs["token_cache"]["kind"] == "token_cache"
    used = store.record(report.recipe_id, report.numerics)["recipe"]["inputs"]["checkpoint"]
    assert used["used"] == own.roots["parameters.ema"] != own.roots["parameters"]
    assert own.facts["loss_first"] < known.facts["loss_first"]


def test_weights_of_another_tokenizer_are_refused_by_field_unless_told(chain, other_instance):
    known = chain.artifact("tiny", "checkpoint").content_id
    begun = {"checkpoint": known, "weights_only": True}
    changes = (
        f"trainer.initialize_from={json.dumps(begun)}", "dataset.tokenizer.vocab_size=300"
    )  # fmt: skip
    result = other_instance.run(*changes, select=[*DATA, ("tiny", "checkpoint")])
    assert not result.success
    (failure,) = result.get_step_failure_events()
    assert failure.step_key == "tiny__checkpoint"
    said = failure.event_specific_data.error.to_string()
    assert f"checkpoint {known[:12]} was trained on ids of tokenizer" in said
    assert "(tokenizer.vocab_size 320 -> 300)" in said
    told = InitializeFromConfig(**begun, allow_changed=("tokenizer",))
    experiment = chain.catalog().experiments["tiny"]
    own = dataclasses.replace(
        experiment, trainer=dataclasses.replace(experiment.trainer, initialize_from=told)
    )
    other = other_instance.artifact("tales", "tokenizer")
    assert initial_checkpoint(own, StoreResource(url=chain.store.url), other)


def test_a_checkpoint_to_begin_with_that_is_not_there_is_named(other_instance):
    unknown = "e2" * 32
    changes = (
        f'trainer.initialize_from={{"checkpoint": "{unknown}"}}',
        "trainer.num_train_steps=20",
    )
    result = other_instance.run(*changes, select=[*DATA, ("tiny", "checkpoint")])
    assert not result.success
    (failure,) = result.get_step_failure_events()
    said = failure.event_specific_data.error.to_string()
    assert (
        f"initialize_from.checkpoint: {other_instance.store.url} has no checkpoint {unknown}."
        in said
    )
