"""`check` misses no damage and names it; `garbage` lists nothing that anything reaches."""

import contextlib
import datetime
import fcntl
import json
import os

import pytest

from modeling import collection
from modeling.artifacts import ArtifactStore, Built, Recipe, numerics_digest, reference_bytes
from modeling.canonical import digest
from modeling.collection import delete, garbage
from modeling.inventory import INVENTORY, DamagedArtifactError, verify_files
from modeling.notes import sealed_bytes
from modeling.upkeep import check, set_aside

LATER = datetime.datetime.now(datetime.UTC) + datetime.timedelta(days=10)


@pytest.fixture(params=["local", "remote"])
def store(request, tmp_path):
    if request.param == "local":
        return ArtifactStore(str(tmp_path / "store"))
    return ArtifactStore(f"memory://{tmp_path.name}/{os.getpid()}", scratch=tmp_path / "scratch")


def make(store, kind, text, *, days_ago=0, **inputs):
    """Makes an artifact of two files from others."""

    def build(workspace):
        (workspace.output / "part").mkdir()
        (workspace.output / "part" / "a.txt").write_text(text)
        (workspace.output / "b.txt").write_text(text * 2)
        return Built(digest("test", [kind, text]))

    ended = datetime.datetime.now(datetime.UTC) - datetime.timedelta(days=days_ago)
    recipe = Recipe(kind, 1, {"text": text}, {name: it.as_input() for name, it in inputs.items()})
    provenance = {"times": {"ended": ended.isoformat()}}
    return store.materialize(recipe, build, provenance=provenance)[0]


@pytest.fixture
def chain(store):
    """Corpus, tokenizer and tokens: the last is made of both."""
    corpus = make(store, "raw_corpus", "tales")
    tokenizer = make(store, "tokenizer", "words", corpus=corpus)
    return corpus, tokenizer, make(store, "tokens", "ids", corpus=corpus, tokenizer=tokenizer)


def unsealed(record):
    return {name: value for name, value in record.items() if name != "sha256"}


def path_of(store, artifact, file="part/a.txt"):
    key = artifact.kind, artifact.content_id
    directory = store.object_path(*key) if file == INVENTORY else store.files_path(*key)
    return f"{directory}/{file}"


def test_a_sound_store_has_no_faults_and_no_garbage(store, chain):
    assert check(store) == []
    assert garbage(store, now=LATER) == []


@pytest.mark.parametrize("kind", [0, 1, 2])
@pytest.mark.parametrize("file", ["part/a.txt", "b.txt", INVENTORY])
@pytest.mark.parametrize("damage", ["truncate", "delete", "flip", "swap"])
def test_every_damage_to_every_file_is_named(store, chain, kind, file, damage):
    fs, path = store.filesystem, path_of(store, chain[kind], file)
    data = fs.cat_file(path)
    match damage:
        case "truncate":
            fs.pipe_file(path, data[:-1])
        case "delete":
            fs.rm(path)
        case "flip":
            # In the inventory a digit of a digest, so that it stays what it seems to be.
            where = data.index(b'"sha256": "') + 12 if file == INVENTORY else 0
            fs.pipe_file(path, data[:where] + bytes([data[where] ^ 1]) + data[where + 1 :])
        case "swap":
            fs.pipe_file(path, fs.cat_file(path_of(store, chain[kind - 1], file)))
    found = [one for one in check(store) if one.object is not None]
    object_key = (chain[kind].kind, chain[kind].content_id)
    assert {one.object for one in found} == {object_key}
    assert path in {one.path for one in found}


def test_a_file_that_was_not_published_is_named(store, chain):
    store.filesystem.pipe_file(path_of(store, chain[1], "extra.txt"), b"")
    (found,) = check(store)
    assert found.path.endswith("extra.txt")
    assert "not published" in found.what


def test_a_damaged_artifact_is_told_what_it_needs_and_made_again(store, chain):
    corpus, tokenizer, _ = chain
    for artifact in (tokenizer, corpus):
        store.filesystem.pipe_file(path_of(store, artifact), b"other")
    by_kind = {one.object[0]: one.remedy for one in check(store)}
    recipe = store.record(tokenizer.recipe_id)["recipe_id"][:12]
    assert f"recipe {recipe} makes it from corpus: raw_corpus" in by_kind["tokenizer"]
    assert "(lost as well)" in by_kind["tokenizer"]
    assert "its source alone" in by_kind["raw_corpus"]

    kept = set_aside(store, (tokenizer.kind, tokenizer.content_id))
    (moved,) = (path for path in store.filesystem.find(kept) if path.endswith("part/a.txt"))
    assert store.filesystem.cat_file(moved) == b"other"
    assert any("which is not stored" in one.what for one in check(store))
    assert make(store, "tokenizer", "words", corpus=corpus) == tokenizer
    assert {one.object for one in check(store)} == {(corpus.kind, corpus.content_id)}


