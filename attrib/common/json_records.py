"""JSON records with a checksum of their own, so that a damaged one is not taken for a record of other values."""

import json
from typing import Any

from attrib.common.config import digest
from attrib.common.errors import AttribError, first_line

CHECKSUM = "record_sha256"


def with_checksum(record: dict[str, Any]) -> dict[str, Any]:
    """The record with a digest of all its other values, as JSON holds them."""
    others = {name: value for name, value in record.items() if name != CHECKSUM}
    return others | {CHECKSUM: digest(json.loads(json.dumps(others, default=str)))}


def parse_record(uri: str, content: bytes) -> dict[str, Any]:
    """The record of a file. Raises AttribError if it is not a JSON object or has another checksum than it states."""
    try:
        record = json.loads(content)
        if not isinstance(record, dict):
            raise ValueError(f"a {type(record).__name__} in place of an object")
        stated = record.get(CHECKSUM)
        if stated and stated != digest({name: value for name, value in record.items() if name != CHECKSUM}):
            raise ValueError("its checksum differs")
    except (ValueError, RecursionError) as error:  # UnicodeDecodeError and JSONDecodeError are ValueErrors
        remedy = "restore it from a copy, or delete its folder and run the job again"
        raise AttribError(f"{uri} is damaged ({first_line(error)}); {remedy}") from error
    return record
