"""Everything that needs Ray. Nothing else in `attrib` imports this package (tests/test_layout.py holds that)."""
