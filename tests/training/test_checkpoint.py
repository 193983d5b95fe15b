"""A checkpoint verifies to the last byte or does not count; the damage here is real."""

import concurrent.futures
import dataclasses
import errno
import hashlib
import json
import logging
import resource
import shutil
import subprocess
import sys
import time
from pathlib import Path

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh

from haliax.axis import Axis
from haliax.core import NamedArray
from modeling.artifacts import DiskFullError
from modeling.experiment import ConfigError, validate
from modeling.training import checkpoint, retention
from modeling.training.config import TrainerConfig
from modeling.training.leaves import HostMemory, fetched, leaf_shardings, named_leaves, snapshot
from modeling.training.manifest import CheckpointError
from modeling.training.pins import mark, pin, pinned, unpin
from modeling.training.reading import read_leaf, read_manifest, verify
from modeling.training.restoring import restore, restore_parameters
from modeling.training.retention import open_checkpoints
from modeling.training.saving import SaveSchedule

Embed, Mlp, Layers = Axis("embed", 8), Axis("mlp", 4), Axis("layers", 2)
FSDP = {"embed": "data"}


class Model(eqx.Module):
    up: NamedArray
    stacked: NamedArray
    zeros: NamedArray
    activation: object = jax.nn.gelu
    epsilon: float = 1e-5


class State(eqx.Module):
    step: jax.Array
    model: Model
    moments: tuple
    key: jax.Array
    half: jax.Array
    flags: jax.Array
    empty: jax.Array


def make_state(seed=0):
    rng = np.random.default_rng(seed)

    def named(*axes):
        values = rng.normal(size=tuple(axis.size for axis in axes))
        return NamedArray(jnp.asarray(values, jnp.float32), axes)

    model = Model(
        named(Embed, Mlp),
        named(Layers, Mlp, Embed),
        NamedArray(jnp.zeros((8, 4)), (Embed, Mlp)),
    )
    return State(
        step=jnp.asarray(3, jnp.int32),
        model=model,
        moments=(named(Embed, Mlp), {"nu": named(Embed)}),
        key=jax.random.PRNGKey(seed),
        half=jnp.asarray(rng.normal(size=5), jnp.bfloat16),
        flags=jnp.asarray([True, False, True]),
        empty=jnp.zeros((0, 3)),
    )


def mesh_of(**sizes):
    count = int(np.prod(list(sizes.values())))
    return Mesh(np.asarray(jax.devices()[:count]).reshape(tuple(sizes.values())), tuple(sizes))


def placed(state, mesh, mapping):
    shardings = dict(leaf_shardings(state, mesh, mapping))
    arrays, static = eqx.partition(state, eqx.is_array)
    leaves = [jax.device_put(array, shardings[path]) for path, array, _ in named_leaves(arrays)]
    tree = jax.tree.unflatten(jax.tree.structure(arrays), leaves)
    return eqx.combine(tree, static)


def save(directory, state, step=3, cursor=None):
    return checkpoint.write(
        directory,
        snapshot(state),
        step=step,
        cursor=cursor or {"rows": step * 8},
        config={"trainer": {"seed": 1}},
        files={"losses.json": {"losses": [2.5, 2.25]}},
    )


def assert_same_bits(found, expected):
    pairs = zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True)
    for a, b in pairs:
        if eqx.is_array(b):
            assert a.dtype == b.dtype
            assert np.asarray(a).tobytes() == np.asarray(b).tobytes()
        else:
            assert a is b


