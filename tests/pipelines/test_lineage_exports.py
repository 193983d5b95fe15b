"""The page and the PROV document hold every artifact of the tree, once, and load nothing."""

import html.parser
import json

import pytest

from modeling.artifacts import ArtifactStore, Built, Recipe
from modeling.canonical import digest
from pipelines.lineage import lineage
from pipelines.lineage_exports import to_html, to_prov

HOSTILE = "</td><script>alert(1)</script>"
SHA256 = digest("file", "f")


@pytest.fixture
def node(tmp_path):
    store = ArtifactStore(str(tmp_path))

    def make(kind, text, **inputs):
        def build(workspace):
            (workspace.output / "a").write_text(text)
            leaves = {f"files/{HOSTILE}": SHA256} if kind == "files" else {}
            return Built(digest("t", text), facts={"vocab_size": 7}, leaves=leaves)

        given = {name: artifact.as_input() for name, artifact in inputs.items()}
        provenance = {"git": {"commit": "c0ffee"}, "times": {"started": "2026-01-01T00:00:00"}}
        recipe = Recipe(kind, 1, {"note": {"text": HOSTILE}}, given)
        return store.materialize(recipe, build, provenance=provenance)[0]

    files = make("files", "f")
    tokenizer = make("tokenizer", "t", corpus=files)
    tokens = make("tokens", "k", corpus=files, tokenizer=tokenizer)
    return lineage(store, make("model", "m", tokens=tokens, tokenizer=tokenizer).content_id)


class Page(html.parser.HTMLParser):
    def __init__(self, text):
        super().__init__()
        self.tags, self.ids, self.links, self.text = [], [], [], ""
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        found = dict(attributes)
        self.tags.append(tag)
        self.ids += [found["id"]] if tag == "section" else []
        self.links += [value for name, value in found.items() if name in ("href", "src")]

    def handle_data(self, data):
        self.text += data


def test_the_page_shows_each_artifact_once_and_loads_nothing(node):
    page = Page(to_html(node))
    assert [one.split("-")[0] for one in page.ids] == ["model", "tokenizer", "files", "tokens"]
    assert page.tags.count("rect") == 4
    assert page.tags.count("path") == 5 + 1, "an arrow for each input, and the tip of arrows"
    assert set(page.links) == {f"#{one}" for one in page.ids}
    assert "script" not in page.tags
    assert HOSTILE in page.text
    assert node.record["content_id"] in page.text
    assert "c0ffee" in page.text


def test_an_arrow_never_leads_back(node):
    text = to_html(node)
    for line in text.splitlines():
        if '<path d="M' in line and "C" in line and "title" in line:
            start, end = line.split('"')[1].removeprefix("M").split("C")
            assert int(start.split()[0]) < int(end.split()[-2])


def test_prov_says_what_was_made_of_what(node):
    document = json.loads(to_prov(node))
    entities, activities = document["entity"], document["activity"]
    kinds = {name: entity["prov:type"] for name, entity in entities.items()}
    assert sorted(kinds.values()) == ["file", "files", "model", "tokenizer", "tokens"]
    assert entities[f"levanter:file-{SHA256}"]["levanter:sha256"] == SHA256
    derived = {
        (kinds[one["prov:generatedEntity"]], kinds[one["prov:usedEntity"]])
        for one in document["wasDerivedFrom"].values()
    }
    assert derived == {
        ("model", "tokens"),
        ("model", "tokenizer"),
        ("tokens", "files"),
        ("tokens", "tokenizer"),
        ("tokenizer", "files"),
        ("files", "file"),
    }
    for relation in ("wasGeneratedBy", "used", "wasDerivedFrom"):
        for one in document[relation].values():
            assert one["prov:activity"] in activities
    assert all("prov:startTime" in one for one in activities.values())
    assert {one["prov:role"] for one in document["used"].values()} == {
        "corpus", "tokens", "tokenizer", HOSTILE,
    }  # fmt: skip
