"""What is out of date, all the way down, and why."""

import json

import dagster as dg
import pytest
import tokenizers
import yaml
from tokenizers import models, pre_tokenizers

from modeling.experiment import load_catalog
from pipelines.build import build_defs
from pipelines.instance import CHECKOUT
from pipelines.plan import out_of_date, wanted_assets
from pipelines.staleness import describe, stale_assets
from pipelines.why import why

CATALOG = CHECKOUT / "tests" / "catalogs" / "tiny"
BELOW_TOKENIZER = [
    "tales/tokenized_corpus", "tales/token_cache/L32", "tiny/checkpoint", "tiny/eval_report",
    "tiny/hf_model",
]  # fmt: skip


@pytest.fixture
def stale(chain, first_run):
    """Asks after the first run, with changes that nobody has run; L64 is in no job of `tiny`."""

    def ask(*changes):
        with chain.instance() as instance:
            found = stale_assets(chain.defs(*changes), instance)
        return {
            key.to_user_string(): why
            for key, why in found.items()
            if key != dg.AssetKey(["tales", "token_cache", "L64"])
        }

    return ask


def test_nothing_is_stale_after_a_run(stale):
    assert stale() == {}


def test_a_changed_vocabulary_concerns_the_tokenizer_and_all_below(stale):
    found = stale("dataset.tokenizer.vocab_size=400")
    assert list(found) == ["tales/tokenizer", *BELOW_TOKENIZER]
    assert found["tales/tokenizer"].status == "STALE"
    assert found["tales/tokenizer"].causes == ("tokenizer.vocab_size 320 -> 400",)
    assert {found[key].status for key in BELOW_TOKENIZER} == {"UPSTREAM"}
    assert found["tiny/hf_model"].causes == ("tiny/checkpoint is not up to date",)


def test_a_changed_learning_rate_concerns_no_data(stale):
    found = stale("optimizer.learning_rate=2e-3")
    assert list(found) == ["tiny/checkpoint", "tiny/eval_report", "tiny/hf_model"]


def test_a_changed_mesh_is_another_numerics_class(stale):
    assert next(iter(stale("trainer.mesh={data: 1}"))) == "tiny/checkpoint"


@pytest.mark.parametrize("change", ["trainer.log_every_steps=1", "description=other"])
def test_what_changes_no_result_makes_nothing_stale(stale, change):
    assert stale(change) == {}


def test_comments_key_order_and_place_of_the_files_make_nothing_stale(chain, first_run, tmp_path):
    def reversed_keys(value):
        if not isinstance(value, dict):
            return value
        return {key: reversed_keys(value[key]) for key in reversed(value)}

    for path in CATALOG.rglob("*.yaml"):
        copy = tmp_path / "elsewhere" / path.relative_to(CATALOG)
        copy.parent.mkdir(parents=True, exist_ok=True)
        content = yaml.safe_load(path.read_text())
        text = yaml.safe_dump(reversed_keys(content), sort_keys=False)
        copy.write_text(f"# Another comment.\n{text}")
        assert next(iter(yaml.safe_load(copy.read_text()))) != next(iter(content))
    catalog = load_catalog(tmp_path / "elsewhere", chain.overrides())
    with chain.instance() as instance:
        found = stale_assets(build_defs(catalog), instance)
    assert set(found) <= {dg.AssetKey(["tales", "token_cache", "L64"])}


def test_what_was_never_made_is_missing(empty_chain):
    with empty_chain.instance() as instance:
        found = stale_assets(empty_chain.defs(), instance)
    assert {why.status for why in found.values()} == {"MISSING"}
    assert len(found) == 8
    assert describe(found)[0].startswith("tales/raw_corpus: missing")


def test_why_names_the_field_above_and_what_the_asset_was_made_for(chain, first_run):
    def told(asset, *changes):
        key = dg.AssetKey(asset.split("/"))
        catalog = chain.catalog(*changes)
        with chain.instance() as instance:
            return "\n".join(why(key, chain.defs(*changes), instance, chain.store, catalog))

    changed = told("tiny/hf_model", "dataset.tokenizer.vocab_size=400", "trainer.seed=5")
    assert "above it, tales/tokenizer is stale: tokenizer.vocab_size 320 -> 400" in changed
    assert "above it, tiny/checkpoint is stale: trainer.seed 0 -> 5" in changed
    assert "  because: " in changed
    assert "tiny/hf_model is fresh" in told("tiny/hf_model")
    with pytest.raises(ValueError, match=r"there are .*tiny/hf_model"):
        told("tiny/hf")


