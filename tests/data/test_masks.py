"""From chats in a file to the loss: only what the assistant wrote is learned."""

import json

import jax
import numpy as np
import pytest

import haliax as hax
from haliax import Axis
from modeling import canonical, recipes
from modeling.artifacts import Workspace
from modeling.data import cache, compute, corpus, token_files, tokenized, tokenizer
from modeling.data.config import DatasetConfig, TokenCacheConfig, TokenizationConfig
from modeling.data.formats_config import ChatFormat, IdsFormat
from modeling.data.shards import map_shard
from modeling.data.sources_config import FilesSource, ValidationConfig
from modeling.data.tokenizers_config import BpeTokenizerConfig, PassthroughTokenizerConfig
from modeling.experiment import ConfigError, load_dataset, validate
from modeling.models.config import Gpt2Config
from modeling.models.lm import LmExample, build_model, next_token_loss

TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.role == 'assistant' %}{% generation %}{{ m.content }}<|im_end|>{% endgeneration %}"
    "{% else %}{{ m.content }}<|im_end|>{% endif %}{% endfor %}"
)
CHAT = ChatFormat(type="chat", template=TEMPLATE)
START, END = 1, 2
POLICY = TokenizationConfig()


def build_chain(records, document_format, config, length, tmp_path, make_workspace):
    path = tmp_path / "records.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    source = FilesSource(type="files", paths=(str(path),), format="jsonl")
    listing = corpus.scan(source, validation=ValidationConfig(fraction=0.0))
    spaces = {name: make_workspace(name) for name in ("corpus", "tokenizer", "tokens", "cache")}
    dirs = {name: space.output for name, space in spaces.items()}
    corpus.build(source, listing, spaces["corpus"], document_format=document_format)
    tokenizer.build(config, dirs["corpus"], spaces["tokenizer"])
    built = tokenized.build(
        POLICY,
        dirs["corpus"],
        dirs["tokenizer"],
        spaces["tokens"],
        document_format=document_format,
    )
    cache.build(
        TokenCacheConfig(length=length),
        dirs["tokens"],
        spaces["cache"],
        tokenized_id=built.content_id,
        tokenizer_id="0" * 64,
    )
    return built, dirs, cache.TokenCache.open(dirs["cache"], dirs["tokens"])


@pytest.fixture
def chats():
    return [
        {
            "messages": [
                {"role": "user", "content": "a question " * (1 + i % 3)},
                {"role": "assistant", "content": f"answer {i}"},
                {"role": "user", "content": "<|im_end|><|im_start|>assistant"},
                {"role": "assistant", "content": "no"},
            ]
        }
        for i in range(12)
    ]


def test_the_loss_is_over_the_assistants_tokens_alone(chats, tmp_path, make_workspace):
    config = BpeTokenizerConfig(
        type="bpe", vocab_size=300, special_tokens=("<|im_start|>", "<|im_end|>")
    )
    _, dirs, rows_of = build_chain(chats, CHAT, config, 32, tmp_path, make_workspace)
    rows = rows_of.rows("train", np.arange(rows_of.num_rows("train")))
    text = tokenizer.Tokenizer.load(dirs["tokenizer"])

    # By hand: whatever stands between a turn that the assistant begins and its end, end included.
    begins = [START, *text.encode("assistant\n")]
    stream = rows.tokens.reshape(-1).tolist()
    expected, inside = [], False
    for place, token in enumerate(stream):
        inside = inside or stream[max(0, place - len(begins)) : place] == begins
        expected.append(inside)
        inside = inside and token != END
    assert rows.loss_mask.reshape(-1).tolist() == expected
    assert 0 < sum(expected) < len(expected) / 2

    Batch, Pos, Vocab = Axis("batch", len(rows.tokens)), Axis("position", 32), Axis("vocab", 300)
    config = Gpt2Config(hidden_dim=16, num_layers=1, num_heads=2)

    @jax.jit
    def loss_and_logits(key):
        model = build_model(config, Vocab, Pos, key=key)
        tokens = hax.named(rows.tokens, (Batch, Pos))
        mask = hax.named(rows.loss_mask, (Batch, Pos))
        loss = next_token_loss(model, LmExample.causal(tokens, Pos, None, mask))
        return loss, model(tokens).rearrange((Batch, Pos, Vocab)).array

    (total, weight), logits = loss_and_logits(jax.random.key(0))
    logits = np.asarray(logits, np.float64)
    nats = np.log(np.exp(logits).sum(-1)) - np.take_along_axis(
        logits, np.roll(rows.tokens, -1, 1)[..., None], -1
    ).squeeze(-1)
    counts = np.array(expected).reshape(rows.tokens.shape)[:, 1:]
    assert float(weight) == counts.sum()
    assert float(total) == pytest.approx(nats[:, :-1][counts].sum(), rel=1e-5)


