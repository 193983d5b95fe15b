"""Examples of a dataset as a model reads them: decoded rows of its token caches.

On a terminal every token has a background, two colours in turn, and what is not learned is dim;
elsewhere bars, brackets and lines say the same (`modeling.data.examples`). `--html` writes a page.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

import dagster as dg
from rich.console import Console
from rich.rule import Rule
from rich.text import Text

from modeling.experiment import Catalog
from resources import materializations
from resources.store import open_store

if TYPE_CHECKING:
    from modeling.data.cache import TokenCache
    from modeling.data.config import TokenCacheConfig
    from modeling.data.examples import Document, Example
    from modeling.data.tokenizer import PassthroughTokenizer, Tokenizer

# Both colours are given, since a terminal's own may be light or dark.
_BACKGROUNDS = ("on #10335c", "on #4a3b0b")
_INKS = {"text": "#ffffff", "id": "#ffffff", "special": "bold #e2b3ff", "bytes": "#ff9f99"}
_SIGNS = (
    "<E6 97> are bytes of a part of a character, <A5 日> its last ones, and ↵ ⇥ stand for what "
    "cannot be seen."
)
_LEGEND = f"A bar ends each token; [brackets] hold what is not learned; {_SIGNS}"
_COLOURED_LEGEND = (
    f"Each coloured stretch is a token; those without colour are not learned; {_SIGNS}"
)


def show(
    catalog: Catalog,
    dataset: str,
    stream: TextIO,
    *,
    length: int | None = None,
    packing: str | None = None,
    split: str | None = None,
    numbers: tuple[int, ...] = (0,),
    ids: bool = False,
    page: Path | None = None,
) -> int:
    """Shows some rows of one of a dataset's token caches.

    Args:
        catalog: where the dataset is.
        dataset: its name.
        stream: where to write.
        length: tokens in a row; by default that of the first cache that is there.
        packing: `concat` or `documents`; by default that of the first cache that is there.
        split: `train` by default, or the first of its sources.
        numbers: which rows, counted from 0.
        ids: whether to show each token's id.
        page: writes an HTML page there instead.

    Raises:
        ValueError: there is no such dataset, cache, split or row, or it is not materialized.
    """
    from modeling.data.examples import read_example, to_html, to_text

    cache, tokenizer = _open(catalog, dataset, _matching(catalog, dataset, length, packing))
    split = split or next(name for name in cache.splits if cache.num_rows(name))
    if split not in cache.splits:
        raise ValueError(f"--split {split}: {dataset} has {', '.join(cache.splits)}.")
    for number in numbers:
        if not 0 <= number < cache.num_rows(split):
            raise ValueError(f"--example {number}: {split} has {cache.num_rows(split)} rows.")
    examples = [read_example(cache, tokenizer, split, number) for number in numbers]
    if page is not None:
        title = f"{dataset}: rows of {cache.sequence_length} tokens"
        page.write_text(to_html(title, examples, ids=ids), encoding="utf-8")
        stream.write(f"{page}\n")
    elif (console := Console(file=stream, highlight=False)).color_system is None:
        stream.writelines(f"{to_text(example, ids=ids)}\n" for example in examples)
        stream.write(f"{_LEGEND}\n")
    else:
        for example in examples:
            _print(console, example, ids)
        console.print(Text(_COLOURED_LEGEND, style="dim"))
    return 0


def _matching(
    catalog: Catalog, dataset: str, length: int | None, packing: str | None
) -> "list[TokenCacheConfig]":
    if dataset not in catalog.datasets:
        raise ValueError(f"no dataset is named {dataset!r}; there are {sorted(catalog.datasets)}.")
    caches = catalog.datasets[dataset].sequence_lengths
    found = [
        cache
        for cache in caches
        if length in (None, cache.length) and packing in (None, cache.packing)
    ]
    if not found:
        raise ValueError(
            f"dataset {dataset!r} has no such rows; it has {', '.join(c.name for c in caches)}. "
            f"Add them to its `sequence_lengths`."
        )
    return found


def _open(
    catalog: Catalog, dataset: str, configs: "Sequence[TokenCacheConfig]"
) -> "tuple[TokenCache, Tokenizer | PassthroughTokenizer]":
    """Opens the first of the caches that is materialized, and its tokenizer."""
    from modeling.data.cache import TokenCache
    from modeling.data.tokenizer import load_tokenizer

    keys = [dg.AssetKey([dataset, "token_cache", config.name]) for config in configs]
    with dg.DagsterInstance.get() as instance:
        found = [materializations.latest(instance, key) for key in keys]
    made = next((each for each in found if each is not None), None)
    name, remedy = keys[0].to_user_string(), _remedy(catalog, dataset, configs[0])
    if made is None:
        raise ValueError(f"{name} is not materialized. {remedy}")
    store = open_store()
    if not store.contains(made.kind, made.content_id):
        raise ValueError(
            f"{made.key.to_user_string()}: its bytes are gone from {store.url}. {remedy}"
        )
    record = store.record(made.recipe_id, made.numerics)
    tokenized = record["recipe"]["inputs"]["tokenized_corpus"]
    opened = TokenCache.open(
        store.local(made.kind, made.content_id),
        store.local(tokenized["kind"], tokenized["content_id"]),
    )
    return opened, load_tokenizer(store.local("tokenizer", opened.tokenizer_id))


def _remedy(catalog: Catalog, dataset: str, config: "TokenCacheConfig") -> str:
    """Returns what to run to have a cache: an experiment that reads it, or the dataset's job."""
    readers = [
        name
        for name, experiment in catalog.experiments.items()
        if (experiment.dataset, experiment.cache_name) == (dataset, config.name)
    ]
    if readers:
        return f"Run `levanter run {readers[0]}`, or materialize it in the UI (`levanter ui`)."
    return (
        f"Materialize it in the UI (`levanter ui`), or run "
        f"`dagster job launch -w workspace.yaml -j {dataset}__data`."
    )


def _print(console: Console, example: "Example", ids: bool) -> None:
    console.print(Text(str(example), style="bold"))
    for document in example.documents:
        if example.has_segments:
            console.print(Rule(str(document), align="left", style="dim"))
        console.print(_painted(document, ids), soft_wrap=True)


def _painted(document: "Document", ids: bool) -> Text:
    painted = Text()
    for place, token in enumerate(document.tokens):
        style = f"{_INKS[token.kind]} {_BACKGROUNDS[place % 2]}" if token.learned else "dim"
        painted.append(token.text, style)
        if ids:
            painted.append(str(token.token_id), "dim italic")
    return painted
