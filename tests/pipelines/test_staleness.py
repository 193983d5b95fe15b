"""What is out of date, all the way down, and why."""

import dagster as dg
import pytest

from pipelines.staleness import describe, stale_assets

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
    assert found["tales/tokenizer"].causes == ("tokenizer.vocab_size 300 -> 400",)
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


def test_what_was_never_made_is_missing(empty_chain):
    with empty_chain.instance() as instance:
        found = stale_assets(empty_chain.defs(), instance)
    assert {why.status for why in found.values()} == {"MISSING"}
    assert len(found) == 8
    assert describe(found)[0].startswith("tales/raw_corpus: missing")
