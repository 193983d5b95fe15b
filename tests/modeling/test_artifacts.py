"""The store: recipes found, bytes shared, damage named, races survived, nothing half-published."""

import dataclasses
import json
import multiprocessing
import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from modeling.artifacts import (
    Artifact,
    ArtifactStore,
    Built,
    Input,
    Recipe,
    ReproducibilityError,
    Workspace,
    numerics_digest,
)
from modeling.canonical import digest
from modeling.inventory import INVENTORY, DamagedArtifactError, verify_files

SPAWN = multiprocessing.get_context("spawn")


def recipe(text: str, **inputs: Input) -> Recipe:
    return Recipe("tokenizer", 1, {"text": text}, inputs)


def writes(
    text: str, *, says: str | None = None, name: str = "text.txt"
) -> Callable[[Workspace], Built]:
    def build(workspace: Workspace) -> Built:
        (workspace.output / "part").mkdir()
        (workspace.output / "part" / name).write_text(text)
        return Built(
            digest("test", says or text), {"half": digest("half", text)}, {"chars": len(text)}
        )

    return build


def must_not_run(workspace: Workspace) -> Built:
    raise AssertionError("this recipe was built before")


@pytest.fixture
def store(tmp_path: Path) -> ArtifactStore:
    return ArtifactStore(str(tmp_path / "store"))


@pytest.fixture(params=["local", "remote"])
def any_store(request: pytest.FixtureRequest, tmp_path: Path) -> ArtifactStore:
    if request.param == "local":
        return ArtifactStore(str(tmp_path / "store"))
    return ArtifactStore(f"memory://{tmp_path.name}/{os.getpid()}", scratch=tmp_path / "scratch")


class TestRecipes:
    def test_an_equal_recipe_computes_nothing(self, any_store: ArtifactStore):
        first, built = any_store.materialize(recipe("a"), writes("a"))
        again, rebuilt = any_store.materialize(recipe("a"), must_not_run)
        assert (built, rebuilt) == (True, False)
        assert again == first
        path = any_store.local("tokenizer", first.content_id) / "part" / "text.txt"
        assert path.read_text() == "a"

    def test_id_depends_on_kind_version_params_and_used_inputs_only(self):
        used = Input("raw_corpus", "1" * 64, "2" * 64)
        base = Recipe("tokenizer", 1, {"n": 1}, {"corpus": used})
        assert (
            base.id
            == Recipe(
                "tokenizer", 1, {"n": 1}, {"corpus": Input("raw_corpus", "3" * 64, "2" * 64)}
            ).id
        )
        others = [
            Recipe("hf_model", 1, {"n": 1}, {"corpus": used}),
            Recipe("tokenizer", 2, {"n": 1}, {"corpus": used}),
            Recipe("tokenizer", 1, {"n": 1.0}, {"corpus": used}),
            Recipe("tokenizer", 1, {"n": 1}, {"documents": used}),
            Recipe("tokenizer", 1, {"n": 1}, {"corpus": Input("raw_corpus", "1" * 64, "1" * 64)}),
            Recipe("tokenizer", 1, {"n": 1}),
        ]
        assert len({base.id, *(other.id for other in others)}) == 7

    def test_two_recipes_with_one_content_share_their_bytes(self, any_store: ArtifactStore):
        one, _ = any_store.materialize(recipe("a"), writes("same"))
        other, built = any_store.materialize(recipe("b"), writes("same"))
        assert built
        assert (one.content_id, one.uri) == (other.content_id, other.uri)
        assert one.as_input() == other.as_input()

    def test_a_part_can_be_depended_on_instead_of_the_whole(self, store: ArtifactStore):
        artifact, _ = store.materialize(recipe("a"), writes("a"))
        assert artifact.as_input("half").used == artifact.roots["half"]
        with pytest.raises(ValueError, match="no root `other`"):
            artifact.as_input("other")

    def test_another_numerics_class_is_another_record_of_the_same_recipe(
        self, store: ArtifactStore
    ):
        cpu, _ = store.materialize(recipe("a"), writes("cpu bits"), numerics={"device": "cpu"})
        gpu, built = store.materialize(recipe("a"), writes("gpu bits"), numerics={"device": "gpu"})
        assert built
        assert cpu.recipe_id == gpu.recipe_id
        assert cpu.content_id != gpu.content_id
        assert store.materialize(recipe("a"), must_not_run, numerics={"device": "cpu"}) == (
            cpu,
            False,
        )


