"""What must stay secret is taken out of whatever is kept or shown: the one place that knows how.

Every way out leads through here: arguments on record (`without_secrets`), lines that processes
print, messages of a run's log, errors of a stage (`without_secrets_in_errors`), what the tracker
and the catalog show (`scrub_tree`), and what the command line says. Taken out are

    of URLs        user and password, and whatever stands behind `?` (tokens, signatures)
    by name        what follows `password=`, `--api-key`, `Authorization: Bearer`, and the like
    by form        tokens of well-known makers, private keys
    by knowing it  what this process's environment holds under such a name, or as a URL's password

It goes by the look of a text, so identities never pass through: what could need it (a path) is no
part of one.
"""

import contextlib
import functools
import logging
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from modeling.urls import public_url

REMOVED = "[removed]"

# Whole words, since `tokenizer` and `author` are none: letters may not go on on either side, but
# for the capital that begins a word in `accessToken`.
_SECRET_WORD = (
    r"(?:(?<![A-Za-z])(?:pass|passwd|password|passphrase|pwd|secret|jwt|cookie"
    r"|(?:access|api|auth|id|refresh)?[-_]?token|credentials?|auth|authorization"
    r"|bearer|sas|sig|signature|(?:api|access|private|secret|account)[-_]?key)"
    r"|(?-i:(?<=[a-z])(?:Token|Password|Secret|Signature|(?:Api|Access|Private|Secret)Key)))"
    r"(?![A-Za-z])"
)
_SECRET_NAME = re.compile(_SECRET_WORD, re.IGNORECASE)
_SECRET_VALUE = re.compile(
    r"hf_[A-Za-z0-9]{8,}"  # Hugging Face
    r"|gh[pousr]_[A-Za-z0-9]{16,}|github_pat_\w{16,}|glpat-[\w-]{16,}"  # GitHub, GitLab
    r"|AKIA[0-9A-Z]{12,}|AIza[\w-]{20,}|ya29\.[\w-]{8,}|sk-[\w-]{16,}|xox[abprs]-[\w-]{8,}"
    r"|eyJ[\w-]{8,}\.[\w-]{8,}\.[\w-]*"  # JSON web tokens
    r"|-----BEGIN [A-Z ]*PRIVATE KEY-----[\s\S]*?(?:-----END [A-Z ]*PRIVATE KEY-----|\Z)"
    # Weights & Biases; a commit looks the same, and stands behind `@`, in a path or in quotes.
    r"|(?<![@/'\w])[0-9a-f]{40}\b"
)
_NAMED_VALUE = re.compile(
    rf"""([\w-]*{_SECRET_WORD}[\w-]*(?:\\?["'])?\s*[=:]\s*)"""
    r"""(?:(\\?["'])(?:(?!\2).)+\2|[^&\s"'}}\]]+)""",
    re.IGNORECASE,
)
_AUTHORIZATION = re.compile(r"(?i)\b(bearer|basic)\s+\S+")
_URL = re.compile(r"""\b[A-Za-z][A-Za-z0-9+.-]*://[^\s"'<>`\\]+""")
_SHORTEST = 8
"""What is shorter may stand in a text by chance."""
_COMMITS = ("revision", "commit")


def scrub(text: str) -> str:
    """Returns `text` without secrets, as far as they can be told."""
    text = _URL.sub(lambda match: public_url(match[0], instead=REMOVED), text)
    text = _AUTHORIZATION.sub(REMOVED, text)
    text = _NAMED_VALUE.sub(rf"\1{REMOVED}", text)
    text = _SECRET_VALUE.sub(REMOVED, text)
    for secret in _of_environment(frozenset(os.environ.items())):
        text = text.replace(secret, REMOVED)
    return text


def scrub_tree(value: Any) -> Any:
    """Returns plain data with each of its texts scrubbed, but those that name a commit."""
    if isinstance(value, Mapping):
        return {
            name: item if name in _COMMITS else scrub_tree(item) for name, item in value.items()
        }
    if isinstance(value, list | tuple):
        return [scrub_tree(item) for item in value]
    return scrub(value) if isinstance(value, str) else value


def without_secrets(argv: Sequence[str]) -> list[str]:
    """Returns `argv` with the values of secret options, tokens and URL credentials taken out."""
    cleaned = []
    follows_secret_option = False
    for argument in argv:
        name, equals, _ = argument.partition("=")
        is_option = argument.startswith("-")
        if follows_secret_option and not is_option:
            cleaned.append(REMOVED)
        elif equals and "://" not in name and _SECRET_NAME.search(name):
            cleaned.append(f"{scrub(name)}={REMOVED}")
        else:
            cleaned.append(scrub(argument))
        follows_secret_option = is_option and not equals and bool(_SECRET_NAME.search(argument))
    return cleaned


class Scrubbing(logging.Filter):
    """Takes secrets out of what is logged."""

    def filter(self, record: logging.LogRecord) -> bool:
        """Rewrites the message; keeps every record."""
        message = record.getMessage()
        if (cleaned := scrub(message)) != message:
            record.msg, record.args = cleaned, ()
        return True


class StageError(RuntimeError):
    """An error of a stage, told without the secrets that its own text held."""


@contextlib.contextmanager
def without_secrets_in_errors(*passing: type[Exception]) -> Iterator[None]:
    """Lets errors pass, but replaces one whose text, or that of a cause, holds a secret.

    Dagster keeps the text of an error and of all that caused it.

    Args:
        passing: what asks for something and must stay what it is; its text is scrubbed already.

    Raises:
        StageError: in place of such an error; it stands for the whole chain.
    """
    try:
        yield
    except passing:
        raise
    except Exception as error:
        told = [f"{type(one).__name__}: {one}" for one in _chain(error)]
        cleaned = [scrub(one) for one in told]
        if cleaned == told:
            raise
        raise StageError("\ncaused by ".join(cleaned)).with_traceback(error.__traceback__) from None


def _chain(error: BaseException) -> Iterator[BaseException]:
    """Yields an error and what led to it, as a traceback tells them."""
    seen: set[int] = set()
    one: BaseException | None = error
    while one is not None and id(one) not in seen:
        seen.add(id(one))
        yield one
        one = one.__cause__ or (None if one.__suppress_context__ else one.__context__)


@functools.lru_cache(maxsize=4)
def _of_environment(variables: frozenset[tuple[str, str]]) -> tuple[str, ...]:
    """Returns the values that names, or their place in a URL, give away; the longest first."""
    found = {value for name, value in variables if _SECRET_NAME.search(name)}
    for _, value in variables:
        found |= {match[1] for match in re.finditer(r"://[^/\s:@]*:([^/\s]*)@", value)}
    return tuple(sorted((one for one in found if len(one) >= _SHORTEST), key=len, reverse=True))
