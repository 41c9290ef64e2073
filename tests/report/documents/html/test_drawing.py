"""SVG files as parts of a page."""

import re

import pytest

from moeprune.errors import InputError
from moeprune.report.documents.html.drawing import drawing
from moeprune.report.figures.style import empty_figure, write_figure

HOSTILE = """<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink"
  width="10" onload="bad()">
  <metadata>made somewhere</metadata>
  <style>* { fill: red }</style>
  <script>bad()</script>
  <foreignObject><p>text</p></foreignObject>
  <defs><path id="mark" d="M 0.123456 1 L 2 3.5"/><clipPath id="frame"><rect width="5" height="5"/></clipPath></defs>
  <g id="unused" clip-path="url(#frame)">
    <use xlink:href="#mark" x="1" style="fill: #0072b2; stroke-width: 2" fill="#ffffff"/>
    <use xlink:href="other.svg#mark"/>
    <image xlink:href="https://example.org/picture.png"/>
    <image xlink:href="data:image/png;base64,AAAA"/>
    <a href="javascript:bad()"><path d="M 0 0"/></a>
  </g>
</svg>"""


@pytest.fixture
def hostile(tmp_path):
    path = tmp_path / "hostile.svg"
    path.write_text(HOSTILE)
    return path


def test_only_what_plots_are_made_of_stays(hostile):
    markup = drawing(hostile, "a-", "A <title>")
    for unwanted in ("bad", "script", "style", "metadata", "foreignObject", "example.org", "other.svg", "unused"):
        assert unwanted not in markup
    assert 'role="img"' in markup and 'aria-label="A &lt;title&gt;"' in markup
    assert "data:image/png;base64,AAAA" in markup
    assert not re.search(r"<\w+:", markup)  # HTML knows no prefixes


def test_references_stay_true_under_the_new_ids(hostile):
    markup = drawing(hostile, "a-", "title")
    assert set(re.findall(r' id="([^"]+)"', markup)) == {"a-mark", "a-frame"}
    assert 'href="#a-mark"' in markup and 'clip-path="url(#a-frame)"' in markup


def test_styles_become_attributes_and_count_more_than_those(hostile):
    markup = drawing(hostile, "a-", "title")
    assert 'fill="#0072b2"' in markup and 'stroke-width="2"' in markup and "#ffffff" not in markup
    assert 'd="M 0.123 1 L 2 3.5"' in markup


def test_every_reference_in_a_plot_has_its_target(tmp_path):
    figure = empty_figure(3, 2)
    panel = figure.subplots()
    panel.plot([1, 2, 3], [1, 4, 9], "o-", label="a line")
    panel.imshow([[1, 2], [3, 4]])
    panel.legend()
    write_figure(figure, tmp_path / "plot.svg")
    markup = drawing(tmp_path / "plot.svg", "f-", "A plot")
    targets = set(re.findall(r' id="([^"]+)"', markup))
    used = set(re.findall(r'href="#([^"]+)"', markup)) | set(re.findall(r"url\(#([^)]+)\)", markup))
    assert used == targets and all(name.startswith("f-") for name in used)
    assert "style" not in markup


@pytest.mark.parametrize("content", ["no markup", "<html></html>", "<svg"])
def test_what_is_no_svg_is_an_error(tmp_path, content):
    (tmp_path / "plot.svg").write_text(content)
    with pytest.raises(InputError, match="is not an SVG file"):
        drawing(tmp_path / "plot.svg", "", "")
