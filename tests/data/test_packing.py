"""Packed documents: what a row may hold, against a plain packer, a reader and `datasets`."""

import dataclasses
import json
from collections import Counter
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from modeling.artifacts import Workspace
from modeling.data import cache, packing
from modeling.data.cache import TokenCache
from modeling.data.config import TokenCacheConfig
from modeling.data.packing import Documents, Fate, PackedRows, Packer, Window
from modeling.data.shards import FlatTokens, write_shard
from modeling.data.token_files import FORMAT, Manifest, Shard, SplitManifest
from modeling.merkle import MerkleHasher

IDS = {"tokenized_id": "a" * 64, "tokenizer_id": "b" * 64}
LENGTH = 16
EOS = 0


def documents_of(lengths, shards=1):
    """Documents of these lengths, in so many shards."""
    return Documents(
        [
            np.cumsum([0, *part], dtype=np.int32)
            for part in np.array_split(np.asarray(lengths, np.int64), shards)
        ]
    )


def pack(lengths, row_length=LENGTH, long_documents="split", shards=1):
    """All rows as lists of (start, length), and what became of documents."""
    packer, documents = Packer(row_length, long_documents), documents_of(lengths, shards)
    rows, fate = [], Fate()
    for window in packer.windows(documents):
        pieces, of_window = packer.pack(documents, *window)
        rows += spans(pieces)
        fate.add(of_window)
    return rows, fate


def spans(pieces):
    """Each row as a list of (start, length)."""
    both = list(zip(pieces.starts.tolist(), pieces.lengths.tolist(), strict=True))
    bounds = pieces.bounds.tolist()
    return [both[a:b] for a, b in pairwise(bounds)]


def plain_best_fit(sizes, row_length):
    """The textbook: longest first, each into the fullest row with room, the oldest of equals."""
    rows = []
    for piece in sorted(range(len(sizes)), key=lambda i: (-sizes[i], i)):
        room = [row_length - sum(sizes[i] for i in row) for row in rows]
        fits = [(space, row) for row, space in enumerate(room) if space >= sizes[piece]]
        if fits:
            rows[min(fits)[1]].append(piece)
        else:
            rows.append([piece])
    return sorted(sorted(row) for row in rows)


@settings(deadline=None, max_examples=60)
@given(st.lists(st.integers(1, 12), max_size=40), st.integers(12, 20))
def test_documents_are_packed_as_the_textbook_has_it(sizes, row_length):
    starts = np.cumsum([0, *sizes])
    expected = [
        [(int(starts[i]), sizes[i]) for i in row] for row in plain_best_fit(sizes, row_length)
    ]
    found, fate = pack(sizes, row_length)
    assert found == expected
    assert (fate.documents, fate.cut, fate.dropped, fate.lost_tokens) == (len(sizes), 0, 0, 0)


@settings(deadline=None, max_examples=60)
@given(
    lengths=st.lists(st.integers(0, 70), max_size=60),
    policy=st.sampled_from(["split", "truncate", "drop"]),
)
def test_every_token_is_where_the_policy_puts_it(lengths, policy):
    rows, fate = pack(lengths, long_documents=policy)
    assert all(0 < sum(length for _, length in row) <= LENGTH for row in rows)
    assert all(row == sorted(row) for row in rows)
    taken = Counter(
        token for row in rows for start, length in row for token in range(start, start + length)
    )
    assert set(taken.values()) <= {1}
    kept = []
    for start, length in zip(np.cumsum([0, *lengths]).tolist(), lengths, strict=False):
        most = {"split": length, "truncate": min(length, LENGTH), "drop": length}[policy]
        kept += range(start, start + (0 if policy == "drop" and length > LENGTH else most))
    assert sorted(taken) == kept
    long = sum(length > LENGTH for length in lengths)
    empty = sum(length == 0 for length in lengths)
    assert fate.documents == len(lengths)
    assert fate.lost_tokens == sum(lengths) - len(kept)
    assert (fate.cut, fate.dropped) == ((0, long + empty) if policy == "drop" else (long, empty))


def test_long_documents_are_cut_at_whole_rows():
    found, fate = pack([40, 5], long_documents="split")
    assert found == [[(0, 16)], [(16, 16)], [(32, 8), (40, 5)]]
    assert fate.cut == 1


