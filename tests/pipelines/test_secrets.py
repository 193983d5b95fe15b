"""Canaries in environment, URLs, command line and YAML reach nothing that anybody keeps."""

import functools
import http.server
import json
import threading
from pathlib import Path

import pytest

from pipelines.cli import main

CANARY = "c4n4ry"
SECRETS = {
    "AWS_SECRET_ACCESS_KEY": f"{CANARY}Aws",
    "HF_TOKEN": f"hf_{CANARY}Hub",
    "GOOGLE_APPLICATION_CREDENTIALS": f"/nowhere/{CANARY}Google.json",
    "WANDB_API_KEY": f"{CANARY}Wandb".ljust(40, "0"),
    "DATABASE_URL": f"postgresql://user:{CANARY}Pg@localhost/x",
}


NONE = f"http://u:{CANARY}P@ADDRESS/none?sig={CANARY}Q"


class _Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, format, *arguments):
        pass


@pytest.fixture
def address(chain):
    """The tales over HTTP, from a server that wants a password and a token, and forgives."""
    handler = functools.partial(_Quiet, directory=str(chain.texts))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"127.0.0.1:{server.server_port}"
        server.shutdown()


def everything_kept(*roots: Path):
    """Yields the bytes of every file, databases and logs included, and the names of all files."""
    for path in (path for root in roots for path in root.rglob("*")):
        yield path, str(path).encode()
        if path.is_file():
            yield path, path.read_bytes()


def test_no_secret_is_kept_of_a_whole_run(chain, address, tmp_path, capfd, monkeypatch):
    mine = chain.under(tmp_path)
    paths = [
        f"http://user:{CANARY}Password@{address}/{number:02d}.txt?token={CANARY}Query"
        for number in range(60)
    ]
    change = f"dataset.source.paths={json.dumps(paths)}"
    variables = SECRETS | {"WANDB_MODE": "offline", "LEVANTER_OVERRIDES": "{}"}
    with mine.instance(**variables):
        monkeypatch.setattr("sys.argv", ["levanter", "run", "tiny", "--set", change])
        assert main(["run", "tiny", "--set", change]) == 0
        assert main(["status", "tiny"]) == 0
        assert main(["why", "tales/raw_corpus"]) == 0
        assert main(["lineage", "tiny/hf_model", "--html", str(tmp_path / "lineage.html")]) == 0
        for form in ("--prov", "--json"):
            assert main(["lineage", "tiny/hf_model", form]) == 0
        for missing, code in ((f'["{NONE}"]', 1), (f"[{NONE}", 2)):
            missing = missing.replace("ADDRESS", address)
            assert main(["run", "tiny", "--set", f"dataset.source.paths={missing}"]) == code
    printed = capfd.readouterr()
    assert CANARY not in printed.out
    assert CANARY not in printed.err
    kept = list(everything_kept(tmp_path))
    assert any(path.suffix == ".wandb" for path, _ in kept), "what W&B keeps is among it"
    assert any(path.suffix == ".db" for path, _ in kept), "and what Dagster does"
    leaks = sorted({str(path.relative_to(tmp_path)) for path, it in kept if CANARY.encode() in it})
    assert leaks == []
