"""What tools tell of checkpoints is what NumPy says of the arrays that were saved."""

import dataclasses
import json
import struct
from concurrent.futures import ThreadPoolExecutor

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from safetensors import safe_open

import haliax as hax
from modeling.training import checkpoint, manifest
from modeling.training.inspecting import described, differences, export
from modeling.training.leaves import snapshot
from modeling.training.manifest import CheckpointError
from modeling.training.reading import faults, read_manifest

Embed, Mlp = hax.Axis("embed", 8), hax.Axis("mlp", 3)


def state(**changes):
    """A model in two dtypes with an average, and other state beside it."""
    draw = np.random.default_rng(0)
    up = jnp.asarray(draw.normal(size=(8, 3)), jnp.float32)
    model = {
        "up": hax.named(up, (Embed, Mlp)),
        "scale": jnp.asarray(draw.normal(size=(5,)), jnp.bfloat16),
        "depth": jnp.asarray(7, jnp.int32),
    }
    averages = {"ema": {"up": hax.named(up / 2, (Embed, Mlp))}}
    tree = {"model": model, "averages": averages, "key": jnp.asarray([1, 2], jnp.uint32)}
    return tree | changes


def write(directory, tree, *, processes=1, kind=checkpoint.Writers):
    """Writes a tree, each of several writers a share of the chunks."""
    leaves = snapshot(tree)
    step = {"step": 3, "cursor": {"rows": 6}, "config": {}, "files": {"losses.json": {}}}
    if processes == 1:
        checkpoint.write(directory, leaves, **step)
        return directory

    def share(index):
        own = [
            dataclasses.replace(leaf, chunks=dict(list(leaf.chunks.items())[index::processes]))
            for leaf in leaves
        ]
        writers = kind(index, processes)
        checkpoint.write(directory, own, writers=writers, **step)

    with ThreadPoolExecutor(processes) as pool:
        list(pool.map(share, range(processes)))
    return directory


def header_of(path):
    raw = path.read_bytes()
    (length,) = struct.unpack("<Q", raw[:8])
    return json.loads(raw[8 : 8 + length])


class Late(checkpoint.Writers):
    """The second of two, which the machine lets go on only when the first has committed."""

    def wait_for(self, path):
        if self.index and path.name.startswith("digests"):
            super().wait_for(path.parents[1] / manifest.COMMIT)
            checkpoint.Writers(self.index, self.count, patience_s=0.0).wait_for(path)
        super().wait_for(path)


def test_the_first_of_two_writers_may_be_done_before_the_second_looks(tmp_path):
    """Which once waited for ever for what the first had removed."""
    saved = write(tmp_path / "saved", state(), processes=2, kind=Late)
    assert not list(faults(saved))
    assert not (saved / manifest.PARTS).exists()