class TestPublishing:
    def test_progress_is_not_shared_between_numerics_classes(self, store: ArtifactStore):
        def leaves_progress(workspace: Workspace) -> Built:
            assert list(workspace.progress.iterdir()) == []
            (workspace.progress / "step-1").write_text("bits of one class")
            raise RuntimeError("preempted")

        for device in ("cpu", "gpu"):
            with pytest.raises(RuntimeError, match="preempted"):
                store.materialize(recipe("a"), leaves_progress, numerics={"device": device})

    def test_other_bytes_for_the_same_recipe_are_an_error_that_names_the_leaf(
        self, store: ArtifactStore, tmp_path: Path
    ):
        def attempt(weight: str) -> Artifact:
            output = tmp_path / weight
            output.mkdir()
            (output / "w").write_text(weight)
            leaves = {"bias": "same", "weight": weight}
            return store.publish(recipe("a"), output, Built(digest("t", weight), leaves=leaves))

        first = attempt("one")
        with pytest.raises(
            ReproducibilityError, match=r"First difference: `weight` \(1 of 2 differ\)"
        ):
            attempt("two")
        assert store.find(recipe("a")) == first

    def test_a_failed_build_publishes_nothing_and_keeps_its_progress(self, store: ArtifactStore):
        def fails(workspace: Workspace) -> Built:
            (workspace.progress / "shard-0").write_text("done")
            (workspace.output / "half").write_text("half")
            raise RuntimeError("disk full")

        with pytest.raises(RuntimeError, match="disk full"):
            store.materialize(recipe("a"), fails)
        assert store.find(recipe("a")) is None
        assert list(store.records()) == []

        def resumes(workspace: Workspace) -> Built:
            assert (workspace.progress / "shard-0").read_text() == "done"
            assert list(workspace.output.iterdir()) == []
            return writes("a")(workspace)

        store.materialize(recipe("a"), resumes)
        assert list((Path(store.root) / "work").glob("*/*/")) == []

    def test_progress_made_before_the_recipe_was_known_is_gone_on_with(self, store: ArtifactStore):
        stand_ins = [recipe("unknown one"), recipe("unknown two")]
        with store.begin(stand_ins[1]) as space:
            assert list(space.output.iterdir()) == []
            (space.progress / "half").write_text("made early")
        with store.begin(stand_ins[1]) as space:
            assert (space.progress / "half").exists(), "a second start finds it too"

        def go_on(workspace: Workspace) -> Built:
            assert (workspace.progress / "half").read_text() == "made early"
            return writes("whole")(workspace)

        artifact, is_new = store.materialize(recipe("known"), go_on, begun_as=stand_ins)
        assert is_new
        assert artifact.recipe_id == recipe("known").id
        assert not list(Path(store.root).glob("work/*/*/"))

    def test_progress_of_the_recipe_itself_comes_before_that_of_its_stand_in(
        self, store: ArtifactStore
    ):
        def fails(workspace: Workspace) -> Built:
            (workspace.progress / "own").touch()
            raise OSError("killed")

        with pytest.raises(OSError, match="killed"):
            store.materialize(recipe("known"), fails)
        with store.begin(recipe("unknown")) as space:
            (space.progress / "early").touch()

        def check(workspace: Workspace) -> Built:
            assert [path.name for path in workspace.progress.iterdir()] == ["own"]
            return writes("whole")(workspace)

        store.materialize(recipe("known"), check, begun_as=[recipe("unknown")])

    def test_a_record_without_its_object_is_built_again(self, store: ArtifactStore):
        artifact, _ = store.materialize(recipe("a"), writes("a"))
        directory = store.local("tokenizer", artifact.content_id)
        directory.rename(directory.with_name("0" * 64))
        assert store.find(recipe("a")) is None
        assert store.materialize(recipe("a"), writes("a")) == (artifact, True)

    @pytest.mark.parametrize("damage", [b"", b"{", b'{"kind": "tok'])
    def test_a_damaged_record_is_named(self, store: ArtifactStore, damage: bytes):
        artifact, _ = store.materialize(recipe("a"), writes("a"))
        path = store.record_path(artifact.recipe_id, "exact")
        Path(path).write_bytes(damage)
        with pytest.raises(DamagedArtifactError, match=rf"{path} is damaged .*remove it"):
            store.materialize(recipe("a"), must_not_run)
        Path(path).unlink()
        assert store.materialize(recipe("a"), writes("a"))[1]

    def test_the_record_says_what_is_needed_to_explain_it(self, store: ArtifactStore):
        parent, _ = store.materialize(recipe("p"), writes("p"))
        child, _ = store.materialize(
            recipe("c", corpus=parent.as_input("half")), writes("c"), provenance={"git": "abc"}
        )
        record = store.record(child.recipe_id)
        assert record["recipe"]["params"] == {"text": "c"}
        assert record["recipe"]["inputs"]["corpus"] == {
            "kind": "tokenizer",
            "content_id": parent.content_id,
            "used": parent.roots["half"],
        }
        assert record["provenance"] == {"git": "abc"}
        assert {r["content_id"] for r in store.records()} == {parent.content_id, child.content_id}