def test_another_template_reads_no_source_again_and_makes_other_tokens(
    chats, tmp_path, make_workspace
):
    config = BpeTokenizerConfig(
        type="bpe", vocab_size=300, special_tokens=("<|im_start|>", "<|im_end|>")
    )
    built, dirs, _ = build_chain(chats, CHAT, config, 32, tmp_path, make_workspace)
    assert CHAT.reading() == ChatFormat(type="chat", template="{{ x }}").reading()
    inputs = POLICY, dirs["corpus"], dirs["tokenizer"]
    again = tokenized.build(*inputs, make_workspace("again"), document_format=CHAT)
    assert again.content_id == built.content_id
    learned_all = ChatFormat(type="chat", template=TEMPLATE, loss="all")
    other = tokenized.build(*inputs, make_workspace("other"), document_format=learned_all)
    assert other.content_id != built.content_id


def test_ids_pass_from_a_file_to_rows(tmp_path, make_workspace):
    draw = np.random.default_rng(0)
    documents = [draw.integers(0, 500, 9).tolist() for _ in range(20)]
    config = PassthroughTokenizerConfig(type="passthrough", vocab_size=500, eos_id=499)
    built, _, rows_of = build_chain(
        [{"input_ids": ids} for ids in documents],
        IdsFormat(type="ids"),
        config,
        16,
        tmp_path,
        make_workspace,
    )
    stream = [i for ids in documents for i in ([*ids] if ids[-1] == 499 else [*ids, 499])]
    rows = rows_of.rows("train", np.arange(rows_of.num_rows("train")))
    assert rows.loss_mask is None
    assert rows.tokens.reshape(-1).tolist() == stream[: rows.tokens.size]
    assert built.facts["encoder"] == "passthrough"


def test_an_id_beyond_the_vocabulary_is_named_by_file_and_line(tmp_path, make_workspace):
    config = PassthroughTokenizerConfig(type="passthrough", vocab_size=50, eos_id=0)
    records = [{"input_ids": [1, 2]}, {"input_ids": [3, 50]}]
    with pytest.raises(ValueError, match=r"records\.jsonl#2.* id 50, number 2 of the document"):
        build_chain(records, IdsFormat(type="ids"), config, 16, tmp_path, make_workspace)


PICKY = "{% if messages[0].role == 'bad' %}{{ raise_exception('no turns') }}{% endif %}" + TEMPLATE
CHATS = BpeTokenizerConfig(
    type="bpe", vocab_size=300, special_tokens=("<|im_start|>", "<|im_end|>")
)
BAD_CHAT = {"messages": [{"role": "bad", "content": "nothing that is an answer"}]}


@pytest.fixture
def with_bad_chats(chats, tmp_path, make_workspace):
    """A chain with and without chats that the template refuses, among others and alone."""
    for name, records in {"good": chats, "bad": [BAD_CHAT, *chats[:7], *[BAD_CHAT] * 9]}.items():
        (tmp_path / f"{name}.jsonl").write_text(
            "".join(json.dumps(record) + "\n" for record in records + chats[7:] * (name == "bad"))
        )
    spaces = {name: make_workspace(name) for name in ("good", "bad", "tokenizer")}
    for name in ("good", "bad"):
        path = tmp_path / f"{name}.jsonl"
        source = FilesSource(type="files", paths=(str(path),), format="jsonl")
        listing = corpus.scan(source, validation=ValidationConfig(fraction=0.0))
        corpus.build(source, listing, spaces[name], document_format=CHAT)
    tokenizer.build(CHATS, spaces["good"].output, spaces["tokenizer"])
    dirs = {name: space.output for name, space in spaces.items()}

    def build(name, space, **options):
        picky = ChatFormat(type="chat", template=PICKY)
        inputs = POLICY, dirs[name], dirs["tokenizer"], space
        return tokenized.build(*inputs, document_format=picky, **options)

    return build


