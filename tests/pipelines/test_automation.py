"""What a daemon would start by itself, and what it leaves alone; asked as the daemon asks."""

import dataclasses
import json
import shutil

import dagster as dg
import fsspec
import pytest
from fsspec.spec import AbstractFileSystem

from pipelines.automation import NEW_FILES, RERUN
from resources.materializations import latest
from tests.pipelines.conftest import REMADE, VOCABULARY

DATA = [("tales", "raw_corpus"), ("tales", "tokenizer"), ("tales", "tokenized_corpus"),
        ("tales", "token_cache", "L32")]  # fmt: skip


def test_every_switch_is_off_at_first(chain):
    sensors = {sensor.name: sensor for sensor in chain.defs().sensors}
    assert set(sensors) == {f"tales{NEW_FILES}", RERUN}
    assert {one.default_status for one in sensors.values()} == {dg.DefaultSensorStatus.STOPPED}


class Looks:
    """A dataset's sensor, evaluated as by a daemon that keeps the cursor."""

    def __init__(self, chain, *changes):
        sensors = {sensor.name: sensor for sensor in chain.defs(*changes).sensors}
        self.sensor = sensors[f"tales{NEW_FILES}"]
        self.cursor = None

    def look(self, keep=True):
        """Returns the run key of the run that is requested, or why there is none."""
        found = self.sensor(dg.build_sensor_context(cursor=self.cursor))
        if isinstance(found, dg.SkipReason):
            return found.skip_message
        if keep:
            self.cursor = found.cursor
        if found.skip_reason:
            return found.skip_reason.skip_message
        (request,) = found.run_requests
        return request.run_key


class TestNewFiles:
    @pytest.fixture
    def own(self, chain, tmp_path):
        return chain.with_own_texts(tmp_path / "texts")

    def test_a_listing_is_run_once_when_two_looks_agree(self, own):
        looks = Looks(own)
        assert looks.sensor.job_name == "tales__data"
        assert "60 files, others than before" in looks.look()
        first = looks.look()
        assert first.startswith("1-")
        assert [looks.look() for _ in range(3)] == ["60 files, as in the last run."] * 3

        (own.texts / "new.txt").write_text("One more tale.\n")
        assert "61 files, others than before" in looks.look()
        (own.texts / "new.txt").write_text("One more tale, still being copied.\n")
        assert "61 files, others than before" in looks.look()
        second = looks.look()
        assert second.startswith("2-")
        (own.texts / "new.txt").unlink()
        assert "60 files, others than before" in looks.look()
        third = looks.look()
        assert third.startswith("3-"), "what was run before has to be run again"
        assert third.partition("-")[2] == first.partition("-")[2] != second.partition("-")[2]

    def test_a_daemon_that_dies_before_it_keeps_the_cursor_repeats_the_key(self, own):
        looks = Looks(own)
        looks.look()
        assert looks.look(keep=False) == looks.look()

    def test_a_file_of_the_same_size_that_was_written_again_is_noticed(self, own):
        looks = Looks(own)
        looks.look(), looks.look()
        path = own.texts / "07.txt"
        path.write_text(path.read_text().swapcase())
        assert "others than before" in looks.look()

    def test_a_source_that_has_vanished_is_named(self, own):
        looks = Looks(own)
        looks.look(), looks.look()
        before = looks.cursor
        own.texts.rename(own.texts.with_name("elsewhere"))
        assert f"tales cannot be looked at: {own.texts}/*.txt: matches no file" in looks.look()
        assert looks.cursor == before
        own.texts.with_name("elsewhere").rename(own.texts)
        assert looks.look() == "60 files, as in the last run."

    @pytest.fixture
    def shelf(self, monkeypatch):
        """A store of files that remembers what it has listed, as those of buckets do."""

        class Shelf(AbstractFileSystem):
            protocol = "shelf"
            files = {"box/a.txt": 3}  # noqa: RUF012
            is_down = False

            @classmethod
            def _strip_protocol(cls, path):
                return super()._strip_protocol(path).rpartition("@")[2]

            def ls(self, path, detail=True, **kwargs):
                if self.is_down:
                    raise RuntimeError("403: anonymous caller")
                known = self.dircache
                if "box" not in known:
                    known["box"] = [
                        {"name": name, "size": size, "type": "file"}
                        for name, size in self.files.items()
                    ]
                path = self._strip_protocol(path)
                return [entry for entry in known["box"] if path in ("box", entry["name"])]

            def invalidate_cache(self, path=None):
                self.dircache.clear()

        fsspec.register_implementation("shelf", Shelf, clobber=True)
        return Shelf

    def test_a_bucket_is_listed_anew_and_named_when_it_does_not_answer(self, chain, shelf):
        looks = Looks(chain, 'dataset.source.paths=["shelf://me:secret@box/*.txt"]')
        assert "1 files" in looks.look()
        assert looks.look().startswith("1-")
        shelf.files = {"box/a.txt": 3, "box/b.txt": 4}
        assert "2 files, others than before" in looks.look()
        shelf.is_down = True
        told = looks.look()
        assert "shelf://box/*.txt: cannot be listed: RuntimeError: 403: anonymous caller" in told
        assert "secret" not in told
        json.loads(looks.cursor)


@pytest.fixture(scope="module")
def made(chain, tmp_path_factory):
    """An instance and a store in which no model was ever made."""
    root = tmp_path_factory.mktemp("made")
    own = dataclasses.replace(chain, home=root / "home", store_directory=root / "store")
    own = own.with_own_texts(root / "texts")
    assert own.run(select=DATA).success
    return own


