"""Charts: every value is drawn, names stay text, and the SVG loads nothing and is reproducible."""

import re
import xml.etree.ElementTree as ElementTree

import numpy as np
import pytest

from attrib.common.errors import AttribError
from attrib.pages.charts import (
    COLOURS,
    Steps,
    calibration_figure,
    correlation_figure,
    forest_figure,
    histogram_figure,
    steps_figure,
    svg,
)

HOSTILE = "<script>alert(1)</script>\"'> $\\frac{1}{2}$ {{7}} &amp; 画像"


def text_of(figure) -> str:
    return "".join(ElementTree.fromstring(svg(figure, "a chart")).itertext())


def test_the_calibration_chart_holds_every_bin():
    bins = {"<b>default</b>": [(0.0, 0.01, 5000), (0.25, 0.5, 40), (1.0, 0.75, 3)], "a & b": [(0.5, 0.5, 1)]}
    figure = calibration_figure(bins, {"<b>default</b>": "error 1", "a & b": "<i>error</i> 2"})
    first, second = figure.axes[0].collections
    assert first.get_offsets().tolist() == [[0.0, 0.01], [0.25, 0.5], [1.0, 0.75]]
    assert second.get_offsets().tolist() == [[0.5, 0.5]]
    sizes = first.get_sizes()
    assert sizes[0] == pytest.approx(81) and sizes[0] > sizes[1] > sizes[2] > 9
    text = text_of(figure)
    assert "<b>default</b>: error 1" in text and "a & b: <i>error</i> 2" in text


def test_the_correlation_chart_holds_every_method():
    lines = {"raw <i>x</i>": (0.9, 0.4, -0.1), 'a & "b"': (0.5,)}
    figure = correlation_figure(lines, {"raw <i>x</i>": (0.3, -2.0), 'a & "b"': (-0.4, -0.0001)})
    left, right = figure.axes
    assert [line.get_xydata().tolist() for line in left.lines] == [[[1, 0.9], [2, 0.4], [3, -0.1]], [[1, 0.5]]]
    assert [line.get_xydata().tolist() for line in right.lines] == [[[0.3, -2.0]], [[-0.4, -0.0001]]]
    assert left.get_ylim()[0] < -0.1 and left.get_ylim()[1] > 1
    text = text_of(figure)
    assert "raw <i>x</i>: mean canonical correlation 0.400, alignment 0.300, whiteness -2.000" in text
    assert 'a & "b": mean canonical correlation 0.500, alignment -0.400, whiteness 0.000' in text


def test_methods_beyond_the_colours_differ_by_their_dashes():
    names = [f"m{i}" for i in range(len(COLOURS) + 2)]
    left, _ = correlation_figure(dict.fromkeys(names, (0.5, 0.2)), dict.fromkeys(names, (0.1, 0.1))).axes
    assert len({(line.get_color(), line.get_linestyle()) for line in left.lines}) == len(names)


def test_a_line_is_cut_where_nothing_was_measured():
    figure = steps_figure([Steps("steps", ["a", "b", "c", "d"], {"one": [0.1, None, 0.3, 0.4]}, chance=0.2)])
    chance, line = figure.axes[0].lines
    np.testing.assert_array_equal(line.get_ydata(), [0.1, np.nan, 0.3, 0.4])
    assert list(chance.get_ydata()) == [0.2, 0.2] and chance.get_linestyle() == "--"
    # The file has two line pieces and three marks.
    root = ElementTree.fromstring(svg(figure, "steps"))
    paths = [e.get("d") for e in root.iter() if COLOURS[0] in e.get("style", "") and e.get("clip-path")]
    assert [path.count("M") for path in paths] == [2]
    marks = [e for e in root.iter() if e.tag.endswith("}use") and COLOURS[0] in e.get("style", "")]
    assert len(marks) == 3 + 1, "one in the legend"


