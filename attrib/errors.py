"""The errors that a job reports as a message instead of a traceback."""


class AttribError(Exception):
    """Something the user can mend: the message names the value or file at fault and the remedy."""


class MismatchError(AttribError):
    """Two inputs were made by different models, preprocessing or metrics and must not be combined."""


class FailedShareError(AttribError):
    """More images failed than the config allows."""
