"""Kinds of fields that several configurations have. No JAX is imported here."""

import re
from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import AfterValidator, ConfigDict, Discriminator, Field

STRICT = ConfigDict(extra="forbid", strict=True)
"""No field that is not known, and no value of another type than the field's."""
Positive = Annotated[int, Field(ge=1)]


def _compilable(pattern: str) -> str:
    try:
        re.compile(pattern)
    except re.error as error:
        raise ValueError(f"{pattern!r} is no regular expression: {error}") from None
    return pattern


RegularExpression = Annotated[str, AfterValidator(_compilable)]
"""As Python's `re` reads it."""


def type_or(default: str) -> Discriminator:
    """Tells the members of a union apart by their `type`, which the `default` one needs not say."""

    def tag(value: Any) -> Any:
        if isinstance(value, Mapping):
            return value.get("type", default)
        return getattr(value, "type", None)

    return Discriminator(tag)


def is_commit(revision: str | None) -> bool:
    """Whether a revision is a commit, by its 40 hex digits; a branch or tag may move."""
    return re.fullmatch(r"[0-9a-f]{40}", revision or "") is not None
