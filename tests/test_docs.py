"""What the documents say is true: Python runs, commands parse, links lead somewhere."""

import re
import shlex
from pathlib import Path

import pytest

from modeling import recipes
from pipelines.cli import dotted_overrides, make_parser

ROOT = Path(__file__).parent.parent
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])
# Run block by block, in order, by the named tensors' own test.
RUN_ELSEWHERE = {"named-tensors.md", "named-tensors-cheatsheet.md"}


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(encoding="utf-8"), re.M | re.S)


def ids(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


@pytest.mark.parametrize("page", [p for p in PAGES if blocks(p, "python")], ids=ids)
def test_python_blocks_run(page: Path):
    if page.name in RUN_ELSEWHERE:
        assert (ROOT / "tests" / "haliax" / "test_docs.py").exists()
        return
    namespace: dict[str, object] = {}
    for block in blocks(page, "python"):
        exec(compile(block, str(page), "exec"), namespace)


def commands(page: Path) -> list[str]:
    """Returns the `levanter` commands of a page's console blocks, continued lines joined."""
    text = "\n".join(blocks(page, "console")).replace("\\\n", " ")
    return [line[2:] for line in text.splitlines() if re.match(r"\$ (\S*/)?levanter ", line)]


def test_commands_parse():
    found = [command for page in PAGES for command in commands(page)]
    assert len(found) >= 6
    for command in found:
        words = shlex.split(command, comments=True)[1:]
        arguments, rest = make_parser().parse_known_args(words)
        assert arguments.command == words[0]
        if arguments.command == "train":
            dotted_overrides(rest)
        else:
            assert rest == []


def test_make_targets_exist():
    targets = set(re.findall(r"^(\w+):.*##", (ROOT / "Makefile").read_text(), re.M))
    text = "\n".join(page.read_text(encoding="utf-8") for page in PAGES)
    named = set(re.findall(r"`make (\w+)`|\$ make (\w+)", text))
    assert {one or other for one, other in named} <= targets


@pytest.mark.parametrize("page", PAGES, ids=ids)
def test_links_lead_to_files(page: Path):
    links = re.findall(r"\]\((?!https?:|#)([^)#]+)", page.read_text(encoding="utf-8"))
    for link in links:
        assert (page.parent / link).exists(), f"{page.name}: {link} leads nowhere"


def test_every_kind_is_explained():
    text = (ROOT / "docs" / "lineage.md").read_text(encoding="utf-8").lower()
    for kind in recipes.VERSIONS:
        name = "hugging face model" if kind == "hf_model" else kind.replace("_", " ")
        assert f"| {name} |" in text
