"""Provenance says where an artifact was made, and nothing that must stay secret."""

import json
import subprocess

import pytest

from modeling.artifacts import ArtifactStore, Built, Recipe
from resources import provenance
from resources.provenance import collect, git_state
from resources.secrets import REMOVED

CANARY = "c4n4ryc4n4ry"


@pytest.fixture
def checkout(tmp_path):
    """A git repository with one commit and a remote that carries credentials."""

    def git(*arguments):
        subprocess.run(["git", "-C", str(tmp_path), *arguments], check=True, capture_output=True)

    git("init", "--initial-branch=main")
    git("config", "user.email", "a@example.com")
    git("config", "user.name", "a")
    git("remote", "add", "origin", f"https://user:{CANARY}@example.com/team/lm.git?x={CANARY}")
    (tmp_path / "a.txt").write_text("one\n")
    git("add", "a.txt")
    git("commit", "-m", "first")
    return tmp_path


def test_a_clean_checkout(checkout):
    state = git_state(checkout)
    assert len(state["commit"]) == 40
    assert state["branch"] == "main"
    assert state["remote"] == "https://example.com/team/lm.git"
    assert state["dirty"] is False
    assert state["diff_sha256"] is None


def test_the_digest_of_the_difference_follows_the_edits(checkout):
    def digest(text):
        (checkout / "a.txt").write_text(text)
        state = git_state(checkout)
        assert state["dirty"] is True
        return state["diff_sha256"]

    assert digest("two\n") == digest("two\n") != digest("three\n")
    (checkout / "a.txt").write_text("one\n")
    (checkout / "untracked.txt").touch()
    assert git_state(checkout)["dirty"] is True


def test_the_difference_itself_is_kept_without_secrets_and_in_bounds(checkout):
    (checkout / "a.txt").write_text(f"two\npassword: {CANARY}\n")
    (checkout / "new.txt").touch()
    state = git_state(checkout)
    assert "-one\n+two\n" in state["diff"]
    assert CANARY not in json.dumps(state)
    assert (state["untracked"], state["num_untracked"]) == (["new.txt"], 1)
    assert state["diff_characters_left_out"] == 0
    (checkout / "a.txt").write_text("long\n" * 30_000)
    state = git_state(checkout)
    assert len(state["diff"]) == 1 << 16
    assert state["diff_characters_left_out"] > 80_000


def test_every_installed_package_is_listed():
    versions = provenance.package_versions()
    assert {"jax", "jaxlib", "ml-dtypes", "levanter-pipeline", "dagster-pipes"} <= set(versions)
    assert list(versions) == sorted(versions)


@pytest.mark.parametrize(
    ("remote", "page"),
    [
        (f"https://user:{CANARY}@github.com/team/lm.git?x={CANARY}", "github.com/team/lm/blob"),
        ("git@github.com:team/lm.git", "github.com/team/lm/blob"),
        ("ssh://git@gitlab.com/a/team/lm", "gitlab.com/a/team/lm/-/blob"),
        (f"https://user:{CANARY}@example.com/team/lm.git", None),
    ],
)
def test_code_has_an_address_where_its_host_is_known(checkout, monkeypatch, remote, page):
    git = ["git", "-C", str(checkout)]
    subprocess.run([*git, "remote", "set-url", "origin", remote], check=True)
    monkeypatch.setattr(provenance, "CHECKOUT", checkout)
    provenance.repository_page.cache_clear()
    commit = git_state(checkout)["commit"]
    expected = page and f"https://{page}/{commit}/a.txt#L7"
    assert provenance.code_url(str(checkout / "a.txt"), 7) == expected
    monkeypatch.setattr(provenance, "CHECKOUT", checkout / "installed")
    (checkout / "installed").mkdir()
    provenance.repository_page.cache_clear()
    assert provenance.code_url(str(checkout / "installed" / "b.py"), 7) is None
    provenance.repository_page.cache_clear()


def test_a_folder_without_git_says_so(tmp_path):
    assert git_state(tmp_path)["commit"] is None


def test_no_environment_variable_is_copied(monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", CANARY)
    monkeypatch.setenv("HARMLESS_NAME", CANARY)
    assert CANARY not in json.dumps(collect(["levanter"]))


def test_an_artifacts_record_holds_provenance_and_its_ids_do_not_depend_on_it(
    tmp_path, monkeypatch
):
    store = ArtifactStore(str(tmp_path / "store"))
    recipe = Recipe("toy", 1, {"seed": 3})

    def build(workspace):
        (workspace.output / "a.txt").write_text("a")
        return Built("ab" * 32)

    monkeypatch.setenv("WANDB_API_KEY", CANARY)
    monkeypatch.setattr("sys.argv", ["levanter", f"--token={CANARY}"])
    artifact, is_new, _ = provenance.materialize(store, recipe, build)
    assert is_new
    record = store.record(artifact.recipe_id)
    assert record["provenance"]["process"]["argv"] == ["levanter", f"--token={REMOVED}"]
    assert record["provenance"]["times"]["started"] <= record["provenance"]["times"]["ended"]
    assert artifact.recipe_id == recipe.id
    everything = "".join(p.read_text() for p in (tmp_path / "store").rglob("*") if p.is_file())
    assert CANARY not in everything
    again, is_new, _ = provenance.materialize(store, recipe, build)
    assert (again, is_new) == (artifact, False)
