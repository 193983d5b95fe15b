"""The instance's home is made once, follows the shipped settings, and respects edits."""

import os

import dagster as dg
import pytest

from pipelines.instance import SHIPPED, ensure_home


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("DAGSTER_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


def test_the_home_is_made_with_the_shipped_settings(home):
    assert ensure_home() == home
    assert (home / "dagster.yaml").read_bytes() == SHIPPED.read_bytes()


def test_without_a_home_it_is_in_the_checkout(home, monkeypatch, tmp_path):
    monkeypatch.delenv("DAGSTER_HOME")
    monkeypatch.setattr("pipelines.instance.CHECKOUT", tmp_path)
    assert ensure_home() == tmp_path / ".dagster_home"
    assert os.environ["DAGSTER_HOME"] == str(tmp_path / ".dagster_home")


def test_a_relative_home_becomes_absolute(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DAGSTER_HOME", "here")
    assert ensure_home() == tmp_path / "here"


def test_an_older_copy_is_renewed_and_an_edited_one_is_kept(home, monkeypatch, tmp_path):
    older = tmp_path / "older.yaml"
    older.write_text("telemetry: {enabled: false}\n")
    with monkeypatch.context() as patch:
        patch.setattr("pipelines.instance.SHIPPED", older)
        ensure_home()
    assert (home / "dagster.yaml").read_text() == older.read_text()
    ensure_home()
    assert (home / "dagster.yaml").read_bytes() == SHIPPED.read_bytes()
    (home / "dagster.yaml").write_text("telemetry: {enabled: false} # mine\n")
    ensure_home()
    assert (home / "dagster.yaml").read_text().endswith("# mine\n")


def test_the_shipped_settings_need_no_daemon_and_send_nothing(home):
    ensure_home()
    with dg.DagsterInstance.get() as instance:
        assert not instance.telemetry_enabled
        assert not instance.nux_enabled
        assert type(instance.run_coordinator).__name__ == "SyncInMemoryRunCoordinator"
        assert instance.run_retries_enabled
        assert instance.run_monitoring_settings["free_slots_after_run_end_seconds"] == 90