def test_damaged_records_aliases_and_lineage_are_named(store, chain):
    corpus, tokenizer, tokens = chain
    fs = store.filesystem
    store.set_alias("best", "0" * 64)
    fs.pipe_file(store.record_path(tokens.recipe_id, "exact"), b"{")
    record = json.loads(fs.cat_file(store.record_path(tokenizer.recipe_id, "exact")))
    fs.pipe_file(
        store.record_path(tokenizer.recipe_id, "exact"),
        sealed_bytes(unsealed(record) | {"recipe_id": corpus.recipe_id}),
    )
    told = [str(one) for one in check(store)]
    assert any("aliases/best" in line and "not stored" in line for line in told)
    assert any(tokens.recipe_id in line and "no valid record" in line for line in told)
    assert any(tokenizer.recipe_id in line and "lies under" in line for line in told)
    with pytest.raises(ValueError, match="while a record is damaged"):
        garbage(store, now=LATER)


def test_a_lost_record_of_an_input_breaks_the_lineage(store, chain):
    corpus, _, _ = chain
    store.filesystem.rm(store.record_path(corpus.recipe_id, "exact"))
    told = [one.what for one in check(store)]
    assert sum("has no record" in what for what in told) == 2
    # What others on record were made of is kept all the same.
    assert garbage(store, now=LATER) == []


def test_an_object_without_a_record_is_garbage_once_it_is_old(store, chain):
    lost = chain[2]
    store.filesystem.rm(store.record_path(lost.recipe_id, "exact"))
    assert garbage(store) == [], "a build may be about to put it on record"
    (found,) = garbage(store, now=LATER)
    assert found.path == store.object_path(lost.kind, lost.content_id)
    assert found.num_bytes > 9
    store.set_alias("best", lost.content_id)
    assert garbage(store, now=LATER) == [], "an alias keeps it"
    store.filesystem.rm(f"{store.root}/aliases/best")
    delete(store, garbage(store, now=LATER))
    assert not store.contains(lost.kind, lost.content_id)
    assert check(store) == []


def test_old_records_expire_unless_a_name_or_an_instance_reaches_them(store):
    corpus = make(store, "raw_corpus", "old", days_ago=90)
    kept = [make(store, "tokens", text, days_ago=90, corpus=corpus) for text in ("a", "b")]
    gone = make(store, "tokens", "c", days_ago=90, corpus=corpus)
    young = make(store, "tokens", "d", days_ago=5, corpus=corpus)
    store.set_alias("best", kept[0].content_id)
    store.filesystem.makedirs(f"{store.root}/refs/scope/latest/nano", exist_ok=True)
    store.filesystem.pipe_file(
        f"{store.root}/refs/scope/latest/nano/tokens.json", reference_bytes(kept[1])
    )
    found = garbage(store, now=LATER, expire_records_after_days=30.0)
    assert {one.path for one in found} == {
        store.record_path(gone.recipe_id, "exact"),
        store.object_path(gone.kind, gone.content_id),
    }
    delete(store, found)
    assert check(store) == []
    assert [store.contains(a.kind, a.content_id) for a in (corpus, *kept, young, gone)] == [
        True, True, True, True, False,
    ]  # fmt: skip


def test_work_that_is_done_is_garbage_and_work_in_hand_is_not(store, chain):
    done = store.scratch / "work" / chain[0].recipe_id / "exact"
    dead = store.scratch / "work" / ("f" * 64) / "exact"
    for work in (done, dead):
        (work / "progress").mkdir(parents=True)
        (work / "progress" / "x").write_text("four")
        work.with_suffix(".lock").touch()
    (dead / "attempt-1").mkdir()
    assert [one.path for one in garbage(store)] == [str(done)]
    found = {one.path: one.num_bytes for one in garbage(store, now=LATER)}
    assert found == {str(done): 4, str(dead / "attempt-1"): 0}, "progress is for any retry"
    with dead.with_suffix(".lock").open() as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        assert [one.path for one in garbage(store, now=LATER)] == [str(done)]


