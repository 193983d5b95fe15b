"""What is kept or shown holds no secret, whichever way it leads out."""

import json
import logging
import sys

import dagster as dg
import pytest

from assets.catalog import guarded
from modeling.experiment import load_catalog
from modeling.urls import public_url
from pipelines import cli
from pipelines.build import build_defs, catalog_from_environment
from pipelines.instance import CHECKOUT
from resources.launcher import Job, LauncherResource
from resources.secrets import (
    REMOVED,
    Scrubbing,
    StageError,
    scrub,
    scrub_tree,
    without_secrets,
    without_secrets_in_errors,
)

CANARY = "c4n4ryc4n4ry"
URL = f"https://user:{CANARY}@example.com/x?token={CANARY}"


@pytest.mark.parametrize(
    "argv",
    [
        ["run", f"--api-key={CANARY}"],
        ["run", "--api_key", CANARY],
        ["run", f"WANDB_API_KEY={CANARY}"],
        ["run", f"https://example.com/?accessToken={CANARY}"],
        ["run", f"{{'aws_secret_access_key': '{CANARY}'}}"],
        ["run", "--wandb-token", CANARY, "--seed", "3"],
        ["run", f"password={CANARY}"],
        ["run", f"hf_{CANARY}ABCDEF"],
        ["run", f"https://user:{CANARY}@example.com/x"],
        ["run", f"https://example.com/x?access_token={CANARY}&y=1"],
        ["run", f"gs://bucket/x?X-Goog-Signature={CANARY}"],
        ["run", "--set", f'{{"secret": "{CANARY}"}}'],
        ["run", "--instance-ref", f'{{"config_yaml": "password: {CANARY}\\nuser: x"}}'],
        ["run", f"Authorization: Bearer {CANARY}"],
        ["run", f"ghp_{CANARY}{CANARY}"],
        ["run", "0123456789abcdef0123456789abcdef01234567"],
        ["run", f"https://us:er@pa?ss#{CANARY}@example.com/x"],
        ["run", f"https://bucket.example.com/x?X-Amz-Credential=a&X-Amz-Signature={CANARY}&y=1"],
        ["run", f"https://example.com/x?{CANARY}"],
        ["run", f"https://example.com/x#access_token={CANARY}"],
        ["run", f"simplecache::https://user:{CANARY}@example.com/x"],
        ["run", "--set", f'dataset.source.paths=["https://a:{CANARY}@example.com/x?t={CANARY}"]'],
        ["run", f"password='two words, {CANARY}'"],
        ["run", f"token=a,{CANARY}"],
        ["run", f"userToken={CANARY}"],
        ["run", f"-----BEGIN RSA PRIVATE KEY-----\n{CANARY}\n-----END RSA PRIVATE KEY-----"],
    ],
)
def test_arguments_lose_their_secrets(argv):
    cleaned = json.dumps(without_secrets(argv))
    assert CANARY not in cleaned
    assert "0123456789abcdef0123456789abcdef01234567" not in cleaned
    assert cleaned.startswith('["run", ')
    assert REMOVED in cleaned or "https://example.com/x" in cleaned


def test_harmless_arguments_stay():
    argv = [
        "levanter",
        "run",
        "nano",
        "--set",
        "dataset.tokenizer.vocab_size=512",
        "--verbose",
        "a/b.yaml",
    ]
    assert without_secrets(argv) == argv
    digest = "ab" * 32
    assert scrub(digest) == digest


def test_what_only_looks_like_a_secret_stays():
    commit = "0123456789abcdef0123456789abcdef01234567"
    for text in (f"owner/name@{commit}", f"'{commit}' is no branch", "author: me", "tokens=5"):
        assert scrub(text) == text
    assert scrub_tree({"hub": {"revision": commit}}) == {"hub": {"revision": commit}}
    assert scrub(commit) == REMOVED
    assert scrub("see https://example.com/a#L7 and gs://b/part-?.txt") == (
        "see https://example.com/a#L7 and gs://b/part-?.txt"
    )


def test_what_the_environment_holds_is_known_wherever_it_stands(monkeypatch):
    monkeypatch.setenv("DB_PASSWORD", CANARY)
    monkeypatch.setenv("SOURCES", "https://user:n0b0dyknows@example.com/x")
    monkeypatch.setenv("SHORT_TOKEN", "1234567")
    said = scrub(f"rejected: <{CANARY}>, n0b0dyknows, 1234567")
    assert said == f"rejected: <{REMOVED}>, {REMOVED}, 1234567"


def test_an_error_is_told_with_its_causes_and_without_their_secrets():
    secret, told = OSError(f"401, url={URL!r}"), ValueError("cannot be read")
    told.__cause__ = secret
    with pytest.raises(StageError) as caught, without_secrets_in_errors():
        raise told
    assert str(caught.value) == (
        f"ValueError: cannot be read\ncaused by OSError: 401, url='https://example.com/x?{REMOVED}'"
    )
    assert caught.value.__suppress_context__
    harmless = KeyError("a")
    with pytest.raises(KeyError) as caught, without_secrets_in_errors():
        raise harmless
    assert caught.value is harmless


