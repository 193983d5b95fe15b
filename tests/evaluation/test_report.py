"""The eval report: figures against hand computation in float64, identity, and the page."""

import dataclasses
import json
import math
import re
from html.parser import HTMLParser

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import haliax as hax
from modeling.artifacts import Workspace
from modeling.data.cache import TokenCache
from modeling.data.rows import Rows
from modeling.data.tokenizer import PassthroughTokenizer, Tokenizer
from modeling.evaluation import report
from modeling.evaluation.config import EvaluationConfig
from modeling.evaluation.heat_map import TokenView
from modeling.evaluation.results import Results, Sample, _chart, content_id, to_html, write
from modeling.models.trained import load_model


class Given:
    """A token cache of the given validation rows."""

    def __init__(self, tokens, segment_ids=None, loss_mask=None):
        segment_ids = None if segment_ids is None else np.asarray(segment_ids, np.int32)
        self._rows = Rows(np.asarray(tokens, np.int32), segment_ids, loss_mask)
        self.sequence_length = self._rows.tokens.shape[1]

        self.splits = ("train", "validation")

    def num_rows(self, split):
        return len(self._rows.tokens) if split == "validation" else 0

    def rows(self, split, indices):
        assert split == "validation"
        return Rows(*(None if column is None else column[indices] for column in self._rows))


@pytest.fixture(scope="module")
def tokenizer(trained):
    return Tokenizer.load(trained.tokenizer_dir)


@pytest.fixture(scope="module")
def cache(trained):
    return TokenCache.open(trained.cache_dir, trained.tokenized_dir)


@pytest.fixture(scope="module")
def model(trained):
    return load_model(trained.checkpoint_dir, trained.experiment)


@pytest.fixture(scope="module")
def built(trained, cache, tmp_path_factory):
    root = tmp_path_factory.mktemp("report")
    workspace = Workspace(root / "progress", root)
    return root, report.build(
        trained.experiment, trained.checkpoint_dir, cache, trained.tokenizer_dir, workspace
    )


@eqx.filter_jit
def run(model, tokens):
    return model(tokens)


def logits64(model, rows):
    named = hax.named(jnp.asarray(rows, jnp.int32), ("row", model.Pos))
    return np.asarray(run(model, named).array, np.float64)


def test_figures_equal_those_computed_by_hand(built, model, cache, tokenizer):
    rows = cache.rows("validation", np.arange(cache.num_rows("validation"))).tokens
    assert len(rows) % 7 != 0, "the last batch should be a short one"
    logits = logits64(model, rows)[:, :-1]
    log_sums = np.log(np.exp(logits).sum(-1))
    nats = log_sums - np.take_along_axis(logits, rows[:, 1:, None], -1)[..., 0]
    lengths = [0 if i == tokenizer.eos_id else _num_bytes(tokenizer, i) for i in range(280)]
    num_bytes = sum(lengths[token] for row in rows for token in row[1:])
    assert tokenizer.eos_id in rows[:, 1:], "a special token should be among them"

    facts = built[1].facts
    assert facts["loss"] == pytest.approx(nats.mean(), rel=1e-6)
    assert facts["perplexity"] == pytest.approx(math.exp(nats.mean()), rel=1e-5)
    assert facts["bits_per_byte"] == pytest.approx(nats.sum() / math.log(2) / num_bytes, rel=1e-6)
    assert facts["num_rows"] == len(rows)
    assert facts["num_tokens"] == rows[:, 1:].size
    assert facts["num_bytes"] == num_bytes
    curve = json.loads((built[0] / "report.json").read_text())["loss_by_position"]
    np.testing.assert_allclose(curve, nats.mean(0), rtol=1e-5)


def _num_bytes(tokenizer, token):
    # Between ASCII letters, so that a part of a character stays apart as its replacement.
    alphabet = {v: k for k, v in _byte_alphabet().items()}
    return len([alphabet[c] for c in tokenizer.backend.id_to_token(token)])


