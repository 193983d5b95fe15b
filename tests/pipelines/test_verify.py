"""An artifact made again is the same, or what differs is named; and nothing real is touched."""

import dataclasses
import shutil

import dagster as dg
import pytest

from modeling.artifacts import Built, Recipe, Workspace
from modeling.training.reading import read_manifest
from pipelines import replay as replays
from pipelines.cli import main
from pipelines.pools import held
from pipelines.replay import Replay, parse_steps, replay
from pipelines.verify import UnverifiableError, verify, verify_export
from resources.launcher import LauncherResource
from resources.materializations import latest
from resources.store import StoreResource

CHECKPOINT = dg.AssetKey(["tiny", "checkpoint"])


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
        content_id = chain.artifact("tales", "tokenizer").content_id
        assert main(["verify", content_id[:8]]) == 0
        assert "Making tales/tokenizer again" in capfd.readouterr().out


def test_an_artifact_that_no_asset_is_now_is_not_guessed_at(empty_chain, capfd):
    other = Recipe("tokenizer", 1, {"of": "another catalog"})
    made = lambda workspace: Built("c0ffee" + 58 * "0")
    with empty_chain.instance():
        empty_chain.store.materialize(other, made)
        assert main(["verify", "c0ffee00"]) == 2
    assert "no asset of the catalog is c0ffee000000 now" in capfd.readouterr().err


def test_a_run_can_check_itself(other_instance, capfd):
    with other_instance.instance():
        command = ["run", "tiny", "--set", "evaluation.sample_tokens=3", "--check-reproducible"]
        assert main(command) == 0
    said = capfd.readouterr().out
    assert "Making tiny/eval_report again" in said
    assert said.count("Making") == 1, "what was not computed now needs no check now"
    assert "Verified: made again" in said


def replayed(chain, first, last, *changes):
    with chain.instance() as instance:
        return replay(CHECKPOINT, (first, last), instance, chain.store, chain.catalog(*changes))


@pytest.fixture
def kept(chain, first_run, tmp_path):
    """The checkpoint of step 8 where a run keeps what it has pinned, made by a run of its own."""
    space = Workspace(tmp_path / "progress", tmp_path / "output")
    for directory in (space.progress, space.output):
        directory.mkdir()
    with chain.instance() as instance:
        made = latest(instance, CHECKPOINT)
        experiment = chain.catalog().experiments["tiny"]
        files = replays.training_files(
            experiment,
            chain.artifact("tales", "token_cache", "L32"),
            StoreResource(url=str(chain.store_directory)),
        )
        replays.train_until(8, "tiny", experiment, files, LauncherResource(), space)
    (commit,) = space.progress.glob("checkpoints/*/step-000008.*/COMMIT")
    work = chain.store.scratch / "work" / made.recipe_id
    shutil.copytree(commit.parents[2], work / made.numerics / "progress" / "checkpoints")
    yield commit.parent
    shutil.rmtree(work)


def test_updates_between_kept_checkpoints_are_made_again(chain, kept):
    found = replayed(chain, 8, 16)
    assert found.is_equal, list(found.lines())
    assert found.found == chain.artifact("tiny", "checkpoint").content_id
    (line,) = found.lines()
    assert "updates 9 to 16, made again from step 8, give the same 8 losses" in line
    assert not list(chain.home.glob("verify-*"))
    with pytest.raises(UnverifiableError, match=r"no checkpoint of step 4 .* of \[8, 16\]"):
        replayed(chain, 4, 16)


def test_what_cannot_be_replayed_is_refused_with_the_steps_there_are(chain, first_run):
    with pytest.raises(UnverifiableError, match=r"no checkpoint of step 12 .* of \[16\]"):
        replayed(chain, 0, 12)
    with pytest.raises(UnverifiableError, match=r"optimizer\.beta1 0\.9 -> 0\.8"):
        replayed(chain, 0, 16, "optimizer.beta1=0.8")
    tokenizer = dg.AssetKey(["tales", "tokenizer"])
    with chain.instance() as instance, pytest.raises(UnverifiableError, match="is a tokenizer"):
        replay(tokenizer, (0, 16), instance, chain.store, chain.catalog())


@pytest.mark.parametrize("text", ["16", "8..8", "9..8", "a..b", "-1..8", "8...9"])
def test_steps_are_a_range_that_goes_up(text):
    with pytest.raises(UnverifiableError, match=r"expected FIRST\.\.LAST"):
        parse_steps(text)


def test_a_replay_that_differs_names_loss_leaf_and_class(chain, first_run):
    files = chain.store.local("checkpoint", chain.artifact("tiny", "checkpoint").content_id)
    manifest = read_manifest(files)
    name = manifest.leaves[5].path
    leaves = [
        dataclasses.replace(leaf, sha256="0" * 64) if leaf.path == name else leaf
        for leaf in manifest.leaves
    ]
    changed = dataclasses.replace(manifest, leaves=tuple(leaves))
    record = {"numerics": {"id": "ab" * 32, "class": {"device": "A"}}}
    losses = [4.0] * 16
    found = Replay.of(
        (8, 16), (manifest, losses), (changed, [*losses[:11], 4.5, *losses[12:]]), record,
        {"device": "B"},
    )  # fmt: skip
    assert not found.is_equal
    said = "\n".join(found.lines())
    assert "The first loss that differs is that of step 12: 4.0 -> 4.5." in said
    assert f"The first array that differs is `{name}` (0 more do)." in said
    assert "Another numerics class: device A -> B." in said
    same_class = Replay.of((8, 16), (manifest, losses), (changed, losses), record, {"device": "A"})
    assert "The numerics class is the same, abababababab." in "\n".join(same_class.lines())
    before = [5.0, *losses[1:]]
    same = Replay.of((8, 16), (manifest, losses), (manifest, before), record, {"device": "A"})
    assert same.is_equal, "losses up to the first step were not made again"


def test_what_is_verified_waits_for_its_place_in_the_pool(other_instance):
    said = []
    with other_instance.instance() as instance:
        run = dg.DagsterRun(job_name="tiny", run_id="7" * 8 + "-0000-4000-8000-" + "0" * 12)
        instance.add_run(run)
        storage = instance.event_log_storage
        storage.initialize_concurrency_limit_to_default("accelerator")
        assert storage.claim_concurrency_slot("accelerator", run.run_id, "step").is_claimed

        def let_go(line):
            said.append(line)
            storage.free_concurrency_slots_for_run(run.run_id)

        with held(instance, "accelerator", let_go):
            (holder,) = storage.get_concurrency_run_ids()
            assert instance.get_run_by_id(holder).tags["levanter/command"] == "verify"
            assert not storage.claim_concurrency_slot("accelerator", run.run_id, "two").is_claimed
            storage.free_concurrency_slots_for_run(run.run_id)
        assert storage.get_concurrency_run_ids() == set()
        assert len(instance.get_runs()) == 1
    assert said == ["Waiting for a place in the pool accelerator, which another run holds."]