def test_no_event_of_a_stage_keeps_a_secret():
    def body(context: dg.AssetExecutionContext) -> None:
        """Says and raises what it should not."""
        context.log.info(f"reading {URL}")
        try:
            raise OSError(f"401, url={URL!r}")
        except OSError as error:
            raise ValueError(f"{URL}: cannot be read") from error

    stage = dg.asset(name="stage")(guarded(body, dg.AssetExecutionContext))
    with dg.DagsterInstance.ephemeral() as instance:
        result = dg.materialize([stage], instance=instance, raise_on_error=False)
        kept = "\n".join(map(dg.serialize_value, instance.all_logs(result.run_id)))
    assert not result.success
    assert f"reading https://example.com/x?{REMOVED}" in kept
    assert "ValueError: https://example.com/x" in kept
    assert CANARY not in kept


def test_what_a_launched_process_prints_loses_its_secrets(capfd):
    heard = []
    job = Job("resources.stages:no_such_entry", {"url": URL}, {}, None)
    command = [sys.executable, "-c", f"print({URL!r}); raise SystemExit('password={CANARY}')"]
    launcher = LauncherResource(grace_s=5)
    code, last_lines = launcher._run_children([command], {}, heard.append, lambda children: None)
    assert code == 1
    told = [*last_lines, *heard, str(launcher._failure(job, code, last_lines))]
    assert f"https://example.com/x?{REMOVED}" in last_lines
    assert f"password={REMOVED}" in last_lines
    assert CANARY not in "\n".join(told)
    printed = capfd.readouterr().out
    assert f"https://example.com/x?{REMOVED}" in printed
    assert CANARY not in printed


def test_a_log_loses_them_with_its_arguments():
    record = logging.LogRecord("a", 20, "a.py", 1, "at %s", (URL,), None)
    assert Scrubbing().filter(record)
    assert record.getMessage() == f"at https://example.com/x?{REMOVED}"


TINY = CHECKOUT / "tests" / "catalogs" / "tiny"


def definitions(token):
    """Returns what Dagster is told of each asset, with a password and a token in every place."""
    url = f"https://user:{token}@example.com/x?token={token}"
    changes = [
        f"description=See {url}",
        f"dataset.description=See {url}",
        f'dataset.source.paths=["{url}"]',
        "dataset.validation=null",
        f'dataset.validation={{"type": "files", "paths": ["{url}"]}}',
        "dataset.tokenizer=null",
        f'dataset.tokenizer={{"type": "pretrained", "path": "{url}"}}',
    ]
    graph = build_defs(load_catalog(TINY, {"tiny": changes})).resolve_asset_graph()
    return {
        key.to_user_string(): (node.code_version, node.description, str(node.metadata))
        for key in graph.get_all_asset_keys()
        for node in [graph.get(key)]
    }


def test_definitions_neither_show_a_secret_nor_depend_on_it():
    shown = definitions(CANARY)
    assert CANARY not in str(shown)
    assert f"https://example.com/x?{REMOVED}" in shown["tales/raw_corpus"][2], "where files lie"
    assert f"https://example.com/x?{REMOVED}" in shown["tales/tokenizer"][2]
    assert f"See https://example.com/x?{REMOVED}" in shown["tiny/checkpoint"][1]
    assert definitions("an0ther0ne") == shown


def test_mistakes_in_a_catalog_are_told_without_secrets():
    overrides = json.dumps({"tiny": [f"dataset.source.paths={URL}"]})
    with pytest.raises(ValueError, match=r"source\.paths") as error:
        catalog_from_environment({"LEVANTER_CATALOG": str(TINY), "LEVANTER_OVERRIDES": overrides})
    assert CANARY not in str(error.value)
    with pytest.raises(ValueError, match="not valid JSON") as error:
        catalog_from_environment({"LEVANTER_OVERRIDES": overrides[:-1]})
    assert CANARY not in str(error.value)


def test_a_traceback_of_the_command_holds_no_secret(monkeypatch, tmp_path, capsys):
    def fail(arguments):
        raise RuntimeError(f"401, url={URL!r}")

    monkeypatch.setenv("DAGSTER_HOME", str(tmp_path))
    monkeypatch.setattr("pipelines.instance.ensure_home", lambda: tmp_path)
    monkeypatch.setattr(cli, "_status", fail)
    assert cli.main(["status"]) == 1
    said = capsys.readouterr().err
    assert "Traceback" in said
    assert f"RuntimeError: 401, url='https://example.com/x?{REMOVED}'" in said
    assert CANARY not in said


def test_urls_are_cut_the_same_way_where_they_are_shown_and_where_they_are_kept():
    assert public_url(URL) == "https://example.com/x"
    assert scrub(f"at {URL}, now") == f"at https://example.com/x?{REMOVED} now"
