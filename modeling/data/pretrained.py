"""Takes a tokenizer made elsewhere: from a directory, a `tokenizer.json`, or the Hugging Face hub.

Four files count: `tokenizer.json`, which the `tokenizers` library reads; and beside it, where there
are any, `tokenizer_config.json` and `special_tokens_map.json`, which name the tokens with a role,
and `chat_template.jinja`. No code that comes with a tokenizer is run.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tokenizers

from modeling import canonical
from modeling.data.tokenizers_config import PretrainedTokenizerConfig

_TOKENIZER, _TEMPLATE = "tokenizer.json", "chat_template.jinja"
_CONFIG, _MAP = "tokenizer_config.json", "special_tokens_map.json"
_FILES = (_TOKENIZER, _CONFIG, _MAP, _TEMPLATE)
_ROLES = ("bos", "eos", "pad", "unk", "sep", "cls", "mask")


class PretrainedTokenizerError(ValueError):
    """The files are no usable tokenizer; the message names the file and the remedy."""


@dataclass(frozen=True)
class Pretrained:
    """What the files say."""

    backend: tokenizers.Tokenizer
    named_tokens: Mapping[str, str]
    """The token of each role that is known, `eos` at least."""
    chat_template: str | None
    digests: Mapping[str, str]
    """The digest of each file that was read."""


def file_digests(config: PretrainedTokenizerConfig) -> dict[str, str]:
    """Returns the digest of each file that a path names; none for a commit, which needs none.

    Raises:
        PretrainedTokenizerError: there is no tokenizer.
    """
    if config.path is None:
        return {}
    return _digests(_read(Path(config.path).expanduser()))


def files_root(digests: Mapping[str, str]) -> str:
    """Returns the digest of files whose digests are given by name."""
    return canonical.digest("tokenizer_files/1", dict(digests))


def load_pretrained(config: PretrainedTokenizerConfig) -> Pretrained:
    """Reads the files, from the hub or its local cache if a repository is named.

    Raises:
        PretrainedTokenizerError: a file is missing or damaged, or a token is not to be found.
    """
    where = Path(config.path).expanduser() if config.path is not None else _fetched(config)
    contents = _read(where)
    backend_json = _object(contents[_TOKENIZER], where / _TOKENIZER)
    settings = {name: _object(contents.get(name, b"{}"), where / name) for name in (_CONFIG, _MAP)}
    named = _named_tokens(config, settings, where)
    for token in backend_json.get("added_tokens", ()):
        # Else a text that spells the token would be taken for it.
        token["special"] = token["special"] or token["content"] in named.values()
    try:
        backend = tokenizers.Tokenizer.from_str(json.dumps(backend_json))
    except Exception as error:  # the library raises nothing more precise
        raise PretrainedTokenizerError(
            f"{where / _TOKENIZER}: `tokenizers` {tokenizers.__version__} cannot read it: {error}."
        ) from error
    for role, token in named.items():
        if backend.token_to_id(token) is None:
            raise PretrainedTokenizerError(
                f"{where}: {role}_token is {token!r}, which the vocabulary lacks; set "
                f"`tokenizer.{role}_token` to a token that it has."
            )
    template = _template(contents, settings[_CONFIG], where)
    return Pretrained(backend, named, template, _digests(contents))


def _digests(contents: Mapping[str, bytes]) -> dict[str, str]:
    return {name: hashlib.sha256(data).hexdigest() for name, data in contents.items()}


def _fetched(config: PretrainedTokenizerConfig) -> Path:
    # Imported here: it is slow, and few tokenizers need it.
    from huggingface_hub import snapshot_download

    assert config.hub is not None
    try:
        return Path(
            snapshot_download(config.hub, revision=config.revision, allow_patterns=list(_FILES))
        )
    except Exception as error:  # those of its HTTP client have no class in common with its own
        raise PretrainedTokenizerError(
            f"tokenizer.hub: {config.hub} at {config.revision} cannot be fetched: {error}"
        ) from error


def _read(where: Path) -> dict[str, bytes]:
    """Returns the bytes of each file that there is."""
    if where.is_file():
        return {_TOKENIZER: where.read_bytes()}
    found = {name: (where / name).read_bytes() for name in _FILES if (where / name).is_file()}
    if _TOKENIZER not in found:
        present = sorted(path.name for path in where.iterdir()) if where.is_dir() else "nothing"
        raise PretrainedTokenizerError(
            f"{where}: holds no {_TOKENIZER} (found {present}). A tokenizer of another kind is "
            f"converted by saving it with a fast tokenizer class of `transformers`."
        )
    return found


def _object(data: bytes, path: Path) -> dict[str, Any]:
    try:
        value = json.loads(data)
    except ValueError as error:
        raise PretrainedTokenizerError(f"{path}: not JSON: {error}.") from error
    if not isinstance(value, dict):
        raise PretrainedTokenizerError(f"{path}: expected an object, found {value!r:.40}.")
    return value


def _named_tokens(
    config: PretrainedTokenizerConfig, settings: Mapping[str, Mapping[str, Any]], where: Path
) -> dict[str, str]:
    named = {}
    for role in _ROLES:
        found = {
            name: _token_text(values[f"{role}_token"])
            for name, values in settings.items()
            if values.get(f"{role}_token") is not None
        }
        chosen = getattr(config, f"{role}_token", None)
        if chosen is None and len(set(found.values())) > 1:
            raise PretrainedTokenizerError(
                f"{where}: {role}_token is {found[_CONFIG]!r} in {_CONFIG}, but {found[_MAP]!r} in "
                f"{_MAP}; set `tokenizer.{role}_token`."
            )
        token = chosen if chosen is not None else next(iter(found.values()), None)
        if token is not None:
            named[role] = token
    if "eos" not in named:
        raise PretrainedTokenizerError(
            f"{where}: neither {_CONFIG} nor {_MAP} names the token that ends a document; set "
            f"`tokenizer.eos_token`."
        )
    return named


def _token_text(value: Any) -> str:
    return value["content"] if isinstance(value, Mapping) else value


def _template(
    contents: Mapping[str, bytes], settings: Mapping[str, Any], where: Path
) -> str | None:
    """Returns the chat template: the file's, else that of the settings."""
    if _TEMPLATE in contents:
        return contents[_TEMPLATE].decode()
    template = settings.get("chat_template")
    if not isinstance(template, list):
        return template
    by_name = {entry["name"]: entry["template"] for entry in template}
    if "default" not in by_name:
        raise PretrainedTokenizerError(
            f"{where / _CONFIG}: has chat templates {sorted(by_name)} and none called `default`; "
            f"set `format.template`, and take `chat_template` out of that file."
        )
    return by_name["default"]
