"""Sources as the pipeline sees them: on object stores, vanished, and remembered."""

import dataclasses
import gzip
import json
import shutil
import uuid

import fsspec
import pytest

from modeling.artifacts import ArtifactStore
from modeling.data.sources import FoundFile
from pipelines.cli import main

DATA = [("tales", "raw_corpus"), ("tales", "tokenizer"), ("tales", "tokenized_corpus"),
        ("tales", "token_cache", "L32")]  # fmt: skip


def content_ids(chain, result):
    assert result.success
    return {key: shown["content_id"] for key, shown in chain.metadata_of(result).items()}


@pytest.fixture(scope="module")
def local_ids(chain, tmp_path_factory):
    root = tmp_path_factory.mktemp("local")
    here = chain.under(root)
    return content_ids(here, here.run(select=DATA))


@pytest.fixture(params=["gs", "memory"])
def bucket(request):
    if request.param == "gs":
        return request.getfixturevalue("gcs")
    return f"memory://{uuid.uuid4().hex}"


TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'assistant' %}{% generation %}{{ m.content }}"
    "{% endgeneration %}{% else %}{{ m.content }}{% endif %}{% endfor %}"
)
PACKED = [("tales", "token_cache", "L32_documents"), ("tales", "token_cache_copy", "L32_documents")]


def test_chats_and_packed_rows_are_the_same_on_an_object_store(bucket, empty_chain, tmp_path):
    """Each stage reads what the one before has left there, through copies that are checked."""
    lines = "".join(
        json.dumps({"messages": [{"role": "user", "content": text[:40]},
                                 {"role": "assistant", "content": text[40:400]}]}) + "\n"
        for text in (path.read_text() for path in sorted(empty_chain.texts.glob("*.txt")))
    )  # fmt: skip
    fs, root = fsspec.url_to_fs(bucket)
    fs.pipe_file(f"{root}/chats.jsonl", lines.encode())
    (tmp_path / "chats.jsonl").write_text(lines)
    rows = {"length": 32, "packing": "documents", "layout": "copy"}
    found = []
    for place, store in ((bucket, f"{bucket}/store"), (str(tmp_path), str(tmp_path / "here"))):
        chain = dataclasses.replace(empty_chain, home=tmp_path / f"home{len(found)}")
        changes = [
            f'dataset.source.paths=["{place}/chats.jsonl"]',
            "dataset.source.format=jsonl",
            f"dataset.format={json.dumps({'type': 'chat', 'template': TEMPLATE})}",
            f"dataset.sequence_lengths={json.dumps([32, rows])}",
        ]
        result = chain.run(*changes, select=[*DATA, *PACKED], variables={"LEVANTER_STORE": store})
        checks = result.get_asset_check_evaluations()
        assert len(checks) == 6
        assert all(check.passed for check in checks)
        found.append(content_ids(chain, result))
    assert found[0] == found[1]


def test_the_chain_runs_on_an_object_store(bucket, empty_chain, local_ids, tmp_path):
    """Texts and artifacts lie there; what is made of equal texts is equal."""
    fs, root = fsspec.url_to_fs(bucket)
    for path in sorted(empty_chain.texts.glob("*.txt")):
        fs.pipe_file(f"{root}/texts/{path.name}.gz", gzip.compress(path.read_bytes(), mtime=0))
    chain = dataclasses.replace(empty_chain, home=tmp_path / "remote_home")
    variables = {"LEVANTER_STORE": f"{bucket}/store"}
    change = f'dataset.source.paths=["{bucket}/texts/*.txt.gz"]'
    result = chain.run(change, select=DATA, variables=variables)
    remote_ids = content_ids(chain, result)
    # The corpus knows that its files are compressed; nothing that is made of it does.
    changed = {key for key, content_id in remote_ids.items() if content_id != local_ids[key]}
    assert changed == {"tales/raw_corpus"}
    checks = result.get_asset_check_evaluations()
    assert len(checks) == 4
    assert all(check.passed for check in checks)
    store = ArtifactStore(f"{bucket}/store", scratch=tmp_path / "elsewhere")
    assert sorted(record["kind"] for record in store.records()) == [
        "raw_corpus", "token_cache", "tokenized_corpus", "tokenizer"
    ]  # fmt: skip

    again = dataclasses.replace(chain, home=tmp_path / "another_home")
    result = again.run(change, select=DATA, variables=variables)
    assert set(again.was(result).values()) == {"reused"}

    fs.pipe_file(f"{root}/texts/00.txt.gz", gzip.compress(b"another text entirely. " * 30))
    result = chain.run(change, select=DATA[:1], variables=variables)
    assert chain.was(result) == {"tales/raw_corpus": "built"}


@pytest.fixture
def corpus_made(empty_chain, tmp_path):
    """A chain whose corpus is made, over texts that may be changed."""
    shutil.copytree(empty_chain.texts, tmp_path / "texts")
    chain = dataclasses.replace(empty_chain, texts=tmp_path / "texts")
    assert chain.run(select=DATA[:1]).success
    return chain


def status(chain, capsys, *options):
    with chain.instance():
        assert main(["status", "tiny", *options]) == 0
    return " ".join(capsys.readouterr().out.split())


def test_status_says_that_a_source_has_vanished(corpus_made, capsys):
    assert "tales/raw_corpus fresh" in status(corpus_made, capsys)
    for path in corpus_made.texts.iterdir():
        path.unlink()
    shown = status(corpus_made, capsys)
    assert "tales/raw_corpus stale" in shown
    assert "its files cannot be listed" in shown
    assert "matches no file" in shown


def test_status_reads_no_file_that_has_rested(corpus_made, capsys, monkeypatch):
    opened = []
    real = FoundFile.open
    monkeypatch.setattr(FoundFile, "open", lambda file: opened.append(file) or real(file))
    monkeypatch.setattr("modeling.data.digests._REST_NS", -1)
    status(corpus_made, capsys)
    assert len(opened) == 60
    status(corpus_made, capsys)
    assert len(opened) == 60
    monkeypatch.setenv("LEVANTER_REHASH", "0")  # so that it is taken back after the test
    status(corpus_made, capsys, "--rehash")
    assert len(opened) == 120
