"""A run directory whose newest checkpoint is damaged, or whose disk fails, goes on from the last.

The oracle is the content id of each step, known beforehand: what is found afterwards is a whole
checkpoint of an earlier step or of this one, and the next save succeeds with the known id.
"""

import errno
import logging
import os
import shutil
import sys
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from modeling import faults
from modeling.training.leaves import snapshot
from modeling.training.manifest import CheckpointError
from modeling.training.reading import verify
from modeling.training.remote import RemoteCheckpoints
from modeling.training.restoring import restore
from modeling.training.retention import open_checkpoints

sys.path.insert(0, str(Path(__file__).parent))
import bucket
from catalogue import FILE_DAMAGES, STEP, trial
from damage import harm, likest
from machine import as_nobody, small_disk
from power import power_may_go, what_may_be_left

bucket.register()


def state(step):
    draw = np.random.default_rng(step)
    return {
        "up": jnp.asarray(draw.normal(size=(8, 4)), jnp.float32),
        "down": jnp.asarray(draw.normal(size=(8, 4)), jnp.float32),
        "half": jnp.asarray(draw.normal(size=5), jnp.bfloat16),
        "step": jnp.asarray(step, jnp.int32),
    }


def save(directory, *steps, keep=3, remote=None):
    """Saves each step and returns its content id."""
    ids = {}
    with open_checkpoints(directory, keep=keep, remote=remote) as held:
        for step in steps:
            held.save(
                snapshot(state(step)), step=step, cursor={"rows": step}, config={},
                files={"losses.json": {"losses": [float(step)]}},
                done=lambda path, step=step: ids.update({step: held.manifest(path).content_id}),
            )  # fmt: skip
        held.wait()
    return ids


def newest(directory, remote=None):
    """Returns step and content id of what a run would go on from."""
    with open_checkpoints(directory, keep=3, remote=remote) as held:
        path = held.newest()
        if path is None:
            return None
        found = restore(path, state(0))
        assert np.array_equal(found["up"], state(held.manifest(path).step)["up"])
        return held.manifest(path).step, held.manifest(path).content_id


@pytest.fixture(scope="module")
def intact(tmp_path_factory):
    directory = tmp_path_factory.mktemp("run")
    return directory, save(directory, 1, 2)


def of_step(directory, step):
    (path,) = directory.glob(f"step-{step:06d}.*")
    return path


@pytest.mark.parametrize("damage", FILE_DAMAGES)
def test_each_damage_to_each_file_is_named_and_the_one_before_is_taken(
    tmp_path, intact, damage, caplog
):
    kept, ids = intact
    names = sorted(
        str(path.relative_to(of_step(kept, 2)))
        for path in of_step(kept, 2).rglob("*")
        if path.is_file()
    )
    assert len(names) == 11, "four arrays, their metadata, losses, manifest and commit"
    for name in names:
        old = of_step(kept, 1) / name
        if (
            damage == "replaced by an older version"
            and old.read_bytes() == (of_step(kept, 2) / name).read_bytes()
        ):
            continue  # the same in all versions
        directory = tmp_path / name.replace("/", "-")
        shutil.copytree(kept, directory)
        harmed = of_step(directory, 2)
        sibling = likest(harmed / name, [harmed / other for other in names])
        caplog.clear()
        with trial(damage, STEP), caplog.at_level(logging.INFO):
            harm(damage, harmed / name, sibling=sibling, older=old, elsewhere=tmp_path / "copy")
            with pytest.raises(CheckpointError) as told:
                verify(harmed)
            places = [name, *([sibling.relative_to(harmed)] if "sibling" in damage else [])]
            assert any(str(place) in str(told.value) for place in places)
            with pytest.raises(CheckpointError):
                restore(harmed, state(0)) if name != "losses.json" else verify(harmed)
            assert newest(directory) == (1, ids[1])
            assert str(harmed) in caplog.text


def test_whenever_the_power_goes_what_counts_is_whole_and_what_was_promised_counts(
    tmp_path, intact
):
    """Also what is being retired, and whatever of it is on disk already."""
    directory, (kept, ids) = tmp_path / "run", intact
    shutil.copytree(kept, directory)
    ids = dict(ids)
    with power_may_go(directory, told=lambda: set(ids)) as moments:
        ids |= save(directory, 3)
        ids |= save(directory, 4, keep=2)
    assert len(moments) > 40, "each file, and each directory"
    for number, (moment, left) in enumerate(what_may_be_left(moments)):
        with trial("power goes", STEP):
            run = left(tmp_path / str(number))
            counting = [path for path in run.glob("step-*") if (path / "COMMIT").exists()]
            found = {one.step: one.content_id for one in map(verify, counting)}
            assert found.items() <= ids.items()
            assert max(found) >= max(moment.told)
            assert len(found) >= 2, "one to fall back to"


def test_whenever_the_power_goes_what_was_copied_from_a_store_is_whole_or_not_there(tmp_path):
    url, run = f"bucket://{tmp_path}/store", tmp_path / "run"
    ids = save(tmp_path / "elsewhere", 1, 2, remote=url)
    run.mkdir()
    with power_may_go(run) as moments:
        assert newest(run, url) == (2, ids[2])
    assert len(moments) > 10
    counting = 0
    for number, (_, left) in enumerate(what_may_be_left(moments)):
        with trial("power goes", STEP):
            there = left(tmp_path / str(number))
            for path in there.glob("step-*/COMMIT"):
                counting += verify(path.parent).content_id == ids[2]
            assert newest(there, url) == (2, ids[2])
    assert counting > 0


