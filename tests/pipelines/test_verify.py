"""An artifact made again is the same, or what differs is named; and nothing real is touched."""

import dataclasses
import json
import shutil
import subprocess

import dagster as dg
import pytest
from pydantic import TypeAdapter

from modeling import canonical, recipes
from modeling.artifacts import Built, Recipe, Workspace
from modeling.data.formats_config import ChatFormat, Format, IdsFormat, SupervisedFormat, TextFormat
from modeling.hf import offline
from modeling.inventory import INVENTORY
from modeling.training.reading import read_manifest
from pipelines import replay as replays
from pipelines.build import build_defs
from pipelines.cli import main
from pipelines.pools import held
from pipelines.recorded import DATA, RUN, _format, recorded_catalog
from pipelines.replay import Replay, parse_steps, replay
from pipelines.verify import UnverifiableError, record_of_asset, verify
from resources.launcher import LauncherResource
from resources.materializations import latest
from resources.store import StoreResource

CHECKPOINT = dg.AssetKey(["tiny", "checkpoint"])


def verdict(chain, asset, *changes):
    with chain.instance() as instance:
        record = record_of_asset(dg.AssetKey(asset.split("/")), instance, chain.store)
        return verify(record, instance, chain.store, chain.catalog(*changes))


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


def test_what_a_record_says_is_made_whatever_the_catalog_says_now(chain, records):
    changes = "dataset.tokenizer.vocab_size=400", "dataset.sequence_lengths=[64]"
    found = verdict(chain, "tales/tokenizer", *changes, "sequence_length=64")
    assert found.is_equal, list(found.lines())


def test_where_files_lie_is_asked_of_the_catalog(chain, records):
    other = "dataset.validation.fraction=0.5"
    with pytest.raises(UnverifiableError, match="no dataset of the catalog has that source"):
        verdict(chain, "tales/raw_corpus", other)


def test_another_version_of_a_transform_is_no_ground_for_a_verdict(chain, records, monkeypatch):
    monkeypatch.setitem(recipes.VERSIONS, "tokenizer", 99)
    with pytest.raises(UnverifiableError, match=r"cannot be made here as it was: version 1 -> 99"):
        verdict(chain, "tales/tokenizer")


def test_the_records_are_read_back_as_what_they_were_written_from(chain, records):
    today = chain.catalog()
    dataset, experiment = today.datasets["tales"], today.experiments["tiny"]
    of_dataset = {
        "raw_corpus": recipes.corpus_params,
        "tokenizer": recipes.tokenizer_params,
        "tokenized_corpus": recipes.tokenized_params,
        "token_cache": lambda dataset: dataset.sequence_lengths[0],
    }
    of_experiment = {
        "checkpoint": recipes.checkpoint_code_params,
        "eval_report": recipes.evaluation_params,
        "hf_model": recipes.export_params,
    }
    seen = set()
    for record in chain.store.records():
        read, key = recorded_catalog(chain.store, record, today)
        kind = record["kind"]
        if kind in of_dataset:
            both = [of_dataset[kind](one) for one in (read.datasets[DATA], dataset)]
        else:
            both = [of_experiment[kind](one) for one in (read.experiments[RUN], experiment)]
        assert canonical.encode(both[0]) == canonical.encode(both[1]), kind
        assert build_defs(read).resolve_asset_graph().has(key)
        seen.add(kind)
    assert seen == {*of_dataset, *of_experiment}


@pytest.mark.parametrize(
    "written",
    [
        ChatFormat(type="chat", messages_field="turns", context_fields=("tools",), template="x",
                   variables={"a": 1}, loss="all"),
        SupervisedFormat(type="supervised", prompt_field="q", completion_field="a", separator="|"),
        IdsFormat(type="ids", field="ids", separator_id=3, dtype="uint16"),
        TextFormat(),
    ],
    ids=lambda one: one.type,
)  # fmt: skip
def test_a_format_is_read_back_of_what_corpus_and_tokens_say_of_it(written):
    told = json.dumps(_format(written.reading(), written.rendering()))
    assert TypeAdapter(Format).validate_json(told) == written


def test_what_was_never_made_cannot_be_verified(chain, records):
    with pytest.raises(UnverifiableError, match="never been materialized"):
        verdict(chain, "tales/token_cache/L64")


