"""Tokens: the tokenized corpus, and a cache of rows for each sequence length."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import dagster as dg

from assets.catalog import config_metadata
from assets.checks import artifact_check
from assets.pictures import lengths_picture
from modeling import recipes
from modeling.artifacts import Artifact
from resources.store import StoreResource

if TYPE_CHECKING:
    from modeling.data.config import DatasetConfig


def tokenized_assets(
    name: str, dataset: "DatasetConfig"
) -> list[dg.AssetsDefinition | dg.AssetChecksDefinition]:
    """Returns `[name, tokenized_corpus]` and its check."""

    @dg.asset(
        key=[name, "tokenized_corpus"],
        ins={
            "raw_corpus": dg.AssetIn([name, "raw_corpus"]),
            "tokenizer": dg.AssetIn([name, "tokenizer"]),
        },
        group_name=name,
        kinds={"arrow"},
        code_version=recipes.code_version("tokenized_corpus", recipes.tokenized_params(dataset)),
        metadata=config_metadata(recipes.tokenized_params(dataset)),
    )
    def tokenized_corpus(
        context: dg.AssetExecutionContext,
        raw_corpus: Artifact,
        tokenizer: Artifact,
        store: StoreResource,
    ) -> dg.MaterializeResult[Artifact]:
        """Every document as token ids, in Arrow shards that caches of any length read in place."""
        from modeling.data import tokenized

        inputs = store.files(raw_corpus), store.files(tokenizer)
        return store.materialize(
            recipes.tokenized_recipe(dataset, raw_corpus, tokenizer),
            lambda space: tokenized.build(
                dataset.tokenization,
                *inputs,
                space,
                document_format=dataset.format,
                compute=dataset.compute,
                fetch_earlier=tokenized.EarlierBuilds(store.open()).fetch,
                report=lambda now: context.log.info(str(now)),
            ),
            show=lambda made, _: {
                "dagster/row_count": _sum_of_splits(made, "documents"),
                "document_lengths": lengths_picture(
                    {name: facts["document_lengths"] for name, facts in _splits(made).items()}
                ),
            },
        )

    shards_are_whole = artifact_check(
        dg.AssetKey([name, "tokenized_corpus"]),
        "shards_are_whole",
        "Documents and tokens read back are as many as the manifest says, every id is below the "
        "vocabulary size, and every document ends with the end-of-text id.",
        lambda artifact, files, store: _token_faults(files, dataset.tokenization.append_eos),
    )
    return [tokenized_corpus, shards_are_whole]


def cache_assets(
    name: str, sequence_length: int
) -> list[dg.AssetsDefinition | dg.AssetChecksDefinition]:
    """Returns `[name, token_cache, L<sequence_length>]` and its check."""
    key = dg.AssetKey([name, "token_cache", f"L{sequence_length}"])

    @dg.asset(
        key=key,
        ins={"tokenized_corpus": dg.AssetIn([name, "tokenized_corpus"])},
        group_name=name,
        kinds={"arrow"},
        description=f"The tokens cut into rows of {sequence_length}: an index into the shards of "
        "the tokenized corpus, so that another length copies and retokenizes nothing.",
        code_version=recipes.code_version("token_cache", recipes.cache_params(sequence_length)),
        metadata=config_metadata(recipes.cache_params(sequence_length)),
    )
    def token_cache(
        tokenized_corpus: Artifact, store: StoreResource
    ) -> dg.MaterializeResult[Artifact]:
        from modeling.data import cache

        tokens = store.files(tokenized_corpus)
        tokenizer = store.input_of(tokenized_corpus, "tokenizer")
        return store.materialize(
            recipes.cache_recipe(sequence_length, tokenized_corpus),
            lambda space: cache.build(
                sequence_length,
                tokens,
                space,
                tokenized_id=tokenized_corpus.content_id,
                tokenizer_id=tokenizer.content_id,
            ),
            show=lambda made, _: {"dagster/row_count": _sum_of_splits(made, "rows")},
        )

    rows_are_the_stream = artifact_check(
        key,
        "rows_are_the_stream",
        f"Rows of {sequence_length} tokens, as many as the stream fills; rows sampled across each "
        "split equal the stream at their place, and hold no id beyond the vocabulary.",
        lambda artifact, files, store: _row_faults(
            files, store.files(store.input_of(artifact, "tokenized_corpus")), sequence_length
        ),
    )
    return [token_cache, rows_are_the_stream]


def _splits(artifact: Artifact) -> dict[str, Mapping[str, Any]]:
    """Returns the facts of each split."""
    from modeling.data.corpus import SPLITS

    return {
        name: facts
        for name, facts in artifact.facts.items()
        if name.partition("/")[0] in SPLITS and isinstance(facts, Mapping)
    }


def _sum_of_splits(artifact: Artifact, what: str) -> int:
    return sum(facts[what] for facts in _splits(artifact).values())


def _token_faults(files: Path, ends_with_eos: bool) -> Iterator[str]:
    import numpy as np

    from modeling.data.shards import map_shard
    from modeling.data.tokenized import Manifest

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


def _row_faults(files: Path, tokens_dir: Path, sequence_length: int) -> Iterator[str]:
    import numpy as np

    from modeling.data.cache import TokenCache
    from modeling.data.tokenized import Manifest, flat_tokens

    cache = TokenCache.open(files, tokens_dir)
    manifest = Manifest.read(tokens_dir)
    for split, expected in manifest.splits.items():
        stream = flat_tokens(tokens_dir, expected, np.dtype(manifest.dtype))
        num_rows = cache.num_rows(split)
        if num_rows != len(stream) // sequence_length:
            yield f"{split}: {num_rows} rows of {sequence_length} from {len(stream)} tokens."
        sampled = np.unique(np.linspace(0, max(num_rows - 1, 0), min(num_rows, 256)).astype(int))
        for index, row in zip(sampled, cache.rows(split, sampled).tokens, strict=True):
            start = int(index) * sequence_length
            if not np.array_equal(row, stream.span(start, start + sequence_length)):
                yield f"{split}: row {index} is not the stream from token {start} on."
            if int(row.max()) >= cache.vocab_size:
                yield f"{split}: row {index} has id {row.max()} of {cache.vocab_size}."
