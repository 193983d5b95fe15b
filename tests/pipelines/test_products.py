"""Damage to what the chain really makes, file by file: always told by name, never handed out."""

import shutil
import sys
from pathlib import Path

import pytest

from modeling.artifacts import ArtifactStore
from modeling.inventory import DamagedArtifactError

sys.path.insert(0, str(Path(__file__).parents[1] / "faults"))
from catalogue import FILE_DAMAGES, KINDS, trial
from damage import harm, likest

DAMAGES = [damage for damage in FILE_DAMAGES if "older version" not in damage]
"""There is but one version of what was made once; `tests/faults` has two."""


@pytest.mark.parametrize(
    "at_once", [1, pytest.param(len(DAMAGES), marks=pytest.mark.slow)], ids=["in turn", "each"]
)
def test_damage_to_a_file_of_any_product_is_named_and_never_handed_out(
    chain, first_run, tmp_path, at_once
):
    """In a copy of the store. Files take the damages in turn, in the soak each file takes all."""
    leave_out = shutil.ignore_patterns("work", "leases", "verified")
    shutil.copytree(chain.store_directory, tmp_path / "store", ignore=leave_out)
    store, kinds, turn = ArtifactStore(str(tmp_path / "store")), [], 0
    for record in store.records():
        kind, content_id = record["kind"], record["content_id"]
        kinds.append(kind)
        root = store.local(kind, content_id)  # noted as verified
        files = sorted(path for path in root.rglob("*") if path.is_file())
        for path in (path for path in files if path.stat().st_size):
            sibling = likest(path, files)
            kept = {one: one.read_bytes() for one in (path, sibling)}
            for damage in (DAMAGES * 2)[turn : turn + at_once]:
                with trial(damage, kind):
                    harm(damage, path, sibling=sibling, older=path, elsewhere=tmp_path / "copy")
                    with pytest.raises(DamagedArtifactError) as told:
                        store.local(kind, content_id)
                    # An exchange with the inventory is told of the inventory.
                    names = [path.relative_to(root).as_posix()]
                    if damage == "exchanged with a sibling":
                        names.append(sibling.relative_to(root).as_posix())
                    assert any(name in str(told.value) for name in names)
                for one, content in kept.items():
                    one.unlink(missing_ok=True)
                    one.write_bytes(content)
            turn = (turn + 1) % len(DAMAGES)
        assert store.local(kind, content_id) == root
    assert sorted(kinds) == sorted(KINDS)
