"""Packed caches and copies as assets: figures, checks, and what `levanter show` makes of them."""

import base64
import dataclasses
import io
import json
import shutil

import dagster as dg
import datasets
import pytest

from modeling.artifacts import write_durably
from modeling.inventory import INVENTORY, file_sha256
from pipelines import cli
from pipelines.show import show

CACHES = "dataset.sequence_lengths=[32, {length: 48, packing: documents, layout: copy}]"
CACHE, COPY = (
    ("tales", "token_cache", "L48_documents"),
    ("tales", "token_cache_copy", "L48_documents"),
)


def files_of(chain, key):
    artifact = chain.artifact(*key)
    return chain.store_directory / "objects" / artifact.kind / artifact.content_id


def edit_json(path, change):
    content = json.loads(path.read_text())
    change(content)
    write_durably(path, content)


def publish_as_if_built(directory):
    """Makes the inventory tell of the files as they are now."""

    def tell(inventory):
        for entry in inventory["files"]:
            path = directory / entry["path"]
            entry |= {"size": path.stat().st_size, "sha256": file_sha256(path)}

    edit_json(directory / INVENTORY, tell)


@pytest.fixture(scope="module")
def chain(chain, tmp_path_factory):
    """One with caches of its own, over the same texts."""
    root = tmp_path_factory.mktemp("caches")
    return chain.under(root)


@pytest.fixture(scope="module")
def run(chain):
    return chain.run(CACHES, job="tales__data")


def test_a_packed_cache_and_its_copy_are_made_and_pass_their_checks(chain, run):
    assert run.success
    verdicts = {
        check.asset_key.path[-1]: check.passed for check in run.get_asset_check_evaluations()
    }
    assert verdicts["L48_documents"]
    assert len(run.get_asset_check_evaluations()) == 6
    shown = chain.metadata_of(run)
    cache, copy = shown["/".join(CACHE)], shown["/".join(COPY)]
    assert copy["content_id"] == cache["content_id"]
    assert (
        copy["dagster/row_count"]
        == cache["dagster/row_count"]
        == (cache["train/rows"] + cache["validation/rows"])
    )
    assert 0 <= cache["train/padding_share"] < 0.05
    assert cache["train/cut_documents"] == cache["train/documents"], "each tale is longer than 48"
    assert cache["train/bytes_per_token"] > 1
    header, _, data = cache["document_lengths"].partition("base64,")
    assert header == "![document lengths](data:image/svg+xml;"
    assert "tokens in a document" in base64.b64decode(data.removesuffix(")")).decode()
    assert "-- document 1: 48 tokens --" in cache["first_example"]
    rows = datasets.Dataset.from_file(str(files_of(chain, COPY) / "train-00000.arrow"))
    assert rows.column_names == ["input_ids", "segment_ids", "loss_mask"]
    assert len(rows) == cache["train/rows"]


def padded_otherwise(directory):
    def change(index):
        index["eos_id"] += 1

    edit_json(directory / "index.json", change)
    return CACHE, "is not the stream at"


def shortened(directory):
    edit_json(directory / "index.json", lambda index: index["splits"]["train"]["shards"].clear())
    return COPY, "train files hold 0 tokens"


@pytest.mark.parametrize("damage", [padded_otherwise, shortened])
def test_the_checks_find_what_a_build_may_not_do(chain, run, tmp_path, damage):
    assert run.success
    shutil.copytree(chain.store_directory, tmp_path / "store")
    copied = dataclasses.replace(chain, store_directory=tmp_path / "store")
    key = CACHE if damage is padded_otherwise else COPY
    directory = files_of(copied, key)
    _, says = damage(directory)
    publish_as_if_built(directory)
    result = copied.run(CACHES, job="tales__data", select=[key])
    (check,) = [c for c in result.get_asset_check_evaluations() if c.asset_key == dg.AssetKey(key)]
    assert not check.passed
    assert says in check.description


def shown(chain, **options):
    stream = io.StringIO()
    with chain.instance():
        assert show(chain.catalog(CACHES), "tales", stream, **options) == 0
    return stream.getvalue()


def test_show_prints_a_row_with_its_documents(chain, run):
    text = shown(chain, packing="documents", split="validation", numbers=(0, 1))
    assert text.startswith("validation, row 0 of ")
    assert "-- document 1: 48 tokens --" in text
    plain = shown(chain, length=32)
    assert plain.startswith("train, row 0 of ")
    assert plain.count("[brackets] hold what is not learned") == 1
    words = plain.split("\n", 1)[1].replace("|", "").replace("↵", "").strip()
    assert any(words[:60] in tale.read_text() for tale in chain.texts.iterdir())


def test_show_writes_a_page(chain, run, tmp_path):
    page = tmp_path / "page.html"
    assert shown(chain, packing="documents", page=page) == f"{page}\n"
    assert "<h3>document 1: 48 tokens</h3>" in page.read_text()


def test_show_paints_tokens_on_a_terminal(chain, run, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm-256color")
    text = shown(chain, length=32)
    assert text.count("\x1b[") > 40
    assert "|" not in text


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"length": 33}, "it has L32, L48_documents"),
        ({"split": "test"}, "--split test: tales has train, validation"),
        ({"numbers": (10**6,)}, "--example 1000000: train has"),
    ],
)
def test_show_says_what_there_is(chain, run, options, says):
    with pytest.raises(ValueError, match=says):
        shown(chain, **options)


def test_show_says_what_to_run_first(chain, tmp_path, capsys, monkeypatch):
    empty = chain.under(tmp_path)
    with empty.instance():
        assert cli.main(["show", "tales"]) == 2
        assert "is not materialized. Run `levanter run tiny`" in capsys.readouterr().err
        assert cli.main(["show", "tales", "--seq-len", "64"]) == 2
        assert "dagster job launch -w workspace.yaml -j tales__data" in capsys.readouterr().err
        assert cli.main(["show", "sagas"]) == 2
        assert "no dataset is named 'sagas'" in capsys.readouterr().err