def _byte_alphabet():
    """GPT-2's spelling of bytes as printable characters, from its paper's repository's README."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [b for b in range(256) if b not in printable]
    return {b: chr(b) for b in printable} | {b: chr(256 + i) for i, b in enumerate(others)}


@pytest.mark.parametrize("batch_size", [1, 3, 7, 64])
def test_the_batch_size_changes_nothing_but_rounding(batch_size, model, tokenizer):
    rows = np.random.default_rng(0).integers(0, 280, (7, 24))
    config = EvaluationConfig(batch_size=batch_size, prompts=())
    results = report.evaluate(config, model, Given(rows), tokenizer)
    logits = logits64(model, rows)[:, :-1]
    nats = np.log(np.exp(logits).sum(-1))
    nats -= np.take_along_axis(logits, rows[:, 1:, None], -1)[..., 0]
    assert results.loss == pytest.approx(nats.mean(), rel=1e-6)
    assert (results.num_rows, results.num_tokens) == (7, 7 * 23)


def test_documents_of_ids_have_a_loss_but_neither_bytes_nor_samples(model, tokenizer, tmp_path):
    rows = np.random.default_rng(0).integers(0, 280, (3, 24))
    config = EvaluationConfig(batch_size=2, prompts=("a prompt",))
    ids = PassthroughTokenizer(vocab_size=280, eos_id=0, bos_id=None)
    found = report.evaluate(config, model, Given(rows), ids)
    with_text = report.evaluate(config, model, Given(rows), tokenizer)
    assert (found.loss, found.num_tokens) == (with_text.loss, with_text.num_tokens)
    assert (found.bits_per_byte, found.num_bytes, found.samples) == (None, None, ())
    assert with_text.samples
    # The row is shown as ids.
    assert [view.text for view in found.row][:3] == [str(i) for i in rows[0, :3]]
    write(found, tmp_path)
    assert json.loads((tmp_path / "report.json").read_text())["bits_per_byte"] is None


def test_a_model_that_knows_nothing_needs_the_log_of_the_vocabulary(model, tokenizer):
    flat = jax.tree.map(jnp.zeros_like, model)
    config = EvaluationConfig(batch_size=2, prompts=())
    rows = np.full((3, 24), 65)
    results = report.evaluate(config, flat, Given(rows), tokenizer)
    assert results.loss == pytest.approx(math.log(280), rel=1e-6)
    assert results.perplexity == pytest.approx(280, rel=1e-5)
    # Id 65 is one byte, so here every token is.
    assert results.bits_per_byte == pytest.approx(math.log2(280), rel=1e-6)


def test_max_rows_are_evenly_spaced(model, tokenizer):
    rows = np.random.default_rng(0).integers(0, 280, (7, 24))
    config = EvaluationConfig(batch_size=2, prompts=(), max_rows=3)
    some = report.evaluate(config, model, Given(rows), tokenizer)
    alone = report.evaluate(config, model, Given(rows[[0, 2, 4]]), tokenizer)
    assert some == alone
    assert some.num_rows == 3


class Sources:
    """A token cache of several sources, one of which holds out nothing."""

    sequence_length = 24

    def __init__(self, **rows):
        self._rows = {f"validation/{name}": found for name, found in rows.items()}
        self.splits = ("train/web", "train/code", "validation/none", *self._rows)

    def num_rows(self, split):
        return len(self._rows.get(split, ()))

    def rows(self, split, indices):
        return Rows(np.asarray(self._rows[split][indices], np.int32))


def test_of_several_sources_there_are_figures_of_all_and_of_each(model, tokenizer, tmp_path):
    rows = np.random.default_rng(0).integers(0, 280, (9, 24))
    config = EvaluationConfig(batch_size=2, prompts=())
    found = report.evaluate(config, model, Sources(code=rows[:6], web=rows[6:]), tokenizer)
    whole = report.evaluate(config, model, Given(rows), tokenizer)
    parts = [
        report.evaluate(config, model, Given(part), tokenizer) for part in (rows[:6], rows[6:])
    ]
    assert (found.loss, found.bits_per_byte) == pytest.approx((whole.loss, whole.bits_per_byte))
    assert (found.num_rows, found.num_tokens, found.num_bytes) == (9, 9 * 23, whole.num_bytes)
    assert list(found.by_source) == ["code", "web"]
    for figures, alone in zip(found.by_source.values(), parts, strict=True):
        assert dataclasses.asdict(figures).items() <= dataclasses.asdict(alone).items()
    assert found.macro_loss == pytest.approx((parts[0].loss + parts[1].loss) / 2)
    write(found, tmp_path)
    assert found.facts()["by_source"]["web"]["loss"] == parts[1].loss
    page = Page((tmp_path / "report.html").read_text())
    assert page.open == []
    assert f"{parts[1].loss:.4f}" in page.text
    assert f"{found.macro_loss:.4f}" in page.text


def test_each_source_has_its_share_of_max_rows_and_one_at_least():
    taken = report.row_indices(Sources(code=np.zeros((90, 24)), web=np.zeros((3, 24))), 10)
    assert {split: len(indices) for split, indices in taken.items()} == {
        "validation/code": 9,
        "validation/web": 1,
    }


def test_more_max_rows_than_rows_are_all(model, tokenizer):
    taken = report.row_indices(Given(np.zeros((5, 24))), 9)
    np.testing.assert_array_equal(taken["validation"], np.arange(5))


def test_no_validation_rows_is_an_error(model, tokenizer):
    with pytest.raises(ValueError, match=r"\(validation\) has a row of 24 tokens\. Raise"):
        report.evaluate(EvaluationConfig(), model, Given(np.zeros((0, 24))), tokenizer)


def test_a_diverged_model_is_an_error(model, tokenizer):
    broken = jax.tree.map(lambda x: x * jnp.nan, model)
    with pytest.raises(ValueError, match="loss over 2 validation rows is nan"):
        report.evaluate(EvaluationConfig(batch_size=2), broken, Given(np.ones((2, 24))), tokenizer)


def test_samples_continue_the_prompts(built, model, tokenizer):
    samples = built[1].facts["samples"]
    assert [sample["prompt"] for sample in samples] == ["def ", "", "naï"]
    tokens = tokenizer.encode("naï")
    for _ in range(12):
        row = np.zeros((1, 24), np.int32)
        row[0, : len(tokens)] = tokens
        tokens.append(int(logits64(model, row)[0, len(tokens) - 1].argmax()))
        if tokens[-1] == tokenizer.eos_id:
            break
    made = [token for token in tokens[len(tokenizer.encode("naï")) :] if token != tokenizer.eos_id]
    assert samples[2]["text"] == tokenizer.decode(made)
    assert samples[2]["num_tokens"] == len(made)


def test_row_shows_the_probabilities_of_the_first_row(built, model, cache, tokenizer):
    row = json.loads((built[0] / "report.json").read_text())["row"]
    ids = cache.rows("validation", np.arange(1)).tokens
    logits = logits64(model, ids)[0]
    probabilities = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    assert [token["text"] for token in row] == [tokenizer.decode([i]) for i in ids[0].tolist()]
    assert row[0]["probability"] is None
    found = [token["probability"] for token in row[1:]]
    expected = [probabilities[t, ids[0, t + 1]] for t in range(23)]
    np.testing.assert_allclose(found, expected, rtol=1e-4)
    text, probability = row[5]["alternatives"][0]
    best = int(probabilities[4].argmax())
    assert text == tokenizer.decode([best])
    assert probability == pytest.approx(probabilities[4, best], rel=1e-4)


def test_building_again_gives_the_same_bytes(built, trained, cache, tmp_path):
    again = report.build(
        trained.experiment,
        trained.checkpoint_dir,
        cache,
        trained.tokenizer_dir,
        Workspace(tmp_path / "progress", tmp_path),
    )
    assert again == built[1]
    for name in ("report.json", "report.html"):
        assert (tmp_path / name).read_bytes() == (built[0] / name).read_bytes()


def test_the_content_id_covers_every_value_and_no_formatting(built, tmp_path):
    values = json.loads((built[0] / "report.json").read_text())
    (tmp_path / "report.json").write_text(json.dumps(values))
    assert content_id(tmp_path) == built[1].content_id
    for name, value in values.items():
        other = value * 2 if isinstance(value, int | float) else value[:-1]
        (tmp_path / "report.json").write_text(json.dumps(values | {name: other}))
        assert content_id(tmp_path) != built[1].content_id, name


def test_compute_precision_is_that_of_training(trained, cache, tmp_path):
    trainer = dataclasses.replace(trained.experiment.trainer, mp="p=f32,c=bfloat16")
    experiment = dataclasses.replace(trained.experiment, trainer=trainer)
    tokenizer = Tokenizer.load(trained.tokenizer_dir)
    workspace = Workspace(tmp_path / "progress", tmp_path)
    rounded = report.build(
        experiment, trained.checkpoint_dir, cache, trained.tokenizer_dir, workspace
    )
    model = load_model(trained.checkpoint_dir, experiment)
    model = jax.tree.map(lambda x: x.astype(jnp.bfloat16), model)
    expected = report.evaluate(experiment.evaluation, model, cache, tokenizer)
    assert rounded.facts == expected.facts()


def test_progress_counts_rows(model, tokenizer):
    told = []
    rows = np.random.default_rng(0).integers(0, 280, (5, 24))
    config = EvaluationConfig(batch_size=2, prompts=())
    report.evaluate(config, model, Given(rows), tokenizer, report=told.append)
    assert (told[-1].done, told[-1].total, told[-1].unit) == (5, 5, "rows")


class Page(HTMLParser):
    def __init__(self, html):
        super().__init__()
        self.text, self.tags, self.open = "", [], []
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "line", "polyline"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


def test_the_page_shows_figures_samples_and_escapes_all_text(built):
    html = (built[0] / "report.html").read_text()
    page = Page(html)
    assert page.open == [], "every tag should be closed"
    assert f"{built[1].facts['perplexity']:,.2f}" in page.text
    for sample in built[1].facts["samples"]:
        assert sample["prompt"] + sample["text"] in page.text
    assert re.findall(r"https?:|@import|url\(|\ssrc=|\shref=", html) == []
    assert {tag for tag, _ in page.tags} & {"script", "img", "link", "iframe"} == set()


def test_hostile_samples_stay_text(built):
    hostile = "</div><script>alert(1)</script>{{ 7 * 7 }}"
    values = json.loads((built[0] / "report.json").read_text())
    row = tuple(
        TokenView(t["text"], t["probability"], tuple(map(tuple, t["alternatives"])))
        for t in values["row"]
    )
    sample = Sample(hostile, hostile, 1, "end")
    curve = tuple(values["loss_by_position"])
    changed = {"samples": (sample,), "row": row, "loss_by_position": curve}
    page = Page(to_html(Results(**{**values, **changed})))
    assert hostile + hostile in page.text
    assert "script" not in {tag for tag, _ in page.tags}


def test_the_chart_goes_through_every_position(built):
    html = (built[0] / "report.html").read_text()
    values = json.loads((built[0] / "report.json").read_text())["loss_by_position"]
    (line,) = [attrs for tag, attrs in Page(html).tags if tag == "polyline"]
    points = [tuple(map(float, p.split(","))) for p in line["points"].split()]
    assert len(points) == len(values) == 23
    heights = np.array([-y for _, y in points])
    np.testing.assert_allclose(np.corrcoef(heights, values)[0, 1], 1.0, atol=1e-4)
    assert [x for x, _ in points] == sorted(x for x, _ in points)


@pytest.mark.parametrize("values", [[3.0], [2.0, 2.0], [0.0, 1e-9], [8.3, 2.1, 1.7]])
def test_the_chart_has_a_few_round_ticks_around_any_values(values):
    chart = _chart(values)
    labels = [float(tick["label"]) for tick in chart["ticks"]]
    assert 2 <= len(labels) <= 9
    assert min(labels) <= min(values) + 1e-6
    assert max(labels) >= max(values) - 1e-6
