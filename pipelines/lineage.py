"""What an artifact was made of, down to the corpus files, from the records of the store alone.

An artifact may have several records: other recipes that gave the same bytes. The tree shows one,
and says how many there are; what it was made of is followed through the record's inputs.
"""

import dataclasses
import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from modeling.artifacts import ArtifactStore

Record = Mapping[str, Any]
_FILES, _MOST_FILES = "files/", 3


@dataclasses.dataclass(frozen=True)
class Node:
    """One artifact in a tree of inputs."""

    role: str
    """What it is to the artifact above it; empty at the top."""
    record: Record
    num_records: int
    is_repeat: bool
    """Its inputs stand further up in the tree."""
    inputs: tuple["Node", ...]

    @property
    def files(self) -> Mapping[str, str]:
        """The files that it was read from, with the SHA-256 of each: what a lineage ends in."""
        return files_of(self.record)


class LineageError(ValueError):
    """The artifact, or something it was made of, is not on record."""


def lineage(store: ArtifactStore, reference: str) -> Node:
    """Returns the tree of inputs of the artifact meant by a content id, a prefix, or an alias."""
    return _node("", *store.resolve_object(reference), store.records_by_object(), set())


def lines(node: Node) -> Iterator[str]:
    """Yields the tree as text, a line an artifact, with the first files of what was read."""
    yield _label(node)
    yield from _branches(node, "")


def _branches(node: Node, indent: str) -> Iterator[str]:
    below: list[tuple[str, Node | None]] = [(_label(child), child) for child in node.inputs]
    below += [] if node.is_repeat else [(line, None) for line in _file_lines(node.files)]
    for place, (line, child) in enumerate(below, 1):
        is_last = place == len(below)
        yield f"{indent}{'└─ ' if is_last else '├─ '}{line}"
        if child is not None:
            yield from _branches(child, indent + ("   " if is_last else "│  "))


def _file_lines(files: Mapping[str, str]) -> Iterator[str]:
    for path in sorted(files)[:_MOST_FILES]:
        yield f"{path}  sha256 {files[path][:12]}"
    if (more := len(files) - _MOST_FILES) > 0:
        yield f"and {more:,} more: --json lists every file"


def files_of(record: Record) -> dict[str, str]:
    """Returns the SHA-256 of each file that an artifact was read from, by path."""
    leaves: Mapping[str, str] = record["leaves"]
    return {
        name.removeprefix(_FILES): leaf for name, leaf in leaves.items() if name.startswith(_FILES)
    }


def _label(node: Node) -> str:
    record = node.record
    title = (
        record["kind"] if node.role in ("", record["kind"]) else f"{node.role}: {record['kind']}"
    )
    text = f"{title} {record['content_id'][:12]}"
    if node.is_repeat:
        return f"{text} (as above)"
    more = f", {node.num_records} recipes gave it" if node.num_records > 1 else ""
    return f"{text}  recipe {record['recipe_id'][:12]}{more}  {summary(record)}".rstrip()


def summary(record: Record) -> str:
    """Returns the few figures of an artifact that a reader looks for first."""
    facts = record["facts"]
    shown = _FIGURES[record["kind"]](facts) if record["kind"] in _FIGURES else []
    return ", ".join(shown)


def _node(
    role: str,
    kind: str,
    content_id: str,
    index: Mapping[tuple[str, str], Sequence[Record]],
    above: set[tuple[str, str]],
) -> Node:
    found = index.get((kind, content_id))
    if not found:
        raise LineageError(
            f"{kind} {content_id[:12]} is an input on record, but has no record itself: the store "
            f"has lost it. Materialize its asset again, or restore the store's `recipes` folder."
        )
    record = found[0]
    if (kind, content_id) in above:
        return Node(role, record, len(found), True, ())
    above.add((kind, content_id))
    inputs = sorted(record["recipe"]["inputs"].items())
    children = [_node(name, i["kind"], i["content_id"], index, above) for name, i in inputs]
    return Node(role, record, len(found), False, tuple(children))


def as_json(node: Node) -> str:
    """Returns the tree as JSON: kind, ids, recipe, figures, files and inputs of each artifact."""
    return json.dumps(_plain(node), indent=2, ensure_ascii=False)


def _plain(node: Node) -> dict[str, Any]:
    keys = ("kind", "content_id", "recipe_id", "roots", "numerics")
    shown: dict[str, Any] = {key: node.record[key] for key in keys}
    shown["params"] = node.record["recipe"]["params"]
    shown["summary"] = summary(node.record)
    provenance = node.record["provenance"]
    shown["made"] = {"commit": provenance.get("git", {}).get("commit")} | provenance.get(
        "times", {}
    )
    if node.files and not node.is_repeat:
        shown["files"] = dict(node.files)
    return shown | {"inputs": {child.role: _plain(child) for child in node.inputs}}


def _total(facts: Mapping[str, Any], name: str) -> int:
    from modeling.data.splits import ROLES, role_of

    return sum(facts[split][name] for split in facts if role_of(split) in ROLES)


_FIGURES = {
    "raw_corpus": lambda f: [
        f"{sum(f['documents'].values()):,} documents",
        f"{sum(f['bytes'].values()) / 1e6:.1f} MB",
    ],
    "tokenizer": lambda f: [f"{f['vocab_size']:,} ids"],
    "tokenized_corpus": lambda f: [
        f"{_total(f, 'tokens'):,} tokens",
        f"{_total(f, 'bytes') / _total(f, 'tokens'):.2f} bytes a token",
    ],
    "token_cache": lambda f: [
        f"{_total(f, 'rows'):,} rows of {f['sequence_length']:,}",
        f"{_total(f, 'tokens'):,} tokens",
    ],
    "token_cache_copy": lambda f: [f"{_total(f, 'rows'):,} rows in {_total(f, 'files')} files"],
    "checkpoint": lambda f: [
        f"step {f['steps']:,}",
        f"loss {f['loss_first']:.3f} to {f['loss_last']:.3f}",
    ],
    "eval_report": lambda f: [
        f"perplexity {f['perplexity']:.2f}",
        *([] if f["bits_per_byte"] is None else [f"{f['bits_per_byte']:.3f} bits a byte"]),
    ],
    "hf_model": lambda f: [f"{f['num_parameters']:,} parameters"],
}
