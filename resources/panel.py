"""What the metadata panel of an asset shows: tables, pictures that stand in the text, plain facts.

A picture is a Markdown image whose bytes are in the link itself, so that it is shown wherever the
event log is read: the UI follows no link from its page to a file.
"""

import base64
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import dagster as dg

Cell = str | int | float | bool | None
_TYPES: Mapping[type, str] = {bool: "bool", int: "int", float: "float"}


def table(columns: Sequence[str], rows: Iterable[Sequence[Cell]]) -> dg.TableMetadataValue:
    """Returns rows under named columns; a column is as its first value is, a text without one."""
    listed = [tuple(row) for row in rows]
    kinds = [
        next((_TYPES.get(type(row[place]), "string") for row in listed if row[place] is not None),
             "string")
        for place in range(len(columns))
    ]  # fmt: skip
    schema = dg.TableSchema(
        [dg.TableColumn(name, kind) for name, kind in zip(columns, kinds, strict=True)]
    )
    records = [dg.TableRecord(dict(zip(columns, row, strict=True))) for row in listed]
    return dg.MetadataValue.table(records, schema)


def picture(name: str, content: bytes, media_type: str) -> dg.MarkdownMetadataValue:
    """Returns an image, such as `image/svg+xml`, as a text that holds it."""
    encoded = base64.b64encode(content).decode()
    return dg.MetadataValue.md(f"![{name}](data:{media_type};base64,{encoded})")


def flat(facts: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Returns nested facts as `train/rows: 7`, which the panel lists and plots over time."""
    shown: dict[str, Any] = {}
    for name, value in facts.items():
        if isinstance(value, Mapping) and all(isinstance(key, str) for key in value):
            shown |= flat(value, f"{prefix}{name}/")
        elif isinstance(value, bool | int | float | str):
            shown[prefix + name] = value
        elif value:
            shown[prefix + name] = dg.MetadataValue.json(value)
    return shown