@pytest.fixture
def downloaded(chain, first_run, tmp_path):
    """An exported model as a stranger has it, with what a hub adds."""
    files = chain.store.local("hf_model", chain.artifact("tiny", "hf_model").content_id)
    copy = tmp_path / "model"
    copy.mkdir()
    for path in files.iterdir():
        if path.name != INVENTORY:
            (copy / path.name).write_bytes(path.read_bytes())
    (copy / ".gitattributes").touch()
    return copy


def test_a_stranger_can_check_an_export_by_its_card(
    chain, downloaded, tmp_path, monkeypatch, capsys
):
    monkeypatch.setenv("DAGSTER_HOME", str(tmp_path / "none"))
    command = ["verify", "--offline", str(downloaded)]
    assert main(command) == 0
    content_id = chain.artifact("tiny", "hf_model").content_id
    assert f"This is hf_model {content_id}." in capsys.readouterr().out
    assert not (tmp_path / "none").exists(), "nothing is made on the stranger's machine"
    listed = (downloaded / "README.md").read_text().partition("## Files")[2]
    sums = "".join(f"{row.split('`')[3]}  {row.split('`')[1]}\n"
                   for row in listed.splitlines() if row.startswith("| `"))  # fmt: skip
    checked = subprocess.run(
        ["sha256sum", "--check", "--strict"], input=sums, text=True, cwd=downloaded, check=False
    )
    assert checked.returncode == 0

    weights = downloaded / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\0\0")
    (downloaded / "config.json").unlink()
    (downloaded / "extra.py").write_text("pass")
    assert [fault.split()[0] for fault in offline.faults(downloaded)] == [
        "config.json", "model.safetensors", "extra.py",
    ]  # fmt: skip
    assert main(command) == 1
    assert "is not on the card" in capsys.readouterr().out
    with pytest.raises(offline.CardError, match=r"no README\.md"):
        offline.faults(tmp_path)


def test_a_card_whose_lineage_has_another_tokenizer_is_found_out(downloaded):
    card = downloaded / "README.md"
    row = next(line for line in card.read_text().splitlines() if line.startswith("| Tokenizer |"))
    card.write_text(card.read_text().replace(row, f"| Tokenizer | `{'0' * 64}` |"))
    (fault,) = offline.faults(downloaded)
    assert "the card's lineage has 000000000000" in fault


def test_the_command_tells_the_verdict(chain, first_run, capfd):
    with chain.instance():
        assert main(["verify", "tales/tokenizer"]) == 0
        assert "Verified: made again" in capfd.readouterr().out
        content_id = chain.artifact("tales", "tokenizer").content_id
        assert main(["verify", content_id[:8]]) == 0
        assert "Making tokenizer " in capfd.readouterr().out


def test_an_artifact_that_no_asset_is_now_is_made_of_its_records(other_instance, capfd):
    chain = other_instance
    made = chain.run(
        "dataset.tokenizer.vocab_size=300", select=[("tales", "raw_corpus"), ("tales", "tokenizer")]
    )
    assert made.success
    content_id = made.asset_value(dg.AssetKey(["tales", "tokenizer"])).content_id
    strange = Recipe("tokenizer", 1, {"of": "another program"})
    with chain.instance():
        chain.store.materialize(strange, lambda workspace: Built("c0ffee" + 58 * "0"))
        assert main(["verify", content_id[:8]]) == 0
        assert f"Making tokenizer {content_id[:12]} again" in capfd.readouterr().out
        assert main(["verify", "tokenizer:c0ffee00"]) == 2
    assert "is not what this version of tokenizer has: KeyError" in capfd.readouterr().err


def test_a_run_can_check_itself(other_instance, capfd):
    with other_instance.instance():
        command = ["run", "tiny", "--set", "evaluation.sample_tokens=3", "--check-reproducible"]
        assert main(command) == 0
    said = capfd.readouterr().out
    assert "Making eval_report " in said
    assert said.count("Making") == 1, "what was not computed now needs no check now"
    assert "Verified: made again" in said


def replayed(chain, first, last):
    with chain.instance() as instance:
        record = record_of_asset(CHECKPOINT, instance, chain.store)
        return replay(record, (first, last), instance, chain.store)


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
    with chain.instance() as instance:
        tokenizer = record_of_asset(dg.AssetKey(["tales", "tokenizer"]), instance, chain.store)
        with pytest.raises(UnverifiableError, match="only a checkpoint has steps"):
            replay(tokenizer, (0, 16), instance, chain.store)


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
