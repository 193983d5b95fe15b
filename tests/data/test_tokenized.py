"""The tokenized corpus: the ids of each document, whatever the batches, shards and crashes."""

import json
import re
import subprocess
import sys
import threading
import uuid
from itertools import pairwise
from pathlib import Path

import fsspec
import numpy as np
import pyarrow as pa
import pytest
import tokenizers
from fsspec.implementations.memory import MemoryFileSystem
from tokenizers import models, pre_tokenizers

from modeling.artifacts import ArtifactStore, Recipe, Workspace
from modeling.data import compute, corpus, ledger, shards, token_files, tokenized
from modeling.data.config import TokenizationConfig
from modeling.data.ledger import committed
from modeling.data.shards import (
    FlatTokens,
    map_rows,
    map_shard,
    token_dtype,
    write_rows,
    write_shard,
)
from modeling.data.sources_config import FilesSource
from modeling.data.splits import ROLES
from modeling.data.tokenizer import Tokenizer, save
from modeling.inventory import INVENTORY
from modeling.merkle import MerkleHasher
from modeling.progress import Progress

DEFAULT = TokenizationConfig()


UNIT = 4000


def build(chain, workspace, config=DEFAULT, unit_bytes=UNIT, **options):
    inputs = config, chain.corpus_dir, chain.tokenizer_dir, workspace
    return tokenized.build(*inputs, unit_bytes=unit_bytes, **options)


def files_of(directory: Path) -> dict[str, bytes]:
    paths = (path for path in directory.rglob("*") if path.is_file())
    return {path.relative_to(directory).as_posix(): path.read_bytes() for path in paths}


def stream(directory: Path, split: str) -> list[int]:
    manifest = token_files.Manifest.read(directory)
    dtype = np.dtype(manifest.dtype)
    tokens = token_files.flat_tokens(directory, manifest.splits[split], dtype)
    return tokens.span(0, len(tokens)).tolist()


def test_each_documents_ids_and_one_eos_follow_each_other(chain):
    for split in ROLES:
        assert stream(chain.tokenized_dir, split) == chain.tokens(split)
    documents = list(corpus.documents(chain.corpus_dir, "train"))
    assert any("<|endoftext|>" in document.text for document in documents)
    assert stream(chain.tokenized_dir, "train").count(0) == len(documents)


def test_shards_hold_one_document_a_row(chain):
    manifest = token_files.Manifest.read(chain.tokenized_dir)
    shards = manifest.splits["train"].shards
    assert len(shards) > 3
    rows = []
    for shard in shards:
        with pa.memory_map(str(chain.tokenized_dir / shard.file)) as mapped:
            table = pa.ipc.open_file(mapped).read_all()
        assert table.schema == pa.schema([("tokens", pa.list_(pa.uint16()))])
        rows += table.column("tokens").to_pylist()
    encoder = Tokenizer.load(chain.tokenizer_dir)
    documents = corpus.documents(chain.corpus_dir, "train")
    assert rows == [[*encoder.encode(document.text), 0] for document in documents]


def test_digests_are_of_the_flat_tokens_and_the_document_ends(chain):
    encoder = Tokenizer.load(chain.tokenizer_dir)
    for split in ROLES:
        documents = corpus.documents(chain.corpus_dir, split)
        lengths = [len(encoder.encode(document.text)) + 1 for document in documents]
        streams = {
            "tokens": np.array(chain.tokens(split), "<u2"),
            "offsets": np.cumsum(lengths).astype("<u8"),
        }
        for name, values in streams.items():
            hasher = MerkleHasher()
            hasher.update(values.tobytes())
            assert chain.tokenized.leaves[f"{split}/{name}"] == hasher.root()


def test_facts_count_each_split(chain):
    facts = chain.tokenized.facts
    for split in ROLES:
        documents = list(corpus.documents(chain.corpus_dir, split))
        num_bytes = sum(len(document.text.encode()) for document in documents)
        assert facts[split]["documents"] == len(documents)
        assert facts[split]["tokens"] == len(chain.tokens(split))
        assert facts[split]["bytes"] == num_bytes
        assert facts[split]["bytes_per_token"] == round(num_bytes / facts[split]["tokens"], 4)


