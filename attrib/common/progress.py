"""Progress of long work: items done, rate, time left and failures."""

import logging
import sys
import time

from tqdm import tqdm

from attrib.common import logs

SECONDS_BETWEEN_LINES = 10.0

logger = logging.getLogger(__name__)


class Progress:
    """A progress bar on a terminal; elsewhere a log message at most every ten seconds, and one at the end."""

    def __init__(self, label: str, total: int, unit: str, already_done: int = 0):
        """unit: name of the items, plural, e.g. "images"; already_done: items finished by an earlier run."""
        self.label, self.total, self.unit = label, total, unit
        self.done, self.failed = already_done, 0
        self._resumed = already_done
        self._started = self._logged = time.monotonic()
        if already_done:
            logger.info(f"{label}: resuming, {already_done:,} of {total:,} {unit} were done before")
        self._bar = tqdm(
            desc=label,
            total=total,
            initial=already_done,
            unit=f" {unit}",
            file=sys.stderr,
            leave=False,
            disable=logs.is_json() or not sys.stderr.isatty(),
        )

    def update(self, count: int, failed: int = 0) -> None:
        """Count finished items. failed: how many of them failed."""
        self.done += count
        self.failed += failed
        if failed:
            self._bar.set_postfix_str(f"{self.failed:,} failed", refresh=False)
        self._bar.update(count)
        now = time.monotonic()
        if self._bar.disable and now - self._logged >= SECONDS_BETWEEN_LINES:
            self._logged = now
            self._log(now)

    def close(self) -> None:
        """Log the totals."""
        self._bar.close()
        self._log(time.monotonic(), last=True)

    def _log(self, now: float, last: bool = False) -> None:
        seconds = max(now - self._started, 1e-6)
        rate = (self.done - self._resumed) / seconds
        percent = 100.0 * self.done / self.total if self.total else 100.0
        eta = (self.total - self.done) / rate if rate else None
        parts = [f"{self.label}: {self.done:,}/{self.total:,} {self.unit}", f"{percent:.0f} %"]
        parts.append(f"{rate:,.1f} {self.unit}/s")
        if last:
            parts.append(f"in {tqdm.format_interval(seconds)}")
        else:
            parts.append("ETA ?" if eta is None else f"ETA {tqdm.format_interval(eta)}")
        if self.failed:
            parts.append(f"{self.failed:,} failed")
        numbers = {
            "done": self.done,
            "total": self.total,
            "unit": self.unit,
            "percent": round(percent, 2),
            "per_second": round(rate, 3),
            "seconds": round(seconds, 3),
            "eta_seconds": None if last or eta is None else round(eta, 1),
            "failed": self.failed,
        }
        logger.info("  ".join(parts), extra={"numbers": numbers})
