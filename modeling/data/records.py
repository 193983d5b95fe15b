"""What a record of a source becomes in the corpus: the canonical text of a document.

    text         the text itself
    chat         {"messages":[{"content":...,"role":...},...],"<context field>":...}
    supervised   {"prompt":...,"completion":...}
    ids          decimal ids with a space between two

JSON is compact and not escaped; the keys of a message are sorted, and null ones, with which tables
fill up their columns, left out. Templates are applied, and loss masks made, when documents are
tokenized (`modeling.data.rendering`): another template reads no source again.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Integer

from modeling.data.formats_config import ChatFormat, Format, IdsFormat, SupervisedFormat, TextFormat
from modeling.data.long_texts import LongText, SpilledText

_END_OF_IDS = 2**32
_IDS = f"0 to {_END_OF_IDS - 1}"
MESSAGES, PROMPT, COMPLETION = "messages", "prompt", "completion"


class RecordError(ValueError):
    """A record does not hold what its format says; whoever knows its place puts it before this."""


@dataclass(frozen=True)
class RecordReader:
    """Takes documents out of records of one format."""

    fields: tuple[str, ...]
    """What a record must have."""
    optional_fields: tuple[str, ...]
    document: Callable[[Mapping[str, Any]], bytes | LongText]
    """Returns the canonical text of a record as UTF-8, or raises a `RecordError`."""
    is_text: bool
    """Whether the document is just the text of its one field."""


def record_reader(record_format: Format, text_field: str) -> RecordReader:
    """Returns what takes documents of `record_format` out of records.

    Args:
        text_field: the field that holds a text, where records are texts.
    """

    def reader(
        fields: Sequence[str],
        document: Callable[[Mapping[str, Any]], str | LongText],
        optional: Sequence[str] = (),
    ) -> RecordReader:
        def checked(record: Mapping[str, Any]) -> bytes | LongText:
            for field in fields:
                if field not in record:
                    raise RecordError(f"no field {field!r} (found {sorted(record)})")
            return _utf8(document(record))

        is_text = isinstance(record_format, TextFormat)
        return RecordReader(tuple(fields), tuple(optional), checked, is_text)

    match record_format:
        case TextFormat():
            return reader([text_field], lambda record: _text(record, text_field))
        case ChatFormat():
            return reader(
                [record_format.messages_field],
                lambda record: _chat(record, record_format),
                record_format.context_fields,
            )
        case SupervisedFormat():
            fields = record_format.prompt_field, record_format.completion_field
            return reader(fields, lambda record: _supervised(record, *fields))
        case IdsFormat():
            return reader([record_format.field], lambda record: _ids(record, record_format.field))


def _text(record: Mapping[str, Any], field: str) -> str | LongText:
    value = record[field]
    return value if isinstance(value, LongText) else _string(record, field)


def _string(record: Mapping[str, Any], field: str) -> str:
    value = record[field]
    if not isinstance(value, str):
        raise RecordError(f"field {field!r} is {_shown(value)}, expected a string")
    return value


def _chat(record: Mapping[str, Any], chat: ChatFormat) -> str:
    messages = record[chat.messages_field]
    if not isinstance(messages, list) or not messages:
        raise RecordError(
            f"field {chat.messages_field!r} is {_shown(messages)}, expected a list of messages"
        )
    document: dict[str, Any] = {MESSAGES: []}
    for index, message in enumerate(messages):
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            raise RecordError(
                f"field {chat.messages_field!r}, message {index + 1}: expected an object with a "
                f"string `role`, found {_shown(message)}"
            )
        kept = {key: message[key] for key in sorted(message) if message[key] is not None}
        document[MESSAGES].append(kept)
    given = {name: record[name] for name in chat.context_fields if record.get(name) is not None}
    return _json(given | document)


def _supervised(record: Mapping[str, Any], prompt: str, completion: str) -> str:
    texts = {PROMPT: _string(record, prompt), COMPLETION: _string(record, completion)}
    if not texts[COMPLETION]:
        raise RecordError(f"field {completion!r} is empty, so that there is nothing to learn")
    return _json(texts)


def _ids(record: Mapping[str, Any], field: str) -> str:
    ids = record[field]
    if not isinstance(ids, list):
        raise RecordError(f"field {field!r} is {_shown(ids)}, expected a list of ids")
    for index, token in enumerate(ids):
        if not isinstance(token, int) or isinstance(token, bool):
            raise RecordError(f"field {field!r}: id {index + 1} is {_shown(token)}, not an integer")
        if not 0 <= token < _END_OF_IDS:
            raise RecordError(f"field {field!r}: id {index + 1} is {token}, expected {_IDS}")
    return ids_text(np.array(ids, np.int64))


def ids_text(ids: Integer[np.ndarray, "_"]) -> str:
    """Returns the canonical text of a list of ids.

    Raises:
        RecordError: an id is negative, or has more than 32 bits.
    """
    if (wrong := np.flatnonzero((ids < 0) | (ids >= _END_OF_IDS))).size:
        raise RecordError(f"id {wrong[0] + 1} is {ids[wrong[0]]}, expected {_IDS}")
    return " ".join(map(str, ids.tolist()))


def _json(value: Mapping[str, Any]) -> str:
    try:
        return json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    except (TypeError, ValueError) as error:
        raise RecordError(f"holds what JSON has no word for: {error}") from error


def _utf8(text: str | LongText) -> bytes | LongText:
    if isinstance(text, SpilledText) and text.half_pair:
        raise _half_a_pair(text.half_pair)
    if isinstance(text, LongText):
        return text
    try:
        return text.encode()
    except UnicodeEncodeError as error:
        raise _half_a_pair(text[error.start]) from error


def _half_a_pair(half: str) -> RecordError:
    return RecordError(f"holds half a surrogate pair ({half!a}), which UTF-8 cannot store")


def _shown(value: Any) -> str:
    text = repr(value)
    return f"{type(value).__name__} {text[:60]}{'...' if len(text) > 60 else ''}"
