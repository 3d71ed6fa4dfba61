"""Amounts and tables as text."""

from attrib.common.formats import duration, gib, text_table


def test_amounts_are_rounded_in_a_readable_scale():
    assert [duration(s) for s in (0.2, 61, 600, 7200)] == ["1 s", "61 s", "10 min", "2.0 h"]
    assert [gib(b) for b in (2**20, 2**30)] == ["1.0 MiB", "1.0 GiB"]


def test_a_table_is_aligned_and_keeps_every_value_as_it_was_formatted():
    rows = [["1e5", "1.10"], ["a longer name", ""], ["b", "-12.00"]]
    assert text_table({"method": "left", "mAP": "right"}, rows, indent="  ").split("\n") == [
        "  method            mAP",
        "  1e5              1.10",
        "  a longer name",
        "  b              -12.00",
    ]
    assert text_table({"method": "left", "mAP": "right"}, []).split() == ["method", "mAP"]