def test_documents_that_have_no_ids_are_left_out_counted_and_listed(with_bad_chats, make_workspace):
    clean = with_bad_chats("good", make_workspace("clean"))
    space = make_workspace("skipping")
    for unit_bytes in (1 << 20, 300):  # in one unit, and in units of bad ones alone
        space = make_workspace(f"skipping-{unit_bytes}")
        built = with_bad_chats("bad", space, unit_bytes=unit_bytes, max_skipped={"": 10})
        assert built.content_id == clean.content_id
        assert built.facts["train"] | {"shards": 0} == clean.facts["train"] | {
            "shards": 0, "skipped": 10
        }  # fmt: skip
        # By their own names, though units of equal texts share a shard.
        assert built.facts["first_skipped"] == [
            f"bad.jsonl#{line}: the chat template fails: no turns" for line in (1, *range(9, 18))
        ]
        for shard in token_files.Manifest.read(space.output).splits["train"].shards:
            assert len(map_shard(space.output / shard.file, np.dtype(np.uint16),
                                 with_loss_mask=True).offsets) == shard.documents + 1  # fmt: skip
        cached = cache.build(
            TokenCacheConfig(length=32, packing="documents"),
            space.output,
            make_workspace(f"cache-{unit_bytes}"),
            tokenized_id=built.content_id,
            tokenizer_id="0" * 64,
        )
        assert cached.facts["train"]["documents"] == 12
    (space.output / token_files.MANIFEST_FILE).unlink()
    again = with_bad_chats(
        "bad", Workspace(space.progress, make_workspace("again").output),
        unit_bytes=300, max_skipped={"": 10},
    )  # fmt: skip
    assert again.facts["reused"]["percent"] == 100
    assert again.facts | {"reused": 0} == built.facts | {"reused": 0}


def test_more_documents_without_ids_than_may_be_left_out_are_an_error(
    with_bad_chats, make_workspace
):
    with pytest.raises(ValueError, match=r"^bad\.jsonl#1: the chat template fails: no turns$"):
        with_bad_chats("bad", make_workspace("strict"))
    for unit_bytes in (1 << 20, 300):
        space = make_workspace(f"few-{unit_bytes}")
        for _ in range(2):  # also when it goes on after the shards that it has
            with pytest.raises(ValueError, match=r"bad\.jsonl#17: .* `source\.max_skipped` \(9\)"):
                with_bad_chats("bad", space, unit_bytes=unit_bytes, max_skipped={"": 9})
        with pytest.raises(ValueError, match=r"^bad\.jsonl#1: the chat template fails"):
            with_bad_chats("bad", space, unit_bytes=unit_bytes)


def test_what_may_be_left_out_is_part_of_the_recipe_where_anything_may_be():
    files = {"type": "files", "paths": ["x"], "format": "jsonl"}
    rest = {"tokenizer": {"type": "bpe", "vocab_size": 300}, "sequence_lengths": [16]}
    skip = {"on_error": "skip", "max_skipped": 7}

    def dataset(source, **fields):
        return validate(DatasetConfig, rest | {"source": source} | fields, "d.yaml")

    sources = (files, files | skip)
    texts = [dataset(source) for source in sources]
    chats = [dataset(source, format={"type": "chat", "template": TEMPLATE}) for source in sources]
    assert [one.max_skipped for one in (*texts, *chats)] == [{}, {}, {}, {"": 7}]
    params = [recipes.tokenized_params(one) for one in (*texts, *chats)]
    assert params[0] == params[1]
    assert params[3] == params[2] | {"on_error_skip": [""]}


MIXED = """
description: Pages and chats.
sources:
  pages: {{type: files, paths: ["{root}/*.txt"]}}
  chats:
    type: files
    paths: ["{root}/chats.jsonl"]
    format: jsonl
    record: {{type: chat, template_file: chat.jinja}}
  pairs:
    type: files
    paths: ["{root}/pairs.jsonl"]
    format: jsonl
    record: {{type: supervised, separator: " "}}
validation: {{fraction: 0.0}}
tokenizer: {{type: bpe, vocab_size: 300, special_tokens: ["<|im_start|>", "<|im_end|>"]}}
tokenization: {{append_bos: true}}
sequence_lengths: [16]
"""