def test_panels_share_one_legend_and_the_range_of_shares():
    lines = {"one": [0.0, 1.0], "two": [0.5, 0.5]}
    figure = steps_figure([Steps("left", ["a", "b"], lines), Steps("right", ["a", "b"], {"two": [0.2, 0.1]})])
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["one", "two"]
    assert [axes.get_title("left") for axes in figure.axes] == ["left", "right"]
    assert {axes.get_ylim() for axes in figure.axes} == {(-0.02, 1.02)}
    assert figure.axes[0].lines[1].get_color() == figure.axes[1].lines[0].get_color()


def test_the_forest_plot_holds_every_interval():
    figure = forest_figure({"a": (0.5, 0.4, 0.7), "b": (-0.1, -0.2, 0.05)}, "macro mAP", reference=0.5)
    (axes,) = figure.axes
    assert [bar.get_segments()[0].tolist() for bar in axes.collections] == [
        [[0.4, 0], [0.7, 0]],
        [[-0.2, 1], [0.05, 1]],
    ]
    reference, *points = (line.get_xydata().tolist() for line in axes.lines)
    assert points == [[[0.5, 0]], [[-0.1, 1]]] and reference[0][0] == 0.5
    assert [label.get_text() for label in axes.get_yticklabels()] == ["a", "b"]
    text = text_of(figure)
    assert "0.500 (0.400 to 0.700)" in text and "\N{MINUS SIGN}0.100 (\N{MINUS SIGN}0.200 to 0.050)" in text


def test_a_histogram_shows_rare_values_and_colours_both_sides_of_the_threshold():
    edges, counts = 0.1 * np.arange(4), np.array([1000, 0, 1])
    figure = histogram_figure(edges, counts, "similarity", marker=0.2)
    drawn = figure.axes[0].patches
    assert [bar.get_height() for bar in drawn] == [1000, 0, 10], "a single query stays visible"
    assert [round(bar.get_x(), 9) for bar in drawn] == [0, 0.1, 0.2]
    assert drawn[0].get_facecolor() == drawn[1].get_facecolor() != drawn[2].get_facecolor()
    assert "clear source from 0.2" in text_of(figure)


def test_a_chart_without_numbers_is_refused():
    with pytest.raises(AttribError, match="no reliability"):
        calibration_figure({}, {})
    with pytest.raises(AttribError, match="no summary"):
        correlation_figure({}, {})


def test_an_svg_is_one_labelled_element_that_loads_nothing_and_keeps_names_as_text():
    figure = forest_figure({HOSTILE: (0.5, 0.4, 0.6), "long " * 99: (0.5, 0.4, 0.6)}, HOSTILE)
    drawn = svg(figure, f'a "b" & c {HOSTILE}')
    root = ElementTree.fromstring(drawn)
    assert root.tag == "{http://www.w3.org/2000/svg}svg" and root.get("role") == "img"
    assert root.get("aria-label") == f'a "b" & c {HOSTILE}'
    tags = {element.tag.rsplit("}")[-1] for element in root.iter()}
    assert not {"script", "image", "foreignObject", "a", "metadata"} & tags
    references = [value for e in root.iter() for name, value in e.attrib.items() if name.endswith("href")]
    assert references and all(value.startswith("#") for value in references)
    assert not re.search(r"url\((?!#)|@import|https?://", re.sub(r'xmlns(:xlink)?="[^"]*"', "", drawn))
    assert not [element for element in root.iter() if element.tag.endswith("}g") and element.get("id")]
    texts = [element.text for element in root.iter() if element.tag.endswith("}text")]
    assert texts.count(HOSTILE) == 2 and max(map(len, texts)) <= len(HOSTILE) + 60


def test_equal_numbers_give_equal_bytes_on_every_day(monkeypatch):
    first = svg(forest_figure({"a": (0.5, 0.4, 0.7)}, "value"), "forest")
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "86400")
    assert svg(forest_figure({"a": (0.5, 0.4, 0.7)}, "value"), "forest") == first
