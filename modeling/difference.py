"""What differs between two plain trees, field by field, as a person would say it.

Trees are those of `canonical.plain` or of JSON: two of them differ here just where their canonical
encodings do.
"""

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any, Final

from modeling import canonical

UNSET: Final = "unset"
"""Stands for a field that one side does not have."""
_MOST_SHOWN = 60


@dataclasses.dataclass(frozen=True)
class Difference:
    """One field that has another value."""

    path: str
    """Dotted, such as `tokenizer.vocab_size`; items of lists by number."""
    before: str
    after: str

    def __str__(self) -> str:
        return f"{self.path} {self.before} -> {self.after}"


def differences(before: Any, after: Any) -> list[Difference]:
    """Returns every field that differs, in the order of paths."""
    return sorted(_differences(before, after, ""), key=lambda found: found.path)


def _differences(before: Any, after: Any, path: str) -> Iterator[Difference]:
    if isinstance(before, Mapping) and isinstance(after, Mapping):
        kinds = before.get("$type"), after.get("$type")
        if kinds[0] != kinds[1]:
            # Fields of another type are other fields, whatever they are called.
            yield Difference(path, *(_shown(kind) for kind in kinds))
            return
        for name in [*before, *(name for name in after if name not in before)]:
            inner = f"{path}.{name}" if path else str(name)
            if name not in before or name not in after:
                yield Difference(inner, _field(before, name), _field(after, name))
            else:
                yield from _differences(before[name], after[name], inner)
    elif isinstance(before, list | tuple) and isinstance(after, list | tuple):
        if len(before) != len(after):
            yield Difference(path, _shown(before), _shown(after))
            return
        for number, pair in enumerate(zip(before, after, strict=True)):
            yield from _differences(*pair, f"{path}.{number}" if path else str(number))
    elif canonical.encode(before) != canonical.encode(after):  # which tells 1, 1.0 and True apart
        yield Difference(path, _shown(before), _shown(after))


def _field(tree: Mapping[str, Any], name: str) -> str:
    return _shown(tree[name]) if name in tree else UNSET


def _shown(value: Any) -> str:
    if isinstance(value, Mapping) and isinstance(value.get("$type"), str):
        text = value["$type"]
    elif isinstance(value, str):
        text = repr(value) if not value or " " in value else value
    else:
        text = str(value)
    return text if len(text) <= _MOST_SHOWN else f"{text[: _MOST_SHOWN - 3]}..."