class TestDamage:
    @pytest.fixture
    def published(self, store: ArtifactStore) -> Path:
        artifact, _ = store.materialize(recipe("a"), writes("abc"))
        return store.local("tokenizer", artifact.content_id)

    def test_a_whole_object_verifies(self, published: Path):
        verify_files(published)

    @pytest.mark.parametrize(
        ("harm", "says"),
        [
            (lambda d: (d / "part" / "text.txt").unlink(), "text.txt is missing"),
            (lambda d: (d / "part" / "text.txt").write_text("ab"), "has 2 bytes, not 3"),
            (lambda d: (d / "part" / "text.txt").write_text("abd"), "has other bytes"),
            (lambda d: (d / "part" / "more.txt").write_text(""), "more.txt was not published"),
        ],
    )
    def test_each_harm_is_named(self, published: Path, harm: Callable[[Path], object], says: str):
        harm(published)
        with pytest.raises(DamagedArtifactError, match=says):
            verify_files(published)

    def test_a_copy_of_a_damaged_remote_object_is_refused(self, tmp_path: Path):
        store = ArtifactStore("memory://damaged", scratch=tmp_path)
        artifact, _ = store.materialize(recipe("a"), writes("abc"))
        files = store.files_path("tokenizer", artifact.content_id)
        store.filesystem.pipe_file(f"{files}/part/text.txt", b"abd")
        with pytest.raises(DamagedArtifactError, match="has other bytes"):
            store.local("tokenizer", artifact.content_id)


class TestNames:
    def test_aliases_and_prefixes_name_contents(self, store: ArtifactStore):
        artifact, _ = store.materialize(recipe("a"), writes("a"))
        store.set_alias("best", artifact.content_id)
        assert store.resolve("best") == artifact.content_id
        assert store.resolve(artifact.content_id[:8]) == artifact.content_id
        with pytest.raises(ValueError, match="names no artifact"):
            store.resolve("ffffff")

    def test_what_several_artifacts_could_be_is_told_with_their_kinds(self, store: ArtifactStore):
        same = "c0ffee" + 58 * "1"
        for kind in ("checkpoint", "hf_model"):
            store.materialize(Recipe(kind, 1, {}), lambda workspace: Built(same))
        other = "c0ffee" + 58 * "2"
        store.materialize(Recipe("checkpoint", 2, {}), lambda workspace: Built(other))
        with pytest.raises(ValueError, match="names 3 artifacts") as error:
            store.resolve("c0ffee")
        for told in (
            f"checkpoint:{same[:16]}",
            f"hf_model:{same[:16]}",
            f"checkpoint:{other[:16]}",
        ):
            assert told in str(error.value)
        with pytest.raises(ValueError, match=rf"checkpoint:{same[:16]}, hf_model:{same[:16]}"):
            store.resolve_object(same)
        assert store.resolve_object(f"hf_model:{same[:8]}") == ("hf_model", same)
        assert store.resolve_object(other, kind="checkpoint") == ("checkpoint", other)
        with pytest.raises(ValueError, match=r"no tokenizer, but checkpoint:"):
            store.resolve_object(other, kind="tokenizer")

    @pytest.mark.parametrize("name", ["../up", "a/b", "", ".hidden", "a" * 200])
    def test_names_cannot_leave_their_folder(self, store: ArtifactStore, name: str):
        with pytest.raises(ValueError, match="not a valid alias"):
            store.set_alias(name, "0" * 64)

    def test_ids_cannot_leave_their_folder(self, store: ArtifactStore):
        with pytest.raises(ValueError, match="not a valid content id"):
            store.local("tokenizer", "../../etc")
        with pytest.raises(ValueError, match="not a valid artifact kind"):
            store.local("../tokenizer", "0" * 64)


def _build_slowly(root: str, count_dir: str) -> None:
    def build(workspace: Workspace) -> Built:
        (Path(count_dir) / str(os.getpid())).touch()
        signal.sigtimedwait([], 0.2)
        return writes("a")(workspace)

    ArtifactStore(root).materialize(recipe("a"), build)


def _build_and_die(root: str) -> None:
    def build(workspace: Workspace) -> Built:
        (workspace.progress / "shard-0").write_text("done")
        os.kill(os.getpid(), signal.SIGKILL)
        raise AssertionError("unreachable")

    ArtifactStore(root).materialize(recipe("a"), build)


