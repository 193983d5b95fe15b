"""One canonical byte encoding of plain values, and the digests made of it.

Every identity in the project is a SHA-256 over this encoding, so it is injective and frozen:

    value    = tag (1 byte) ++ length (8 bytes, big endian) ++ payload
    None     N ++ nothing
    bool     B ++ 00 or 01
    int      I ++ decimal digits
    float    F ++ `float.hex()`; zero keeps its sign, NaN and infinities are refused
    str      S ++ UTF-8 of the NFC form
    bytes    Y ++ the bytes
    list     L ++ items (a tuple is tagged T)
    mapping  M ++ (key, value) pairs sorted by the encoded key; keys are strings
    record   R ++ the type tag as a string ++ its fields as a mapping

A *record* is a frozen dataclass with a class attribute `identity_tag`, e.g. `"optim.adamw/1"`: two
classes with equal fields differ. Every field counts with its default filled in, except two kinds
declared with `dataclasses.field(metadata=...)`: `NOT_IDENTITY` fields never count (paths, logging),
and `added_later(default)` fields count only when they differ from the default they were introduced
with, so adding one keeps all older identities.
"""

import dataclasses
import hashlib
import math
import unicodedata
from collections.abc import Mapping
from typing import Any

NOT_IDENTITY: Mapping[str, Any] = {"identity": "never"}
"""`dataclasses.field` metadata of a field that cannot change a result."""


def added_later(introduced_default: Any) -> Mapping[str, Any]:
    """Returns `dataclasses.field` metadata of a field that did not exist in earlier versions."""
    return {"identity": "unless", "introduced_default": introduced_default}


def encode(value: Any) -> bytes:
    """Returns the canonical bytes of `value`, a tree of plain values and tagged records.

    Raises:
        ValueError: for NaN or an infinity, which equal nothing or hide an overflow.
        TypeError: for any type without a canonical form, naming where in the tree it sits.
    """
    return _encode(value, "$")


def digest(domain: str, value: Any) -> str:
    """Returns the SHA-256, in hex, of `value` in `domain`; no digest is shared by two domains."""
    return hashlib.sha256(encode([domain, value])).hexdigest()


def plain(value: Any, where: str = "$") -> Any:
    """Returns `value` as JSON-ready data, holding exactly what its identity counts.

    Records become `{"$type": tag, field: ...}`, so two plain trees differ just where their
    canonical encodings do; records in lineage files are written this way and compared field by
    field.
    """
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        tag, fields = _record(value, where)
        return {"$type": tag} | {
            name: plain(item, f"{where}.{name}") for name, item in fields.items()
        }
    if isinstance(value, Mapping):
        return {str(key): plain(item, f"{where}.{key}") for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item, f"{where}[{i}]") for i, item in enumerate(value)]
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise TypeError(f"{where}: {type(value).__name__} {value!r} has no plain form.")


def _frame(tag: bytes, payload: bytes) -> bytes:
    return tag + len(payload).to_bytes(8, "big") + payload


def _encode(value: Any, where: str) -> bytes:
    match value:
        case None:
            return _frame(b"N", b"")
        case bool():
            return _frame(b"B", b"\x01" if value else b"\x00")
        case int():
            return _frame(b"I", str(int(value)).encode())
        case float():
            if not math.isfinite(value):
                raise ValueError(f"{where}: {value} has no identity; give a finite number.")
            return _frame(b"F", float(value).hex().encode())
        case str():
            return _frame(b"S", unicodedata.normalize("NFC", value).encode())
        case bytes():
            return _frame(b"Y", value)
        case list():
            return _frame(b"L", _encode_items(value, where))
        case tuple():
            return _frame(b"T", _encode_items(value, where))
        case Mapping():
            return _frame(b"M", _encode_pairs(value, where))
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        tag, fields = _record(value, where)
        return _frame(b"R", _encode(tag, where) + _encode(fields, where))
    raise TypeError(
        f"{where}: a {type(value).__name__} has no canonical encoding. Pass plain values "
        f"(None, bool, int, float, str, bytes, list, tuple, mapping) or a frozen "
        f"dataclass with an `identity_tag`."
    )


def _encode_items(items: list[Any] | tuple[Any, ...], where: str) -> bytes:
    return b"".join(_encode(item, f"{where}[{i}]") for i, item in enumerate(items))


def _encode_pairs(mapping: Mapping[Any, Any], where: str) -> bytes:
    pairs = []
    for key, item in mapping.items():
        if not isinstance(key, str):
            raise TypeError(
                f"{where}: the key {key!r} is a {type(key).__name__}; identities take string keys."
            )
        pairs.append((_encode(key, where), _encode(item, f"{where}.{key}")))
    pairs.sort()
    keys = [key for key, _ in pairs]
    if len(set(keys)) != len(keys):
        raise ValueError(
            f"{where}: two keys are equal after Unicode normalization (NFC); rename one."
        )
    return b"".join(key + item for key, item in pairs)


def _record(value: Any, where: str) -> tuple[str, dict[str, Any]]:
    tag = getattr(type(value), "identity_tag", None)
    if not isinstance(tag, str) or "identity_tag" not in vars(type(value)):
        raise TypeError(
            f"{where}: {type(value).__name__} has no `identity_tag` of its own; add e.g. "
            f'`identity_tag: ClassVar[str] = "area.{type(value).__name__.lower()}/1"`.'
        )
    return tag, {
        f.name: getattr(value, f.name) for f in dataclasses.fields(value) if _counts(f, value)
    }


def _counts(field: dataclasses.Field[Any], value: Any) -> bool:
    rule = field.metadata.get("identity")
    if rule is None:
        return True
    if rule == "never":
        return False
    current, introduced = getattr(value, field.name), field.metadata["introduced_default"]
    return encode(current) != encode(introduced)