@pytest.mark.parametrize(
    ("written_on", "read_on"),
    [(1, 4), (4, 1), (4, 2), (2, 8)],
)
def test_a_state_returns_bit_for_bit_onto_any_mesh(tmp_path, written_on, read_on):
    state = make_state()
    save(tmp_path / "c", placed(state, mesh_of(data=written_on), FSDP))
    mesh = mesh_of(data=read_on)
    template = eqx.filter_eval_shape(make_state)
    found = restore(tmp_path / "c", template, mesh=mesh, mapping=FSDP)
    assert_same_bits(found, state)
    assert found.model.up.axes == state.model.up.axes
    shard = found.model.stacked.array.addressable_shards[0].data.shape
    assert shard == (2, 4, 8 // read_on), "the array is not split as the mapping says"


def test_restoring_without_a_mesh_uses_the_default_device(tmp_path):
    state = make_state()
    save(tmp_path / "c", placed(state, mesh_of(data=4), FSDP))
    assert_same_bits(restore(tmp_path / "c", make_state(seed=9)), state)
    assert_same_bits(restore_parameters(tmp_path / "c", make_state(seed=9).model), state.model)


def test_ids_do_not_depend_on_mesh_or_chunks_but_on_content(tmp_path):
    state = make_state()
    layouts = {"one": (mesh_of(data=1), {}), "four": (mesh_of(data=4), FSDP),
               "both": (mesh_of(data=2, model=2), {"embed": "data", "mlp": "model"})}  # fmt: skip
    ids = {}
    for name, (mesh, mapping) in layouts.items():
        manifest = save(tmp_path / name, placed(state, mesh, mapping))
        ids[name] = (manifest.content_id, manifest.parameters)
    assert len(set(ids.values())) == 1
    assert len(list((tmp_path / "both/arrays/model.up").glob("c.*"))) == 4

    other_cursor = save(tmp_path / "cursor", state, cursor={"rows": 25})
    assert other_cursor.content_id != ids["one"][0]
    assert other_cursor.parameters == ids["one"][1]

    nudged = eqx.tree_at(
        lambda s: s.moments[1]["nu"].array, state, replace_fn=lambda x: x.at[0].add(1)
    )
    other_moment = save(tmp_path / "moment", nudged)
    assert (other_moment.content_id != ids["one"][0], other_moment.parameters) == (
        True,
        ids["one"][1],
    )


def test_leaf_digests_are_those_of_the_row_major_bytes(tmp_path):
    state = make_state()
    manifest = save(tmp_path / "c", placed(state, mesh_of(data=4), FSDP))
    digests = manifest.digests
    for path, array in {
        "model.stacked": state.model.stacked.array,
        "moments.1.nu": state.moments[1]["nu"].array,
        "half": state.half,
        "step": state.step,
        "empty": state.empty,
    }.items():
        assert digests[path] == hashlib.sha256(np.asarray(array).tobytes()).hexdigest()
    assert set(digests) == {"step", "model.up", "model.stacked", "model.zeros", "moments.0",
                            "moments.1.nu", "key", "half", "flags", "empty"}  # fmt: skip
    by_path = {leaf.path: leaf for leaf in manifest.leaves}
    assert by_path["model.stacked"].axes == ("layers", "mlp", "embed")
    assert by_path["key"].axes is None


def test_the_manifest_on_disk_says_it_all(tmp_path):
    written = save(tmp_path / "c", make_state())
    assert verify(tmp_path / "c") == read_manifest(tmp_path / "c") == written
    content = json.loads((tmp_path / "c/manifest.json").read_text())
    assert content["content_id"] == written.content_id
    assert (content["step"], content["cursor"]) == (3, {"rows": 24})


def test_an_array_of_zeros_has_a_file(tmp_path):
    save(tmp_path / "c", make_state())
    assert (tmp_path / "c/arrays/model.zeros/c.0.0").stat().st_size == 8 * 4 * 4 + 4


def flip(path, _):
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 2] ^= 1
    path.write_bytes(raw)


def truncate(path, _):
    path.write_bytes(path.read_bytes()[:-1])


def delete(path, _):
    path.unlink()


def swap(path, directory):
    """Exchanges the file with another of the same size, or the same name elsewhere."""
    for sibling in sorted(directory.rglob("*")):
        alike = sibling.is_file() and sibling.stat().st_size == path.stat().st_size
        if alike and sibling.read_bytes() != path.read_bytes():
            mine, other = path.read_bytes(), sibling.read_bytes()
            path.write_bytes(other)
            sibling.write_bytes(mine)
            return
    pytest.skip("no other file of this size")


@pytest.fixture(scope="module")
def intact(tmp_path_factory):
    directory = tmp_path_factory.mktemp("checkpoint") / "intact"
    save(directory, placed(make_state(), mesh_of(data=2), FSDP))
    return directory


