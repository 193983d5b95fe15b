"""Where the store is, and how an artifact becomes a materialization."""

from pathlib import Path

import dagster as dg
import pytest

from assets.export import card_lineage
from modeling.artifacts import Artifact, Built, Recipe
from resources.scratch import programs_directory, scratch_directory
from resources.store import StoreLocationError, StoreResource, store_url


def build(content):
    """Returns a builder of one file, whose content id is made of the file."""

    def write(workspace):
        (workspace.output / "a.txt").write_text(content)
        facts = {"train": {"rows": 7}, "loss": 0.5, "name": content, "list": [1], "nothing": None}
        return Built((content * 64)[:64], facts=facts)

    return write


@pytest.fixture
def store(tmp_path):
    return StoreResource(url=str(tmp_path / "store"))


@pytest.fixture
def made(store):
    """Materializes recipes one after the other as the same asset."""
    with dg.DagsterInstance.ephemeral() as instance:

        def make(recipe, builder, **options):
            results = []

            @dg.asset(metadata={"config": dg.MetadataValue.json(recipe.params)})
            def toy():
                results.append(store.materialize(recipe, builder, **options))
                return dg.MaterializeResult(
                    data_version=results[0].data_version, metadata=results[0].metadata
                )

            assert dg.materialize([toy], instance=instance).success
            return results[0]

        yield make


def test_the_location_is_the_resources_then_the_variables_then_the_homes():
    both = {"LEVANTER_STORE": "/b", "DAGSTER_HOME": "/c"}
    assert store_url("/a", both) == "/a"
    assert store_url(None, both) == "/b"
    assert store_url(None, {"DAGSTER_HOME": "/c"}) == "/c/store"
    assert store_url("gs://bucket/path", both) == "gs://bucket/path"
    assert store_url("here", both) == str(Path.cwd() / "here")
    assert str(scratch_directory({"DAGSTER_HOME": "/c"})) == "/c/scratch"
    assert str(programs_directory({"DAGSTER_HOME": "/c"})) == "/c/scratch/programs"
    cache = "LEVANTER_COMPILE_CACHE"
    assert programs_directory({"DAGSTER_HOME": "/c", cache: "off"}) is None
    assert str(programs_directory({"DAGSTER_HOME": "/c", cache: "/d"})) == "/d"
    assert programs_directory({}) is None


def test_without_a_location_the_remedy_is_told():
    with pytest.raises(StoreLocationError, match="LEVANTER_STORE"):
        store_url(None, {})


def test_a_materialization_shows_ids_facts_and_whether_it_was_built(made):
    recipe = Recipe("toy", 1, {"seed": 1})
    show = lambda made, files: {"text": (files / "a.txt").read_text()}
    first = made(recipe, build("a"), show=show)
    assert isinstance(first.value, Artifact)
    assert first.data_version.value == "a" * 64
    assert first.metadata["was"] == "built"
    assert first.metadata["train/rows"] == 7
    assert first.metadata["loss"] == 0.5
    assert first.metadata["text"] == "a"
    assert first.metadata["recipe_id"] == recipe.id
    assert "nothing" not in first.metadata
    assert first.metadata["why"] == "first materialization"
    second = made(recipe, build("b"))
    assert second.metadata["was"] == "reused"
    assert second.metadata["why"] == "asked for again; nothing has changed"
    assert second.value == first.value


def test_why_names_parameters_inputs_version_and_numerics_class(made):
    above = [made(Recipe("above", 1, {"n": n}), build(text)).value for n, text in enumerate("ab")]
    made(Recipe("toy", 1, {"seed": 1}, {"x": above[0].as_input()}), build("c"), numerics={"d": 1})
    after = Recipe("toy", 2, {"seed": 2}, {"x": above[1].as_input()})
    assert made(after, build("d"), numerics={"d": 2}).metadata["why"].split("; ") == [
        "seed 1 -> 2",
        "transform version 1 -> 2",
        f"input.x {'a' * 12} -> {'b' * 12}",
        "numerics.d 1 -> 2",
    ]


def test_inputs_are_found_through_the_records(made, store):
    top = made(Recipe("top", 1, {}), build("a")).value
    middle = made(Recipe("middle", 1, {}, {"top": top.as_input()}), build("b")).value
    low = made(Recipe("low", 1, {}, {"middle": middle.as_input()}), build("c")).value
    assert store.input_of(low, "middle") == middle
    assert store.inputs_above(low) == {"top": top, "middle": middle}
    with pytest.raises(ValueError, match=r"no input `top`; it has \['middle'\]"):
        store.input_of(low, "top")


def test_a_card_names_the_checkpoint_and_the_one_that_training_began_from(made, store):
    def made_of(kind, text, **inputs):
        recipe = Recipe(kind, 1, {"text": text}, {r: one.as_input() for r, one in inputs.items()})
        return made(recipe, build(text)).value

    old, new = ({} for _ in range(2))
    for known, (one, two, three) in ((old, "abc"), (new, "def")):
        known["tokenizer"] = made_of("tokenizer", one)
        known["token_cache"] = made_of("token_cache", two, tokenizer=known["tokenizer"])
        began = {"initial_checkpoint": old["checkpoint"]} if known is new else {}
        inputs = {"token_cache": known["token_cache"], **began}
        known["checkpoint"] = made_of("checkpoint", three, **inputs)
    assert store.inputs_above(new["checkpoint"]) == {
        kind: new[kind] for kind in ("token_cache", "tokenizer")
    }
    ids = {kind: one.content_id for kind, one in new.items()}
    assert card_lineage(store, new["checkpoint"]) == ids | {
        "initial_checkpoint": old["checkpoint"].content_id
    }
    assert card_lineage(store, old["checkpoint"]) == {
        kind: one.content_id for kind, one in old.items()
    }
    assert store.input_of(new["checkpoint"], "initial_checkpoint") == old["checkpoint"]
