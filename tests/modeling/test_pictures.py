"""Pictures show each figure at its place, and any text as text."""

import math
from xml.etree import ElementTree

import numpy as np
import pytest

from modeling.pictures import curve, histogram

SPACE = "{http://www.w3.org/2000/svg}"


def test_a_histogram_has_a_bar_for_each_count():
    picture = histogram([(64, 3), (128, 12000), (256, 1)], "a < b", "documents")
    assert picture.count("<title>") == 3
    assert "128 to 255: 12,000" in picture
    assert "a &lt; b" in picture
    assert histogram([], "a", "b").endswith("</svg>")


def read(picture):
    """Returns the points of the line, with up as up, and the labels of the upright axis."""
    root = ElementTree.fromstring(picture)
    line = root.find(f"{SPACE}polyline")
    points = [tuple(map(float, point.split(","))) for point in line.get("points").split()]
    texts = [text for text in root.iter(f"{SPACE}text") if text.get("x") == "42"]
    ticks = {float(text.text): float(text.get("y")) - 4 for text in texts}
    return np.array([(x, -y) for x, y in points]).reshape(-1, 2), ticks


def test_a_curve_goes_through_every_value_as_its_axis_says():
    values = [8.3, 2.1, 1.7, 1.9, 1.2]
    points, ticks = read(curve(values, "step", "loss"))
    assert np.allclose(np.diff(points[:, 0]), np.diff(points[:, 0])[0], atol=0.1)
    assert min(ticks) <= 1.2
    assert max(ticks) >= 8.3
    (low, low_y), *_, (high, high_y) = sorted(ticks.items())
    found = low + (-points[:, 1] - low_y) / (high_y - low_y) * (high - low)
    np.testing.assert_allclose(found, values, atol=0.01)


def test_places_of_many_values_have_their_mean_on_their_range():
    values = np.random.default_rng(0).normal(5, 1, 10_000) - np.linspace(0, 3, 10_000)
    picture = curve(values.tolist(), "step", "loss")
    points, _ = read(picture)
    assert len(points) == math.ceil(10_000 / 17)
    means = [values[start : start + 17].mean() for start in range(0, 10_000, 17)]
    assert np.corrcoef(points[:, 1], means)[0, 1] > 0.9999
    assert picture.count('stroke-opacity="0.25"') == len(points), "the extremes are seen too"
    assert ">10,000</text>" in picture
    assert len(picture) < 200_000


@pytest.mark.parametrize(
    ("values", "num_points"),
    [([], 0), ([3.0], 1), ([2.0, 2.0], 2), ([2.0, math.nan, math.inf, 1.0], 2), ([math.nan], 0)],
)
def test_a_curve_of_anything_is_a_picture(values, num_points):
    points, ticks = read(curve(values, "a < b", "loss"))
    assert len(points) == num_points
    assert len(ticks) >= 2
    assert np.isfinite(points).all()