@pytest.mark.parametrize("damage", [flip, truncate, delete])
def test_damage_to_any_file_is_found_and_named(tmp_path, intact, damage):
    names = [p.relative_to(intact) for p in sorted(intact.rglob("*")) if p.is_file()]
    assert len(names) >= 25, "arrays, chunks, manifest, commit and losses"
    for number, name in enumerate(names):
        directory = tmp_path / str(number)
        shutil.copytree(intact, directory)
        verify(directory)
        damage(directory / name, directory)
        with pytest.raises(CheckpointError, match=str(name)):
            verify(directory)


@pytest.mark.parametrize(
    "name",
    ["arrays/model.stacked/c.0.0.0", "arrays/model.up/c.1.0", "arrays/model.up/zarr.json"],
)
def test_files_that_changed_places_are_found(tmp_path, intact, name):
    directory = tmp_path / "c"
    shutil.copytree(intact, directory)
    swap(directory / name, directory)
    with pytest.raises(CheckpointError, match="changed or exchanged"):
        verify(directory)
    with pytest.raises(CheckpointError, match="changed or exchanged"):
        restore(directory, make_state())


@pytest.mark.parametrize("name", ["arrays", "arrays/model.up", "arrays/model.up/c.1.0", "COMMIT"])
@pytest.mark.parametrize("to", ["outside", "a sibling"])
def test_a_link_to_the_same_bytes_is_none_of_the_checkpoints_own(tmp_path, intact, name, to):
    directory = tmp_path / "c"
    shutil.copytree(intact, directory)
    target = tmp_path / "elsewhere" if to == "outside" else (directory / name).with_name("other")
    (directory / name).rename(target)
    (directory / name).symlink_to(target)
    for read in (verify, lambda directory: restore(directory, make_state())):
        with pytest.raises(CheckpointError, match=f"{directory / name} is a symbolic link"):
            read(directory)


def test_a_lost_chunk_does_not_read_as_zeros(tmp_path, intact):
    directory = tmp_path / "c"
    shutil.copytree(intact, directory)
    (directory / "arrays/model.up/c.1.0").unlink()
    with pytest.raises(CheckpointError, match=r"model\.up/c.1.0 is missing"):
        restore_parameters(directory, make_state().model)


def test_the_commit_of_another_checkpoint_commits_nothing(tmp_path):
    save(tmp_path / "old", make_state(0), step=2)
    save(tmp_path / "new", make_state(1), step=3)
    shutil.copy(tmp_path / "old/COMMIT", tmp_path / "new/COMMIT")
    with pytest.raises(CheckpointError, match="COMMIT promises"):
        verify(tmp_path / "new")


@pytest.mark.parametrize("name", ["losses.json", "manifest.json"])
def test_what_a_disk_makes_of_a_file_while_it_is_written_is_found(tmp_path, monkeypatch, name):
    write_whole = checkpoint.write_whole

    def spoiled(path, content):
        write_whole(path, content.replace(b"2.5", b"2.0").replace(b"1", b"3"))

    monkeypatch.setattr(
        checkpoint,
        "write_whole",
        lambda path, content: (spoiled if path.name == name else write_whole)(path, content),
    )
    save(tmp_path / "c", make_state())
    with pytest.raises(CheckpointError, match=rf"{name} has the digest"):
        verify(tmp_path / "c")


def test_a_manifest_that_forgets_a_chunk_is_refused(tmp_path):
    """Even a consistent manifest cannot make half an array whole."""
    save(tmp_path / "c", placed(make_state(), mesh_of(data=2), FSDP))
    path = tmp_path / "c/manifest.json"
    content = json.loads(path.read_text())
    leaf = next(leaf for leaf in content["leaves"] if leaf["path"] == "model.up")
    leaf["chunks"].pop()
    path.write_text(json.dumps(content))
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    (tmp_path / "c/COMMIT").write_text(digest + "\n")
    with pytest.raises(CheckpointError, match=r"chunks of `model\.up` hold 16 elements"):
        verify(tmp_path / "c")


def test_another_state_is_refused_leaf_by_leaf(tmp_path):
    save(tmp_path / "c", make_state())
    state = make_state()
    wider = eqx.tree_at(lambda s: s.half, state, jnp.zeros(6, jnp.bfloat16))
    with pytest.raises(CheckpointError, match=r"`half` is .*\(5,\).* expected .*\(6,\)"):
        restore(tmp_path / "c", wider)
    renamed = eqx.tree_at(
        lambda s: s.model.up, state, NamedArray(state.model.up.array, (Embed.alias("width"), Mlp))
    )
    with pytest.raises(CheckpointError, match=r"`model\.up` is .*'embed'.*'width'"):
        restore(tmp_path / "c", renamed)
    with pytest.raises(CheckpointError, match=r"`moments\.1\.nu` is in the checkpoint but not exp"):
        restore(tmp_path / "c", dataclasses.replace(state, moments=(state.moments[0],)))


