"""`levanter checkpoint`, `fsck`, `gc` and `alias`, as a person types them: output, exit codes."""

import contextlib
import dataclasses
import hashlib
import json
import os
import shutil
import time

import fsspec
import pytest
from safetensors import safe_open

from modeling.leases import Holder
from modeling.training import reading
from modeling.training.remote import RemoteCheckpoints
from pipelines.cli import main

STEP = 16


@pytest.fixture
def copy(chain, first_run, tmp_path):
    """The chain over a copy of its store, for tests to damage."""
    shutil.copytree(chain.store_directory, tmp_path / "store")
    return dataclasses.replace(chain, store_directory=tmp_path / "store")


@pytest.fixture
def published(copy):
    """The record of the published checkpoint."""
    (record,) = (record for record in copy.store.records() if record["kind"] == "checkpoint")
    return record


@pytest.fixture
def in_progress(copy, published):
    """The directory of a run's checkpoints: two complete steps, and one never completed."""
    store, numerics = copy.store, published["numerics"]["id"]
    work = store.scratch / "work" / published["recipe_id"] / numerics
    directory = work / "progress" / "checkpoints" / numerics[:16]
    files = store.local("checkpoint", published["content_id"])
    for number, attempt in ((8, "a"), (STEP, "a"), (24, "b")):
        saved = directory / f"step-{number:06d}.{attempt * 12}"
        shutil.copytree(files, saved, ignore=shutil.ignore_patterns("INVENTORY.json"))
        with rewritten(saved) as manifest:
            manifest["step"] = number
    (directory / f"step-000024.{'b' * 12}" / "COMMIT").unlink()
    return directory


@pytest.fixture
def run(copy, capsys):
    """Runs a command; returns its exit code and what it printed."""

    def command(*words):
        with copy.instance():
            code = main([str(word) for word in words])
        printed = capsys.readouterr()
        return code, printed.out + printed.err

    return command


@contextlib.contextmanager
def rewritten(saved):
    """Yields the manifest of a checkpoint for changes, and commits it anew."""
    path = saved / "manifest.json"
    yield (manifest := json.loads(path.read_text()))
    path.write_text(json.dumps(manifest))
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    (saved / "COMMIT").write_text(f"{digest}\n")


def chunk_of(directory):
    """Returns the largest file of a checkpoint's arrays."""
    return max(directory.glob("arrays/*/c*"), key=lambda path: path.stat().st_size)


def flip(path):
    data = bytearray(path.read_bytes())
    data[0] ^= 1
    path.write_bytes(data)


class TestList:
    def test_steps_in_progress_and_what_is_published_are_told(self, run, in_progress, published):
        code, printed = run("checkpoint", "ls", "tiny")
        assert code == 0
        rows = {line.split()[0]: line for line in printed.splitlines()}
        assert rows["tiny@8"].split()[1] == "8"
        assert "complete" in rows["tiny@16"]
        assert "incomplete" in rows["tiny@24"]
        last = rows[published["content_id"][:12]]
        assert "published" in last
        assert published["numerics"]["id"][:12] in last

    def test_what_is_damaged_is_found_by_size_and_by_every_byte(self, run, in_progress):
        truncated, flipped = (chunk_of(path) for path in sorted(in_progress.glob("step-*"))[:2])
        truncated.write_bytes(truncated.read_bytes()[:-1])
        flip(flipped)

        def states(*options):
            code, printed = run("checkpoint", "ls", "tiny", "--json", *options)
            assert code == 0
            return {row["step"]: row["state"] for row in json.loads(printed) if "@" in row["name"]}

        assert states() == {8: "DAMAGED", 16: "complete", 24: "incomplete"}
        assert states("--verify") == {8: "DAMAGED", 16: "DAMAGED", 24: "incomplete"}

    def test_work_that_was_begun_in_another_class_says_so(self, run, in_progress):
        before = [{"class": "fedcba9876543210", "until": 4}]
        with rewritten(in_progress / f"step-000008.{'a' * 12}") as manifest:
            manifest["config"]["numerics_before"] = before
        _, printed = run("checkpoint", "ls", "tiny")
        rows = {line.split()[0]: line for line in printed.splitlines()}
        assert "after fedcba987654 until step 4" in rows["tiny@8"]
        assert "after" not in rows["tiny@16"]
        _, printed = run("checkpoint", "ls", "tiny", "--json")
        told = {row["name"]: row["numerics_before"] for row in json.loads(printed)}
        assert (told["tiny@8"], told["tiny@16"]) == (before, [])
        assert f"numerics_before: {json.dumps(before)}" in run("checkpoint", "show", "tiny@8")[1]

    def test_who_trains_now_is_told(self, run, copy, published):
        holder = Holder("x", "nodeb", 812, "2026-01-01T12:04:00+00:00", 3, "4 bytes committed")
        lease = copy.store_directory / "leases" / published["recipe_id"] / "exact.json"
        lease.parent.mkdir(parents=True, exist_ok=True)
        lease.write_text(json.dumps(dataclasses.asdict(holder)))
        _, printed = run("checkpoint", "ls")
        assert "tiny is being trained by process 812 on nodeb, since 2026-01-01T12:04" in printed

    def test_an_experiment_that_is_none_is_an_error(self, run):
        code, printed = run("checkpoint", "ls", "tyni")
        assert code == 2
        assert "no experiment is named 'tyni'; there are ['tiny']" in printed