@pytest.mark.parametrize("unit_bytes", [1, 900, 10**6])
def test_units_leave_no_trace_in_the_content(unit_bytes, chain, make_workspace):
    workspace = make_workspace("other")
    built = build(chain, workspace, unit_bytes=unit_bytes)
    assert built.content_id == chain.tokenized.content_id
    assert built.leaves == chain.tokenized.leaves
    assert stream(workspace.output, "train") == chain.tokens("train")


def test_batches_leave_no_trace_in_the_files(chain, make_workspace, monkeypatch):
    monkeypatch.setattr(compute, "_BATCH_DOCUMENTS", 3)
    workspace = make_workspace("other")
    build(chain, workspace, unit_bytes=UNIT)
    assert files_of(workspace.output) == files_of(chain.tokenized_dir)


@pytest.mark.parametrize(
    ("bos", "eos", "expected"),
    [
        (False, False, lambda ids: ids),
        (True, False, lambda ids: [0, *ids]),
        (True, True, lambda ids: [0, *ids, 0]),
    ],
)
def test_bos_and_eos_go_where_the_policy_says(bos, eos, expected, chain, make_workspace):
    workspace = make_workspace("policy")
    config = TokenizationConfig(append_bos=bos, append_eos=eos)
    built = build(chain, workspace, config)
    encoder = Tokenizer.load(chain.tokenizer_dir)
    documents = corpus.documents(chain.corpus_dir, "validation")
    rows = [expected(encoder.encode(document.text)) for document in documents]
    assert stream(workspace.output, "validation") == [token for row in rows for token in row]
    assert built.content_id != chain.tokenized.content_id


KILLED_BUILDS = """
import os, pathlib, random, signal, sys, traceback
from modeling.artifacts import Workspace
from modeling.data import ledger, tokenized
from modeling.data.config import TokenizationConfig

corpus_dir, tokenizer_dir, root = map(pathlib.Path, sys.argv[1:4])


def build(name, output="output"):
    workspace = Workspace(root / name / "progress", root / name / output)
    workspace.progress.mkdir(parents=True, exist_ok=True)
    workspace.output.mkdir()
    tokenized.build(TokenizationConfig(), corpus_dir, tokenizer_dir, workspace, unit_bytes=4000)


def in_child(run):
    if (child := os.fork()) == 0:
        try:
            run()
            os._exit(0)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def dies_at(point):
    name, calls = point.split()[1], []
    original = getattr(ledger, name)

    def wrapped(path, *content):
        calls.extend([path] if "units" in path.parts else [])
        dies_now = len(calls) == 3
        if not dies_now or point != f"before {name}":
            original(path, *content)
        if dies_now:
            if point == "inside write_shard":
                path.write_bytes(path.read_bytes()[:100])
            os.kill(os.getpid(), signal.SIGKILL)

    setattr(ledger, name, wrapped)
    build(point)


def dies_soon(attempt):
    draw, calls, original = random.Random(attempt), [], ledger.write_shard
    first, delay_s = draw.randint(1, 3), draw.uniform(1e-5, 5e-3)

    def wrapped(path, *content):
        calls.append(path)
        if len(calls) == first:
            signal.setitimer(signal.ITIMER_REAL, delay_s)  # SIGALRM ends a process at any point
        original(path, *content)

    ledger.write_shard = wrapped
    build("at random", f"output-{attempt}")
    signal.setitimer(signal.ITIMER_REAL, 0)


for point in sys.argv[4:]:
    code = in_child(lambda: dies_at(point))
    assert code == -signal.SIGKILL, (point, code)
for attempt in range(200):
    code = in_child(lambda: dies_soon(attempt))
    print(code)
    if code != -signal.SIGALRM:
        break
"""
POINTS = ["inside write_shard", "after write_shard", "before write_durably", "after write_durably"]


