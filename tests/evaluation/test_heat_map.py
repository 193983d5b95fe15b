"""The heat map shows any text as text, in the colour of its probability, and loads nothing."""

import re
from html.parser import HTMLParser
from xml.etree import ElementTree

import pytest

from modeling.evaluation.heat_map import BANDS, TokenView, band_of, drawing, page, visible


class Spans(HTMLParser):
    """Collects every tag, and class, tooltip and text of the token spans."""

    def __init__(self, html):
        super().__init__()
        self.tags, self.spans, self._open = [], [], None
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag == "span":
            self._open = {**dict(attrs), "text": ""}
            self.spans.append(self._open)

    def handle_endtag(self, tag):
        if tag == "span":
            self._open = None

    def handle_data(self, data):
        if self._open is not None:
            self._open["text"] += data


HOSTILE = ["</span><script>alert(1)</script>", "&amp;", '" onmouseover="x', "{{ 7 * 7 }}", "\u202e"]


def test_a_drawing_holds_any_text_in_lines_of_so_many_signs_and_its_colours():
    texts = [*HOSTILE, "a\nb", "\x00", "x" * 20]
    row = [TokenView(texts[0], None), *(TokenView(text, 0.95) for text in texts[1:])]
    svg = ElementTree.fromstring(drawing(row, columns=30))
    space = "{http://www.w3.org/2000/svg}"
    shown = [text for text in svg.iter(f"{space}text") if text.get("textLength")]
    words = [word for text in texts for word in visible(text).split("\n")]
    assert [text.text for text in shown] == words
    assert {element.tag for element in svg.iter()} == {
        f"{space}{n}" for n in ("svg", "rect", "text")
    }
    rects = svg.findall(f"{space}rect")[1 : len(shown) + 1]
    assert rects[0].get("fill") not in {band.background for band in BANDS}, "nothing foretold it"
    assert {rect.get("fill") for rect in rects[1:]} == {BANDS[-1].background}
    ends = [float(rect.get("x")) + float(rect.get("width")) for rect in rects]
    assert max(end for end, word in zip(ends, words, strict=True) if len(word) <= 30) <= 30 * 7.5
    assert float(rects[words.index("b")].get("x")) == 0, "a line break begins a line"


def test_hostile_text_is_shown_and_not_run():
    rows = [[TokenView(text, 0.5, ((text, 0.25),)) for text in HOSTILE]]
    parsed = Spans(page("</title><script>", rows, caption="<img src=x>"))
    assert [span["text"] for span in parsed.spans] == HOSTILE
    assert [tag for tag, _ in parsed.tags if tag in ("script", "img")] == []
    assert all(set(span) == {"class", "title", "text"} for span in parsed.spans)
    assert HOSTILE[0] in parsed.spans[0]["title"]


def test_each_token_has_the_colour_of_its_band_and_its_probability_as_a_tip():
    probabilities = [0.0, 0.0009, 0.001, 0.05, 0.1, 0.49, 0.5, 0.9, 1.0]
    bands = [0, 0, 1, 2, 3, 3, 4, 5, 5]
    parsed = Spans(page("t", [[TokenView("x", p) for p in probabilities]]))
    assert [span["class"] for span in parsed.spans] == [f"b{band}" for band in bands]
    assert parsed.spans[3]["title"] == "p = 5 %"


def test_legend_names_every_band_with_the_class_that_colours_it():
    html = page("t", [])
    for index, band in enumerate(BANDS):
        assert f".b{index} {{ background: {band.background}; color: {band.ink}; }}" in html
        assert f'<li class="b{index}">{band.label}</li>' in html


def test_ink_is_readable_on_every_band():
    for band in BANDS:  # WCAG 2.1, success criterion 1.4.3: a contrast of at least 4.5
        light, dark = sorted((_luminance(band.background), _luminance(band.ink)), reverse=True)
        assert (light + 0.05) / (dark + 0.05) >= 4.5, band


def test_lightness_alone_orders_the_bands():
    lightness = [_luminance(band.background) for band in BANDS]
    assert lightness == sorted(lightness)
    assert [band.floor for band in BANDS] == sorted({band.floor for band in BANDS})


def test_the_first_token_has_no_colour():
    (span,) = Spans(page("t", [[TokenView("def", None)]])).spans
    assert span["class"] == "first"
    assert span["text"] == "def"


def test_characters_that_print_nothing_get_signs():
    assert visible("a\n\tb\r") == "a↵\n⇥\tb␍"
    assert visible("\x00\x1b\x7f") == "␀␛␡"
    assert visible("") == "∅"


def test_tip_names_what_was_expected_instead():
    token = TokenView("x", 0.01, (("self", 0.5), ("\n", 0.25)))
    (span,) = Spans(page("t", [[token]])).spans
    assert span["title"] == "p = 1 %; expected “self” 50 %, “↵” 25 %"


def test_page_loads_nothing_from_elsewhere():
    html = page("t", [[TokenView("x", 0.5)]])
    assert re.findall(r"https?:|//|@import|url\(|src=|href=", html) == []


@pytest.mark.parametrize("value", [-0.1, 1.1, float("nan")])
def test_what_is_no_probability_is_refused(value):
    with pytest.raises(ValueError, match="not a probability"):
        band_of(value)


def _luminance(colour):
    channels = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
