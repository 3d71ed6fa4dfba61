"""Reliability of shares as a chart."""

from attrib.pages.charts import calibration_figure, svg
from attrib.shares.calibration import Reliability


def reliability_plot(measured: dict[str, Reliability]) -> str:
    """Reliability diagram as SVG. measured: by name, such as default and fitted. Raises AttribError if empty."""
    bins = {n: [(b.mean_share, b.observed_share, b.count) for b in table.bins] for n, table in measured.items()}
    captions = {
        name: f"error {table.expected_calibration_error:.4f}, misplaced {table.misplaced_share:.3f}, "
        f"Brier {table.brier:.3f}, on true sources {table.true_mass:.3f}"
        for name, table in measured.items()
    }
    return svg(calibration_figure(bins, captions), "Calibration of shares")
