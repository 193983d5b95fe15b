import numpy as np
import pytest

from modeling.data import spans
from modeling.data.spans import NOWHERE, SpanTable

FILLER = 7


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.uint32])
@pytest.mark.parametrize("cuts", [[], [100, 100, 640]])
@pytest.mark.parametrize(("block_bytes", "many"), [(256, 256), (256, 2), (1 << 30, 256)])
def test_spans_of_every_length_come_end_to_end(dtype, cuts, block_bytes, many, monkeypatch):
    monkeypatch.setattr(spans, "BLOCK_BYTES", block_bytes)
    monkeypatch.setattr(spans, "_MANY_BUFFERS", many)
    draw = np.random.default_rng(0)
    stream = draw.integers(0, 256, 1000).astype(dtype)
    parts = np.split(stream, cuts)
    firsts, ends = [0, *cuts], [*cuts, len(stream)]
    expected, starts, lengths = [], [], []
    for _ in range(400):
        length = int(draw.integers(0, 50))
        if draw.random() < 0.1:
            start, content = NOWHERE, [FILLER] * length
        else:
            inside = [k for k, first in enumerate(firsts) if ends[k] - first >= max(length, 1)]
            part = inside[draw.integers(len(inside))]
            start = int(draw.integers(firsts[part], ends[part] - max(length, 1) + 1))
            content = stream[start : start + length].tolist()
        expected += content
        starts.append(start)
        lengths.append(length)
    table = SpanTable(parts, np.dtype(dtype), FILLER, 50)
    views = table.views(np.array(starts), np.array(lengths, np.int32))
    assert table.lengths(views).tolist() == lengths
    assert table.joined(views).tolist() == expected
    assert table.joined(views).dtype == dtype


def test_spans_at_the_end_of_the_stream_read_nothing_beyond_it():
    stream = np.arange(20, dtype=np.uint16)
    table = SpanTable([stream[:10], stream[10:]], stream.dtype, FILLER, 20)
    views = table.views(np.array([9, 18, 0, 19]), np.array([1, 2, 10, 1], np.int32))
    assert table.joined(views).tolist() == [9, 18, 19, *range(10), 19]