class TestPins:
    def test_a_step_is_pinned_until_it_is_unpinned(self, run, in_progress):
        assert run("checkpoint", "pin", "tiny@8", "--why", "best so far")[0] == 0
        assert list((in_progress / "pins").iterdir())
        _, printed = run("checkpoint", "ls", "tiny")
        (line,) = (line for line in printed.splitlines() if line.startswith("tiny@8"))
        assert "pinned: best so far" in line
        assert run("checkpoint", "unpin", "tiny@8")[0] == 0
        assert "pinned: " not in run("checkpoint", "ls", "tiny")[1]

    @pytest.mark.parametrize(
        ("name", "says"),
        [
            ("tiny@24", "no complete checkpoint of step 24"),
            ("tiny@x", "expected the number of a step, such as tiny@100"),
            ("tiny", "published artifact, which no run retires. `levanter alias`"),
        ],
    )
    def test_what_cannot_be_pinned_is_refused(self, run, in_progress, name, says):
        code, printed = run("checkpoint", "pin", name)
        assert code == 2
        assert says in printed


class TestLook:
    def test_every_array_and_their_totals_are_shown(self, run, copy, published):
        code, printed = run("checkpoint", "show", "tiny")
        assert code == 0
        for path, digest in published["leaves"].items():
            (line,) = (line for line in printed.splitlines() if line.split()[0] == path)
            assert line.endswith(digest[:12])
        assert f"content_id: {published['content_id']}" in printed
        assert "cursor: {" in printed
        files = copy.store.local("checkpoint", published["content_id"])
        leaves = reading.read_manifest(files).leaves
        sizes = [reading.read_leaf(files, x).nbytes for x in leaves if x.path.startswith("model.")]
        assert f"model: {len(sizes)} arrays, {sum(sizes) / 1000:.1f} kB" in printed
        shown = json.loads(run("checkpoint", "show", "tiny/checkpoint", "--json")[1])
        assert {x["path"]: x["sha256"] for x in shown["leaves"]} == published["leaves"]

    def test_an_export_is_one_file_of_the_recorded_bytes(self, run, published, tmp_path):
        target = tmp_path / "weights.safetensors"
        reference = published["content_id"][:8]
        assert run("checkpoint", "export", reference, target)[0] == 0
        with safe_open(target, framework="numpy") as file:
            digests = {
                f"model.{name}": hashlib.sha256(file.get_tensor(name).tobytes()).hexdigest()
                for name in file.keys()  # noqa: SIM118
            }
        expected = {k: v for k, v in published["leaves"].items() if k.startswith("model.")}
        assert digests == expected
        code, printed = run("checkpoint", "export", reference, target)
        assert code == 2
        assert "exists already" in printed

    def test_a_difference_is_an_exit_code_as_of_diff(self, run, in_progress):
        code, printed = run("checkpoint", "diff", "tiny@8", "tiny")
        assert code == 0
        assert "arrays are equal" in printed
        directory = in_progress / f"step-000008.{'a' * 12}"
        flip(chunk_of(directory))
        code, printed = run("checkpoint", "diff", directory, "tiny")
        assert (code, "arrays are equal" in printed) == (0, True), "equal digests are not read"
        (directory / "manifest.json").write_text("{}")
        code, printed = run("checkpoint", "diff", directory, "tiny")
        assert code == 2
        assert "manifest.json has the digest" in printed

    def test_every_damaged_file_is_named(self, run, copy, in_progress, published):
        assert run("checkpoint", "verify", "tiny")[0] == 0
        files = copy.store.local("checkpoint", published["content_id"])
        damaged = [chunk_of(files), files / "losses.json", files / "model.json"]
        for path in damaged:
            flip(path)
        code, printed = run("checkpoint", "verify", "tiny")
        assert code == 1
        assert all(str(path) in printed for path in damaged), printed
        code, printed = run("checkpoint", "verify", in_progress)
        assert code == 0
        assert "step-000016" in printed, "the newest complete one of a run"

    @pytest.mark.parametrize(
        ("name", "says"),
        [
            ("nowhere", "names no artifact"),
            ("tiny@99", "no complete checkpoint of step 99"),
            ("tales/tokenizer", "is no checkpoint"),
        ],
    )
    def test_what_names_no_checkpoint_is_an_error(self, run, name, says):
        code, printed = run("checkpoint", "show", name)
        assert code == 2
        assert says in printed