def without_a_record(store, artifact):
    store.filesystem.rm(store.record_path(artifact.recipe_id, "exact"))
    return artifact


@pytest.mark.parametrize("field", ["params", "content_id", "facts", "recipe_id", "sha256", "text"])
def test_a_flipped_bit_anywhere_in_a_record_is_never_believed(store, chain, field):
    path = store.record_path(chain[1].recipe_id, "exact")
    raw = store.filesystem.cat_file(path)
    where = raw.index(f'"{field}": '.encode()) + 1
    for offset in (0, len(field) + 4):  # the name, and what it says
        changed = bytearray(raw)
        changed[where + offset] ^= 1
        store.filesystem.pipe_file(path, bytes(changed))
        assert path in {one.path for one in check(store)}
        with pytest.raises(DamagedArtifactError, match="is damaged"):
            store.find(Recipe("tokenizer", 1, {"text": "words"}, {"corpus": chain[0].as_input()}))
    store.filesystem.pipe_file(path, raw)
    assert check(store) == []


def test_records_from_before_they_were_sealed_are_taken_as_they_are(store, chain):
    path = store.record_path(chain[0].recipe_id, "exact")
    record = unsealed(json.loads(store.filesystem.cat_file(path)))
    store.filesystem.pipe_file(path, json.dumps(record).encode())
    assert make(store, "raw_corpus", "tales") == chain[0]
    assert check(store) == []
    record["recipe"]["inputs"] = {"x": {"kind": "../..", "content_id": "x", "used": "x"}}
    store.filesystem.pipe_file(path, json.dumps(record).encode())
    assert "name no objects" in str(check(store)[0])


@pytest.mark.parametrize("place", ["aliases", "refs/scope/latest/nano", "recipes/0/exact"])
def test_what_a_killed_writer_of_a_note_left_harms_nothing_and_is_collected(store, chain, place):
    left = f"{store.root}/{place}/.note.json.0123456789ab"
    store.filesystem.makedirs(left.rpartition("/")[0], exist_ok=True)
    store.filesystem.pipe_file(left, b'{"conte')
    store.set_alias("best", chain[0].content_id)
    assert store.aliases() == {"best": chain[0].content_id}
    assert check(store) == garbage(store) == []
    assert [one.path for one in garbage(store, now=LATER)] == [left]
    delete(store, garbage(store, now=LATER))
    assert not store.filesystem.exists(left)


def test_a_stray_among_the_objects_is_named_and_no_obstacle(store, chain):
    stray = f"{store.root}/objects/tokens/notes.txt"
    store.filesystem.pipe_file(stray, b"mine")
    assert [(one.path, one.what) for one in check(store)] == [(stray, "has no object's name")]
    assert garbage(store, now=LATER) == []


@pytest.mark.parametrize("by", ["record", "alias", "reference", "lease"])
def test_what_is_named_while_it_is_collected_is_given_back(store, chain, monkeypatch, by):
    """The worst moment: it has lost its name, the others are about to be looked at."""
    lost = without_a_record(store, chain[2])
    found = garbage(store, now=LATER)
    assert [one.object for one in found] == [(lost.kind, lost.content_id)]
    take_away = collection._take_away

    def taken_and_named(*args):
        taken = take_away(*args)
        assert not store.contains(lost.kind, lost.content_id)
        match by:
            case "record":
                assert make(store, "tokens", "ids", corpus=chain[0], tokenizer=chain[1]) == lost
            case "alias":
                store.set_alias("best", lost.content_id)
            case "reference":
                path = f"{store.root}/refs/scope/latest/nano/tokens.json"
                store.filesystem.makedirs(path.rpartition("/")[0], exist_ok=True)
                store.filesystem.pipe_file(path, reference_bytes(lost))
            case "lease":
                stack.enter_context(store.begin(Recipe("x", 1, {}, {"tokens": lost.as_input()})))
        return taken

    monkeypatch.setattr(collection, "_take_away", taken_and_named)
    with contextlib.ExitStack() as stack:
        gone = delete(store, found)
        assert gone == []
        assert store.contains(lost.kind, lost.content_id)
    verify_files(store.local(lost.kind, lost.content_id))
    assert not store.filesystem.glob(f"{store.root}/trash/*/*")