@settings(deadline=None, max_examples=30)
@given(
    lengths=st.lists(st.integers(1, 40), max_size=80),
    shards=st.integers(1, 9),
    window=st.integers(1, 4),
)
def test_windows_depend_on_documents_alone_and_end_at_the_first_that_fills_them(
    lengths, shards, window
):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(packing, "WINDOW_TOKENS", 1)
        patch.setattr(packing, "WINDOW_ROWS", window)
        patch.setattr(packing, "WINDOW_DOCUMENTS", 7)
        found, _ = pack(lengths, shards=shards)
        by_window, window_lengths = [], []
        for length in [*lengths, None]:
            is_full = sum(window_lengths) >= window * LENGTH or len(window_lengths) == 7
            if is_full or length is None:
                by_window.append(window_lengths)
                window_lengths = []
            window_lengths = [*window_lengths, length]
        expected, start = [], 0
        for of_window in by_window:
            alone, _ = pack(of_window)
            expected += [[(start + at, length) for at, length in row] for row in alone]
            start += sum(of_window)
    assert found == expected


def test_padding_is_little():
    lengths = np.random.default_rng(0).lognormal(5.5, 1.0, 20000).astype(int) + 1
    found, _ = pack(lengths, 1024)
    padding = 1 - int(lengths.sum()) / (len(found) * 1024)
    assert padding < 0.001
    # One document a row, the alternative that keeps them whole, wastes most of it.
    assert padding < (1 - np.minimum(lengths, 1024).mean() / 1024) / 50


def expected_row(row, stream, mask):
    tokens, segment_ids, loss_mask = [], [], []
    for number, (start, length) in enumerate(row, start=1):
        tokens += stream[start : start + length].tolist()
        segment_ids += [number] * length
        loss_mask += mask[start : start + length].astype(bool).tolist()
    padding = LENGTH - len(tokens)
    return tokens + [EOS] * padding, segment_ids + [0] * padding, loss_mask + [False] * padding


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("cuts", [1, 4])
def test_rows_are_put_together_from_any_shards(cuts, masked):
    draw = np.random.default_rng(cuts)
    lengths = draw.integers(1, 40, 200)
    stream = draw.integers(1, 60000, lengths.sum()).astype(np.uint16)
    mask = draw.integers(0, 2, len(stream)).astype(np.uint8)
    ends = np.cumsum(lengths)[[50, 51, 130]] if cuts > 1 else []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(packing, "WINDOW_TOKENS", 1)
        patch.setattr(packing, "WINDOW_ROWS", 1000 if cuts == 1 else 9)
        rows, _ = pack(lengths)
        documents = documents_of(lengths)
        windows = stored_windows(documents)
    assert len(windows) > 1 or cuts == 1
    opened = PackedRows(
        windows,
        documents,
        FlatTokens(np.split(stream, ends)),
        FlatTokens(np.split(mask, ends)) if masked else None,
        sequence_length=LENGTH,
        long_documents="split",
        padding_id=EOS,
    )
    assert len(opened) == len(rows)
    indices = draw.integers(0, len(rows), 500)
    found = opened.gather(indices)
    ones = mask if masked else np.ones_like(mask)
    expected = [expected_row(rows[index], stream, ones) for index in indices]
    for column, wanted in zip(found, zip(*expected, strict=True), strict=True):
        assert column.tolist() == list(wanted)
    assert opened.gather(indices[:0]).tokens.shape == (0, LENGTH)


def stored_windows(documents):
    packer = Packer(LENGTH, "split")
    return [
        Window.of(stop - first, packer.pack(documents, first, stop)[0])
        for first, stop in packer.windows(documents)
    ]


def test_rows_that_are_not_those_of_the_index_are_refused():
    documents = documents_of([5, 9, 20, 3])
    (window,) = stored_windows(documents)
    opened = PackedRows(
        [window],
        documents_of([5, 9, 19, 4]),
        FlatTokens([np.arange(37, dtype=np.uint16)]),
        None,
        sequence_length=LENGTH,
        long_documents="split",
        padding_id=EOS,
    )
    with pytest.raises(ValueError, match="documents 0 to 3 give other packed rows"):
        opened.gather(np.array([0]))
    with pytest.raises(ValueError, match="documents 0 to 3 give other packed rows"):
        opened.pieces()


def test_only_windows_that_are_read_are_laid(monkeypatch):
    monkeypatch.setattr(packing, "WINDOW_TOKENS", 1)
    monkeypatch.setattr(packing, "WINDOW_ROWS", 2)
    lengths = np.full(40, 8)
    documents = documents_of(lengths)
    windows = stored_windows(documents)
    tokens = FlatTokens([np.arange(320, dtype=np.uint16)])
    damaged = [*windows[:5], windows[5]._replace(digest="?"), *windows[6:]]
    opened = PackedRows(
        damaged,
        documents,
        tokens,
        None,
        sequence_length=LENGTH,
        long_documents="split",
        padding_id=EOS,
    )
    others = np.array([0, 19, 9, 12, 0])
    np.testing.assert_array_equal(
        opened.gather(others).tokens, others[:, None] * 16 + np.arange(16)
    )
    with pytest.raises(ValueError, match="documents 20 to 23 give other"):
        opened.gather(np.array([11]))