class TestProcesses:
    def test_processes_racing_on_one_recipe_build_it_once(
        self, store: ArtifactStore, tmp_path: Path
    ):
        count_dir = tmp_path / "built"
        count_dir.mkdir()
        racers = [
            SPAWN.Process(target=_build_slowly, args=(store.root, str(count_dir))) for _ in range(3)
        ]
        for racer in racers:
            racer.start()
        for racer in racers:
            racer.join(60)
        assert [racer.exitcode for racer in racers] == [0, 0, 0]
        assert len(list(count_dir.iterdir())) == 1
        assert len(list(store.records())) == 1

    def test_a_killed_builder_holds_nothing_up_and_its_progress_is_found(
        self, store: ArtifactStore
    ):
        victim = SPAWN.Process(target=_build_and_die, args=(store.root,))
        victim.start()
        victim.join(60)
        assert victim.exitcode == -signal.SIGKILL
        assert store.find(recipe("a")) is None

        def resumes(workspace: Workspace) -> Built:
            assert (workspace.progress / "shard-0").read_text() == "done"
            return writes("a")(workspace)

        assert store.materialize(recipe("a"), resumes)[1]


def test_work_of_another_class_is_offered_and_what_comes_of_it_is_of_both(any_store: ArtifactStore):
    store, wanted = any_store, recipe("x")
    first, second = {"mesh": 8}, {"mesh": 4}
    before = [{"class": "8", "until": 3}]

    def dies(workspace: Workspace) -> Built:
        (workspace.progress / "step-3").write_text("done so far")
        raise ConnectionError

    def goes_on(workspace: Workspace) -> Built:
        (other,) = workspace.elsewhere
        assert (other.local / "step-3").read_text() == "done so far"
        assert (other.remote is None) == store.is_local
        return dataclasses.replace(writes("both")(workspace), numerics_before=before)

    with pytest.raises(ConnectionError):
        store.materialize(wanted, dies, numerics=first)
    made, is_new = store.materialize(wanted, goes_on, numerics=second)
    assert is_new
    record = store.record(made.recipe_id, made.numerics)
    assert record["numerics"]["class"] == second | {"before": before}
    assert record["numerics"]["ended_in"] == numerics_digest(second) != made.numerics
    assert store.materialize(wanted, must_not_run, numerics=second) == (made, False)
    assert store.find(wanted, numerics_digest(first)) is None

    # What one class alone makes is no contradiction, and counts for more.
    output = store.scratch / "alone"
    output.mkdir()
    pure = writes("alone")(Workspace(output, output))
    alone = store.publish(wanted, output, pure, numerics=second)
    assert alone.content_id != made.content_id
    assert store.find(wanted, numerics_digest(second)) == alone


def test_work_of_another_class_is_offered_that_was_begun_before_the_recipe_was_known(
    any_store: ArtifactStore,
):
    store, early = any_store, recipe("early")
    with store.begin(early, {"mesh": 8}) as space:
        assert space.elsewhere == ()
        (space.progress / "step-3").write_text("done so far")
    with store.begin(early, {"mesh": 2}) as space:
        (other,) = space.elsewhere
        assert (other.local / "step-3").exists()

    def goes_on(workspace: Workspace) -> Built:
        of_eight, of_two = sorted(workspace.elsewhere, key=lambda it: not any(it.local.iterdir()))
        assert (of_eight.local / "step-3").read_text() == "done so far"
        assert list(of_two.local.iterdir()) == []
        return writes("both")(workspace)

    assert store.materialize(recipe("x"), goes_on, numerics={"mesh": 4}, begun_as=[early])[1]


def test_work_of_another_class_is_left_alone_while_somebody_does_it(store: ArtifactStore):
    said: list[str] = []

    def at_work(workspace: Workspace) -> Built:
        def alone(inner: Workspace) -> Built:
            assert inner.elsewhere == ()
            return writes("x")(inner)

        store.materialize(
            recipe("x"), alone, numerics={"mesh": 4}, report=lambda x: said.append(str(x))
        )
        return writes("x")(workspace)

    store.materialize(recipe("x"), at_work, numerics={"mesh": 8})
    assert len([line for line in said if "it is left alone" in line]) == 1

    def is_over(workspace: Workspace) -> Built:
        assert workspace.elsewhere == (), "both are on record"
        return writes("x")(workspace)

    store.materialize(recipe("x"), is_over, numerics={"mesh": 2})


def test_layout_on_disk_is_as_documented(store: ArtifactStore):
    artifact, _ = store.materialize(recipe("a"), writes("a"))
    store.set_alias("best", artifact.content_id)
    root = Path(store.root)
    directory = root / "objects" / "tokenizer" / artifact.content_id
    inventory = json.loads((directory / INVENTORY).read_text())
    assert [entry["path"] for entry in inventory["files"]] == ["part/text.txt"]
    record = json.loads(
        (root / "recipes" / artifact.recipe_id / "exact" / "artifact.json").read_text()
    )
    assert record["content_id"] == artifact.content_id
    assert json.loads((root / "aliases" / "best").read_text()) == {
        "content_id": artifact.content_id
    }
