"""Trials are counted when they begin, so that one that takes all with it counts as lost."""

import json
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
import catalogue
from catalogue import CATALOGUE, STEP, trial

DOCUMENT = Path(__file__).parents[2] / "docs" / "reliability.md"


def test_the_documented_table_names_exactly_the_faults_of_the_suite():
    told = catalogue.rows_of(DOCUMENT.read_text())
    empty = catalogue.rows_of(f"{catalogue.BEGIN}{catalogue.table([])}{catalogue.END}")
    assert [row[:1] for row in told] == [row[:1] for row in empty]
    cells = [cell.split(" of ") for row in told for cell in row[1:] if cell[:1].isdigit()]
    assert len(cells) == sum(len(where) for rows in CATALOGUE.values() for where in rows.values())
    assert all(survived == tried and int(tried) > 0 for survived, tried in cells)
    assert "not tried" not in DOCUMENT.read_text()


def test_a_trial_that_fails_is_counted_as_tried_and_an_unknown_one_is_refused(
    tmp_path, monkeypatch
):
    path = tmp_path / "trials.jsonl"
    monkeypatch.setenv(catalogue.VARIABLE, str(path))
    with trial("deleted", STEP):
        pass
    with pytest.raises(OSError, match="lost"), trial("deleted", STEP):
        raise OSError("lost")
    with pytest.raises(AssertionError, match="not in the catalogue"), trial("eaten", STEP):
        pass
    lines = path.read_text().splitlines()
    assert [json.loads(line)[0] for line in lines] == ["tried", "survived", "tried"]
    (row,) = [line for line in catalogue.table(lines).splitlines() if line.startswith("| deleted")]
    assert row.startswith("| deleted | 1 of 2 | **not tried** |")
    num_faults = sum(len(where) for rows in CATALOGUE.values() for where in rows.values())
    assert f"1 lost anything. {num_faults - 1} were **not tried**." in catalogue.table(lines)
    with pytest.raises(
        SystemExit, match=r"(?s)faults were not tried; run all of it.\n.* deleted, raw_c"
    ):
        catalogue.main(str(path), str(tmp_path / "none.md"))