@pytest.mark.parametrize("error", ["ENOSPC", "EIO", "EROFS"])
@pytest.mark.parametrize("point", ["before-write", "during-write", "before-commit"])
def test_an_error_while_writing_is_raised_and_loses_nothing(
    tmp_path, intact, monkeypatch, point, error
):
    directory = tmp_path / "run"
    shutil.copytree(intact[0], directory)
    with trial("I/O error at any point", STEP):
        monkeypatch.setenv(faults.VARIABLE, f"{point}@3:{error}")
        with pytest.raises(OSError, match=os.strerror(getattr(errno, error))):
            save(directory, 3)
        monkeypatch.delenv(faults.VARIABLE)
        assert newest(directory) == (2, intact[1][2])
        assert newest(directory) != (3, save(directory, 3)[3]) == newest(directory)


def test_a_full_disk_is_told_and_the_last_checkpoint_is_kept(tmp_path, intact):
    with trial("full disk", STEP), small_disk(tmp_path, 512 * 1024) as (disk, fill):
        directory = disk / "run"
        shutil.copytree(intact[0], directory)
        with fill(), pytest.raises(OSError, match=r"space|too large|quota"):
            save(directory, 3)
        assert newest(directory) == (2, intact[1][2])
        assert newest(directory) != (3, save(directory, 3)[3]) == newest(directory)


def test_a_read_only_directory_is_told(intact):
    with trial("read-only directory", STEP), as_nobody() as directory:
        ids = save(directory, 1)
        directory.chmod(0o555)
        with pytest.raises(PermissionError, match=str(directory)):
            save(directory, 2)
        directory.chmod(0o755)
        assert newest(directory) == (1, ids[1])
        assert save(directory, 2)[2] == intact[1][2]


def test_a_file_that_may_not_be_read_makes_its_checkpoint_be_passed_over(intact, caplog):
    with trial("file that may not be read", STEP), as_nobody() as directory:
        save(directory, 1, 2)
        unreadable = of_step(directory, 2) / "losses.json"
        unreadable.chmod(0)
        assert newest(directory) == (1, intact[1][1])
        assert str(unreadable) in caplog.text


def test_a_clock_going_backwards_changes_nothing(tmp_path, intact, monkeypatch):
    directory = tmp_path / "run"
    shutil.copytree(intact[0], directory)
    for path in of_step(directory, 2).rglob("*"):
        os.utime(path, (0, 0))
    with trial("clock going backwards", STEP):
        assert newest(directory) == (2, intact[1][2])
        now = iter(range(10**9, 0, -3600))
        monkeypatch.setattr("time.time", lambda: float(next(now)))
        ids = save(directory, 3, 4, 5)
        monkeypatch.undo()
        assert newest(directory) == (5, ids[5])


@pytest.fixture
def late(tmp_path):
    """A store that lists what is there now, until the end."""
    yield lambda: bucket.Bucket.list_late(str(tmp_path / "store"))
    bucket.Bucket.late = False


def test_a_listing_that_lacks_the_newest_loses_nothing(tmp_path, intact, late):
    """Another machine goes on from the one before, and makes again what it did not see."""
    url, ids = f"bucket://{tmp_path}/store", intact[1]
    with trial("listing that comes late", STEP):
        save(tmp_path / "a", 1, 2, remote=url)
        late()
        ids = ids | save(tmp_path / "a", 3, remote=url)
        assert newest(tmp_path / "b", url) == (2, ids[2])
        again = save(tmp_path / "b", 3, 4, keep=2, remote=url)
        assert again[3] == ids[3]
        bucket.Bucket.late = False
        there = RemoteCheckpoints(url)
        found = [there.verify(name) for name in there.names()]
        assert {4, 3} <= {one.step for one in found}, "what it did not see was not removed"
        assert {one.step: one.content_id for one in found}.items() <= (ids | again).items()
        assert newest(tmp_path / "c", url) == (4, again[4])


def test_a_listing_that_still_has_what_was_removed_is_not_believed(tmp_path, intact, late):
    url, ids = f"bucket://{tmp_path}/store", intact[1]
    with trial("listing that comes late", STEP):
        save(tmp_path / "a", 1, 2, 3, remote=url)
        late()
        there = RemoteCheckpoints(url)
        lost, kept = there.names()[0], there.names()[1:]
        shutil.rmtree(tmp_path / "store" / lost)
        assert newest(tmp_path / "b", url) == (2, ids[2])
        again = save(tmp_path / "b", 3, keep=2, remote=url)
        assert newest(tmp_path / "b", url) == (3, again[3])
        bucket.Bucket.late = False
        assert [there.verify(name).step for name in there.names()] == [3, 2, 1]
        assert kept == there.names()[1:], "what was not listed does not make others superfluous"
        assert newest(tmp_path / "c", url) == (3, again[3])


def test_a_half_copied_checkpoint_does_not_count(tmp_path, intact):
    """However far the copy came, and whatever came first."""
    kept, ids = intact
    files = sorted(path for path in of_step(kept, 2).rglob("*") if path.is_file())
    for number in range(1, len(files)):
        directory = tmp_path / str(number)
        shutil.copytree(of_step(kept, 1), directory / of_step(kept, 1).name)
        with trial("half-copied directory", STEP):
            for path in files[:number]:  # `COMMIT` sorts before most
                target = directory / path.relative_to(kept)
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(path, target)
            assert newest(directory) == (1, ids[1])


def test_a_second_trainer_is_refused(tmp_path, intact):
    directory = tmp_path / "run"
    shutil.copytree(intact[0], directory)
    with trial("two at work on one directory", STEP):
        with open_checkpoints(directory, keep=2), pytest.raises(CheckpointError, match="in use by"):
            save(directory, 3)
        assert newest(directory) == (2, intact[1][2])
