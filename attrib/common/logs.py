"""Log messages of a job: on stderr, as text or JSON, set up once per process."""

import json
import logging
import os
import sys
from datetime import UTC, datetime

from attrib.common.secrets import without_user_info

FORMATS = ("text", "json")
FORMAT_VARIABLE = "ATTRIB_LOG_FORMAT"  # environment variable that tells Ray workers the format of their job
PREFIXES = {logging.WARNING: "WARNING: ", logging.ERROR: "error: "}


def set_up(log_format: str) -> None:
    """Write the messages of attrib and jobs, and the warnings of libraries, to stderr."""
    os.environ[FORMAT_VARIABLE] = log_format
    _set_handler(logging.getLogger(), log_format)
    for name in ("attrib", "jobs"):
        logging.getLogger(name).setLevel(logging.INFO)


def set_up_worker() -> None:
    """The same in a Ray worker; Ray forwards its stderr to the driver. Does not change the handlers of Ray."""
    logger = logging.getLogger("attrib")
    _set_handler(logger, os.environ.get(FORMAT_VARIABLE, "text"))
    logger.setLevel(logging.INFO)
    logger.propagate = False  # Ray Train's handlers at the root logger would show each message again


def is_json() -> bool:
    """Whether this process writes its messages as JSON."""
    return os.environ.get(FORMAT_VARIABLE) == "json"


def _set_handler(logger: logging.Logger, log_format: str) -> None:
    for handler in logger.handlers[:]:
        if isinstance(handler, _StderrHandler):
            logger.removeHandler(handler)
    handler = _StderrHandler()
    handler.setFormatter(_JsonFormatter() if log_format == "json" else _TextFormatter())
    logger.addHandler(handler)


class _StderrHandler(logging.Handler):
    """Writes to the current sys.stderr, above the progress bar if there is one."""

    def emit(self, record: logging.LogRecord) -> None:
        try:
            line = without_user_info(self.format(record)) + "\n"
            tqdm = sys.modules.get("tqdm")  # not imported: no progress bar
            if tqdm is None:
                sys.stderr.write(line)
            else:
                tqdm.tqdm.write(line, file=sys.stderr, end="")
            sys.stderr.flush()
        except Exception:
            self.handleError(record)


class _TextFormatter(logging.Formatter):
    """The message; warnings and errors get a prefix."""

    def format(self, record: logging.LogRecord) -> str:
        return PREFIXES.get(record.levelno, "") + super().format(record)


class _JsonFormatter(logging.Formatter):
    """One JSON object per line: time, level, logger, message, and the numbers of a progress message."""

    def format(self, record: logging.LogRecord) -> str:
        values = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": super().format(record),
        }
        return json.dumps(values | getattr(record, "numbers", {}))
