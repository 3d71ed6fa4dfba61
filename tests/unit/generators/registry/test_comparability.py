"""Warnings about formats and sizes that differ between generators, negatives and queries."""

from attrib.generators.registry.comparability import query_warnings, registry_warnings
from attrib.generators.registry.registry import Entry


def entry_of(name, codecs, sides_px, role="generator"):
    return Entry(name, 1, role, (10,), codecs, sides_px, "", "")


def test_entries_of_another_format_than_others_are_named():
    png, jpeg = entry_of("a", {"PNG": 10}, (32, 32)), entry_of("b", {"JPEG": 10}, (1024, 1024))
    formats, sizes = registry_warnings([png, jpeg])
    assert "formats of a (100% PNG), b (100% JPEG) differ from those of the other generators" in formats
    assert "a (32 to 32 px), b (1024 to 1024 px) differ from those of the other generators" in sizes
    camera = entry_of("camera", {"JPEG": 9, "PNG": 1}, (900, 1100), "photographs")
    against = [text for text in registry_warnings([png, jpeg, camera]) if "those of the negatives" in text]
    assert len(against) == 2 and all("a (" in text and "b (" not in text for text in against)
    assert registry_warnings([jpeg, camera, entry_of("c", {"JPEG": 6, "WEBP": 4}, (700, 900))]) == []


def test_entries_of_another_format_than_the_queries_are_named():
    """Some entries have the format and size of the queries, but not all."""
    png, jpeg = entry_of("a", {"PNG": 10}, (32, 32)), entry_of("b", {"JPEG": 10}, (1024, 1024))
    formats, sizes = query_warnings({"JPEG": 100}, (256.0, 300.0), [png, jpeg])
    assert "a (100% PNG) differ from those of the images to identify (100% JPEG)" in formats
    assert "a (32 to 32 px), b (1024 to 1024 px)" in sizes and "(256 to 300 px)" in sizes
    assert query_warnings({"JPEG": 97, "PNG": 3}, (800.0, 1000.0), [jpeg]) == []
    (warning,) = query_warnings({"JPEG": 94, "BMP": 6}, (800.0, 1000.0), [jpeg])
    assert "6 of 100 images are BMP, and all references are JPEG" in warning
    assert query_warnings({}, None, [png, jpeg]) == []
