"""Exit codes of jobs: 0 done, 1 an error that the user can fix, 2 an invalid config, 3 too many failed images,
130 Ctrl-C, 143 SIGTERM."""

import logging
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from attrib.common.errors import AttribError, FailedShareError

EXIT_CODES = {signal.SIGINT: 130, signal.SIGTERM: 143}  # 128 + the signal, as in a shell

STORE_CLIENTS = ("aiohttp", "botocore", "aiobotocore")

logger = logging.getLogger("jobs")


def note_if_finished(record: dict) -> None:
    """Print, as the last line of a job, that it found its work done."""
    if made_from := getattr(record, "made_from", None):
        print(f"nothing was computed: finished before, at {record['written_at']}, from {made_from}")


@contextmanager
def reported() -> Iterator[None]:
    """Run a job: errors the user can fix and signals become one log message and an exit code, without a traceback."""
    received = [signal.SIGINT]

    def on_sigterm(*_: object) -> None:
        received.append(signal.SIGTERM)
        raise KeyboardInterrupt  # the only exception that passes through Ray's C++ code unchanged

    signal.signal(signal.SIGTERM, on_sigterm)
    try:
        yield
    except AttribError as error:
        logger.error(error)
        raise SystemExit(3 if isinstance(error, FailedShareError) else 1) from None
    except Exception as error:
        # Such as a full disk, a missing bucket or refused credentials; s3fs passes some errors of its clients on.
        if not isinstance(error, OSError) and type(error).__module__.split(".")[0] not in STORE_CLIENTS:
            raise
        logger.error(f"{type(error).__name__}: {' '.join(str(error).split())[:400]}")
        raise SystemExit(1) from None
    except (KeyboardInterrupt, SystemExit):  # SystemExit: raised by Ray Train on Ctrl-C
        for number in EXIT_CODES:
            signal.signal(number, signal.SIG_DFL)  # a second signal ends the process at once
        if "ray" in sys.modules:
            sys.modules["ray"].shutdown()
        logger.error(f"stopped by {received[-1].name}")
        raise SystemExit(EXIT_CODES[received[-1]]) from None