PACKED = TokenCacheConfig(length=64, packing="documents")


@pytest.fixture(scope="module")
def view(chain, tmp_path_factory):
    root = tmp_path_factory.mktemp("packed")
    (root / "output").mkdir()
    workspace = Workspace(root, root / "output")
    return workspace.output, cache.build(PACKED, chain.tokenized_dir, workspace, **IDS)


def documents_in(opened, split):
    """Every segment of every row, as ids."""
    rows = opened.rows(split, np.arange(opened.num_rows(split)))
    for tokens, segment_ids, loss_mask in zip(*rows, strict=True):
        assert (loss_mask == (segment_ids > 0)).all()
        assert (tokens[segment_ids == 0] == EOS).all()
        for number in range(1, segment_ids.max() + 1):
            yield tokens[segment_ids == number].tolist()


def test_a_packed_cache_holds_every_document_once(chain, view):
    opened = TokenCache.open(view[0], chain.tokenized_dir)
    assert opened.columns == (True, True)
    for split in ("train", "validation"):
        stream = chain.tokens(split)
        ends = [i + 1 for i, token in enumerate(stream) if token == EOS]
        documents = [stream[a:b] for a, b in zip([0, *ends], ends, strict=False)]
        expected = [d[i : i + 64] for d in documents for i in range(0, len(d), 64)]
        assert sorted(documents_in(opened, split)) == sorted(expected)
        facts = view[1].facts[split]
        rows = opened.rows(split, np.arange(opened.num_rows(split)))
        assert facts["rows"] == len(rows.tokens)
        assert facts["tokens"] == len(stream) == int((rows.segment_ids > 0).sum())
        assert facts["padding_tokens"] == int((rows.segment_ids == 0).sum())
        assert facts["padding_share"] == pytest.approx((rows.segment_ids == 0).mean(), abs=1e-6)
        assert facts["cut_documents"] == sum(len(d) > 64 for d in documents)
        assert (facts["dropped_tokens"], facts["dropped_documents"]) == (0, 0)


def test_the_content_id_is_over_stream_pieces_and_rule(chain, view, make_workspace):
    ids = {view[1].content_id}
    for changed in ({"length": 63}, {"packing": "concat"}, {"long_documents": "truncate"}):
        config = TokenCacheConfig(**{"length": 64, "packing": "documents"} | changed)
        name = "-".join(changed)
        ids.add(cache.build(config, chain.tokenized_dir, make_workspace(name), **IDS).content_id)
    assert len(ids) == 4


def test_the_index_is_a_few_figures_a_window(view):
    index = json.loads((view[0] / "index.json").read_text())
    for name, split in index["splits"].items():
        facts = view[1].facts[name]
        ((documents, _, rows, digest),) = split["windows"]
        assert (documents, rows, len(digest)) == (facts["documents"], facts["rows"], 64)
    assert [path.name for path in view[0].iterdir()] == ["index.json"]


def test_another_stream_is_refused(chain, view, make_workspace):
    changed = make_workspace("changed").output
    text = (chain.tokenized_dir / "manifest.json").read_text()
    root = json.loads(text)["splits"]["train"]["tokens_root"]
    for file in chain.tokenized_dir.iterdir():
        (changed / file.name).write_bytes(file.read_bytes())
    (changed / "manifest.json").write_text(text.replace(root, "f" * 64))
    with pytest.raises(ValueError, match="train rows are not the tokens of"):
        TokenCache.open(view[0], changed)


def test_a_split_that_loses_all_its_documents_is_an_error(chain, make_workspace):
    config = TokenCacheConfig(length=8, packing="documents", long_documents="drop")
    with pytest.raises(ValueError, match=r"none of its .* documents fits into a row of 8 tokens"):
        cache.build(config, chain.tokenized_dir, make_workspace("dropped"), **IDS)


