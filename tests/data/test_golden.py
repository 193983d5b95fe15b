"""Content ids of a fixed corpus; when one changes, so must `modeling.recipes.VERSIONS`."""

from modeling.data import cache, corpus, tokenized, tokenizer
from modeling.data.config import TokenCacheConfig, TokenizationConfig
from modeling.data.sources_config import FilesSource, ValidationConfig
from modeling.data.tokenizers_config import BpeTokenizerConfig

GOLDEN = {
    "listing": "70fc907afc62d78472c9d6b176050784c62daf0e375ccd8b561951a826e2bb1c",
    "raw_corpus": "f49a94bec8ef73a6136a3ee7686a8e36accafc525abae5239205f1dc1e395eb5",
    "documents": "b636eebc313582e9523c06e7968499afda4542e42f37644ea9619a086182c888",
    "tokenizer": "5bb7563a41e83c44ae4a0c1716f352ce17b0e9688c2d996fe0326e70aa3bf041",
    "tokenized_corpus": "fd458142141a3bca2f526090940f5df68c7dfb3f31214cbc0869cb97a3835d31",
    "token_cache": "d5cd2ec0b75643f1f1be231d0689bd659673e51b06571149bbccb48bf91a744c",
}


def test_a_fixed_corpus_gives_the_ids_on_record(tmp_path, make_workspace):
    directory = tmp_path / "source"
    directory.mkdir()
    for index in range(12):
        text = f"def f{index}(x):\n    return x + {index} * naïve(x)  # 日本語\n" * (index + 1)
        (directory / f"{index}.py").write_text(text, encoding="utf-8", newline="")
    source = FilesSource(type="files", paths=(str(directory),))
    listing = corpus.scan(source, validation=ValidationConfig(fraction=0.3))
    spaces = {name: make_workspace(name) for name in ("corpus", "tokenizer", "tokens", "cache")}
    documents = corpus.build(source, listing, spaces["corpus"])
    config = BpeTokenizerConfig(type="bpe", vocab_size=280)
    trained = tokenizer.build(config, spaces["corpus"].output, spaces["tokenizer"])
    tokens = tokenized.build(
        TokenizationConfig(),
        spaces["corpus"].output,
        spaces["tokenizer"].output,
        spaces["tokens"],
    )
    rows = cache.build(
        TokenCacheConfig(length=16),
        spaces["tokens"].output,
        spaces["cache"],
        tokenized_id=tokens.content_id,
        tokenizer_id=trained.content_id,
    )
    assert {
        "listing": listing.root,
        "raw_corpus": documents.content_id,
        "documents": documents.roots["documents"],
        "tokenizer": trained.content_id,
        "tokenized_corpus": tokens.content_id,
        "token_cache": rows.content_id,
    } == GOLDEN
