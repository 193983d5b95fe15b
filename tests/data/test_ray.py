"""Ray tasks make the bytes that this process makes, also when their workers die."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from modeling import canonical, recipes
from modeling.data import compute, corpus, long_texts, tokenized
from modeling.data.config import DatasetConfig, LocalCompute, RayCompute, TokenizationConfig
from modeling.data.encoding import TextEncoder
from modeling.data.sources_config import FilesSource, ValidationConfig
from modeling.data.units import cut_units
from modeling.experiment import validate
from tests.data.conftest import words

# Where JAX is loaded, which the process that starts Ray for a run never does, it warns of forks.
pytestmark = pytest.mark.filterwarnings(r"ignore:os\.fork\(\) was called:RuntimeWarning")
UNIT = 4000
DEFAULT = TokenizationConfig()
RAY = RayCompute(type="ray", max_workers=2)


LOCALHOST = "0100007F"
LOCALHOST_IN_IPV6 = "0000000000000000FFFF0000" + LOCALHOST
_LISTENS = "0A"


def descendants(pid: int) -> list[int]:
    """Returns the processes below one, as Linux shows them."""
    children: dict[int, list[int]] = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            _, _, rest = path.read_text().rpartition(") ")
            children.setdefault(int(rest.split()[1]), []).append(int(path.parent.name))
    found, waiting = [], [pid]
    while waiting:
        below = children.get(waiting.pop(), [])
        found += below
        waiting += below
    return found


def listening(pids: list[int]) -> set[str]:
    """Returns the addresses, in hex, on which processes listen for TCP."""
    sockets = set()
    for pid in pids:
        for path in Path(f"/proc/{pid}/fd").glob("*"):
            with contextlib.suppress(OSError):
                sockets.add(str(path.readlink()))
    found = set()
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == _LISTENS and f"socket:[{fields[9]}]" in sockets:
                found.add(fields[1].partition(":")[0])
    return found


@pytest.fixture(scope="module")
def cluster():
    """A cluster of this module's, of which nothing is left afterwards."""
    before = set(descendants(os.getpid()))
    with compute.ray_cluster(RAY) as ray:
        processes = set(descendants(os.getpid())) - before
        yield ray
    assert not ray.is_initialized()
    deadline = time.monotonic() + 60
    while any(Path(f"/proc/{pid}/exe").exists() for pid in processes):
        assert time.monotonic() < deadline
        time.sleep(0.2)


@pytest.fixture
def encoding(chain):
    formats = dict.fromkeys(("train", "validation"), corpus.TEXT)
    return compute.Encoding.read(DEFAULT, formats, chain.tokenizer_dir)


def units_of(chain):
    units = cut_units(corpus.stored_documents(chain.corpus_dir), UNIT)
    return [(unit.key("p"), unit) for unit in units]