# Retention: which checkpoints there are, and which one counts.


def save_all(checkpoints, steps):
    for step in steps:
        checkpoints.save(
            snapshot(make_state(step)),
            step=step,
            cursor={"rows": step},
            config={},
            files={},
            done=lambda _: None,
        )
    checkpoints.wait()


def steps_on_disk(directory):
    return sorted(read_manifest(path).step for path in directory.glob("step-*"))


def test_the_newest_is_the_highest_step_whatever_the_clock_says(tmp_path):
    with open_checkpoints(tmp_path, keep=3) as checkpoints:
        save_all(checkpoints, [999999, 1000000, 9])
        assert checkpoints.manifest(checkpoints.newest()).step == 1000000
    with open_checkpoints(tmp_path, keep=3) as checkpoints:
        newest = checkpoints.newest()
        assert_same_bits(restore(newest, make_state()), make_state(1000000))


def test_two_or_more_verified_ones_are_kept(tmp_path):
    with open_checkpoints(tmp_path, keep=2) as checkpoints:
        save_all(checkpoints, [1, 2, 3, 4])
    assert steps_on_disk(tmp_path) == [3, 4]
    with pytest.raises(ValueError, match="keep at least 2"), open_checkpoints(tmp_path, keep=1):
        pass


def test_those_of_the_lowest_steps_go_however_many_digits_they_have(tmp_path):
    with open_checkpoints(tmp_path, keep=2) as checkpoints:
        save_all(checkpoints, [9, 999999, 1000000, 1000001])
    assert steps_on_disk(tmp_path) == [1000000, 1000001]


def test_an_attempt_that_died_is_not_written_into_and_goes_when_its_step_is_done(tmp_path):
    """What is beyond the step is being written by the rest of a crew, or will be."""
    with open_checkpoints(tmp_path, keep=2) as checkpoints:
        save_all(checkpoints, [3])
    (died,) = tmp_path.glob("step-*")
    (died / "COMMIT").unlink()
    with open_checkpoints(tmp_path, keep=2) as checkpoints:
        save_all(checkpoints, [1, 2])
        assert died.exists()
        save_all(checkpoints, [3])
    assert not died.exists()
    assert steps_on_disk(tmp_path) == [2, 3]


def test_a_damaged_one_is_told_passed_over_and_never_counted_as_kept(tmp_path, caplog):
    with open_checkpoints(tmp_path, keep=2) as checkpoints:
        save_all(checkpoints, [1, 2, 3])
    damaged = next(tmp_path.glob("step-000003.*"))
    flip(damaged / "arrays/model.up/c.0.0", damaged)
    with open_checkpoints(tmp_path, keep=2) as checkpoints, caplog.at_level(logging.WARNING):
        assert checkpoints.manifest(checkpoints.newest()).step == 2
        assert "DAMAGED CHECKPOINT" in caplog.text
        assert "arrays/model.up/c.0.0" in caplog.text
        # 3 is damaged, so that 2 must stay beside 4 although it is the third newest.
        save_all(checkpoints, [4])
        assert steps_on_disk(tmp_path) == [2, 3, 4]
        save_all(checkpoints, [5])
        assert steps_on_disk(tmp_path) == [4, 5]


def test_a_link_to_a_checkpoint_is_told_never_counted_and_what_it_leads_to_never_removed(
    tmp_path, caplog
):
    run, elsewhere = tmp_path / "run", tmp_path / "elsewhere"
    with open_checkpoints(run, keep=2) as checkpoints:
        save_all(checkpoints, [1, 2, 3])
    for step, path in zip((2, 3), sorted(run.glob("step-*")), strict=True):
        path.rename(elsewhere.with_name(f"{step}"))
        path.symlink_to(elsewhere.with_name(f"{step}"))
    with open_checkpoints(run, keep=2) as checkpoints:
        assert checkpoints.newest() is None
        save_all(checkpoints, [4, 5, 6])
        checkpoints.clear()
    assert f"{path} is a symbolic link and does not count" in caplog.text
    assert [verify(tmp_path / name).step for name in ("2", "3")] == [2, 3]


