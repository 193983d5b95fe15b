"""Compiled programs outlive the process, whole or not at all."""

import hashlib
import logging
import os
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from modeling.training.compile_cache import open_compile_cache


@pytest.fixture
def compilations():
    """How often XLA really compiles; JAX tells through its monitoring."""
    from jax import monitoring

    found = []

    def hear(event, **_):
        if event == "/jax/compilation_cache/cache_misses":
            found.append(event)

    monitoring.register_event_listener(hear)
    yield found
    monitoring.unregister_event_listener(hear)


ROWS = np.linspace(-1, 1, 12, dtype=np.float32).reshape(3, 4)


def compute():
    """Compiles anew, as another process would; what JAX remembers of itself is not asked."""
    compiled = jax.jit(lambda x: jnp.tanh(x @ x.T).sum(0)).lower(ROWS).compile()
    return np.asarray(compiled(ROWS)).tobytes()


def stored(directory):
    return sorted(path for path in directory.iterdir() if path.is_file())


def test_a_program_is_compiled_once_and_gives_the_same_bits(tmp_path, compilations):
    with open_compile_cache(tmp_path):
        first = compute()
    assert len(compilations) == 1
    with open_compile_cache(tmp_path):
        assert compute() == first
    assert len(compilations) == 1
    (entry,) = stored(tmp_path)
    assert [path for path in tmp_path.iterdir() if path.is_dir()] == []
    assert jax.config.jax_compilation_cache_dir is None
    assert "-cache." in entry.name


def test_what_was_compiled_is_kept_if_the_process_then_fails(tmp_path, compilations):
    def fail():
        with open_compile_cache(tmp_path):
            compute()
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    with open_compile_cache(tmp_path) as cache:
        compute()
        cache.publish()
    assert len(compilations) == 1


def test_a_damaged_program_is_not_run(tmp_path, compilations, caplog):
    with open_compile_cache(tmp_path):
        first = compute()
    (entry,) = stored(tmp_path)
    content = bytearray(entry.read_bytes())
    content[len(content) // 2] ^= 1
    entry.write_bytes(content)
    with caplog.at_level(logging.WARNING), open_compile_cache(tmp_path):
        assert f"{entry} is damaged" in caplog.text
        assert compute() == first
    assert len(compilations) == 2
    (again,) = stored(tmp_path)
    assert again.read_bytes() != bytes(content)


def test_what_a_killed_process_left_is_no_program(tmp_path, compilations):
    """JAX writes in place: half an entry in a process's own directory is never looked at."""
    with open_compile_cache(tmp_path):
        compute()
    (entry,) = stored(tmp_path)
    dead = tmp_path / "process-0123456789ab"
    dead.mkdir()
    (dead / entry.name.rpartition(".")[0]).write_bytes(entry.read_bytes()[:100])
    torn = tmp_path / ".0123456789abcdef"
    torn.write_bytes(b"half")
    entry.unlink()
    with open_compile_cache(tmp_path):
        compute()
    assert len(compilations) == 2
    assert dead.exists(), "it may be alive"
    long_ago = time.time() - 2 * 24 * 3600
    for path in (dead, torn):
        os.utime(path, (long_ago, long_ago))
    with open_compile_cache(tmp_path):
        pass
    assert not dead.exists()
    assert not torn.exists()


def test_the_oldest_programs_make_room(tmp_path):
    kept = [entry(tmp_path, name, age_s) for name, age_s in (("b", 20), ("a", 50), ("c", 10))]
    with open_compile_cache(tmp_path, max_bytes=2500):
        assert len(stored(tmp_path)) == 3
    assert stored(tmp_path) == [kept[0], kept[2]]


def entry(directory, name, age_s):
    content = name.encode() * 1000
    path = directory / f"jit_{name}-cache.{hashlib.sha256(content).hexdigest()}"
    path.write_bytes(content)
    os.utime(path, (time.time() - age_s, time.time() - age_s))
    return path