class TestUpkeep:
    def test_a_sound_store_passes(self, run):
        code, printed = run("fsck")
        assert code == 0
        assert "every object, record and alias is as published" in printed

    def test_damage_is_named_with_what_its_remedy_takes(self, run, copy, published):
        (tokenizer,) = (r for r in copy.store.records() if r["kind"] == "tokenizer")
        file = copy.store.local("tokenizer", tokenizer["content_id"]) / "tokenizer.json"
        flip(file)
        code, printed = run("fsck")
        assert code == 1
        assert f"{file}: has other bytes than were published. Set it aside and run again" in printed
        assert f"recipe {tokenizer['recipe_id'][:12]} makes it from corpus: raw_corpus" in printed
        assert "1 faults. Nothing was changed." in printed
        assert file.exists()
        code, printed = run("fsck", "--set-aside")
        assert code == 1
        assert "set aside: " in printed
        assert not file.exists()
        assert list(copy.store_directory.glob("set_aside/tokenizer/*/tokenizer.json"))

    def test_nothing_is_deleted_unless_asked_for(self, run, copy):
        with copy.instance():
            (record,) = (r for r in copy.store.records() if r["kind"] == "eval_report")
        store = copy.store
        object_path = store.object_path("eval_report", record["content_id"])
        # No record and no instance has it any more, and it is old.
        store.filesystem.rm(store.record_path(record["recipe_id"], record["numerics"]["id"]))
        shutil.rmtree(copy.store_directory / "refs")
        age(copy.store_directory)
        code, printed = run("gc")
        assert code == 0
        assert object_path in printed
        assert "Would delete: 1 of it" in printed
        assert store.contains("eval_report", record["content_id"])
        before = {r["content_id"] for r in store.records()}
        code, printed = run("gc", "--delete")
        assert (code, "Deleted: 1 of it" in printed) == (0, True)
        assert not store.contains("eval_report", record["content_id"])
        assert {r["content_id"] for r in store.records()} == before
        assert run("gc") == (0, f"{store.url}: nothing to collect.\n")

    def test_an_alias_keeps_what_it_names_and_all_it_was_made_of(self, run, copy, published):
        shutil.rmtree(copy.store_directory / "refs")
        code, printed = run("alias", "best", "tiny/checkpoint")
        assert (code, printed) == (0, f"best is {published['content_id']}\n")
        assert run("lineage", "best")[1].startswith("checkpoint")
        code, printed = run("gc", "--expire-records", "0", "--delete")
        assert code == 0
        kinds = sorted(record["kind"] for record in copy.store.records())
        assert "checkpoint" in kinds
        assert {"raw_corpus", "tokenizer", "tokenized_corpus", "token_cache"} <= set(kinds)
        assert "eval_report" not in kinds
        assert run("fsck")[0] == 0
        assert run("checkpoint", "verify", "best")[0] == 0

    def test_pins_outlast_the_run_and_what_is_not_pinned_is_collected(self, run, in_progress, copy):
        work = in_progress.parents[2]
        work.with_suffix(".lock").touch()
        assert run("checkpoint", "pin", "tiny@8")[0] == 0
        assert run("gc", "--delete")[0] == 0
        assert [path.name for path in in_progress.glob("step-*")] == [f"step-000008.{'a' * 12}"]
        assert run("checkpoint", "verify", "tiny@8")[0] == 0


