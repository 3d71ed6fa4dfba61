"""Coverage of prevalence intervals with many repeats; tests/unit has the same with few repeats."""

from support.prevalence import CoverageTests


class TestCoverageWithManyRepeats(CoverageTests):
    repeats = 120
