"""What a person does first: opens the UI, sees the graph, clicks Materialize, sees it green.

`LEVANTER_SCREENSHOT=docs/images/asset-graph.png` keeps the picture of the graph.
"""

import contextlib
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest

from pipelines.instance import CHECKOUT, SHIPPED

pytestmark = pytest.mark.browser

STAGES = (
    "raw_corpus", "tokenizer", "tokenized_corpus", "L32", "checkpoint", "eval_report", "hf_model",
)  # fmt: skip
DATASET = """
source: {{type: files, paths: ["{texts}/*.txt"]}}
validation: {{fraction: 0.5}}
tokenizer: {{type: bpe, vocab_size: 257}}
sequence_lengths: [32]
"""
EXPERIMENT = """
dataset: tales
sequence_length: 32
model: {hidden_dim: 32, num_layers: 1, num_heads: 2}
trainer: {num_train_steps: 2, train_batch_size: 2}
"""
CHROMIUM_FLAGS = (
    "--no-sandbox",  # containers forbid the namespaces that it needs
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--host-resolver-rules=MAP * ~NOTFOUND , EXCLUDE 127.0.0.1",  # the page loads nothing else
)


@pytest.fixture
def chromium():
    names = ("chromium", "chromium-browser", "google-chrome")
    found = next(filter(None, map(shutil.which, names)), None)
    if found is None:
        reason = f"this test needs a browser: none of {names} is on the PATH."
        if os.environ.get("CI") == "true":
            pytest.fail(reason)
        pytest.skip(reason)
    return found


@pytest.fixture
def catalog(tmp_path):
    """A dataset and an experiment that nobody has run."""
    for name in ("datasets", "experiments", "texts"):
        (tmp_path / name).mkdir()
    for number in range(8):
        text = f"Tale {number}: the old king went over the sea.\n" * 20
        (tmp_path / "texts" / f"{number}.txt").write_text(text)
    dataset = DATASET.format(texts=tmp_path / "texts")
    (tmp_path / "datasets" / "tales.yaml").write_text(dataset)
    (tmp_path / "experiments" / "tiny.yaml").write_text(EXPERIMENT)
    return tmp_path


@pytest.fixture
def webserver(catalog, tmp_path):
    """Serves the UI on a free port; it and all it starts end with the test."""
    home = tmp_path / "home"
    home.mkdir()
    shutil.copy(SHIPPED, home / "dagster.yaml")
    with socket.socket() as chosen:
        chosen.bind(("127.0.0.1", 0))
        port = chosen.getsockname()[1]
    log = tmp_path / "webserver.log"
    with log.open("wb") as output:
        server = subprocess.Popen(
            [sys.executable, "-m", "dagster_webserver", "-h", "127.0.0.1", "-p", str(port),
             "-w", str(CHECKOUT / "workspace.yaml")],
            env={**os.environ, "DAGSTER_HOME": str(home), "LEVANTER_CATALOG": str(catalog)},
            stdout=output, stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip
    try:
        _wait_until_it_answers(f"http://127.0.0.1:{port}/server_info", server, log)
        yield f"http://127.0.0.1:{port}"
    finally:
        for number in (signal.SIGTERM, signal.SIGKILL):
            with contextlib.suppress(ProcessLookupError):
                os.killpg(server.pid, number)
            with contextlib.suppress(subprocess.TimeoutExpired):
                server.wait(15)


def _wait_until_it_answers(url, server, log):
    deadline = time.monotonic() + 180
    while True:
        try:
            with urllib.request.urlopen(url, timeout=5):
                return
        except (urllib.error.URLError, TimeoutError):
            assert server.poll() is None, log.read_text()
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(0.5)


@pytest.fixture
def page(chromium):
    from playwright.sync_api import sync_playwright

    with tempfile.TemporaryDirectory() as profile, sync_playwright() as playwright:
        context = playwright.chromium.launch_persistent_context(
            profile,
            executable_path=chromium,
            args=list(CHROMIUM_FLAGS),
            viewport={"width": 2000, "height": 760},
        )
        context.set_default_timeout(120_000)
        yield context.new_page()
        context.close()


def test_materializing_an_asset_in_the_browser(page, webserver, tmp_path):
    from playwright.sync_api import expect

    groups = "%2C".join(f"global%40global%3A{group}" for group in ("tales", "tiny"))
    page.goto(f"{webserver}/asset-groups?expanded={groups}", wait_until="domcontentloaded")
    for stage in STAGES:
        page.get_by_text(stage, exact=True).first.wait_for()

    page.goto(f"{webserver}/locations/__repository__@lm/asset-groups/tales",
              wait_until="domcontentloaded")  # fmt: skip
    page.get_by_text("raw_corpus", exact=True).first.wait_for()
    expect(page.get_by_text("Never materialized", exact=True)).to_have_count(4, timeout=120_000)
    page.get_by_text("raw_corpus", exact=True).first.click()
    page.get_by_role("button", name="Materialize selected").click()
    page.get_by_text("Materialized", exact=True).first.wait_for()
    page.get_by_text(re.compile("1 / 1 Passed")).first.wait_for()

    page.goto(f"{webserver}/runs", wait_until="domcontentloaded")
    page.get_by_text("Success", exact=True).first.wait_for()

    page.goto(f"{webserver}/asset-groups?expanded={groups}", wait_until="domcontentloaded")
    page.get_by_text("hf_model", exact=True).first.wait_for()
    picture = Path(os.environ.get("LEVANTER_SCREENSHOT") or tmp_path / "asset-graph.png")
    picture.parent.mkdir(parents=True, exist_ok=True)
    page.screenshot(path=picture)
    assert picture.read_bytes().startswith(b"\x89PNG")
