"""JSON records with a checksum of their own, so that a damaged one is not taken for a record of other values."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from attrib.common.config import digest
from attrib.common.errors import AttribError, first_line

CHECKSUM = "record_sha256"
JOB = "job"  # key of the record of a run: the settings class of the job that wrote it
REMEDY = "restore it from a copy, or delete its folder and run the job again"


def with_checksum(record: dict[str, Any]) -> dict[str, Any]:
    """The record with a digest of all its other values, as JSON holds them."""
    others = {name: value for name, value in record.items() if name != CHECKSUM}
    return others | {CHECKSUM: digest(json.loads(json.dumps(others, default=str)))}


class ParsedRecord(dict[str, Any]):
    """The record of a file. A value that it lacks is an AttribError that names the file."""

    def __init__(self, values: dict[str, Any], uri: str):
        super().__init__(values)
        self.uri = uri

    def __reduce__(self) -> tuple[type["ParsedRecord"], tuple[dict[str, Any], str]]:
        return ParsedRecord, (dict(self), self.uri)

    def __missing__(self, name: str) -> Any:
        raise AttribError(f"{self.uri} is damaged (it lacks {name!r}); {REMEDY}")


def parse_record(uri: str, content: bytes) -> ParsedRecord:
    """The record of a file. Raises AttribError if it is not a JSON object or has another checksum than it states."""
    try:
        record = json.loads(content)
        if not isinstance(record, dict):
            raise ValueError(f"a {type(record).__name__} in place of an object")
        stated = record.get(CHECKSUM)
        if stated and stated != digest({name: value for name, value in record.items() if name != CHECKSUM}):
            raise ValueError("its checksum differs")
        if not stated and JOB in record:  # records of earlier versions name no job
            raise ValueError("its checksum is missing")
    except (ValueError, RecursionError) as error:  # UnicodeDecodeError and JSONDecodeError are ValueErrors
        raise AttribError(f"{uri} is damaged ({first_line(error)}); {REMEDY}") from error
    return ParsedRecord(record, uri)


@contextmanager
def taking_values(uri: str) -> Iterator[None]:
    """Raise AttribError if a value is missing in a record or of another type: one without a checksum may be damaged."""
    try:
        yield
    except (LookupError, TypeError, AttributeError, ValueError) as error:
        found = f"{type(error).__name__}: {first_line(error)}"
        raise AttribError(f"{uri} is damaged, or of another version of attrib ({found}); {REMEDY}") from error
