"""What the documents say is true: Python runs, commands parse, links lead somewhere."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from modeling import recipes
from pipelines.cli import dotted_overrides, make_parser

ROOT = Path(__file__).parent.parent
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])
RUN_ELSEWHERE = {
    "named-tensors.md": "haliax/test_docs.py",
    "named-tensors-cheatsheet.md": "haliax/test_docs.py",
    "data.md": "data/test_docs.py",
}
"""Pages whose code needs what only another test has."""


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(encoding="utf-8"), re.M | re.S)


def ids(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


@pytest.mark.parametrize("page", [p for p in PAGES if blocks(p, "python")], ids=ids)
def test_python_blocks_run(page: Path):
    if page.name in RUN_ELSEWHERE:
        runner = ROOT / "tests" / RUN_ELSEWHERE[page.name]
        assert page.name in runner.read_text(encoding="utf-8")
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


def test_the_api_reference_is_made_of_the_docstrings(tmp_path: Path):
    command = [sys.executable, "-m", "pdoc", "--docformat", "google", "-o", str(tmp_path), "haliax"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    page = (tmp_path / "haliax" / "axis.html").read_text(encoding="utf-8")
    assert "A named dimension: two axes are the same when both name and size are." in page
    modules = {path.stem for path in (ROOT / "haliax").glob("[a-z]*.py")}
    assert modules <= {path.stem for path in (tmp_path / "haliax").rglob("*.html")}


def test_every_kind_is_explained():
    text = (ROOT / "docs" / "lineage.md").read_text(encoding="utf-8").lower()
    for kind in recipes.VERSIONS:
        name = "hugging face model" if kind == "hf_model" else kind.replace("_", " ")
        assert f"| {name} |" in text