def test_a_checkpoint_under_the_name_of_another_step_is_none(tmp_path, caplog):
    with open_checkpoints(tmp_path, keep=2) as checkpoints:
        save_all(checkpoints, [1, 2])
    (one,) = tmp_path.glob("step-000001.*")
    shutil.copytree(one, tmp_path / f"step-000009.{'a' * 12}")
    with pytest.raises(CheckpointError, match=r"step-0*9.*is of step 1: the directory was renamed"):
        verify(tmp_path / f"step-000009.{'a' * 12}")
    with open_checkpoints(tmp_path, keep=2) as checkpoints:
        assert checkpoints.manifest(checkpoints.newest()).step == 2


@pytest.mark.parametrize("name", ["../x", "/etc/passwd", "a/../../x", "a\0b", "", "./x"])
def test_a_manifest_that_names_a_file_elsewhere_is_refused(tmp_path, intact, name):
    shutil.copytree(intact, tmp_path / "c")
    path = tmp_path / "c/manifest.json"
    content = json.loads(path.read_text())
    content["files"][0]["path"] = name
    path.write_text(json.dumps(content))
    (tmp_path / "c/COMMIT").write_text(hashlib.sha256(path.read_bytes()).hexdigest() + "\n")
    with pytest.raises(CheckpointError, match="names no file within the directory"):
        verify(tmp_path / "c")


def test_a_run_that_has_lost_all_checkpoints_begins_anew_only_if_told(tmp_path, caplog):
    with open_checkpoints(tmp_path, keep=2) as checkpoints:
        save_all(checkpoints, [1, 2])
    for path in tmp_path.glob("step-*"):
        flip(path / "arrays/model.up/c.0.0", path)
    with (
        open_checkpoints(tmp_path, keep=2) as checkpoints,
        pytest.raises(CheckpointError, match=r"None of the 2 checkpoints.*newest of step 2: .*up"),
    ):
        checkpoints.newest()
    with open_checkpoints(tmp_path, keep=2, may_begin_anew=True) as checkpoints:
        assert checkpoints.newest() is None
        assert "ALL IS LOST" in caplog.text
        save_all(checkpoints, [1])
    with open_checkpoints(tmp_path, keep=2) as checkpoints:
        assert_same_bits(restore(checkpoints.newest(), make_state()), make_state(1))


def test_an_attempt_without_a_commit_does_not_count_and_is_cleared_away(tmp_path):
    with open_checkpoints(tmp_path, keep=2) as checkpoints:
        save_all(checkpoints, [1, 2])
    torn = next(tmp_path.glob("step-000002.*"))
    (torn / "COMMIT").unlink()
    with open_checkpoints(tmp_path, keep=2) as checkpoints:
        assert checkpoints.manifest(checkpoints.newest()).step == 1
        save_all(checkpoints, [2])
    assert not torn.exists()
    assert steps_on_disk(tmp_path) == [1, 2]


def test_a_second_trainer_is_refused_while_the_first_one_lives(tmp_path):
    with (
        open_checkpoints(tmp_path, keep=2),
        pytest.raises(CheckpointError, match=r"in use by another trainer \(process \d+\)"),
        open_checkpoints(tmp_path, keep=2),
    ):
        pass
    with open_checkpoints(tmp_path, keep=2):
        pass


def test_a_failed_save_is_raised_by_the_next_one_or_by_the_end(tmp_path):
    def fail(_):
        raise OSError("no space left on device")

    with pytest.raises(OSError, match="no space"), open_checkpoints(tmp_path, keep=2) as held:
        held.save(snapshot(make_state()), step=1, cursor={}, config={}, files={}, done=fail)


def copied_later(state):
    """As the trainer does it: what the device copies is read by the thread that writes."""
    copies = jax.jit(lambda state: jax.tree.map(jnp.copy, state))(state)
    return lambda: fetched(copies)