class TestExport:
    def test_the_file_holds_the_weights_to_the_bit(self, tmp_path):
        tree, target = state(), tmp_path / "weights.safetensors"
        assert export(write(tmp_path / "saved", tree), target) == 3
        with safe_open(target, framework="flax") as file:
            found = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        assert sorted(found) == ["depth", "scale", "up"]
        for name, array in tree["model"].items():
            expected = array.array if isinstance(array, hax.NamedArray) else array
            assert found[name].dtype == expected.dtype
            np.testing.assert_array_equal(found[name], expected)

    def test_there_is_one_metadata_key_and_tensors_are_aligned(self, tmp_path):
        target = tmp_path / "weights.safetensors"
        export(write(tmp_path / "saved", state()), target, "state")
        header = header_of(target)
        assert header.pop("__metadata__") == {"format": "pt"}
        assert sorted(header) == [
            "averages.ema.up", "key", "model.depth", "model.scale", "model.up",
        ]  # fmt: skip
        widths = {"F32": 4, "U32": 4, "I32": 4, "BF16": 2}
        assert all(x["data_offsets"][0] % widths[x["dtype"]] == 0 for x in header.values())

    def test_bytes_are_the_same_whatever_wrote_the_checkpoint(self, tmp_path):
        mesh = Mesh(np.array(jax.devices()[:4]), ("data",))
        tree = state()
        split = NamedSharding(mesh, PartitionSpec("data", None))
        up = hax.named(jax.device_put(tree["model"]["up"].array, split), (Embed, Mlp))
        cut = state(model=tree["model"] | {"up": up})
        saved = [write(tmp_path / "one", tree), write(tmp_path / "two", cut, processes=2)]
        assert [len(read_manifest(path).leaf("model.up").chunks) for path in saved] == [1, 4]
        files = [tmp_path / f"{path.name}.safetensors" for path in saved]
        for path, file in zip(saved, files, strict=True):
            export(path, file)
        assert files[0].read_bytes() == files[1].read_bytes()

    def test_an_average_is_weights_too(self, tmp_path):
        target = tmp_path / "ema.safetensors"
        export(write(tmp_path / "saved", state()), target, "ema")
        assert header_of(target)["up"]["shape"] == [8, 3]
        with pytest.raises(
            CheckpointError, match=r"no weights `emma`; did you mean `ema`\?; it has"
        ):
            export(tmp_path / "saved", tmp_path / "other", "emma")

    def test_nothing_is_overwritten_and_nothing_half_is_left(self, tmp_path):
        saved, target = write(tmp_path / "saved", state()), tmp_path / "weights.safetensors"
        target.write_text("precious")
        with pytest.raises(FileExistsError, match="exists already"):
            export(saved, target)
        assert target.read_text() == "precious"
        chunk = next((saved / "arrays" / "model.up").glob("c.*"))
        chunk.write_bytes(chunk.read_bytes()[:-1] + b"?")
        with pytest.raises(CheckpointError, match=r"model\.up"):
            export(saved, tmp_path / "new")
        assert sorted(path.name for path in tmp_path.iterdir()) == ["saved", target.name]


class TestDifferences:
    def test_a_checkpoint_is_no_different_from_itself_elsewhere(self, tmp_path):
        assert not list(differences(write(tmp_path / "a", state()), write(tmp_path / "b", state())))

    def test_each_kind_is_told_by_array(self, tmp_path):
        tree = state()
        up = tree["model"]["up"].array.at[0, 0].add(0.5).at[7, 2].add(-0.25)
        scale = tree["model"]["scale"].astype(jnp.float32)
        model = {"up": hax.named(up, (Embed, Mlp)), "scale": scale, "new": jnp.zeros(2)}
        other = write(tmp_path / "b", state(model=model))
        found = {x.path: x for x in differences(write(tmp_path / "a", tree), other)}
        assert found["model.up"].what == "2 of 24 elements differ, by at most 0.5"
        assert found["model.up"].max_abs == pytest.approx(0.5, abs=1e-6)
        assert (
            found["model.scale"].what == "is bfloat16[5] in the first and float32[5] in the second"
        )
        assert found["model.depth"].what == "is in the first alone"
        assert found["model.new"].what == "is in the second alone"
        assert set(found) == {"model.up", "model.scale", "model.depth", "model.new"}

    def test_numbers_that_are_none_are_counted_but_not_measured(self, tmp_path):
        first = {"model": {"x": jnp.asarray([1.0, 2.0, jnp.inf, 0.0])}}
        second = {"model": {"x": jnp.asarray([jnp.nan, 2.5, jnp.inf, -0.0])}}
        (found,) = differences(write(tmp_path / "a", first), write(tmp_path / "b", second))
        assert found.what == "3 of 4 elements differ, by at most 0.5", "the zeros' signs differ"


def test_an_array_is_described_by_its_axes(tmp_path):
    manifest = read_manifest(write(tmp_path / "saved", state()))
    assert described(manifest.leaf("model.up")) == "float32[embed=8, mlp=3]"
    assert described(manifest.leaf("model.depth")) == "int32[]"


def test_every_damaged_file_is_named(tmp_path):
    saved = write(tmp_path / "saved", state())
    assert list(faults(saved)) == []
    (saved / "losses.json").write_text("{ }")
    (saved / "arrays" / "model.up" / "c.0.0").unlink()
    (saved / "arrays" / "model.scale" / "zarr.json").write_text("{}")
    found = list(faults(saved))
    assert len(found) == 3
    for name in ("losses.json", "model.up/c.0.0", "model.scale/zarr.json"):
        assert any(name in fault for fault in found), found
    (saved / "COMMIT").unlink()
    (fault,) = faults(saved)
    assert "never completed" in fault
