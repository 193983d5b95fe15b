"""An artifact made again is the same, or what differs is named; and nothing real is touched."""

import dagster as dg
import pytest

from pipelines.cli import main
from pipelines.verify import UnverifiableError, verify, verify_export


def verdict(chain, asset, *changes):
    with chain.instance() as instance:
        key = dg.AssetKey(asset.split("/"))
        return verify(key, instance, chain.store, chain.catalog(*changes))


@pytest.fixture
def records(chain, first_run):
    return sorted(record["content_id"] for record in chain.store.records())


@pytest.mark.parametrize(
    "asset",
    ["tales/raw_corpus", "tales/tokenizer", "tales/tokenized_corpus", "tales/token_cache/L32",
     "tiny/checkpoint", "tiny/eval_report", "tiny/hf_model"],
)  # fmt: skip
def test_every_stage_makes_the_same_again(chain, records, asset):
    found = verdict(chain, asset)
    assert found.is_equal, list(found.lines())
    assert found.numerics_changes == ()
    assert sorted(record["content_id"] for record in chain.store.records()) == records
    assert not list(chain.home.glob("verify-*"))


def test_other_bytes_for_one_recipe_are_found_by_leaf(chain, records, monkeypatch):
    """A transform that was changed without raising its version."""
    from modeling.data import tokenized

    encode = tokenized.build

    def drop_eos(config, *args, **options):
        return encode(type(config)(append_eos=False), *args, **options)

    monkeypatch.setattr(tokenized, "build", drop_eos)
    found = verdict(chain, "tales/tokenized_corpus")
    assert not found.is_equal
    assert found.differing_leaves[0] == "train/offsets"
    assert "The first part that differs is `train/offsets`" in "\n".join(found.lines())


def test_a_changed_catalog_is_no_ground_for_a_verdict(chain, records):
    with pytest.raises(UnverifiableError, match=r"tokenizer\.vocab_size 320 -> 400"):
        verdict(chain, "tales/tokenizer", "dataset.tokenizer.vocab_size=400")


def test_what_was_never_made_cannot_be_verified(chain, records):
    with pytest.raises(UnverifiableError, match="never been materialized"):
        verdict(chain, "tales/token_cache/L64")


def test_a_stranger_can_check_an_export_by_its_card(chain, first_run, tmp_path, capsys):
    files = chain.store.local("hf_model", chain.artifact("tiny", "hf_model").content_id)
    copy = tmp_path / "model"
    copy.mkdir()
    for path in files.iterdir():
        (copy / path.name).write_bytes(path.read_bytes())
    assert main(["verify", "--offline", str(copy)]) == 0
    weights = copy / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\0\0")
    (copy / "config.json").unlink()
    (copy / "extra.py").write_text("pass")
    assert [fault.split()[0] for fault in verify_export(copy)] == [
        "config.json", "model.safetensors", "extra.py",
    ]  # fmt: skip
    assert main(["verify", "--offline", str(copy)]) == 1
    assert "is not on the card" in capsys.readouterr().out
    with pytest.raises(UnverifiableError, match=r"no README\.md"):
        verify_export(tmp_path)


def test_the_command_tells_the_verdict(chain, first_run, capfd):
    with chain.instance():
        assert main(["verify", "tales/tokenizer"]) == 0
    assert "Verified: made again" in capfd.readouterr().out


def test_a_run_can_check_itself(other_instance, capfd):
    with other_instance.instance():
        command = ["run", "tiny", "--set", "evaluation.sample_tokens=3", "--check-reproducible"]
        assert main(command) == 0
    said = capfd.readouterr().out
    assert "Making tiny/eval_report again" in said
    assert said.count("Making") == 1, "what was not computed now needs no check now"
    assert "Verified: made again" in said