@pytest.mark.parametrize("leaves_of", [snapshot, copied_later])
def test_a_save_does_not_see_what_happens_to_the_state_afterwards(tmp_path, leaves_of):
    """The step donates its state: buffers are overwritten while the writer still writes."""
    state = {"w": jnp.arange(1 << 20, dtype=jnp.float32)}
    expected = np.asarray(state["w"]).copy()
    overwrite = jax.jit(lambda s: jax.tree.map(lambda x: -x, s), donate_argnums=0)
    with open_checkpoints(tmp_path, keep=2) as checkpoints:
        checkpoints.save(
            leaves_of(state), step=1, cursor={}, config={}, files={}, done=lambda _: None
        )
        for _ in range(3):
            state = overwrite(state)
        jax.block_until_ready(state)
    found = restore(next(tmp_path.glob("step-*")), {"w": jnp.zeros(1 << 20)})
    np.testing.assert_array_equal(np.asarray(found["w"]), expected)


def save_one(checkpoints, step, **how):
    how = {"cursor": {}, "config": {}, "files": {}, "done": lambda _: None} | how
    checkpoints.save(snapshot(make_state(step)), step=step, **how)


@pytest.mark.parametrize("error", ["ENOSPC", "EROFS"])
def test_a_failed_save_is_raised_by_the_next_look_and_leaves_nothing(tmp_path, monkeypatch, error):
    monkeypatch.setenv("LEVANTER_FAULT", f"during-write@2:{error}")
    with open_checkpoints(tmp_path, keep=2) as checkpoints:
        save_one(checkpoints, 1)
        checkpoints.wait()
        save_one(checkpoints, 2)
        concurrent.futures.wait([checkpoints._pending])
        with pytest.raises(OSError, match=r"step-000002|Read-only") as raised:
            checkpoints.raise_failure()
        assert raised.value.errno == getattr(errno, error)
        assert [path.name[:11] for path in tmp_path.glob("step-*")] == ["step-000001"]
        # Once told it is over: the next save finds space again.
        monkeypatch.delenv("LEVANTER_FAULT")
        save_one(checkpoints, 3)
        checkpoints.wait()
        assert steps_on_disk(tmp_path) == [1, 3]


def test_a_failed_save_is_not_forgotten_over_the_next_one(tmp_path, monkeypatch):
    monkeypatch.setenv("LEVANTER_FAULT", "during-write@1:EIO")
    with open_checkpoints(tmp_path, keep=2) as checkpoints:
        save_one(checkpoints, 1)
        with pytest.raises(OSError, match="Input/output error"):
            save_one(checkpoints, 2)


def test_what_the_operating_system_refuses_to_write_is_told_as_such(tmp_path):
    """The limit is a full disk's double."""
    state = {"w": jnp.ones((512, 512))}
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    try:
        with (
            pytest.raises(DiskFullError, match=r"no space for the checkpoint of step 1 \(File too"),
            open_checkpoints(tmp_path, keep=2) as held,
        ):
            held.save(snapshot(state), step=1, cursor={}, config={}, files={}, done=lambda _: None)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_one_set_of_host_memory_is_used_again_and_holds_the_last_state(tmp_path):
    memory = HostMemory()
    state = placed(make_state(0), mesh_of(data=4), FSDP)
    first = snapshot(state, memory)
    again = snapshot(placed(make_state(1), mesh_of(data=4), FSDP), memory)
    for before, after in zip(first, again, strict=True):
        for start, chunk in before.chunks.items():
            assert after.chunks[start] is chunk
    by_path = {leaf.path: leaf.assemble() for leaf in again}
    expected = make_state(1)
    np.testing.assert_array_equal(by_path["model.stacked"], expected.model.stacked.array)
    assert by_path["half"].tobytes() == np.asarray(expected.half).tobytes()
    # Another layout has other chunks, of other shapes.
    other = {leaf.path: leaf.assemble() for leaf in snapshot(make_state(2), memory)}
    np.testing.assert_array_equal(other["model.up"], make_state(2).model.up.array)


# When a run saves, and what stays of it.


def schedule_of(clock=time.monotonic, **fields):
    fields = {"num_train_steps": 50, "train_batch_size": 8} | fields
    return SaveSchedule(validate(TrainerConfig, fields, "trainer"), clock=clock)