def files_of(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def build(chain, workspace, **options):
    inputs = DEFAULT, chain.corpus_dir, chain.tokenizer_dir, workspace
    return tokenized.build(*inputs, unit_bytes=UNIT, **options)


def test_tasks_make_the_bytes_of_this_process(chain, make_workspace, cluster):
    workspace = make_workspace("ray")
    built = build(chain, workspace, compute=RAY)
    assert built.content_id == chain.tokenized.content_id
    assert files_of(workspace.output) == files_of(chain.tokenized_dir)


def test_long_documents_are_encoded_here(chain, make_workspace, tmp_path, cluster, monkeypatch):
    for number in range(6):
        text = words(number, 2000 if number % 2 else 20)
        (tmp_path / f"{number}.txt").write_text(text, encoding="utf-8")
    monkeypatch.setattr(long_texts, "PART_BYTES", UNIT // 3)
    space = make_workspace("corpus")
    source = FilesSource(type="files", paths=(str(tmp_path / "*.txt"),))
    corpus.build(source, corpus.scan(source, validation=ValidationConfig(fraction=0.0)), space)
    inputs = DEFAULT, space.output, chain.tokenizer_dir
    here, by_ray = make_workspace("here"), make_workspace("ray")
    expected = tokenized.build(*inputs, here, unit_bytes=UNIT)
    spilled, original = [], TextEncoder.spilled

    def counted(encoder, document, scratch):
        spilled.append(len(document))
        return original(encoder, document, scratch)

    monkeypatch.setattr(TextEncoder, "spilled", counted)
    assert tokenized.build(*inputs, by_ray, unit_bytes=UNIT, compute=RAY) == expected
    assert files_of(by_ray.output) == files_of(here.output)
    assert len(spilled) == 3


def test_a_killed_worker_costs_nothing_but_time(
    chain, make_workspace, tmp_path, cluster, monkeypatch
):
    marker = tmp_path / "died"
    encode_unit = compute.encode_unit

    def dies_once(encoder, doc_ids, texts, **options):
        if "05.txt" in " ".join(doc_ids):
            try:
                marker.touch(exist_ok=False)
            except FileExistsError:
                pass
            else:
                os.kill(os.getpid(), signal.SIGKILL)
        return encode_unit(encoder, doc_ids, texts, **options)

    def with_a_death(compute_config, encoding, units, **options):
        return compute.encoded_by_ray(compute_config, encoding, units, encode=dies_once, **options)

    monkeypatch.setattr(tokenized, "encoded_by_ray", with_a_death)
    workspace = make_workspace("killed")
    built = build(chain, workspace, compute=RAY)
    assert marker.exists()
    assert built.content_id == chain.tokenized.content_id
    assert files_of(workspace.output) == files_of(chain.tokenized_dir)


def test_a_unit_that_kills_every_worker_is_named(chain, encoding, cluster, monkeypatch):
    monkeypatch.setattr(compute, "_LIVES", 2)

    def dies(encoder, doc_ids, texts, **options):
        os.kill(os.getpid(), signal.SIGKILL)

    units = units_of(chain)[:1]
    with pytest.raises(compute.WorkersLostError, match=f"unit {units[0][0][:12]}: 2 workers died"):
        list(compute.encoded_by_ray(RAY, encoding, units, encode=dies))


AT_ADDRESS = """
import pathlib, sys
from modeling.artifacts import Workspace
from modeling.data import tokenized
from modeling.data.config import RayCompute, TokenizationConfig
corpus_dir, tokenizer_dir, root, address = sys.argv[1:]
space = Workspace(pathlib.Path(root) / "progress", pathlib.Path(root) / "output")
inputs = TokenizationConfig(), pathlib.Path(corpus_dir), pathlib.Path(tokenizer_dir), space
built = tokenized.build(
    *inputs, unit_bytes=4000, compute=RayCompute(type="ray", address=address, max_workers=2)
)
print(built.content_id)
"""


def test_a_cluster_that_runs_elsewhere_makes_the_same_bytes_and_is_left_running(
    chain, make_workspace, tmp_path, cluster
):
    workspace = make_workspace("there")
    address = cluster.get_runtime_context().gcs_address
    inputs = chain.corpus_dir, chain.tokenizer_dir, tmp_path / "there", address
    done = subprocess.run(
        [sys.executable, "-c", AT_ADDRESS, *map(str, inputs)],
        check=False, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == chain.tokenized.content_id
    assert files_of(workspace.output) == files_of(chain.tokenized_dir)
    assert cluster.get(cluster.put("it goes on")) == "it goes on"


def test_an_address_that_nobody_answers_at_is_named(monkeypatch):
    import ray

    def refuses(**where):
        assert where["address"] == "127.0.0.1:1"
        raise ConnectionError("ray is not there")

    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "init", refuses)
    there = RayCompute(type="ray", address="127.0.0.1:1")
    told = r"compute\.address: .*'127\.0\.0\.1:1'.*not there"
    with pytest.raises(compute.ClusterError, match=told), compute.ray_cluster(there):
        pass


@pytest.mark.parametrize(
    ("error", "meaning"),
    [
        ("OutOfMemoryError", r"no memory left; lower `compute\.max_workers`"),
        ("WorkerCrashedError", "workers died while encoding it"),
        ("ObjectReconstructionFailedError", "texts or ids were lost"),
        ("OwnerDiedError", "texts or ids were lost"),
        ("ObjectStoreFullError", "Ray has no room"),
        ("OutOfDiskError", "Ray has no room"),
        ("RaySystemError", "Ray could not encode it"),
    ],
)
def test_what_a_cluster_loses_is_told_with_the_unit_and_a_remedy(error, meaning):
    import ray

    kind = getattr(ray.exceptions, error)

    class Lost(kind):
        def __init__(self):
            Exception.__init__(self, "as Ray has it")

        def __str__(self):
            return "as Ray has it"

    class Cluster:
        exceptions = ray.exceptions

        def wait(self, tasks, num_returns):
            return tasks[:num_returns], tasks[num_returns:]

        def get(self, task):
            raise Lost

    told = rf"unit 0123456789ab: .*{meaning}.*as Ray has it.*kept, so run again"
    with pytest.raises(compute.WorkersLostError, match=told):
        compute._first_finished(Cluster(), {"task": "0123456789abcdef"})


def test_what_is_wrong_with_a_document_is_said_as_it_is_here(chain, encoding, cluster):
    def refuses(encoder, doc_ids, texts, **options):
        raise ValueError(f"{doc_ids[0]}: has no ids")

    with pytest.raises(ValueError, match=r"^doc-\d\d\.txt: has no ids$"):
        list(compute.encoded_by_ray(RAY, encoding, units_of(chain), encode=refuses))


def test_units_are_taken_as_fast_as_they_are_encoded(chain, encoding, cluster):
    taken, given = 0, 0

    def counted():
        nonlocal taken
        for keyed in units_of(chain):
            taken += 1
            assert taken - given <= 2 * 2 + 1
            yield keyed

    for _ in compute.encoded_by_ray(RAY, encoding, counted()):
        given += 1
    assert given == taken > 10


def test_the_cluster_listens_on_this_machine_alone(cluster):
    addresses = listening([os.getpid(), *descendants(os.getpid())])
    assert addresses
    assert addresses <= {LOCALHOST, LOCALHOST_IN_IPV6}
    assert os.environ["RAY_USAGE_STATS_ENABLED"] == "0"


LOCAL_BUILD = """
import json, pathlib, sys
from modeling.artifacts import Workspace
from modeling.data import tokenized
from modeling.data.config import TokenizationConfig
corpus_dir, tokenizer_dir, root = map(pathlib.Path, sys.argv[1:])
workspace = Workspace(root / "progress", root / "output")
tokenized.build(TokenizationConfig(), corpus_dir, tokenizer_dir, workspace)
heavy = {"ray", "jax", "datasets", "pandas", "dagster"}
print(json.dumps(sorted(heavy & set(sys.modules))))
"""


def test_a_local_build_imports_no_ray(chain, make_workspace, tmp_path):
    make_workspace("local")
    arguments = [chain.corpus_dir, chain.tokenizer_dir, tmp_path / "local"]
    done = subprocess.run(
        [sys.executable, "-c", LOCAL_BUILD, *map(str, arguments)],
        check=True,
        capture_output=True,
        text=True,
    )
    assert json.loads(done.stdout) == []


@pytest.mark.parametrize(
    ("written", "meant"),
    [
        ("local", LocalCompute()),
        ("ray", RayCompute(type="ray")),
        ({"type": "ray", "address": "auto", "max_workers": 3}, None),
    ],
)
def test_who_computes_is_said_in_the_dataset_and_is_no_part_of_it(written, meant):
    fields = {
        "source": {"type": "pystdlib"},
        "tokenizer": {"type": "bpe", "vocab_size": 300},
        "sequence_lengths": [16],
    }
    plain = validate(DatasetConfig, fields, "x.yaml")
    said = validate(DatasetConfig, fields | {"compute": written}, "x.yaml")
    assert plain.compute == LocalCompute()
    assert said.compute == (meant or RayCompute(type="ray", address="auto", max_workers=3))
    assert canonical.encode(said) == canonical.encode(plain)
    assert recipes.tokenized_params(said) == recipes.tokenized_params(plain)
