"""Work units: every document in one, and a change moves no cut far away from it."""

import random
from itertools import chain

import pytest

from modeling.data.corpus import StoredDocument
from modeling.data.units import cut_units

LIMIT = 4000


def cut(documents):
    stored = (
        StoredDocument(doc_id, split, memoryview(text.encode()))
        for doc_id, split, text in documents
    )
    return list(cut_units(stored, LIMIT))


def lines(file, count, seed, longest=300, split="train"):
    draw = random.Random(f"{file}{seed}")
    return [
        (f"{file}#{n}", split, "".join(draw.choices("abcdé ", k=draw.randint(1, longest))))
        for n in range(1, count + 1)
    ]


def small_files(count, seed=0):
    return [lines(f"small-{n:03d}.txt", 1, seed)[0] for n in range(count)]


def keys(units):
    return [unit.key("policy") for unit in units]


def test_units_hold_every_document_once_in_order_within_the_limit():
    documents = []
    for n in range(30):
        split = "train" if n % 3 else "validation"
        documents += lines(f"{n}.jsonl", n * 3, 1, split=split)
    units = cut(documents)
    for split in ("train", "validation"):
        held = [
            (doc_id, split, bytes(text).decode())
            for unit in units
            if unit.split == split
            for doc_id, text in zip(unit.doc_ids, unit.texts, strict=True)
        ]
        assert held == [document for document in documents if document[1] == split]
    assert all(unit.num_bytes <= LIMIT for unit in units)
    assert len(units) < 3 * sum(unit.num_bytes for unit in units) / LIMIT


def test_a_document_longer_than_the_limit_has_its_own_unit():
    documents = [*lines("a", 3, 0), ("b", "train", "x" * (3 * LIMIT)), *lines("c", 3, 0)]
    units = cut(documents)
    assert ["b"] in [unit.doc_ids for unit in units]
    assert sum(len(unit.texts) for unit in units) == 7


def test_large_files_share_no_unit_and_small_ones_fill_them():
    large = [document for name in "abc" for document in lines(f"{name}.jsonl", 200, 0)]
    for unit in cut(large):
        assert len({doc_id.partition("#")[0] for doc_id in unit.doc_ids}) == 1
    for unit in cut([*small_files(20), *lines("x.jsonl", 200, 0)]):
        assert len({doc_id.startswith("x") for doc_id in unit.doc_ids}) == 1 or (
            unit.num_bytes <= LIMIT
        )
    counts = [len(unit.texts) for unit in cut(small_files(200))]
    assert min(counts[:-1]) >= LIMIT // 8 // 300


def test_a_changed_large_file_costs_its_own_units_alone():
    files = {name: lines(f"{name}.jsonl", 200, 0) for name in "abc"}
    before = {
        key: unit for unit, key in zip(*_with_keys(list(chain(*files.values()))), strict=True)
    }
    changed = files | {"b": lines("b.jsonl", 150, 1)}
    after = {
        key: unit for unit, key in zip(*_with_keys(list(chain(*changed.values()))), strict=True)
    }
    for key in set(before) ^ set(after):
        unit = before.get(key) or after[key]
        assert all(doc_id.startswith("b.jsonl#") for doc_id in unit.doc_ids)
    assert len(set(before) & set(after)) >= 10


@pytest.mark.parametrize("kind", ["edit", "insert", "delete"])
def test_a_change_among_small_files_moves_only_the_cuts_next_to_it(kind):
    files = small_files(1500)
    before = set(keys(cut(files)))
    lost = []
    for place in range(100, 1400, 100):
        changed = list(files)
        if kind == "delete":
            del changed[place]
        else:
            text = ("small-x.txt", "train", f"another text {place}")
            changed[place : place + (kind == "edit")] = [text]
        lost.append(len(before - set(keys(cut(changed)))))
    assert all(count >= 1 for count in lost)
    assert sum(lost) / len(lost) < 4
    assert len(before) > 60


def test_an_edited_line_of_a_large_file_costs_the_units_around_it():
    file = lines("large.jsonl", 3000, 0)
    before = keys(cut(file))
    edited = [*file[:700], ("large.jsonl#701", "train", "edited"), *file[701:]]
    lost = set(before) - set(keys(cut(edited)))
    assert 1 <= len(lost) <= 5
    assert len(before) > 100


def test_keys_tell_documents_bounds_and_policy_apart():
    def key(texts, policy="p"):
        (unit,) = cut([(f"f#{n}", "train", text) for n, text in enumerate(texts)])
        return unit.key(policy)

    found = {key(["ab", "c"]), key(["a", "bc"]), key(["abc"]), key(["ab", "d"])}
    assert len(found) == 4
    assert key(["abc"], "other") not in found
    (other_name,) = cut([("g#1", "validation", "abc")])
    assert other_name.key("p") == key(["abc"])


def _with_keys(documents):
    units = cut(documents)
    return units, keys(units)
