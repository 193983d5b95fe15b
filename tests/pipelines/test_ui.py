"""The UI as a person and a browser see it, and what it leaves behind: nothing.

One webserver, by `levanter ui`, over a copy of the chain that all files share: a test may change
its catalog. `LEVANTER_SCREENSHOT=docs/images/asset-graph.png` keeps a picture of the graph.
"""

import contextlib
import json
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

from tests.pipelines.conftest import begin_changed

pytestmark = pytest.mark.browser

GROUP = "/locations/__repository__@lm/asset-groups"
CHROMIUM_FLAGS = (
    "--no-sandbox",  # containers forbid the namespaces that it needs
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--host-resolver-rules=MAP * ~NOTFOUND , EXCLUDE 127.0.0.1",  # the page loads nothing else
)
ENDLESS = """
extends: tiny
trainer: {num_train_steps: 1000000, save_every_steps: 1000000}
"""
ASSETS = """query { assetNodes {
  assetKey { path } staleStatus staleCauses { category reason dependency { path } }
} }"""
RUNS = """query { runsOrError(limit: 100) { ... on Runs { results {
  id status assetMaterializations {
    assetKey { path } metadataEntries { label ... on TextMetadataEntry { text } }
  }
} } } }"""
LAUNCH = """mutation ($path: [String!]!) { launchRun(executionParams: {
  selector: {
    repositoryName: "__repository__", repositoryLocationName: "lm", pipelineName: "__ASSET_JOB",
    assetSelection: [{path: $path}], assetCheckSelection: []
  }, runConfigData: {}, mode: "default"
}) { ... on LaunchRunSuccess { run { id } } ... on PythonError { message } } }"""
TERMINATE = """mutation ($run: String!) {
  terminateRun(runId: $run) { __typename ... on TerminateRunFailure { message } }
}"""
LOGS = """query ($run: ID!) { logsForRun(runId: $run) { ... on EventConnection { events {
  ... on MessageEvent { message }
} } } }"""


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def stat_of(pid: int) -> list[str] | None:
    """Returns state, parent and the rest of a process, as proc(5) lists them, while it is there."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return None


def descendants(pid: int) -> set[int]:
    """Returns every process below `pid`, in whatever session."""
    parents = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and (fields := stat_of(int(entry.name))):
            parents[int(entry.name)] = int(fields[1])
    found, todo = set(), [pid]
    while todo:
        above = todo.pop()
        below = {child for child, parent in parents.items() if parent == above} - found
        found |= below
        todo += below
    return found


def is_running(pid: int) -> bool:
    fields = stat_of(pid)
    return fields is not None and fields[0] != "Z"


def until(found, say=lambda: "", limit_s=400):
    """Waits for something true and returns it."""
    deadline = time.monotonic() + limit_s
    while not (result := found()):
        assert time.monotonic() < deadline, f"not within {limit_s} s: {say()}"
        time.sleep(0.5)
    return result


class Site:
    """`levanter ui` over a chain and a catalog of its own, started when it is asked for."""

    def __init__(self, chain, root):
        self.chain, self.catalog, self._log = chain, root / "catalog", root / "ui.log"
        self._log.touch()
        self.port, self.server = 0, None

    @property
    def url(self):
        if self.server is None or self.server.poll() is not None:
            self._start()
        return f"http://127.0.0.1:{self.port}"

    def _start(self):
        self.port = free_port()
        with self._log.open("ab") as output:
            self.server = subprocess.Popen(
                [sys.executable, "-m", "pipelines.cli", "ui", "--port", str(self.port)],
                env={**os.environ, **self.chain.environment(), "LEVANTER_CATALOG": self.catalog},
                stdout=output, stderr=subprocess.STDOUT,
            )  # fmt: skip
        until(self._answers, self.log)

    def _answers(self):
        assert self.server.poll() is None, self.log()
        with contextlib.suppress(urllib.error.URLError, ConnectionError, TimeoutError):
            return self.ask(ASSETS)

    def log(self):
        return self._log.read_text()

    def stop(self):
        """Ends it as a user's Ctrl-C or a service manager does; returns its exit code."""
        if self.server is None:
            return 0
        self.server.send_signal(signal.SIGTERM)
        try:
            return self.server.wait(120)
        finally:
            self.server.kill()
            self.server.wait()

    def ask(self, query, **variables):
        """Asks as the browser does."""
        request = urllib.request.Request(
            f"http://127.0.0.1:{self.port}/graphql",
            json.dumps({"query": query, "variables": variables}).encode(),
            {"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request, timeout=120) as answer:
            content = json.load(answer)
        assert "errors" not in content, content
        return content["data"]

    def stale(self):
        """Returns what the UI marks as unsynced, of what was ever made, and why."""
        nodes = self.ask(ASSETS)["assetNodes"]
        return {
            "/".join(node["assetKey"]["path"]): [cause["reason"] for cause in node["staleCauses"]]
            for node in nodes
            if node["staleStatus"] == "STALE"
        }

    def runs(self):
        """Returns what each run that has ended has made, by its id: built, or reused."""
        ended = {}
        for run in self.ask(RUNS)["runsOrError"]["results"]:
            if run["status"] in ("SUCCESS", "FAILURE", "CANCELED"):
                made = {}
                for asset in run["assetMaterializations"]:
                    shown = {e["label"]: e.get("text") for e in asset["metadataEntries"]}
                    made["/".join(asset["assetKey"]["path"])] = shown["was"]
                ended[run["id"]] = {"status": run["status"], "made": made}
        return ended

    @contextlib.contextmanager
    def one_more_run(self):
        """Yields a list that holds what the run that the block starts has made, when it is over."""
        before, made = set(self.runs()), []
        yield made
        until(lambda: set(self.runs()) - before, lambda: self.ask(RUNS))
        ((run_id, run),) = [(k, v) for k, v in self.runs().items() if k not in before]
        assert run["status"] == "SUCCESS", self.log_of(run_id)
        made.append(run["made"])

    def log_of(self, run):
        events = self.ask(LOGS, run=run)["logsForRun"]["events"]
        return "\n".join(event.get("message", "") for event in events)

    def edit(self, before, after):
        path = self.catalog / "datasets" / "tales.yaml"
        text = path.read_text()
        assert text.count(before) == 1
        path.write_text(text.replace(before, after))


@pytest.fixture(scope="module")
def site(chain, changed_run, tmp_path_factory):
    """Models on a vocabulary of 300 are on record, so that the browser need not wait for them."""
    root = tmp_path_factory.mktemp("ui")
    own = begin_changed(chain, changed_run, root)
    site = Site(own, root)
    shutil.copytree(chain.environment()["LEVANTER_CATALOG"], site.catalog)
    site.edit("sequence_lengths: [32, 64]", "sequence_lengths: [32]")
    tales = (site.catalog / "datasets" / "tales.yaml").read_text()
    (site.catalog / "datasets" / "fables.yaml").write_text(
        re.sub("paths: .*}", f'paths: ["{chain.texts}/*.txt"]}}', tales)
    )
    (site.catalog / "experiments" / "endless.yaml").write_text(ENDLESS)
    yield site
    site.stop()


@pytest.fixture(scope="module")
def chromium():
    names = ("chromium", "chromium-browser", "google-chrome")
    found = next(filter(None, map(shutil.which, names)), None)
    if found is None:
        reason = f"this test needs a browser: none of {names} is on the PATH."
        if os.environ.get("CI") == "true":
            pytest.fail(reason)
        pytest.skip(reason)
    return found


@pytest.fixture(scope="module")
def browser(chromium):
    from playwright.sync_api import sync_playwright

    with tempfile.TemporaryDirectory() as profile, sync_playwright() as playwright:
        context = playwright.chromium.launch_persistent_context(
            profile,
            executable_path=chromium,
            args=list(CHROMIUM_FLAGS),
            viewport={"width": 2000, "height": 1000},
        )
        context.set_default_timeout(240_000)
        yield context
        context.close()


@pytest.fixture
def page(browser, site):
    page = browser.new_page()
    yield page
    # Shown if the test has failed.
    sys.stdout.write(f"{page.url}\n{page.inner_text('body')}\n{site.log()}\n")
    page.close()


def go(page, url):
    page.goto(url, wait_until="domcontentloaded")


def test_materializing_an_asset_in_the_browser(page, site, tmp_path):
    from playwright.sync_api import expect

    groups = "%2C".join(f"global%40global%3A{group}" for group in ("tales", "tiny"))
    go(page, f"{site.url}/asset-groups?expanded={groups}")
    for stage in ("raw_corpus", "tokenizer", "tokenized_corpus", "L32",
                  "checkpoint", "eval_report", "hf_model"):  # fmt: skip
        page.get_by_text(stage, exact=True).first.wait_for()
    picture = Path(os.environ.get("LEVANTER_SCREENSHOT") or tmp_path / "asset-graph.png")
    picture.parent.mkdir(parents=True, exist_ok=True)
    page.screenshot(path=picture)
    assert picture.read_bytes().startswith(b"\x89PNG")

    go(page, f"{site.url}{GROUP}/fables")
    page.get_by_text("raw_corpus", exact=True).first.wait_for()
    expect(page.get_by_text("Never materialized", exact=True)).to_have_count(4, timeout=240_000)
    page.get_by_text("raw_corpus", exact=True).first.click()
    page.get_by_role("button", name="Materialize selected").click()
    page.get_by_text("Materialized", exact=True).first.wait_for()
    page.get_by_text(re.compile("1 / 1 Passed")).first.wait_for()


def test_the_page_of_an_asset_tells_a_stranger_what_it_is(page, site):
    go(page, f"{site.url}/assets/tiny/checkpoint?view=overview")
    for said in (
        "Weights, optimizer state and data position after the last step of training.",
        ": A two-layer GPT-2 that trains in seconds.",
        "cost/device_s",
        "Source code",
        "this checkout",
    ):
        page.get_by_text(said).first.wait_for()
    page.get_by_text("lm", exact=True).first.wait_for()
    for asset in ("tiny/checkpoint", "tiny/eval_report", "tales/token_cache/L32"):
        go(page, f"{site.url}/assets/{asset}?view=overview")
        image = page.locator("img[src^='data:image/']").first
        link = page.get_by_text("[Show Markdown]").first  # in place of a large one
        image.or_(link).first.wait_for()
        if not image.count():
            link.click()
        image.wait_for()
        assert image.evaluate("async i => { await i.decode(); return i.naturalWidth }") > 300


def materialize_unsynced(page, site):
    """Does what the button of the group does; returns what the run has made."""
    with site.one_more_run() as made:
        button = page.get_by_role("button", name="Materialize all")
        button.locator("xpath=following::button[1]").click()  # the arrow beside it
        page.get_by_text("Materialize unsynced").first.click()
        page.get_by_role("button", name=re.compile("Materialize 1 asset")).click()
    return made[0]


def test_a_changed_tokenizer_is_made_again_and_only_what_hangs_on_its_bytes(page, site):
    from playwright.sync_api import expect

    go(page, f"{site.url}{GROUP}/tales")
    page.get_by_text("tokenized_corpus", exact=True).first.wait_for()
    assert site.stale() == {}

    # No pair of bytes occurs just twice, so the threshold of three gives the same merges.
    site.edit("vocab_size: 320", "vocab_size: 320, min_frequency: 3")
    page.get_by_role("button", name="Reload definitions").click()
    until(lambda: site.stale() == {"tales/tokenizer": ["has a new code version"]}, site.stale)
    page.get_by_text(re.compile("Unsynced")).first.wait_for()
    assert materialize_unsynced(page, site) == {"tales/tokenizer": "built"}
    assert site.stale() == {}, "the bytes are the same: nothing below has to be made"
    expect(page.get_by_text(re.compile("Unsynced"))).to_have_count(0, timeout=240_000)

    site.edit("vocab_size: 320, min_frequency: 3", "vocab_size: 300")
    page.get_by_role("button", name="Reload definitions").click()
    until(lambda: site.stale() == {"tales/tokenizer": ["has a new code version"]}, site.stale)
    page.get_by_text(re.compile("Unsynced")).first.wait_for()
    assert materialize_unsynced(page, site) == {"tales/tokenizer": "built"}
    assert site.stale() == {"tales/tokenized_corpus": ["has a new data version"]}

    with site.one_more_run() as made:
        page.get_by_role("button", name="Materialize all").click()
    assert made == [
        {
            "tales/raw_corpus": "reused",
            "tales/tokenizer": "reused",
            "tales/tokenized_corpus": "built",
            "tales/token_cache/L32": "built",
        }
    ]
    assert set(site.stale()) == {"tiny/checkpoint"}

    go(page, f"{site.url}{GROUP}/tiny")
    page.get_by_text("hf_model", exact=True).first.wait_for()
    with site.one_more_run() as made:
        page.get_by_role("button", name="Materialize all").click()
    models = ["tiny/checkpoint", "tiny/eval_report", "tiny/hf_model"]
    assert made == [dict.fromkeys(models, "reused")]
    assert site.stale() == {}


def test_terminate_ends_a_training_that_tells_how_it_goes_and_leaves_no_process(page, site):
    assert site.url
    run = site.ask(LAUNCH, path=["endless", "checkpoint"])["launchRun"]["run"]["id"]
    pattern = r"step [\d,]+ of 1,000,000: loss [\d.]+, [\d,]+ tokens/s,.* \d+ s left"
    go(page, f"{site.url}/runs/{run}")
    page.get_by_text(re.compile(pattern)).first.wait_for()
    below = descendants(site.server.pid)
    training = {pid for pid in below if b"resources.worker" in command_of(pid)}
    assert len(training) == 1, "one process trains"

    answer = site.ask(TERMINATE, run=run)["terminateRun"]
    assert answer["__typename"] == "TerminateRunSuccess", answer
    until(lambda: run in site.runs(), lambda: site.log_of(run))
    assert site.runs()[run]["status"] == "CANCELED", "and no retry has begun"
    assert [pid for pid in training if is_running(pid)] == []
    commits = list(site.chain.store_directory.glob("work/*/*/progress/checkpoints/**/COMMIT"))
    assert len(commits) == 1, "the next run goes on from there"
    page.get_by_text("Canceled").first.wait_for()


def command_of(pid):
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    return b""


def test_it_serves_the_catalog_locally_and_ends_with_its_children(site):
    assert site.url
    keys = {"/".join(node["assetKey"]["path"]) for node in site.ask(ASSETS)["assetNodes"]}
    assert {"tales/tokenizer", "tiny/checkpoint", "tiny/hf_model"} <= keys
    for address in set(socket.gethostbyname_ex(socket.gethostname())[2]):
        if not address.startswith("127."):
            with socket.socket() as caller:
                assert caller.connect_ex((address, site.port)) != 0
    children = descendants(site.server.pid)
    assert len(children) >= 2
    assert site.stop() == 0
    until(lambda: not any(map(is_running, children)), lambda: children)
