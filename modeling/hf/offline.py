"""An exported model checked by its files alone: no store, no catalog, no network, no JAX.

Three things are compared, of which `sha256sum` can do the first by itself:

    files       each file's SHA-256 with the card's table
    tokenizer   its content id, made anew of the files, with the one in the card's lineage
    model       its content id, over every tensor and file: what `levanter lineage` and the store
                call this model, for whoever has that id from elsewhere
"""

import hashlib
import json
import mmap
import re
import struct
from collections.abc import Iterator
from pathlib import Path

import tokenizers

from modeling import canonical
from modeling.data.tokenizer import TEMPLATE_FILE, TOKENIZER_FILE, tokenizer_content_id
from modeling.hf.model_card import LINEAGE
from modeling.inventory import INVENTORY, file_sha256

CARD, WEIGHTS, NAMES = "README.md", "model.safetensors", "special_tokens_map.json"
_FILE_ROW = re.compile(r"^\| `([^`]+)` \| `([0-9a-f]{64})` \|$", re.MULTILINE)
_ID_ROW = re.compile(r"^\| ([^|`]+?) \| `([0-9a-f]{64})` \|$", re.MULTILINE)
_DTYPES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}


class CardError(ValueError):
    """There is no card, or it lists no files: nothing to compare with."""


def faults(directory: Path) -> list[str]:
    """Returns what is wrong with an exported model, by the digests in its own card.

    Hidden files, which a hub or git may have added, are no part of it.

    Raises:
        CardError: there is no card, or it lists no files.
    """
    listed, lineage = _card(directory)
    present = {
        path.relative_to(directory).as_posix()
        for path in directory.rglob("*")
        if path.is_file()
        and not any(part.startswith(".") for part in path.relative_to(directory).parts)
    }
    found = []
    for name, expected in sorted(listed.items()):
        if name not in present:
            found.append(f"{name} is missing")
        elif (digest := file_sha256(directory / name)) != expected:
            found.append(f"{name} has SHA-256 {digest[:12]}, the card says {expected[:12]}")
    extra = present - set(listed) - {CARD, INVENTORY}
    found += [f"{name} is not on the card" for name in sorted(extra)]
    if not found and TOKENIZER_FILE in present:
        made, expected = _tokenizer_id(directory), lineage.get(_title("tokenizer"))
        if made != expected:
            found.append(
                f"{TOKENIZER_FILE} is of a tokenizer with content id {made[:12]}, the card's "
                f"lineage has {str(expected)[:12]}"
            )
    return found


def content_id(directory: Path) -> str:
    """Returns the content id of an exported model whose files are as its card says."""
    listed, _ = _card(directory)
    files = listed | {CARD: file_sha256(directory / CARD)}
    tensors = dict(_tensors(directory / WEIGHTS))
    return canonical.digest("hf_model/1", {"tensors": tensors, "files": files})


def _card(directory: Path) -> tuple[dict[str, str], dict[str, str]]:
    card = directory / CARD
    if not card.is_file():
        raise CardError(f"{directory}: has no {CARD}; give an exported model's directory.")
    head, _, tail = card.read_text(encoding="utf-8").partition("## Files")
    listed = dict(_FILE_ROW.findall(tail))
    if not listed:
        raise CardError(f"{card}: lists no files with their SHA-256 under `## Files`.")
    return listed, dict(_ID_ROW.findall(head.partition("## Lineage")[2]))


def _title(kind: str) -> str:
    return dict(LINEAGE)[kind]


def _tokenizer_id(directory: Path) -> str:
    backend = json.loads((directory / TOKENIZER_FILE).read_text(encoding="utf-8"))
    library = tokenizers.Tokenizer.from_file(str(directory / TOKENIZER_FILE))
    names = json.loads((directory / NAMES).read_text(encoding="utf-8"))
    special = {
        role.removesuffix("_token"): {"token": token, "id": library.token_to_id(token)}
        for role, token in names.items()
    }
    template = directory / TEMPLATE_FILE
    text = template.read_text(encoding="utf-8") if template.exists() else None
    return tokenizer_content_id(backend, special, text)


def _tensors(path: Path) -> Iterator[tuple[str, str]]:
    """Yields name and digest of each tensor of a safetensors file, in its own little-endian bytes.

    The format: the header's length in 8 bytes, the header in JSON, and the bytes of all tensors.
    """
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        (length,) = struct.unpack("<Q", content[:8])
        header = json.loads(content[8 : 8 + length])
        for name, told in header.items():
            if name == "__metadata__":
                continue
            start, end = (8 + length + offset for offset in told["data_offsets"])
            digest = hashlib.sha256(memoryview(content)[start:end]).hexdigest()
            dtype = _DTYPES[told["dtype"]]
            yield name, canonical.digest("tensor/1", [dtype, told["shape"], digest])
