"""Progress that means something: done of total, rate, time left, failures."""

import sys
import time


class Progress:
    """Prints `label: done/total unit, share, rate, ETA, failures`: in place on a terminal, else a line every ten seconds."""

    def __init__(self, label: str, total: int, unit: str, already_done: int = 0):
        self.label, self.total, self.unit = label, total, unit
        self.done, self.failed = already_done, 0
        self._resumed = already_done
        self._started = self._printed = time.monotonic()
        self._in_place = sys.stderr.isatty()
        if already_done:
            self._line(f"{self.label}: resuming, {already_done:,} of {total:,} {unit} were done before")

    def update(self, count: int, failed: int = 0) -> None:
        self.done += count
        self.failed += failed
        now = time.monotonic()
        if now - self._printed >= (0.5 if self._in_place else 10.0):
            self._printed = now
            self._print(now)

    def close(self) -> None:
        self._print(time.monotonic(), last=True)

    def _print(self, now: float, last: bool = False) -> None:
        elapsed = max(now - self._started, 1e-6)
        rate = (self.done - self._resumed) / elapsed
        share = 100.0 * self.done / self.total if self.total else 100.0
        parts = [
            f"{self.label}: {self.done:,}/{self.total:,} {self.unit}",
            f"{share:.0f} %",
            f"{rate:,.1f} {self.unit}/s",
        ]
        if last:
            parts.append(f"in {_clock(elapsed)}")
        else:
            parts.append(f"ETA {_clock((self.total - self.done) / rate) if rate else '?'}")
        if self.failed:
            parts.append(f"{self.failed:,} failed")
        self._line("  ".join(parts), stay=self._in_place and not last)

    def _line(self, text: str, stay: bool = False) -> None:
        start, end = ("\r\x1b[K" if self._in_place else ""), ("" if stay else "\n")
        print(start + text, end=end, file=sys.stderr, flush=True)


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(int(seconds + 0.5), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
