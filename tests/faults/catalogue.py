"""The faults that the suite tries, how often each was survived, and the table of both in the docs.

    with trial("one bit flipped", "tokenizer"):
        ...                                    a trial is survived if this block ends without error

Where `LEVANTER_TRIALS` names a file, each trial appends a line when it begins and one when it is
survived, so that a trial that takes the whole process with it is counted as lost.

    python tests/faults/catalogue.py TRIALS docs/reliability.md    writes the table, as `make soak`
"""

import contextlib
import json
import os
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

from modeling import faults

VARIABLE = "LEVANTER_TRIALS"
BEGIN, END = "<!-- written by make soak: -->", "<!-- end -->"

STEP = "step checkpoint"
STORE, BUCKET = "local store", "object store"
KINDS = (
    "raw_corpus", "tokenizer", "tokenized_corpus", "token_cache", "checkpoint", "eval_report",
    "hf_model",
)  # fmt: skip

FILE_DAMAGES = (
    "truncated", "deleted", "one bit flipped", "exchanged with a sibling",
    "replaced by an older version", "replaced by a link to a copy",
)  # fmt: skip

CATALOGUE: dict[str, dict[str, tuple[str, ...]]] = {
    "Killed with SIGKILL": {
        **{f"at `{point}`": ("training",) for point in faults.TRAINING},
        "at a random moment": ("training",),
        **{f"at `{point}`": (BUCKET,) for point in faults.SENDING},
        **{
            f"at `{point}`": {
                "before-store": (STORE,),
                "during-upload": (BUCKET,),
            }.get(point, (STORE, BUCKET))
            for point in faults.PUBLISHING
        },
    },
    "A file": dict.fromkeys(FILE_DAMAGES, (STEP, *KINDS)),
    "Machine and surroundings": {
        "power goes": (STEP, STORE),
        "full disk": (STEP, STORE),
        "I/O error at any point": (STEP, STORE),
        "read-only directory": (STEP, STORE),
        "file that may not be read": (STEP, STORE),
        "clock going backwards": (STEP, STORE),
        "listing that comes late": (STEP, BUCKET),
        "half-copied directory": (STEP, STORE),
        "two at work on one directory": (STEP, STORE),
    },
}
"""Fault, and where it is tried, by section."""


@contextlib.contextmanager
def trial(fault: str, where: str) -> Iterator[None]:
    """Counts what is done within as one trial."""
    known = {(f, w) for faults_in in CATALOGUE.values() for f, ws in faults_in.items() for w in ws}
    assert (fault, where) in known, f"{fault!r}, {where!r} is not in the catalogue"
    _append("tried", fault, where)
    yield
    _append("survived", fault, where)


def _append(what: str, fault: str, where: str) -> None:
    if (path := os.environ.get(VARIABLE)) is not None:
        with Path(path).open("a") as file:
            file.write(json.dumps([what, fault, where]) + "\n")


def table(lines: Iterable[str]) -> str:
    """Returns the sections, a row a fault and a column a place: survived of tried."""
    counts = Counter(map(tuple, map(json.loads, lines)))
    parts = []
    for section, rows in CATALOGUE.items():
        places = list(dict.fromkeys(where for wheres in rows.values() for where in wheres))
        parts += ["", f"### {section}", "", f"| | {' | '.join(places)} |"]
        parts += [f"|---|{'---|' * len(places)}"]
        for fault, wheres in rows.items():
            cells = [
                _cell(counts["survived", fault, where], counts["tried", fault, where])
                if where in wheres
                else ""
                for where in places
            ]
            parts.append(f"| {fault} | {' | '.join(cells)} |")
    tried = sum(n for (what, _, _), n in counts.items() if what == "tried")
    survived = sum(n for (what, _, _), n in counts.items() if what == "survived")
    head = f"{tried:,} faults tried, {survived:,} survived, {tried - survived} lost anything."
    if missing := untried(counts):
        head += f" {len(missing)} were **not tried**."
    return "\n".join([head, *parts, ""])


def _cell(survived: int, tried: int) -> str:
    return f"{survived} of {tried}" if tried else "**not tried**"


def untried(counts: Mapping[tuple[str, str, str], int]) -> list[tuple[str, str]]:
    """Returns the faults of the catalogue, and where, that no trial was of."""
    return [
        (fault, where)
        for rows in CATALOGUE.values()
        for fault, wheres in rows.items()
        for where in wheres
        if not counts.get(("tried", fault, where))
    ]


def rows_of(text: str) -> list[list[str]]:
    """Returns the cells of each row of the tables in a document."""
    lines = text.partition(BEGIN)[2].partition(END)[0].splitlines()
    return [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines if line[:1] == "|"]


def main(trials: str, document: str) -> None:
    """Replaces the table of a document; refuses to if any fault of the catalogue was not tried."""
    lines = Path(trials).read_text().splitlines()
    if missing := untried(Counter(map(tuple, map(json.loads, lines)))):
        told = "\n".join(f"    {fault}, {where}" for fault, where in missing)
        sys.exit(f"{trials}: {len(missing)} faults were not tried; run all of it.\n{told}")
    path = Path(document)
    before, _, rest = path.read_text().partition(BEGIN)
    after = rest.partition(END)[2]
    path.write_text(f"{before}{BEGIN}\n\n{table(lines)}\n{END}{after}")


if __name__ == "__main__":
    main(*sys.argv[1:])