def test_rules_take_turns_in_what_they_keep():
    keep = [{"every": 2, "until": 10}, {"every": 5, "until": 20}, {"every": 10}]
    schedule = schedule_of(keep=keep, save_every_steps=None)
    kept = [step for step in range(1, 50) if schedule.is_permanent(step)]
    assert kept == [2, 4, 6, 8, 10, 15, 20, 30, 40]
    assert [step for step in range(1, 51) if schedule.is_due(step)] == [*kept, 50]
    bounded = schedule_of(keep=[{"every": 3, "until": 7}], save_every_steps=20)
    assert [step for step in range(1, 51) if bounded.is_due(step)] == [3, 6, 20, 40, 50]
    assert [step for step in range(1, 51) if bounded.is_permanent(step)] == [3, 6]


def test_time_is_up_once_an_interval_since_the_last_save():
    now = [1000.0]
    schedule = schedule_of(save_interval="1.5m", clock=lambda: now[0])
    said = []
    for second in range(1000, 1400, 10):
        now[0] = float(second)
        if second == 1150:
            schedule.begin_interval()
        if schedule.time_is_up():
            said.append(second)
    assert said == [1090, 1240, 1330]
    assert not schedule_of().time_is_up()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"save_interval": 10}, r"save_interval.*10 is no time: write it with its unit"),
        ({"save_interval": "10"}, r"'10' is no time.*belongs in trainer\.save_every_steps"),
        ({"save_interval": "0m"}, "longer than no time"),
        ({"save_every_steps": "10m"}, "save_every_steps.*integer"),
        ({"keep": [{"every": 5}, {"every": 9}]}, r"keep.*only the last rule may lack it"),
        ({"keep": [{"every": 5, "until": 9}, {"every": 2, "until": 8}]}, r"`until` must rise"),
        ({"keep": [{"every": 0}]}, r"keep\.0\.every"),
        ({"keep": [{"every": "10m"}]}, r"keep\.0\.every.*integer"),
        ({"keep_checkpoints": 1}, "keep_checkpoints.*2"),
    ],
)
def test_a_schedule_that_makes_no_sense_is_refused_by_field(fields, message):
    with pytest.raises(ConfigError, match=message):
        schedule_of(**fields)


def test_what_is_saved_for_ever_stays_when_its_rule_is_gone(tmp_path):
    with open_checkpoints(tmp_path, keep=2) as checkpoints:
        for step in (1, 2, 3):
            save_one(checkpoints, step, is_permanent=step == 1)
    with open_checkpoints(tmp_path, keep=2) as checkpoints:
        assert checkpoints.manifest(checkpoints.newest()).step == 3
        save_all(checkpoints, [4, 5])
    assert steps_on_disk(tmp_path) == [1, 4, 5]
    assert pinned(tmp_path) == {1: "trainer.keep"}


# Parts of a state, and what tools see of it.


def test_a_tool_reads_leaves_without_the_experiment_or_jax(tmp_path):
    state = make_state()
    save(tmp_path / "c", placed(state, mesh_of(data=4), FSDP))
    program = f"""
import json, sys
from pathlib import Path
from modeling.training.pins import pin
from modeling.training.pins import mark, pin, pinned, unpin
from modeling.training.reading import read_leaf, read_manifest
directory = Path({str(tmp_path / "c")!r})
manifest = read_manifest(directory)
leaves = {{leaf.path: [leaf.dtype, leaf.shape, leaf.axes] for leaf in manifest.leaves}}
half = read_leaf(directory, manifest.leaf("half"))
print(json.dumps([leaves, half.tobytes().hex(), "jax" in sys.modules]))
"""
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    leaves, half, has_jax = json.loads(run.stdout)
    assert leaves["model.stacked"] == ["float32", [2, 4, 8], ["layers", "mlp", "embed"]]
    assert leaves["flags"] == ["bool", [3], None]
    assert half == np.asarray(state.half).tobytes().hex()
    assert not has_jax


def test_a_leaf_that_was_changed_is_not_read(tmp_path, intact):
    shutil.copytree(intact, tmp_path / "c")
    manifest = read_manifest(tmp_path / "c")
    flip(tmp_path / "c/arrays/model.up/c.1.0", None)
    with pytest.raises(CheckpointError, match=r"model\.up/c\.1\.0|model\.up` cannot be read"):
        read_leaf(tmp_path / "c", manifest.leaf("model.up"))
    assert read_leaf(tmp_path / "c", manifest.leaf("model.zeros")).shape == (8, 4)
    with pytest.raises(CheckpointError, match=r"no leaf `model\.upp`; did you mean `model\.up`"):
        manifest.leaf("model.upp")


