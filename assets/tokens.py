"""Tokens: the tokenized corpus, and a cache of rows for each sequence length."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import dagster as dg

from assets.catalog import stage
from assets.checkpoint import initial_checkpoint
from assets.checks import artifact_check
from assets.pictures import lengths_picture
from modeling import recipes
from modeling.artifacts import Artifact
from resources import panel
from resources.head_start import ON_DEMAND_TAG, HeadStartResource
from resources.launcher import LauncherResource
from resources.store import StoreResource

if TYPE_CHECKING:
    import numpy as np

    from modeling.data.cache import TokenCache
    from modeling.data.config import DatasetConfig, TokenCacheConfig
    from modeling.experiment import ExperimentConfig


def tokenized_assets(
    name: str, dataset: "DatasetConfig", experiments: "Mapping[str, ExperimentConfig]"
) -> list[dg.AssetsDefinition | dg.AssetChecksDefinition]:
    """Returns `[name, tokenized_corpus]` and its check.

    Args:
        name: of the dataset.
        dataset: all of it.
        experiments: those on this dataset: a run on demand begins to train one of them meanwhile.
    """

    @stage(
        "tokenized_corpus",
        recipes.tokenized_params(dataset),
        [name, "tokenized_corpus"],
        of=dataset,
        kinds={"arrow"},
        ins={"raw_corpus": [name, "raw_corpus"], "tokenizer": [name, "tokenizer"]},
    )
    def tokenized_corpus(
        context: dg.AssetExecutionContext,
        raw_corpus: Artifact,
        tokenizer: Artifact,
        store: StoreResource,
        launcher: LauncherResource,
        head_start: HeadStartResource,
    ) -> dg.MaterializeResult[Artifact]:
        """Every document as token ids, in Arrow shards that caches of any length read in place."""
        from modeling.artifacts import Built, Workspace
        from modeling.data import corpus, tokenized

        inputs = store.files(raw_corpus), store.files(tokenizer)
        recipe = recipes.tokenized_recipe(dataset, raw_corpus, tokenizer)
        trained = context.run.tags.get(ON_DEMAND_TAG, "")

        def build(space: Workspace) -> Built:
            pace = None
            if trained in experiments:
                pace = head_start.begin(
                    context, trained, experiments[trained], dataset, launcher, store,
                    tokenized=recipe, progress=space.progress,
                    text_bytes=corpus.text_bytes(inputs[0]),
                    files=initial_checkpoint(experiments[trained], store, tokenizer)
                    | {"tokenizer": inputs[1]},
                )  # fmt: skip
            return tokenized.build(
                dataset.tokenization,
                *inputs,
                space,
                document_format=dataset.formats,
                compute=dataset.compute,
                fetch_earlier=tokenized.EarlierBuilds(store.open()).fetch,
                report=lambda now: context.log.info(str(now)),
                unit_bytes=dataset.unit_bytes,
                pace=pace,
                max_skipped=dataset.max_skipped,
            )

        made = store.materialize(
            recipe,
            build,
            show=lambda made, _: {
                "dagster/row_count": _sum_of_splits(made, "documents"),
                "splits": _split_table(made),
                "document_lengths": lengths_picture(
                    (2**power, count)
                    for facts in _splits(made).values()
                    for power, count in enumerate(facts["document_lengths"])
                ),
            },
        )
        assert made.value is not None
        head_start.tokenized(store.files(made.value))
        return made

    shards_are_whole = artifact_check(
        dg.AssetKey([name, "tokenized_corpus"]),
        "shards_are_whole",
        "Documents and tokens read back are as many as the manifest says, every id is below the "
        "vocabulary size, and every document ends with the end-of-text id.",
        lambda artifact, files, store: _token_faults(files, dataset.tokenization.append_eos),
    )
    return [tokenized_corpus, shards_are_whole]


def cache_assets(
    name: str, config: "TokenCacheConfig", dataset: "DatasetConfig"
) -> list[dg.AssetsDefinition | dg.AssetChecksDefinition]:
    """Returns `[name, token_cache, L<n>]` and its check, and those of its copy if it has one."""
    key = dg.AssetKey([name, "token_cache", config.name])
    made_by = {
        "concat": f"The tokens cut into rows of {config.length}",
        "documents": f"Whole documents packed into rows of {config.length} tokens",
    }

    @stage(
        "token_cache",
        recipes.cache_params(config),
        key.path,
        of=dataset,
        kinds={"arrow"},
        ins={"tokenized_corpus": [name, "tokenized_corpus"]},
        description=f"{made_by[config.packing]}: an index into the shards of the tokenized corpus, "
        "so that another length copies and retokenizes nothing.",
    )
    def token_cache(
        tokenized_corpus: Artifact, store: StoreResource
    ) -> dg.MaterializeResult[Artifact]:
        from modeling.data import cache

        tokens = store.files(tokenized_corpus)
        tokenizer = store.input_of(tokenized_corpus, "tokenizer")
        return store.materialize(
            recipes.cache_recipe(config, tokenized_corpus),
            lambda space: cache.build(
                config,
                tokens,
                space,
                tokenized_id=tokenized_corpus.content_id,
                tokenizer_id=tokenizer.content_id,
            ),
            show=lambda made, files: {
                "dagster/row_count": _sum_of_splits(made, "rows"),
                "splits": _split_table(made),
                "document_lengths": lengths_picture(
                    (power, count)
                    for facts in _splits(made).values()
                    for power, count in facts["document_lengths"]
                ),
                "first_example": _first_example(files, tokens, store.files(tokenizer)),
            },
        )

    rows_are_the_stream = artifact_check(
        key,
        "rows_are_the_stream",
        f"Rows of {config.length} tokens, none beyond the vocabulary, hold what the stream of "
        "tokens has at their place; sampled across each split.",
        lambda artifact, files, store: _row_faults(
            files, store.files(store.input_of(artifact, "tokenized_corpus")), config
        ),
    )
    copies = [] if config.layout == "view" else _copy_assets(name, config, dataset)
    return [token_cache, rows_are_the_stream, *copies]


def _copy_assets(
    name: str, config: "TokenCacheConfig", dataset: "DatasetConfig"
) -> list[dg.AssetsDefinition | dg.AssetChecksDefinition]:
    key = dg.AssetKey([name, "token_cache_copy", config.name])

    @stage(
        "token_cache_copy",
        recipes.cache_copy_params(),
        key.path,
        of=dataset,
        kinds={"arrow", "huggingface"},
        ins={"token_cache": [name, "token_cache", config.name]},
    )
    def token_cache_copy(
        token_cache: Artifact, store: StoreResource
    ) -> dg.MaterializeResult[Artifact]:
        """The rows of the token cache in files that stand alone, as `datasets` opens them.

        Its content id is the cache's: the rows are the same.
        """
        from modeling.data import cache

        inputs = (
            store.files(token_cache),
            store.files(store.input_of(token_cache, "tokenized_corpus")),
        )
        return store.materialize(
            recipes.cache_copy_recipe(token_cache),
            lambda space: cache.copy(*inputs, space),
            show=lambda made, _: {
                "dagster/row_count": _sum_of_splits(made, "rows"),
                "splits": _split_table(made),
            },
        )

    rows_are_those_of_the_view = artifact_check(
        key,
        "rows_are_those_of_the_view",
        "Rows sampled across each split equal those of the token cache in every column.",
        _copy_faults,
    )
    return [token_cache_copy, rows_are_those_of_the_view]


def _first_example(files: Path, tokens_dir: Path, tokenizer_dir: Path) -> dg.MarkdownMetadataValue:
    """Returns the first row of the cache, token by token."""
    from modeling.data.cache import TokenCache
    from modeling.data.examples import read_example, to_markdown
    from modeling.data.tokenizer import load_tokenizer

    cache = TokenCache.open(files, tokens_dir)
    example = read_example(cache, load_tokenizer(tokenizer_dir), cache.splits[0])
    return dg.MetadataValue.md(to_markdown(example))


def _splits(artifact: Artifact) -> dict[str, Mapping[str, Any]]:
    """Returns the facts of each split."""
    from modeling.data.splits import ROLES, role_of

    return {
        name: facts
        for name, facts in artifact.facts.items()
        if role_of(name) in ROLES and isinstance(facts, Mapping)
    }


def _split_table(artifact: Artifact) -> dg.TableMetadataValue:
    """Returns the plain figures of each split, a row each."""
    splits = _splits(artifact)
    names = [
        name
        for name, value in next(iter(splits.values()), {}).items()
        if isinstance(value, int | float)
    ]
    rows = ((split, *(facts[name] for name in names)) for split, facts in splits.items())
    return panel.table(("split", *names), rows)


def _sum_of_splits(artifact: Artifact, what: str) -> int:
    return sum(facts[what] for facts in _splits(artifact).values())


def _token_faults(files: Path, ends_with_eos: bool) -> Iterator[str]:
    import numpy as np

    from modeling.data.shards import map_shard
    from modeling.data.token_files import Manifest

    manifest = Manifest.read(files)
    for split, expected in manifest.splits.items():
        found = {"documents": 0, "tokens": 0}
        for shard in expected.shards:
            tokens, offsets, _ = map_shard(
                files / shard.file,
                np.dtype(manifest.dtype),
                with_loss_mask=manifest.has_loss_mask,
            )
            found["documents"] += len(offsets) - 1
            found["tokens"] += len(tokens)
            if len(tokens) and (largest := int(tokens.max())) >= manifest.vocab_size:
                yield f"{shard.file}: id {largest}; the vocabulary has {manifest.vocab_size}."
            last = tokens[offsets[1:] - 1]
            if ends_with_eos and (lacking := int((last != manifest.eos_id).sum())):
                yield f"{shard.file}: {lacking} documents do not end with id {manifest.eos_id}."
        for what, count in found.items():
            if count != getattr(expected, what):
                yield f"{split}: {count} {what} read back, {getattr(expected, what)} in manifest."


def _row_faults(files: Path, tokens_dir: Path, config: "TokenCacheConfig") -> Iterator[str]:
    import numpy as np

    from modeling.data.cache import TokenCache
    from modeling.data.token_files import Manifest, flat_tokens

    cache, length = TokenCache.open(files, tokens_dir), config.length
    manifest = Manifest.read(tokens_dir)
    for split, expected in manifest.splits.items():
        stream = flat_tokens(tokens_dir, expected, np.dtype(manifest.dtype))
        num_rows, sampled = cache.num_rows(split), _sample(cache, split)
        if config.packing == "concat":
            spans = [[(index * length, length)] for index in sampled.tolist()]
            if num_rows != len(stream) // length:
                yield f"{split}: {num_rows} rows of {length} from {len(stream)} tokens."
        else:
            pieces = cache.pieces(split)
            spans = [pieces.row(index) for index in sampled.tolist()]
            yield from (f"{split}: {fault}" for fault in pieces.faults(len(stream), length))
        rows = cache.rows(split, sampled)
        for place, (index, row_spans) in enumerate(zip(sampled.tolist(), spans, strict=True)):
            row = rows.tokens[place]
            wanted = [stream.span(start, start + size) for start, size in row_spans]
            used = sum(map(len, wanted))
            padding = np.full(length - used, manifest.eos_id)
            if not np.array_equal(row, np.concatenate([*wanted, padding])):
                yield f"{split}: row {index} is not the stream at {row_spans}."
            if rows.segment_ids is not None and used != (rows.segment_ids[place] > 0).sum():
                yield f"{split}: row {index} has {used} tokens, but its segments others."
            if int(row.max()) >= cache.vocab_size:
                yield f"{split}: row {index} has id {row.max()} of {cache.vocab_size}."


def _copy_faults(artifact: Artifact, files: Path, store: StoreResource) -> Iterator[str]:
    import numpy as np

    from modeling.data.cache import TokenCache

    view = store.input_of(artifact, "token_cache")
    tokens_dir = store.files(store.input_of(view, "tokenized_corpus"))
    copy, expected = TokenCache.open(files), TokenCache.open(store.files(view), tokens_dir)
    for split in expected.splits:
        if copy.num_rows(split) != expected.num_rows(split):
            yield f"{split}: {copy.num_rows(split)} rows of {expected.num_rows(split)}."
            continue
        found, wanted = (each.rows(split, _sample(expected, split)) for each in (copy, expected))
        for name, ours, theirs in zip(wanted._fields, found, wanted, strict=True):
            if ours is not None and theirs is not None and np.array_equal(ours, theirs):
                continue
            if ours is not None or theirs is not None:
                yield f"{split}: {name} of the copy are not those of the view."


def _sample(cache: "TokenCache", split: str) -> "np.ndarray":
    import numpy as np

    num_rows = cache.num_rows(split)
    return np.unique(np.linspace(0, max(num_rows - 1, 0), min(num_rows, 256)).astype(int))
