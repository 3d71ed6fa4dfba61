"""Errors that a job reports as one message instead of a traceback."""

from collections.abc import Iterable, Mapping
from itertools import islice
from typing import Any

MAX_EXAMPLES = 3  # failed images that an error names


class AttribError(Exception):
    """An error the user can fix: the message names the value or file and the remedy."""


class MissingFileError(AttribError):
    """A file that a job wrote is no longer there."""


class MismatchError(AttribError):
    """Two inputs that must not be combined: made by different models, preprocessing or metrics."""


class FailedShareError(AttribError):
    """More images failed than the config allows."""

    @staticmethod
    def examples(failures: Iterable[Mapping[str, Any]]) -> str:
        """Return key and reason of the first failures. failures: rows with key and reason."""
        return "; ".join(f"{row['key']}: {row['reason']}" for row in islice(failures, MAX_EXAMPLES))


class ImageError(Exception):
    """One image that cannot be used. stage: "read" or "decode"; reason: one line of at most 200 characters."""

    def __init__(self, stage: str, reason: str):
        super().__init__(stage, reason)
        self.stage = stage
        self.reason = reason

    def __str__(self) -> str:
        return f"{self.stage}: {self.reason}"


def one_line(names: Iterable[str]) -> str:
    """Names, such as those of columns, on one line of at most 400 characters."""
    return " ".join(", ".join(names).split())[:400]


def first_line(error: Exception) -> str:
    """First line of an error's message, at most 200 characters; the error's type if it has no message."""
    return (str(error).splitlines() or [type(error).__name__])[0][:200]
