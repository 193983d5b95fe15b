"""References go from asset to asset as JSON, pinned within a run."""

import json

import dagster as dg
import pytest

from modeling.artifacts import Artifact
from resources.io_manager import ReferenceIOManager, ReferenceIOManagerFactory, scope_of

FIRST = Artifact("toy", "ab" * 32, "cd" * 32, "exact", "file:///x", {"part": "ef" * 32}, {"n": 1})
PARENT = dg.AssetSelection.assets(["d", "parent"]).without_checks()
SECOND = Artifact("toy", "12" * 32, "cd" * 32, "exact", "file:///y", {}, {})


def run(store, *, made, seen, selection=None, between=lambda: None):
    """Runs `parent` (which hands on `made`) and `child` (which adds what it got to `seen`)."""

    @dg.asset(key=["d", "parent"])
    def parent() -> Artifact:
        return made

    @dg.asset(ins={"parent": dg.AssetIn(["d", "parent"])})
    def child(parent: Artifact) -> None:
        seen.append(parent)

    @dg.asset_check(asset=parent)
    def check(parent: Artifact) -> dg.AssetCheckResult:
        between()
        return dg.AssetCheckResult(passed=parent == made)

    return dg.materialize(
        [parent, child, check],
        resources={"io_manager": ReferenceIOManagerFactory(url=str(store))},
        selection=selection,
    )


def test_the_child_gets_what_the_parent_made(tmp_path):
    seen = []
    run(tmp_path, made=FIRST, seen=seen)
    assert seen == [FIRST]


def test_a_run_of_the_child_alone_takes_the_latest(tmp_path):
    seen = []
    run(tmp_path, made=FIRST, seen=seen, selection=PARENT)
    run(tmp_path, made=SECOND, seen=seen, selection=PARENT)
    run(tmp_path, made=FIRST, seen=seen, selection=dg.AssetSelection.assets("child"))
    assert seen == [SECOND]


def test_a_run_never_takes_what_another_makes_meanwhile(tmp_path):
    seen = []

    def another():
        run(tmp_path, made=SECOND, seen=[], selection=PARENT)

    run(tmp_path, made=FIRST, seen=seen, between=another)
    assert seen == [FIRST]


def test_instances_that_share_a_store_have_references_of_their_own(tmp_path):
    homes = []
    for name in "ab":
        (tmp_path / name).mkdir()
        homes.append(dg.DagsterInstance.local_temp(str(tmp_path / name)))
    assert scope_of(homes[0]) != scope_of(homes[1])
    managers = [ReferenceIOManager(str(tmp_path / "store"), scope_of(home)) for home in homes]
    key = dg.AssetKey(["d", "parent"])
    context = dg.build_output_context(asset_key=key, run_id="r")
    managers[0].handle_output(context, FIRST)
    assert managers[0].latest(key) == FIRST
    with pytest.raises(FileNotFoundError, match="d/parent has never been materialized here"):
        managers[1].latest(key)


def test_an_instance_that_was_moved_finds_its_references(tmp_path):
    (tmp_path / "before").mkdir()
    with dg.DagsterInstance.local_temp(str(tmp_path / "before")) as instance:
        scope = scope_of(instance)
        assert scope_of(instance) == scope
    (tmp_path / "before").rename(tmp_path / "after")
    with dg.DagsterInstance.local_temp(str(tmp_path / "after")) as instance:
        assert scope_of(instance) == scope


def test_references_are_json_and_nothing_but_artifacts_passes(tmp_path):
    manager = ReferenceIOManager(str(tmp_path), "scope")
    context = dg.build_output_context(asset_key=dg.AssetKey(["d", "parent"]), run_id="r")
    manager.handle_output(context, FIRST)
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert [json.loads(path.read_text())["content_id"] for path in files] == ["ab" * 32] * 2
    with pytest.raises(TypeError, match="d/parent: an asset hands on"):
        manager.handle_output(context, {"not": "an artifact"})