@pytest.fixture(scope="module")
def killed(chain, tmp_path_factory):
    """What builds have left that were killed: a directory for each point, and one `at random`."""
    root = tmp_path_factory.mktemp("killed")
    arguments = map(str, [chain.corpus_dir, chain.tokenizer_dir, root, *POINTS])
    done = subprocess.run(
        [sys.executable, "-c", KILLED_BUILDS, *arguments],
        check=False, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return root, [int(code) for code in done.stdout.split()]


@pytest.mark.parametrize("point", POINTS)
def test_a_killed_build_goes_on_after_what_it_committed(point, chain, killed):
    progress, again = killed[0] / point / "progress", killed[0] / point / "again"
    before = {path.with_suffix(".arrow") for path in progress.glob("units/*.json")}
    assert len(before) == (3 if point == "after write_durably" else 2)
    inodes = {path: path.stat().st_ino for path in before}
    again.mkdir()
    reports = []
    built = build(chain, Workspace(progress, again), report=reports.append)
    assert built.content_id == chain.tokenized.content_id
    assert files_of(again) == files_of(chain.tokenized_dir)
    assert {path: path.stat().st_ino for path in before} == inodes
    assert not list(progress.glob("units/.*"))
    assert built.facts["reused"]["from_this_build"] == len(before)
    told = [report for report in reports if isinstance(report, Progress)]
    assert told[-1].done == pytest.approx(told[-1].total)


def test_a_build_killed_over_and_over_at_any_moment_ends_with_the_same_files(chain, killed):
    root, codes = killed
    assert len(codes) > 1
    assert codes[-1] == 0
    output = root / "at random" / f"output-{len(codes) - 1}"
    assert files_of(output) == files_of(chain.tokenized_dir)


def test_a_build_killed_before_publication_encodes_nothing_again(chain, make_workspace):
    first = make_workspace("first")
    build(chain, first)
    inodes = {path.name: path.stat().st_ino for path in first.output.glob("*.arrow")}
    for path in first.output.iterdir():
        path.unlink()
    again = build(chain, Workspace(first.progress, first.output))
    assert again.content_id == chain.tokenized.content_id
    assert again.facts["reused"]["percent"] == 100
    assert {path.name: path.stat().st_ino for path in first.output.glob("*.arrow")} == inodes


def test_another_machine_goes_on_from_what_is_in_the_remote_store(
    chain, make_workspace, monkeypatch
):
    def machine(name):
        made = make_workspace(name)
        return Workspace(made.progress, made.output, f"memory://{chain.tokenized.content_id}/work")

    class SwitchedOffError(Exception):
        pass

    encode, left = compute.encode_unit, 3

    def encode_few(*arguments, **options):
        nonlocal left
        left -= 1
        if left < 0:
            raise SwitchedOffError
        return encode(*arguments, **options)

    monkeypatch.setattr(compute, "encode_unit", encode_few)
    with pytest.raises(SwitchedOffError):
        build(chain, machine("first"))
    left, told = 1000, []
    second = machine("second")
    built = build(chain, second, report=told.append)
    num_units = len(list(second.output.glob("*.arrow")))
    assert built.content_id == chain.tokenized.content_id
    assert files_of(second.output) == files_of(chain.tokenized_dir)
    assert built.facts["reused"]["from_this_build"] == 3
    assert 1000 - left == num_units - 3

    remote = fsspec.filesystem("memory")
    shards = sorted(remote.glob(f"/{chain.tokenized.content_id}/work/units/*.arrow"))
    remote.pipe_file(shards[0], b"damaged")
    remote.rm_file(shards[1])
    remote.pipe_file(shards[2].replace(".arrow", ".json"), b"{")
    left = 3
    third = machine("third")
    assert build(chain, third, report=told.append).content_id == built.content_id
    assert left == 0
    texts = [report for report in told if isinstance(report, str)]
    assert any("committed by another machine: damaged (SHA-256" in text for text in texts)
    assert any("committed by another machine is missing" in text for text in texts)
    assert any("committed by another machine is damaged" in text for text in texts)
    left = 0  # what was made again has been sent again
    assert build(chain, machine("fourth")).content_id == built.content_id


@pytest.fixture
def sent(monkeypatch):
    """The names of all files that are sent to stores in memory."""
    put_file, names = MemoryFileSystem.put_file, []

    def put(filesystem, local, remote, **options):
        names.append(Path(remote).name)
        put_file(filesystem, local, remote, **options)

    monkeypatch.setattr(MemoryFileSystem, "put_file", put)
    return names


@pytest.mark.parametrize("harm", ["nothing", "lost", "cut short"])
def test_units_are_published_by_a_copy_of_what_was_sent(harm, chain, tmp_path, sent, monkeypatch):
    cp_file, copied = MemoryFileSystem.cp_file, []

    def copy(filesystem, source, target, **options):
        if not copied and harm == "lost":
            filesystem.rm_file(source)
        if not copied and harm == "cut short":
            filesystem.pipe_file(source, b"ARROW1")
        copied.append(source)
        cp_file(filesystem, source, target, **options)

    monkeypatch.setattr(MemoryFileSystem, "cp_file", copy)
    store = ArtifactStore(f"memory://{uuid.uuid4().hex}", scratch=tmp_path)
    recipe = Recipe("tokenized_corpus", 1, {"n": 1})
    artifact, _ = store.materialize(recipe, lambda workspace: build(chain, workspace))
    shards = [name for name in files_of(chain.tokenized_dir) if name.endswith(".arrow")]
    assert len(copied) == len(shards)
    again = [name for name in sent if name in shards]
    assert len(again) == (0 if harm == "nothing" else 1)
    assert len([name for name in sent if name.endswith(".arrow")]) == len(shards) + len(again)
    found = store.local("tokenized_corpus", artifact.content_id)
    wanted = files_of(chain.tokenized_dir)
    assert {name: (found / name).read_bytes() for name in wanted} == wanted


def test_units_are_sent_while_others_are_encoded_and_all_before_the_end(
    chain, make_workspace, monkeypatch
):
    commit, put_file, begun = ledger.Ledger.commit, MemoryFileSystem.put_file, []
    has_third = threading.Event()

    def committing(self, key, unit):
        begun.append(key)
        if len(begun) == 3:
            has_third.set()
        return commit(self, key, unit)

    def put(filesystem, local, remote, **options):
        assert has_third.wait(30), "the third unit waits for the first to be sent"
        put_file(filesystem, local, remote, **options)

    monkeypatch.setattr(ledger.Ledger, "commit", committing)
    monkeypatch.setattr(MemoryFileSystem, "put_file", put)
    made = make_workspace("behind")
    url = f"memory://{uuid.uuid4().hex}/work"
    built = build(chain, Workspace(made.progress, made.output, url))
    receipts = fsspec.filesystem("memory").glob(f"{url}/units/*.json")
    assert sorted(Path(path).stem for path in receipts) == sorted(begun)
    assert len(built.stored) == len(begun)


def test_a_unit_that_cannot_be_sent_fails_the_build(chain, make_workspace, monkeypatch):
    def put(filesystem, local, remote, **options):
        raise OSError("no route to store")

    monkeypatch.setattr(MemoryFileSystem, "put_file", put)
    made = make_workspace("cut_off")
    url = f"memory://{uuid.uuid4().hex}/work"
    with pytest.raises(OSError, match="no route to store"):
        build(chain, Workspace(made.progress, made.output, url))
    assert not list(made.output.iterdir())
    assert not fsspec.filesystem("memory").glob(f"{url}/units/*.json")


@pytest.mark.parametrize("damage", ["flip", "truncate", "remove", "receipt", "count", "list"])
def test_a_damaged_committed_shard_is_named_and_made_again(damage, chain, make_workspace):
    workspace = make_workspace("damaged")
    build(chain, workspace)
    path = sorted(workspace.progress.glob("units/*.arrow"))[1]
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    match damage:
        case "flip":
            path.unlink()
            path.write_bytes(data)
        case "truncate":
            path.unlink()
            path.write_bytes(data[:50])
        case "remove":
            path.unlink()
        case "receipt":
            path.with_suffix(".json").write_text("{")
        case "count":  # which no byte of the shard says
            receipt = path.with_suffix(".json")
            text = receipt.read_text()
            receipt.write_text(re.sub(r'("text_bytes": ?)\d+', r"\g<1>5", text))
            assert receipt.read_text() != text
        case "list":
            path.with_suffix(".json").write_text("[]")
    for file in workspace.output.iterdir():
        file.unlink()
    reports = []
    built = build(chain, workspace, report=reports.append)
    (told,) = [report for report in reports if "damaged" in str(report)]
    assert f"{path}: damaged since it was committed" in told
    assert built.facts["reused"]["of_units"] == built.facts["reused"]["units"] + 1
    assert files_of(workspace.output) == files_of(chain.tokenized_dir)


@pytest.mark.parametrize(
    "rest", [b"", b'{"split": "tr', b"nonsense\n", b"7\n", b'{"split": "train"}\n']
)
def test_a_damaged_stream_is_written_again(rest, chain, make_workspace):
    workspace = make_workspace("stream")
    build(chain, workspace)
    path = workspace.progress / "stream.jsonl"
    whole = path.read_bytes()
    path.write_bytes(b"\n".join(whole.split(b"\n")[:3]) + b"\n" + rest)
    for file in workspace.output.iterdir():
        file.unlink()
    build(chain, workspace)
    assert path.read_bytes() == whole
    assert files_of(workspace.output) == files_of(chain.tokenized_dir)


FULL_DISK = """
import pathlib, resource, sys
from modeling.artifacts import Workspace
from modeling.data import tokenized
from modeling.data.config import TokenizationConfig

corpus_dir, tokenizer_dir, root = map(pathlib.Path, sys.argv[1:4])
workspace = Workspace(root / "progress", root / "output")
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[4]), resource.RLIM_INFINITY))
unit_bytes = int(sys.argv[5])
tokenized.build(TokenizationConfig(), corpus_dir, tokenizer_dir, workspace, unit_bytes=unit_bytes)
"""


@pytest.mark.parametrize(
    ("unit_bytes", "limit", "what"),
    [(30_000, 7_000, r"a shard of [\d,]+ tokens"), (2_000, 5_000, "a line")],
)
def test_a_full_disk_is_said_so_and_costs_no_committed_shard(
    unit_bytes, limit, what, chain, make_workspace, tmp_path
):
    workspace = make_workspace("full")
    arguments = [chain.corpus_dir, chain.tokenizer_dir, tmp_path / "full", limit, unit_bytes]
    done = subprocess.run(
        [sys.executable, "-c", FULL_DISK, *map(str, arguments)],
        check=False,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1
    assert re.search(f"DiskFullError: .* no space for {what} .*: free space,", done.stderr)
    assert str(workspace.progress) in done.stderr
    assert not list(workspace.progress.glob("units/.*"))
    kept = len(list(workspace.progress.glob("units/*.json")))
    built = build(chain, workspace, unit_bytes=unit_bytes)
    assert built.facts["reused"]["from_this_build"] == kept > 0
    assert built.content_id == chain.tokenized.content_id
    assert committed(workspace.progress, "train").complete


class Corpora:
    """Tokenized corpora of changing files, all in one store."""

    def __init__(self, chain, root, store):
        self._chain, self._root, self.store = chain, root, store
        self.files = {
            f"{n:02d}.txt": path.read_text(encoding="utf-8")
            for n, path in enumerate(sorted((chain.corpus_dir.parents[1] / "source").iterdir()))
        }

    def build(self, config=DEFAULT):
        """Returns the tokenized corpus of the files as they are now, and what was told of it."""
        directory = self._root / f"{len(list(self._root.iterdir()))}"
        (directory / "source").mkdir(parents=True)
        for name, text in self.files.items():
            (directory / "source" / name).write_text(text, encoding="utf-8", newline="")
        source = FilesSource(type="files", paths=(str(directory / "source"),))
        listing = corpus.scan(source, validation=self._chain.validation)
        recipe = Recipe("raw_corpus", 1, listing.root)
        raw, _ = self.store.materialize(recipe, lambda space: corpus.build(source, listing, space))
        recipe = Recipe("tokenized_corpus", 1, config, {"corpus": raw.as_input()})
        reports = []
        made, _ = self.store.materialize(
            recipe,
            lambda space: tokenized.build(
                config,
                self.store.local("raw_corpus", raw.content_id),
                self._chain.tokenizer_dir,
                space,
                fetch_earlier=tokenized.EarlierBuilds(self.store).fetch,
                report=reports.append,
                unit_bytes=UNIT,
            ),
        )
        return made, self.store.local(made.kind, made.content_id), reports


@pytest.fixture(params=["local", "remote"])
def corpora(request, chain, tmp_path):
    url = str(tmp_path / "store")
    if request.param == "remote":
        url = f"memory://{uuid.uuid4().hex}"
    (tmp_path / "corpora").mkdir()
    return Corpora(chain, tmp_path / "corpora", ArtifactStore(url, scratch=tmp_path / "scratch"))


def test_a_changed_file_tokenizes_its_own_units_only(corpora):
    first, before, _ = corpora.build()
    assert first.facts["reused"]["units"] == 0
    corpora.files["17.txt"] += " and more"
    second, after, reports = corpora.build()
    reused = second.facts["reused"]
    assert reused["of_units"] - reused["units"] in (1, 2)
    assert reused["from_other_corpora"] == reused["units"] > 5
    assert 70 < reused["percent"] < 100
    (told,) = [str(report) for report in reports if "reused" in str(report)]
    assert f"{reused['units']} of {reused['of_units']} units reused" in told
    assert f"{reused['tokens']:,} tokens ({reused['percent']}%)" in told
    if corpora.store.is_local:
        inodes = {path.stat().st_ino for path in before.glob("*.arrow")}
        shared = [path for path in after.glob("*.arrow") if path.stat().st_ino in inodes]
        assert len(shared) >= reused["units"]


def test_reused_shards_are_those_that_a_fresh_build_makes(corpora, chain, make_workspace):
    corpora.build()
    corpora.files["03.txt"] = "new words"
    del corpora.files["30.txt"]
    made, reused, _ = corpora.build()
    fresh = make_workspace("fresh")
    raw_id = corpora.store.record(made.recipe_id)["recipe"]["inputs"]["corpus"]["content_id"]
    raw = corpora.store.local("raw_corpus", raw_id)
    built = tokenized.build(DEFAULT, raw, chain.tokenizer_dir, fresh, unit_bytes=UNIT)
    assert built.content_id == made.content_id
    assert files_of(fresh.output) == {
        name: data for name, data in files_of(reused).items() if name != INVENTORY
    }


def test_another_policy_reuses_nothing(corpora):
    corpora.build()
    made, _, _ = corpora.build(TokenizationConfig(append_bos=True))
    assert made.facts["reused"]["units"] == 0


def test_a_damaged_shard_of_another_corpus_is_named_and_not_taken(chain, tmp_path):
    store = ArtifactStore(str(tmp_path / "store"))
    (tmp_path / "corpora").mkdir()
    corpora = Corpora(chain, tmp_path / "corpora", store)
    _, directory, _ = corpora.build()
    shards = sorted(directory.glob("*.arrow"))
    shards[0].write_bytes(shards[0].read_bytes()[:-1] + b"x")
    shards[1].unlink()
    corpora.files["17.txt"] += " and more"
    made, _, reports = corpora.build()
    told = [str(report) for report in reports]
    assert any(f"{shards[0].name} of an earlier tokenized corpus: damaged" in t for t in told)
    assert any(f"{shards[1]} of an earlier tokenized corpus is missing" in t for t in told)
    assert made.facts["reused"]["of_units"] - made.facts["reused"]["units"] in (3, 4)


def test_shards_can_be_read_in_order_while_more_are_made(chain, make_workspace, monkeypatch):
    workspace = make_workspace("growing")
    assert committed(workspace.progress, "train") is None
    seen = []

    def looking(self, *arguments):
        shard = commit(self, *arguments)
        seen.append(committed(workspace.progress, "train"))
        return shard

    commit = ledger.Ledger.commit
    monkeypatch.setattr(ledger.Ledger, "commit", looking)
    build(chain, workspace)
    last = committed(workspace.progress, "train")
    assert [growing.complete for growing in seen] == [False] * len(seen)
    assert last.complete
    for shorter, longer in pairwise([*seen, last]):
        assert longer.shards[: len(shorter.shards)] == shorter.shards
    assert len({len(growing.shards) for growing in seen}) > 5
    parts = [
        map_shard(workspace.progress / shard.file, np.dtype(last.dtype)).tokens
        for shard in last.shards
    ]
    assert np.concatenate(parts).tolist() == chain.tokens("train")
    assert (last.vocab_size, last.eos_id) == (300, 0)


def test_units_committed_out_of_order_are_told_in_order(chain, make_workspace, monkeypatch):
    workspace = make_workspace("shuffled")

    def backwards(here, units):
        yield from reversed(list(compute.encoded_here(here, units)))

    monkeypatch.setattr(tokenized, "encoded_here", backwards)
    built = build(chain, workspace)
    assert built.content_id == chain.tokenized.content_id
    assert files_of(workspace.output) == files_of(chain.tokenized_dir)
    parts = [
        map_shard(workspace.progress / shard.file, np.dtype(np.uint16)).tokens
        for shard in committed(workspace.progress, "train").shards
    ]
    assert np.concatenate(parts).tolist() == chain.tokens("train")


def test_equal_documents_in_several_units_are_encoded_once(chain, make_workspace, tmp_path):
    (tmp_path / "source").mkdir()
    for name in "abcdefgh":
        (tmp_path / "source" / name).write_text("the same text " * 400)
    source = FilesSource(type="files", paths=(str(tmp_path / "source"),))
    listing = corpus.scan(source, validation=chain.validation)
    raw = make_workspace("raw")
    corpus.build(source, listing, raw)
    workspace = make_workspace("equal")
    built = tokenized.build(DEFAULT, raw.output, chain.tokenizer_dir, workspace, unit_bytes=UNIT)
    assert len(list(workspace.progress.glob("units/*.arrow"))) == 1
    assert sum(built.facts[split]["documents"] for split in ROLES) == 8
    assert len({path.stat().st_ino for path in workspace.output.glob("*.arrow")}) == 1


def test_statistics_are_those_of_the_documents(chain):
    encoder = Tokenizer.load(chain.tokenizer_dir)
    for split in ROLES:
        documents = corpus.documents(chain.corpus_dir, split)
        lengths = [len(encoder.encode(document.text)) + 1 for document in documents]
        facts = chain.tokenized.facts[split]
        assert facts["longest_document"] == max(lengths)
        expected = [
            sum(2**k <= length < 2 ** (k + 1) for length in lengths)
            for k in range(max(lengths).bit_length())
        ]
        assert facts["document_lengths"] == expected
        assert "unknown_percent" not in facts


def test_unknown_tokens_are_counted(chain, make_workspace, tmp_path):
    vocab = {"[UNK]": 0, "<|endoftext|>": 1, "return": 2, "the": 3}
    backend = tokenizers.Tokenizer(models.WordLevel(vocab, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    (tmp_path / "tokenizer").mkdir()
    save(
        Tokenizer(backend, bos_token="<|endoftext|>", eos_token="<|endoftext|>"),
        tmp_path / "tokenizer",
    )
    workspace = make_workspace("unknown")
    built = tokenized.build(DEFAULT, chain.corpus_dir, tmp_path / "tokenizer", workspace)
    tokens = stream(workspace.output, "train")
    expected = 100 * tokens.count(0) / len(tokens)
    assert 5 < expected < 95
    assert built.facts["train"]["unknown_percent"] == pytest.approx(expected, abs=1e-4)


def test_a_shard_of_too_many_tokens_for_its_offsets_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"x\.arrow: 2,147,483,648 tokens"):
        write_shard(tmp_path / "x.arrow", np.empty(0, np.uint16), np.array([2**31]))
    assert not list(tmp_path.iterdir())


def test_ids_take_four_bytes_from_65536_on(chain, make_workspace, tmp_path):
    assert token_dtype(65535) == np.uint16
    assert token_dtype(65536) == np.uint32
    vocab = {c: i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    vocab |= {f"<{i}>": i for i in range(256, 69_999)} | {"<|endoftext|>": 69_999}
    backend = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    large = Tokenizer(backend, bos_token="<|endoftext|>", eos_token="<|endoftext|>")
    (tmp_path / "tokenizer").mkdir()
    save(large, tmp_path / "tokenizer")
    workspace = make_workspace("wide")
    built = tokenized.build(DEFAULT, chain.corpus_dir, tmp_path / "tokenizer", workspace)
    assert built.facts["dtype"] == "uint32"
    tokens = stream(workspace.output, "validation")
    text = next(corpus.documents(chain.corpus_dir, "validation")).text.encode()
    assert len(text) == tokens.index(69_999)


def test_a_shard_of_other_columns_is_refused(tmp_path):
    path = tmp_path / "x.arrow"
    write_shard(path, np.arange(6, dtype=np.uint32), np.array([2, 0, 4]))
    tokens, offsets, _ = map_shard(path, np.dtype(np.uint32))
    assert (tokens.tolist(), offsets.tolist()) == ([0, 1, 2, 3, 4, 5], [0, 2, 2, 6])
    assert not tokens.flags.writeable
    with pytest.raises(ValueError, match=r"x\.arrow: expected one batch of .*uint16"):
        map_shard(path, np.dtype(np.uint16))


@pytest.mark.parametrize("written_at_once", [3, 6, 1 << 20])
def test_columns_of_rows_are_written_in_pieces(written_at_once, tmp_path, monkeypatch):
    monkeypatch.setattr(shards, "_WRITTEN_AT_ONCE", written_at_once)
    ids, mask = np.arange(40, dtype=np.uint16), np.arange(40, dtype=np.uint8) % 3
    columns = {"input_ids": np.split(ids, [1, 17]), "loss_mask": [mask]}
    write_rows(tmp_path / "x.arrow", columns, 8)
    dtypes = {name: pieces[0].dtype for name, pieces in columns.items()}
    found = map_rows(tmp_path / "x.arrow", dtypes, 8)
    assert np.array_equal(found["input_ids"], ids)
    assert np.array_equal(found["loss_mask"], mask)


def test_gathering_crosses_shards_of_any_size():
    draw = np.random.default_rng(0)
    whole = draw.integers(0, 60000, 500, dtype=np.uint16)
    cuts = np.sort(draw.integers(0, 500, 40))
    flat = FlatTokens(np.split(whole, cuts))
    assert len(flat) == 500
    for length in (1, 7, 60):
        indices = draw.integers(0, 500 // length, 200)
        rows = flat.rows(indices, length)
        assert rows.dtype == np.int32
        assert np.array_equal(rows, whole[: 500 // length * length].reshape(-1, length)[indices])
        assert flat.rows(indices[:0], length).shape == (0, length)
    assert np.array_equal(flat.span(3, 480), whole[3:480])
    assert flat.span(5, 5).size == 0


@pytest.mark.parametrize(("cuts", "alone"), [([40, 80], []), ([45, 85], [4, 8]), ([45], [4])])
def test_only_rows_that_span_two_shards_are_copied_one_by_one(cuts, alone, monkeypatch):
    flat = FlatTokens(np.split(np.arange(120, dtype=np.uint16), cuts))
    copied, span = [], flat.span
    monkeypatch.setattr(flat, "span", lambda *bounds: copied.append(bounds) or span(*bounds))
    for indices in (np.arange(12), np.array([11, 4, 0, 8])):
        assert np.array_equal(flat.rows(indices, 10), indices[:, None] * 10 + np.arange(10))
    assert sorted(copied) == sorted([(10 * row, 10 * row + 10) for row in alone] * 2)


def test_the_manifest_says_what_its_format_is(chain, tmp_path):
    raw = json.loads((chain.tokenized_dir / "manifest.json").read_text())
    (tmp_path / "manifest.json").write_text(json.dumps(raw | {"format": "other/1"}))
    with pytest.raises(ValueError, match=r"manifest\.json: not of format"):
        token_files.Manifest.read(tmp_path)