def test_some_leaves_return_and_the_others_stay(tmp_path):
    state, other = make_state(0), make_state(1)
    save(tmp_path / "c", placed(state, mesh_of(data=4), FSDP))
    changed = dataclasses.replace(other, moments={"another": jnp.ones(3)})
    found = restore(tmp_path / "c", changed, only=["model", "step", "half"])
    assert_same_bits(found.model, state.model)
    assert_same_bits(found.half, state.half)
    assert_same_bits(found.moments, changed.moments)
    assert_same_bits(found.key, other.key)

    mesh = mesh_of(data=2)
    found = restore(tmp_path / "c", changed, only=["model.up"], mesh=mesh, mapping=FSDP)
    assert_same_bits(found.model.up, state.model.up)
    assert found.model.up.array.sharding.mesh == mesh
    assert_same_bits(found.model.stacked, other.model.stacked)


@pytest.mark.parametrize(
    ("only", "message"),
    [
        (["model.upp"], r"only: `model\.upp` is no array .* did you mean `model\.up`"),
        (["mod"], r"only: `mod` is no array"),
        (["moments.another"], r"`moments\.another` is not in the checkpoint"),
        (["moments.1"], r"`moments\.1\.nu` is in the checkpoint but not expected"),
    ],
)
def test_a_list_of_leaves_names_those_that_there_are(tmp_path, intact, only, message):
    changed = dataclasses.replace(make_state(), moments={"another": jnp.ones(3)})
    with pytest.raises(CheckpointError, match=message):
        restore(intact, changed, only=only)


def test_pinned_steps_stay_and_unpinned_ones_go(tmp_path):
    with open_checkpoints(tmp_path, keep=2) as checkpoints:
        save_all(checkpoints, [1, 2])
        pin(tmp_path, 1, "the paper shows it")
        save_all(checkpoints, [3, 4, 5])
        assert steps_on_disk(tmp_path) == [1, 4, 5]
        assert pinned(tmp_path) == {1: "the paper shows it"}
        unpin(tmp_path, 1)
        save_all(checkpoints, [6])
        assert steps_on_disk(tmp_path) == [5, 6]
    for refused in (pin, unpin):
        with pytest.raises(CheckpointError, match=r"step 4.*(has \[5, 6\]|not pinned)"):
            refused(tmp_path, 4)
    assert pinned(tmp_path) == {}


def test_a_pin_that_comes_while_its_step_is_being_retired_is_heeded(tmp_path, monkeypatch):
    """The worst moment: the commit is gone, so that the step does not count any more."""
    with open_checkpoints(tmp_path, keep=2) as checkpoints:
        save_all(checkpoints, [1, 2])
        rename = Path.rename

        def rename_and_pin(self, target):
            moved = rename(self, target)
            if self.name == "COMMIT":
                mark(tmp_path, 1, "just now")
            return moved

        synced, sync = [], retention.sync_directory

        def noted(path):
            sync(path)
            synced.append([path, (path / "COMMIT").exists()])

        monkeypatch.setattr(retention, "sync_directory", noted)
        monkeypatch.setattr(Path, "rename", rename_and_pin)
        save_all(checkpoints, [3])
    assert synced == [[next(tmp_path.glob("step-000001.*")), True]], "the disk has it back, too"
    assert steps_on_disk(tmp_path) == [1, 2, 3]


def test_a_trainer_killed_while_it_heeds_a_pin_has_its_checkpoint_given_back(tmp_path):
    with open_checkpoints(tmp_path, keep=2) as checkpoints:
        save_all(checkpoints, [1, 2])
    (pinned_one,) = tmp_path.glob("step-000001.*")
    (pinned_one / "COMMIT").rename(pinned_one / "RETIRED")
    mark(tmp_path, 1, "just now")
    with open_checkpoints(tmp_path, keep=2) as checkpoints:
        save_all(checkpoints, [3, 4])
    assert steps_on_disk(tmp_path) == [1, 3, 4]
    assert verify(pinned_one).step == 1
