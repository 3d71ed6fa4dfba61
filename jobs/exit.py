"""How jobs end. Exit codes: 0 done, 1 an error that the user can fix, 2 an invalid config, 3 too many failed images,
130 Ctrl-C, 143 SIGTERM."""

import logging
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from attrib.common.errors import AttribError, FailedShareError

EXIT_CODES = {signal.SIGINT: 130, signal.SIGTERM: 143}  # as shells report them: 128 + the signal

logger = logging.getLogger("jobs")


@contextmanager
def reported() -> Iterator[None]:
    """Run a job: errors the user can fix and signals become one log message and an exit code, without a traceback."""
    # Ray installs the same handler when it starts.
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(number))
    try:
        yield
    except AttribError as error:
        logger.error(error)
        raise SystemExit(3 if isinstance(error, FailedShareError) else 1) from None
    except OSError as error:  # such as a full disk, a missing bucket or refused credentials
        logger.error(f"{type(error).__name__}: {' '.join(str(error).split())[:400]}")
        raise SystemExit(1) from None
    except KeyboardInterrupt:
        _stop(signal.SIGINT)
    except SystemExit as end:
        # Ray Train takes over Ctrl-C while it trains and then exits with code 0. No job exits with 0 by itself.
        if end.code not in (0, signal.SIGTERM):
            raise
        _stop(signal.SIGTERM if end.code else signal.SIGINT)


def _stop(received: signal.Signals) -> None:
    for number in EXIT_CODES:
        signal.signal(number, signal.SIG_DFL)  # a second signal ends the process at once
    if "ray" in sys.modules:
        sys.modules["ray"].shutdown()
    logger.error(f"stopped by {received.name}; run the same command again to continue")
    raise SystemExit(EXIT_CODES[received]) from None