def age(directory):
    """Makes all files of a store two days old."""
    long_ago = time.time() - 2 * 86400
    for path in directory.rglob("*"):
        os.utime(path, (long_ago, long_ago))


# Checkpoints in a remote store.


@pytest.fixture
def remote(copy, in_progress, published, monkeypatch, tmp_path):
    """A store that is remote to this machine, with the steps in it and none here."""
    url = f"memory://{tmp_path.name}-{os.getpid()}"
    filesystem, root = fsspec.url_to_fs(url)
    for path in copy.store_directory.rglob("*"):
        name = path.relative_to(copy.store_directory)
        if path.is_file() and name.parts[0] != "work":
            filesystem.pipe_file(f"{root}/{name}", path.read_bytes())
    place = in_progress.relative_to(copy.store_directory)
    there = RemoteCheckpoints(f"{url}/{place}")
    for step in (8, STEP):
        there.send(in_progress / f"step-{step:06d}.{'a' * 12}")
    filesystem.pipe_file(f"{root}/{place}/step-000024.{'b' * 12}/losses.json", b"{")
    monkeypatch.setenv("LEVANTER_SCRATCH", str(tmp_path / "scratch"))
    monkeypatch.setattr("resources.store.store_url", lambda configured=None: url)
    return there


class TestRemote:
    def test_steps_in_a_remote_store_are_listed_read_verified_and_pinned(self, run, remote):
        code, printed = run("checkpoint", "ls", "tiny", "--json", "--verify")
        assert code == 0
        rows = {row["name"]: row for row in json.loads(printed) if "@" in row["name"]}
        assert {name: row["state"] for name, row in rows.items()} == {
            "tiny@8": "verified",
            "tiny@16": "verified",
            "tiny@24": "incomplete",
        }
        assert rows["tiny@8"]["directory"] == f"{remote.url}/step-000008.{'a' * 12}"
        code, printed = run("checkpoint", "show", "tiny@8")
        assert (code, "step: 8" in printed) == (0, True)
        assert run("checkpoint", "diff", "tiny@8", "tiny@16")[0] == 0
        code, printed = run("checkpoint", "verify", "tiny@8")
        assert (code, f"{remote.url}/step-000008" in printed) == (0, True)
        assert run("checkpoint", "pin", "tiny@8", "--why", "kept")[0] == 0
        assert remote.pinned() == {8: "kept"}
        assert run("checkpoint", "unpin", "tiny@8")[0] == 0
        assert remote.pinned() == {}

    def test_what_is_damaged_in_a_remote_store_is_named_and_not_handed_out(
        self, run, remote, tmp_path
    ):
        fs, root = fsspec.url_to_fs(remote.url)
        path = next(path for path in fs.find(root) if "step-000008" in path and "/c." in path)
        fs.pipe_file(path, bytes(len(fs.cat_file(path))))
        for reference in ("tiny@8", f"{remote.url}/step-000008.{'a' * 12}"):
            code, printed = run("checkpoint", "verify", reference)
            assert code == 1
            assert f"{path.rpartition('/')[2]} holds other bytes than were written" in printed
        code, printed = run("checkpoint", "export", "tiny@8", tmp_path / "weights.safetensors")
        assert code == 2
        assert "holds other values than were written" in printed
        assert not (tmp_path / "weights.safetensors").exists()
        assert run("checkpoint", "verify", remote.url)[0] == 0, "the newest complete one"
