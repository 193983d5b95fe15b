"""Every Python block of the documentation runs, and every row of the cheat sheet is true."""

import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

DOCS = Path(__file__).parents[2] / "docs"
BLOCK = re.compile(r"^```python\n(.*?)^```", re.MULTILINE | re.DOTALL)


def _run(path):
    """Runs the blocks of a page in one namespace, so that tracebacks point into the page."""
    text = path.read_text()
    namespace: dict = {"__name__": path.stem}
    for match in BLOCK.finditer(text):
        line = text[: match.start(1)].count("\n")
        source = "\n" * line + match.group(1)
        exec(compile(source, str(path), "exec"), namespace)
    return namespace


def test_the_tutorial_runs():
    with jax.numpy_dtype_promotion("standard"):  # Optax needs it
        namespace = _run(DOCS / "named-tensors.md")
    assert namespace["losses"][-1] < namespace["losses"][0]


CHEATS = DOCS / "named-tensors-cheatsheet.md"
ROWS = [
    row.strip("|").rsplit("|", 1)[-1].strip().strip("`")
    for row in CHEATS.read_text().splitlines()
    if row.startswith("| `")
]


@pytest.fixture(scope="module")
def cheats():
    return _run(CHEATS)


def test_the_cheat_sheet_is_whole():
    assert len(ROWS) >= 45


@pytest.mark.parametrize("row", ROWS)
def test_rows_of_the_cheat_sheet_run(cheats, row):
    assert eval(row, dict(cheats)) is not None


def test_rows_of_the_cheat_sheet_are_true(cheats):
    """The pairs that are easy to get wrong, in plain jnp."""
    raw, w, ids = (np.asarray(cheats[name].array) for name in ("x", "w", "ids"))

    def says(row):
        assert row in ROWS
        return np.asarray(eval(row, dict(cheats)).array)

    np.testing.assert_allclose(
        says('x - x.mean("embed")'), raw - raw.mean(-1, keepdims=True), rtol=1e-6
    )
    np.testing.assert_allclose(says('hax.einsum("{embed} -> ...", x, w)'), raw @ w, rtol=1e-5)
    gathered = np.take_along_axis(raw, ids[..., None], -1)[..., 0]
    np.testing.assert_array_equal(says('x["embed", ids]'), gathered)
    np.testing.assert_array_equal(says('w.take("embed", ids)'), w[ids])
    heads = raw.reshape(2, 3, 2, 2).transpose(0, 2, 1, 3)
    np.testing.assert_array_equal(says('hax.rearrange(x, "b p (h d) -> b h p d", h=2)'), heads)
    loss = -np.take_along_axis(np.asarray(jax.nn.log_softmax(raw)), ids[..., None], -1).mean()
    assert says('hax.nn.cross_entropy_loss(x, "embed", ids)') == pytest.approx(loss, rel=1e-5)
    np.testing.assert_array_equal(says('x.at["pos", 0].set(0.0)'), jnp.asarray(raw).at[:, 0].set(0))
