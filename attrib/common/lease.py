"""One driver writes to an output folder: a lease in `writer.json` that the driver renews while it runs.

A second driver stops with a message that names the first. A lease whose driver is dead is taken over: at once if its
process was on this machine, else after it was watched for LEASE_SECONDS without a renewal. Clocks are not compared.
"""

import json
import logging
import os
import threading
import time
from datetime import UTC, datetime
from types import TracebackType
from typing import Any

from attrib.common.errors import AttribError, first_line
from attrib.common.processes import is_alive, this_process
from attrib.common.scratch import sweep_unfinished
from attrib.common.storage import Storage, is_remote, join
from attrib.common.swap import read_or_none, swap

WRITER = "writer.json"
LEASE_SECONDS = 60.0
RENEWALS_PER_LEASE = 4

logger = logging.getLogger(__name__)


class Lease:
    """The lease of one output folder; a context manager. `check` raises AttribError if another driver took it over."""

    def __init__(self, output: str, storage: Storage, seconds: float = LEASE_SECONDS):
        self.output, self.uri, self.storage, self.seconds = output, join(output, WRITER), storage, seconds
        self._writer: dict[str, Any] = this_process() | {"since": datetime.now(UTC).isoformat(), "renewals": 0}
        self._lost: str | None = None
        self._ended = threading.Event()
        self._renewals = threading.Thread(target=self._renew, name="lease", daemon=True)

    def __enter__(self) -> "Lease":
        while True:
            found = read_or_none(self.uri, self.storage)
            if found is not None:
                self._wait_until_abandoned(found)
            if swap(self.uri, self._content(), found, self.storage):
                break
        _sweep(self.output)
        self._renewals.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ended.set()
        self._renewals.join()
        storage = self.storage if error is None else without_retries(self.storage)
        try:
            if self._is_mine(found := read_or_none(self.uri, storage)):
                _sweep(self.output)  # of workers that died while this driver lived
                swap(self.uri, None, found, storage)
        except Exception as failed:  # the lease expires by itself; an error here would hide the one of the job
            logger.warning(f"{self.uri} could not be deleted ({first_line(failed)}); the next run deletes it")

    def check(self) -> None:
        """Raise AttribError if another driver has taken the lease. To be called before a record is written."""
        if self._lost is None and self._is_mine(read_or_none(self.uri, self.storage)):
            return
        raise AttribError(
            f"{self.output} was taken over by another driver ({self._lost or 'its lease is gone'}) because this one "
            "did not renew its lease; let the other one finish"
        )

    def _wait_until_abandoned(self, found: bytes) -> None:
        """Return when the driver of this lease is known to be dead. Raises AttribError as soon as it is seen alive."""
        writer = _parsed(found)
        if _is_here(writer):
            if writer["pid"] == os.getpid() or not is_alive(writer["pid"], writer["started"]):
                return
            raise self._taken(writer)
        logger.info(
            f"{self.output}: waiting up to {self.seconds:.0f} s to see whether {_name(writer)} still writes here"
        )
        deadline = time.monotonic() + self.seconds
        while time.monotonic() < deadline:
            time.sleep(min(1.0, self.seconds / 20))
            now = read_or_none(self.uri, self.storage)
            if now is None:
                return
            if now != found:
                raise self._taken(_parsed(now))
        logger.warning(f"{self.output}: {_name(writer)} no longer writes here; this job continues its work")

    def _taken(self, writer: dict[str, Any]) -> AttribError:
        return AttribError(
            f"{self.output} is being written by {_name(writer)}; wait until it ends, stop it, or choose another output"
        )

    def _content(self) -> bytes:
        return json.dumps(self._writer).encode()

    def _renew(self) -> None:
        while not self._ended.wait(self.seconds / RENEWALS_PER_LEASE):
            try:
                found = read_or_none(self.uri, self.storage)
                self._writer["renewals"] += 1
                if self._is_mine(found) and swap(self.uri, self._content(), found, self.storage):
                    continue
            except Exception as error:  # a store that is away for a moment; the next renewal is soon
                logger.warning(f"{self.uri} could not be renewed: {first_line(error)}")
                continue
            self._lost = "its lease is gone" if found is None else _name(_parsed(found))
            return

    def _is_mine(self, found: bytes | None) -> bool:
        names = ("machine", "namespace", "pid", "started", "since")
        return found is not None and all(_parsed(found).get(name) == self._writer[name] for name in names)


def release_abandoned(output: str, storage: Storage) -> None:
    """Delete the lease, and unfinished files, of a driver of this machine that died after it wrote its last record.

    For a run that finds its work done and so takes no lease of its own. One of another machine may be alive and stays.
    """
    uri = join(output, WRITER)
    found = read_or_none(uri, storage)
    if found is None or not _is_here(writer := _parsed(found)) or is_alive(writer["pid"], writer["started"]):
        return
    _sweep(output)
    swap(uri, None, found, storage)


def without_retries(storage: Storage) -> Storage:
    """For what is tidied after an error: a store that has just failed for minutes would cost as many minutes again."""
    return Storage(storage.settings.model_copy(update={"max_attempts": 1}))


def _sweep(output: str) -> None:
    if not is_remote(output):
        sweep_unfinished(output)


def _is_here(writer: dict[str, Any]) -> bool:
    """Whether the process that wrote a lease is, or was, one of this machine."""
    here = this_process()
    known = isinstance(writer.get("pid"), int) and isinstance(writer.get("started"), int)
    return known and all(writer.get(name) == here[name] for name in ("machine", "namespace"))


def _parsed(content: bytes) -> dict[str, Any]:
    try:
        writer = json.loads(content)
    except ValueError:
        writer = None
    return writer if isinstance(writer, dict) else {}


def _name(writer: dict[str, Any]) -> str:
    machine = str(writer.get("machine", "an unknown machine")).split(" ")[0]
    return f"the driver with process {writer.get('pid', '?')} on {machine} (since {writer.get('since', 'unknown')})"