@pytest.mark.parametrize("config", [TokenCacheConfig(length=130), PACKED], ids=lambda c: c.name)
def test_a_copy_has_the_rows_and_the_content_id_of_the_view(config, chain, make_workspace):
    view, copy = make_workspace("view"), make_workspace("copy")
    viewed = cache.build(config, chain.tokenized_dir, view, **IDS)
    copied = cache.copy(view.output, chain.tokenized_dir, copy, shard_tokens=2000)
    assert copied.content_id == viewed.content_id
    assert len(list(copy.output.glob("train-*.arrow"))) > 2
    opened, alone = TokenCache.open(view.output, chain.tokenized_dir), TokenCache.open(copy.output)
    assert alone.columns == opened.columns
    for split in ("train", "validation"):
        indices = np.random.default_rng(1).permutation(opened.num_rows(split))
        for found, wanted in zip(
            alone.rows(split, indices), opened.rows(split, indices), strict=True
        ):
            np.testing.assert_array_equal(found, wanted)


@pytest.mark.parametrize("config", [TokenCacheConfig(length=16), PACKED], ids=lambda c: c.name)
def test_datasets_opens_a_copy_as_it_is(config, chain, make_workspace):
    import datasets

    view, copy = make_workspace("view"), make_workspace("copy")
    cache.build(config, chain.tokenized_dir, view, **IDS)
    cache.copy(view.output, chain.tokenized_dir, copy)
    opened = TokenCache.open(view.output, chain.tokenized_dir)
    rows = opened.rows("train", np.arange(opened.num_rows("train")))
    found = datasets.Dataset.from_file(str(copy.output / "train-00000.arrow"))
    names = ["input_ids", "segment_ids", "loss_mask"]
    expected = {
        name: column.astype(int).tolist()
        for name, column in zip(names, rows, strict=True)
        if column is not None
    }
    assert found[:] == expected


def masked_corpus(directory, mask):
    """A tokenized corpus of two shards whose tokens count up, with this mask."""
    directory.mkdir()
    lengths = np.array([5, 20, 3, 9, 30, 13])
    tokens = np.arange(1, 81, dtype=np.uint16)
    roots = [MerkleHasher(), MerkleHasher()]
    for root, stream in zip(roots, (tokens, mask), strict=True):
        root.update(stream.tobytes())
    shards = []
    for name, here, at in (("a", slice(0, 3), slice(0, 28)), ("b", slice(3, 6), slice(28, 80))):
        write_shard(directory / name, tokens[at], lengths[here], mask[at])
        shards.append(Shard(name, 3, len(tokens[at]), 0, "", ""))
    leaves = tuple(leaf.hex() for leaf in roots[0].leaves)
    split = SplitManifest(
        6, 80, 160, tuple(shards), leaves, roots[0].root(), "", roots[1].root(), 30, (6,), None
    )
    raw = {"format": FORMAT} | dataclasses.asdict(Manifest("uint16", 99, 0, True, {"train": split}))
    (directory / "manifest.json").write_text(json.dumps(raw))
    return directory


@pytest.mark.parametrize("packing", ["concat", "documents"])
def test_masks_of_tokens_come_with_their_rows(packing, tmp_path, make_workspace):
    mask = np.random.default_rng(0).integers(0, 2, 80).astype(np.uint8)
    corpus = masked_corpus(tmp_path / "corpus", mask)
    config = TokenCacheConfig(length=16, packing=packing)
    view, copy = make_workspace("view"), make_workspace("copy")
    built = cache.build(config, corpus, view, **IDS)
    cache.copy(view.output, corpus, copy)
    for opened in (TokenCache.open(view.output, corpus), TokenCache.open(copy.output)):
        assert opened.columns == (packing == "documents", True)
        rows = opened.rows("train", np.arange(opened.num_rows("train")))
        # Token t of the stream is t + 1, and 0 is padding.
        expected = np.concatenate([[0], mask])[rows.tokens]
        np.testing.assert_array_equal(rows.loss_mask, expected != 0)
        assert sorted(rows.tokens[rows.tokens > 0].tolist()) == list(range(1, 81))
    other = masked_corpus(tmp_path / "other", 1 - mask)
    assert cache.build(config, other, make_workspace("o"), **IDS).content_id != built.content_id
    with pytest.raises(ValueError, match="Open it with tokenized corpus aaaaaaaaaaaa"):
        TokenCache.open(view.output, other)


def test_a_copy_that_lost_a_file_is_refused(chain, make_workspace):
    copy = make_workspace("copy")
    cache.copy(chain.cache_dir, chain.tokenized_dir, copy, shard_tokens=2000)
    index = copy.output / "index.json"
    index.write_text(index.read_text().replace('"train-00001.arrow",', ""))
    with pytest.raises(ValueError, match="train files hold"):
        TokenCache.open(copy.output)