def test_a_model_of_another_numerics_class_is_not_called_fresh(chain, first_run, monkeypatch):
    import importlib.metadata

    installed = importlib.metadata.version
    jax = installed("jax")
    found = lambda name: "9.9.9" if name == "jax" else installed(name)
    monkeypatch.setattr("modeling.numerics.importlib.metadata.version", found)
    catalog, defs = chain.catalog(), chain.defs()
    with chain.instance() as instance:
        stale = out_of_date(defs, instance, chain.store, catalog, wanted_assets(defs, "tiny"))
        told = "\n".join(
            why(dg.AssetKey(["tiny", "hf_model"]), defs, instance, chain.store, catalog)
        )
    cause = f"the same experiment, in another numerics class: libraries.jax {jax} -> 9.9.9"
    assert {key.to_user_string(): why.status for key, why in stale.items()} == {
        "tiny/checkpoint": "STALE", "tiny/eval_report": "STALE", "tiny/hf_model": "UPSTREAM",
    }  # fmt: skip
    assert stale[dg.AssetKey(["tiny", "checkpoint"])].causes == (cause,)
    assert f"above it, tiny/checkpoint is stale: {cause}" in told


def test_a_materialization_says_what_it_was_for(other_instance):
    before = other_instance.run(select=[("tales", "raw_corpus"), ("tales", "tokenizer")])
    assert before.success
    after = other_instance.run(
        "dataset.tokenizer.vocab_size=340", select=[("tales", "tokenizer")], job="tales__data"
    )
    shown = other_instance.metadata_of(after)["tales/tokenizer"]
    assert shown["why"] == "tokenizer.vocab_size 320 -> 340"
    assert shown["config"]["tokenizer"]["vocab_size"] == 340


def test_changed_files_are_named(other_instance, tmp_path):
    chain = other_instance.with_own_texts(tmp_path / "texts")
    assert chain.run(select=[("tales", "raw_corpus")]).success
    (chain.texts / "07.txt").write_text("Another tale altogether.\n")
    (chain.texts / "08.txt").unlink()
    (chain.texts / "99.txt").write_text("A new tale.\n")
    catalog = chain.catalog()
    key = dg.AssetKey(["tales", "raw_corpus"])
    with chain.instance() as instance:
        found = out_of_date(chain.defs(), instance, chain.store, catalog, [key])
    assert found[key].causes == (
        "1 of its files is new: 99.txt",
        "1 of its files is gone: 08.txt",
        "1 of its files is changed: 07.txt",
    )


def test_changed_files_of_a_tokenizer_are_named(empty_chain, tmp_path):
    where = tmp_path / "made elsewhere"
    where.mkdir()
    backend = tokenizers.Tokenizer(models.WordLevel({"<end>": 0, "<unk>": 1, "<stop>": 2}, "<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    backend.save(str(where / "tokenizer.json"))
    (where / "tokenizer_config.json").write_text('{"eos_token": "<end>"}')
    taken = json.dumps({"type": "pretrained", "path": str(where)})
    changes = "dataset.tokenizer=null", f"dataset.tokenizer={taken}"  # else they would be merged
    key = dg.AssetKey(["tales", "tokenizer"])

    def found():
        with empty_chain.instance() as instance:
            catalog = empty_chain.catalog(*changes)
            store = empty_chain.store
            plan = out_of_date(empty_chain.defs(*changes), instance, store, catalog, [key])
            return plan[key].causes if plan else ()

    def make():
        assert empty_chain.run(*changes, select=[("tales", "tokenizer")], job="tales__data").success

    make()
    assert found() == ()
    (where / "tokenizer_config.json").write_text('{"eos_token": "<stop>"}')
    (where / "chat_template.jinja").write_text("{{ 1 }}")
    assert found() == (
        "1 of its files is new: chat_template.jinja",
        "1 of its files is changed: tokenizer_config.json",
    )
    make()
    assert found() == ()
    (where / "tokenizer.json").unlink()
    (told,) = found()
    assert "its files cannot be listed: " in told
    assert "holds no tokenizer.json" in told