@pytest.mark.parametrize("when", ["before", "after"])
def test_a_writer_whose_object_is_collected_before_its_record_stores_it_again(
    store, chain, monkeypatch, when
):
    lost = without_a_record(store, chain[2])
    found = garbage(store, now=LATER)
    sound_inventory = ArtifactStore._sound_inventory

    def collected(self, *key):
        monkeypatch.undo()
        digest = sound_inventory(self, *key) if when == "after" else None
        assert delete(store, found) == found
        return digest or sound_inventory(self, *key)

    monkeypatch.setattr(ArtifactStore, "_sound_inventory", collected)
    assert make(store, "tokens", "ids", corpus=chain[0], tokenizer=chain[1]) == lost
    assert store.contains(lost.kind, lost.content_id)
    assert check(store) == []


def test_a_collection_that_is_cut_off_leaves_no_half_object_and_is_gone_on_with(
    store, chain, monkeypatch
):
    lost = without_a_record(store, chain[2])
    found = garbage(store, now=LATER)
    rm = type(store.filesystem).rm

    def cut_off(self, path, recursive=False, maxdepth=None):
        raise KeyboardInterrupt

    monkeypatch.setattr(type(store.filesystem), "rm", cut_off)
    with pytest.raises(KeyboardInterrupt):
        delete(store, found)
    monkeypatch.setattr(type(store.filesystem), "rm", rm)
    assert not store.contains(lost.kind, lost.content_id)
    assert [one.object for one in garbage(store, now=LATER)] == [(lost.kind, lost.content_id)]
    delete(store, garbage(store, now=LATER))
    assert not store.filesystem.find(store.object_path(lost.kind, lost.content_id))
    assert check(store) == garbage(store, now=LATER) == []


def test_what_a_build_under_way_reads_is_kept_though_its_record_expires(store):
    corpus = make(store, "raw_corpus", "old", days_ago=90)
    with store.begin(Recipe("tokens", 1, {}, {"corpus": corpus.as_input()})):
        assert garbage(store, expire_records_after_days=30.0) == []
    (record,) = [one for one in garbage(store, expire_records_after_days=30.0) if one.is_record]
    with store.begin(Recipe("tokens", 1, {}, {"corpus": corpus.as_input()})):
        assert delete(store, [record]) == [], "it began after that was found"
    assert delete(store, [record]) == [record]


def test_work_is_spared_that_begins_again_or_whose_object_is_lost(store, chain):
    work = store.scratch / "work" / chain[0].recipe_id / "exact"
    (work / "progress").mkdir(parents=True)
    (work / "progress" / "x").write_text("four")
    found = garbage(store)
    assert [one.path for one in found] == [str(work)]
    with work.with_suffix(".lock").open() as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        assert delete(store, found) == []
    set_aside(store, (chain[0].kind, chain[0].content_id))
    assert garbage(store) == [], "whoever builds it again goes on from there"
    (work / "progress" / "y").write_text("more")
    assert delete(store, found) == [], "it has changed"
    assert (work / "progress" / "x").exists()


def test_copies_of_what_is_gone_from_a_remote_store_are_collected(tmp_path):
    store = ArtifactStore(f"memory://{tmp_path.name}", scratch=tmp_path)
    kept, gone = make(store, "tokens", "kept"), make(store, "tokens", "gone")
    copies = [store.local(one.kind, one.content_id) for one in (kept, gone)]
    cut_off = copies[0].with_name(f"{kept.content_id}.0123456789ab")
    cut_off.mkdir()
    without_a_record(store, gone)
    delete(store, garbage(store, now=LATER))
    assert {one.path for one in garbage(store, now=LATER)} == {str(copies[1])}
    assert garbage(store) == [], "it may be being read"
    delete(store, garbage(store, now=LATER))
    assert [path.exists() for path in (*copies, cut_off)] == [True, False, False]


def test_work_that_went_on_with_another_class_is_done_where_it_ended(store):
    def build(workspace):
        (workspace.output / "a.txt").write_text("a")
        return Built(digest("test", "mixed"), numerics_before=[{"class": "tpu", "until": 3}])

    here = {"device": "cpu"}
    made, _ = store.materialize(Recipe("tokens", 1, {}), build, numerics=here)
    work = store.scratch / "work" / made.recipe_id / numerics_digest(here)
    (work / "progress").mkdir(parents=True)
    (work / "progress" / "x").write_text("four")
    assert [one.path for one in garbage(store)] == [str(work)]
