"""The errors that a job reports as a message instead of a traceback."""


class AttribError(Exception):
    """Something the user can mend: the message names the value or file at fault and the remedy."""


class MismatchError(AttribError):
    """Two inputs were made by different models, preprocessing or metrics and must not be combined."""


class FailedShareError(AttribError):
    """More images failed than the config allows."""


class ImageError(Exception):
    """One image that cannot be used. stage: "read" or "decode"; reason: one line of at most 200 characters."""

    def __init__(self, stage: str, reason: str):
        super().__init__(stage, reason)
        self.stage = stage
        self.reason = reason

    def __str__(self) -> str:
        return f"{self.stage}: {self.reason}"


def first_line(error: Exception) -> str:
    """What fits into a row or a message: the first line, at most 200 characters; the kind of an error that says nothing."""
    return (str(error).splitlines() or [type(error).__name__])[0][:200]
