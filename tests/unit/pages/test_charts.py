"""Charts from plain numbers: valid XML that holds every value at its place, whatever the names."""

import xml.etree.ElementTree as ElementTree

import pytest

from attrib.common.errors import AttribError
from attrib.pages.charts import COLOURS, Panel, calibration_chart, correlation_chart, drawing, padded, ticks


def elements(root: ElementTree.Element, tag: str) -> list[ElementTree.Element]:
    return [element for element in root.iter() if element.tag.rsplit("}")[-1] == tag]


def test_the_calibration_chart_holds_every_bin_and_escapes_names():
    bins = {"<b>default</b>": [(0.0, 0.01, 5000), (0.25, 0.5, 40), (1.0, 0.75, 3)], "a & b": [(0.5, 0.5, 1)]}
    root = ElementTree.fromstring(calibration_chart(bins, {"<b>default</b>": "error 1", "a & b": "<i>error</i> 2"}))
    dots = [(e.get("cx"), e.get("cy"), float(e.get("r"))) for e in elements(root, "circle") if e.get("fill-opacity")]
    assert [(x, y) for x, y, _ in dots] == [
        ("58.0", "376.6"),
        ("163.0", "210.0"),
        ("478.0", "125.0"),
        ("268.0", "210.0"),
    ]
    assert 9 == dots[0][2] > dots[1][2] > dots[2][2] > 3
    text = "".join(root.itertext())
    assert "<b>default</b>: error 1" in text and "a & b: <i>error</i> 2" in text
    assert "<b>default</b>: 5,000 candidates, share given 0.000, observed 0.010" in text
    assert not elements(root, "b") and not elements(root, "i")


def test_the_correlation_chart_holds_every_method_and_escapes_names():
    lines = {"raw <i>x</i>": (0.9, 0.4, -0.1), 'a & "b"': (0.5,)}
    root = ElementTree.fromstring(correlation_chart(lines, {"raw <i>x</i>": (0.3, -2.0), 'a & "b"': (-0.4, -0.0001)}))
    drawn = [e.get("points").split() for e in elements(root, "polyline")]
    assert [len(points) for points in drawn] == [3, 1] and drawn[0][0].startswith("58.0,")
    assert len(elements(root, "circle")) == 4 and not elements(root, "i")
    text = "".join(root.itertext())
    assert "raw <i>x</i>: mean canonical correlation 0.400, alignment 0.300, whiteness -2.000" in text
    assert 'a & "b": mean canonical correlation 0.500, alignment -0.400, whiteness 0.000' in text


def test_methods_beyond_the_colours_differ_by_their_dashes():
    names = [f"m{i}" for i in range(len(COLOURS) + 2)]
    root = ElementTree.fromstring(correlation_chart(dict.fromkeys(names, (0.5, 0.2)), dict.fromkeys(names, (0.1, 0.1))))
    assert len({(e.get("stroke"), e.get("stroke-dasharray")) for e in elements(root, "polyline")}) == len(names)


def test_no_numbers_are_no_chart():
    with pytest.raises(AttribError, match="no reliability"):
        calibration_chart({}, {})
    with pytest.raises(AttribError, match="no summary"):
        correlation_chart({}, {})


def test_a_drawing_is_one_labelled_svg():
    root = ElementTree.fromstring(drawing(30, 20, 'a "b" & c', ["<g/>"]))
    assert (root.get("viewBox"), root.get("aria-label"), len(root)) == ("0 0 30 20", 'a "b" & c', 1)


def test_ranges_are_padded_also_where_all_values_are_equal():
    assert padded([3, -1], 0.25) == (-2, 4) and padded([2, 2], 0.5) == (1.5, 2.5)


def test_axes_place_values_and_round_ticks():
    panel = Panel(10, 20, 100, 50, (0, 2), (-1, 1))
    assert [panel.at(0, -1), panel.at(2, 1), panel.at(1, 0)] == [(10, 70), (110, 20), (60, 45)]
    assert ticks(0, 1) == [0, 0.2, 0.4, 0.6, 0.8, 1]
    assert ticks(-0.31, 0.02) == [-0.3, -0.2, -0.1, 0]
    assert all(3 <= len(ticks(low, low + span)) <= 8 for low in (-3.3, 0, 7) for span in (1e-3, 0.37, 6, 99))