class TestRerun:
    @pytest.fixture
    def own(self, made, tmp_path):
        shutil.copytree(made.home, tmp_path / "home")
        return dataclasses.replace(made, home=tmp_path / "home")

    @pytest.fixture
    def daemon(self, own):
        """Says what would be requested, tick after tick."""
        cursors = [None]

        def tick(*changes):
            with own.instance() as instance:
                defs = own.defs(*changes)
                found = dg.evaluate_automation_conditions(
                    defs,
                    instance=instance,
                    asset_selection=dg.AssetSelection.all(),
                    cursor=cursors[-1],
                )
            cursors.append(found.cursor)
            keys = defs.resolve_asset_graph().get_all_asset_keys()
            asked = [key for key in keys if found.get_num_requested(key)]
            return sorted(key.to_user_string() for key in asked)

        return tick

    def test_a_changed_tokenizer_is_rerun_down_to_the_exported_model(self, changed, changed_run):
        """What the daemon asks for, run as it runs it."""
        with changed.instance() as instance:
            defs = changed.defs(VOCABULARY)
            cursor = None
            for tick in (changed.defs(), defs):
                found = dg.evaluate_automation_conditions(
                    tick,
                    instance=instance,
                    asset_selection=dg.AssetSelection.all(),
                    cursor=cursor,
                )
                cursor = found.cursor
            graph = defs.resolve_asset_graph()
            asked = [key for key in graph.toposorted_asset_keys if found.get_num_requested(key)]
        models = ["tiny/checkpoint", "tiny/eval_report", "tiny/hf_model"]
        assert sorted(key.to_user_string() for key in asked) == sorted([*REMADE, *models])
        made = changed.run(VOCABULARY, select=[key.path for key in asked])
        assert made.success
        assert changed.was(made) == dict.fromkeys(REMADE, "built") | dict.fromkeys(models, "reused")
        exported = changed_run.asset_value(dg.AssetKey(["tiny", "hf_model"]))
        model = made.asset_value(dg.AssetKey(["tiny", "hf_model"]))
        assert model.content_id == exported.content_id

    BELOW = ("tales/token_cache/L32", "tales/tokenized_corpus")

    def test_a_changed_tokenizer_is_rerun_once_with_all_below_that_was_ever_made(self, daemon):
        assert daemon() == []
        changed = "dataset.tokenizer.vocab_size=290"
        assert daemon(changed) == [*self.BELOW, "tales/tokenizer"]
        assert daemon(changed) == [], "also if that run has failed"
        assert daemon("dataset.tokenizer.vocab_size=291") == [*self.BELOW, "tales/tokenizer"]
        assert daemon() == []
        assert daemon(changed) == [*self.BELOW, "tales/tokenizer"]

    def test_what_was_changed_while_the_switch_was_off_is_noticed(self, daemon):
        changed = "dataset.tokenizer.vocab_size=290"
        assert daemon(changed) == [*self.BELOW, "tales/tokenizer"]

    @pytest.mark.parametrize(
        ("changed", "below"),
        [("vocab_size=290", BELOW), ("min_frequency=3", ())],
        ids=["other-merges", "the-same-merges"],
    )
    def test_a_tokenizer_made_by_hand_is_followed_if_it_is_another(
        self, daemon, own, changed, below
    ):
        changed = f"dataset.tokenizer.{changed}"
        assert daemon() == []
        made = own.run(changed, select=DATA[:2], job="tales__data")
        assert made.success
        assert daemon(changed) == list(below)

    def test_changed_files_of_a_tokenizer_with_a_path_are_noticed(self, daemon, own, tmp_path):
        where = tmp_path / "made elsewhere"
        with own.instance() as instance:
            content_id = latest(instance, dg.AssetKey(DATA[1])).content_id
        made = own.store.local("tokenizer", content_id)
        where.mkdir()
        shutil.copy(made / "tokenizer.json", where)
        (where / "tokenizer_config.json").write_text('{"eos_token": "<|endoftext|>"}')
        taken = json.dumps({"type": "pretrained", "path": str(where)})
        changes = "dataset.tokenizer=null", f"dataset.tokenizer={taken}"  # else they are merged
        assert daemon(*changes) == [*self.BELOW, "tales/tokenizer"]
        assert own.run(*changes, select=DATA, job="tales__data").success
        assert daemon(*changes) == []
        (where / "chat_template.jinja").write_text("{{ 1 }}")
        assert daemon(*changes) == [*self.BELOW, "tales/tokenizer"]
        assert daemon(*changes) == [], "also if that run has failed"
        kept = (where / "tokenizer.json").rename(tmp_path / "kept.json")
        assert daemon(*changes) == [], "what is not there cannot be made"
        kept.rename(where / "tokenizer.json")
        assert own.run(*changes, select=DATA[1:2], job="tales__data").success
        assert daemon(*changes) == list(self.BELOW)

    def test_nothing_is_made_of_what_has_failed_its_check(self, daemon, own):
        failed = dg.AssetCheckEvaluation(
            asset_key=dg.AssetKey(["tales", "tokenizer"]), check_name="round_trips", passed=False
        )
        with own.instance() as instance:
            instance.report_runless_asset_event(failed)
        assert daemon("dataset.tokenization.append_eos=false") == []