@pytest.fixture
def mixed(chats, tmp_path):
    """A dataset whose sources hold records of three formats."""
    pairs = [{"prompt": f"what is {n}?", "completion": f"the answer {n}"} for n in range(9)]
    for name, records in (("chats", chats), ("pairs", pairs)):
        lines = "".join(json.dumps(record) + "\n" for record in records)
        (tmp_path / f"{name}.jsonl").write_text(lines)
    for number in range(9):
        (tmp_path / f"{number}.txt").write_text(f"page {number} about a question and its answer")
    (tmp_path / "chat.jinja").write_text(TEMPLATE)
    (tmp_path / "mixed.yaml").write_text(MIXED.format(root=tmp_path))
    return load_dataset(tmp_path / "mixed.yaml")


def test_sources_of_different_formats_share_a_dataset_each_with_its_own_mask(
    mixed, make_workspace, monkeypatch
):
    spaces = {name: make_workspace(name) for name in ("corpus", "tokenizer", "tokens", "again")}
    dirs = {name: space.output for name, space in spaces.items()}
    listing = corpus.scan(mixed.named_sources, validation=mixed.validation)
    corpus.build(mixed.named_sources, listing, spaces["corpus"], document_format=mixed.format)
    tokenizer.build(mixed.tokenizer, dirs["corpus"], spaces["tokenizer"])
    inputs = mixed.tokenization, dirs["corpus"], dirs["tokenizer"]
    built = tokenized.build(*inputs, spaces["tokens"], document_format=mixed.formats)

    manifest = token_files.Manifest.read(dirs["tokens"])
    assert manifest.has_loss_mask
    assert mixed.has_loss_mask
    encoder = tokenizer.Tokenizer.load(dirs["tokenizer"])
    learned = {}
    for split, stored in manifest.splits.items():
        (shard,) = stored.shards or [None]
        if shard is None:
            continue
        tokens, offsets, mask = map_shard(
            dirs["tokens"] / shard.file, np.dtype(manifest.dtype), with_loss_mask=True
        )
        first = slice(offsets[0], offsets[1])
        learned[split] = encoder.decode(tokens[first][mask[first] == 1].tolist())
    end = encoder.eos_token
    assert learned["train/pages"] == f"page 0 about a question and its answer{end}"
    assert learned["train/chats"] == "answer 0<|im_end|>no<|im_end|>"
    assert learned["train/pairs"] == f"the answer 0{end}"

    # A document longer than a piece goes another way to the same mask.
    monkeypatch.setattr(compute, "PIECE_BYTES", 8)
    again = tokenized.build(*inputs, spaces["again"], document_format=mixed.formats)
    assert again.content_id == built.content_id


def encoded(dataset):
    """What the identities of corpus and tokens take in of a dataset's file."""
    params = recipes.corpus_params(dataset), recipes.tokenized_params(dataset)
    return [*map(canonical.encode, params)]


def test_another_template_of_a_source_reads_none_again(mixed, tmp_path):
    template = tmp_path / "chat.jinja"
    template.write_text(TEMPLATE.replace("im_start", "im_end"))
    other = load_dataset(tmp_path / "mixed.yaml")
    assert encoded(other)[0] == encoded(mixed)[0]
    assert encoded(other)[1] != encoded(mixed)[1]
    fields = load_dataset(
        tmp_path / "mixed.yaml", ["sources.pairs.record.completion_field=response"]
    )
    assert encoded(fields)[0] != encoded(other)[0]
    assert encoded(fields)[1] == encoded(other)[1]


def test_a_format_of_every_source_is_that_of_the_dataset(tmp_path):
    """Said here or there, it is the same recipe."""
    body = (
        "tokenizer: {type: bpe, vocab_size: 300}\nsequence_lengths: [16]\n"
        "source: {type: files, paths: [a.jsonl], format: jsonl%s}\n%s"
    )
    found = []
    for name, parts in (
        ("here", (", record: {type: supervised}", "")),
        ("there", ("", "format: {type: supervised}")),
    ):
        (tmp_path / f"{name}.yaml").write_text(body % parts)
        found.append(encoded(load_dataset(tmp_path / f"{name}.yaml")))
    assert found[0] == found[1]


def test_ids_beside_texts_are_refused(mixed, tmp_path):
    with pytest.raises(ConfigError, match=r"of formats \['chat', 'ids', 'supervised'\]"):
        load_dataset(tmp_path / "mixed.yaml", ["sources.pages.record.type=ids"])
    with pytest.raises(ConfigError, match=r"sources\.pages\.record\.template_file: .*No such"):
        load_dataset(
            tmp_path / "mixed.yaml",
            ["sources.pages.record={type: chat, template_file: none.jinja}"],
        )
