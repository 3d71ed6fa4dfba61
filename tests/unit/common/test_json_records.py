"""Records of runs: what is not as it was written is one error that names the file."""

import json
import pickle

import pytest

from attrib.common.errors import AttribError
from attrib.common.json_records import CHECKSUM, parse_record, with_checksum

RECORD = with_checksum({"job": "TrainSettings", "num_rows": [3]})


def written(changes: dict, without: str = "") -> bytes:
    return json.dumps({name: value for name, value in (RECORD | changes).items() if name != without}).encode()


def test_a_whole_record_is_read():
    assert parse_record("r.json", written({})) == RECORD


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (written({"num_rows": "x"}), "its checksum differs"),
        (written({"num_rows": float("nan")}), "its checksum differs"),
        (written({"num_rows": "x"}, without=CHECKSUM), "its checksum is missing"),
        (written({}, without="num_rows"), "its checksum differs"),
        (b"[]", "a list in place of an object"),
        (b"[" * 100_000, "recursion"),
        (written({})[:-9], ""),
    ],
)
def test_a_damaged_record_is_one_error(content, message):
    with pytest.raises(AttribError, match=rf"^r.json is damaged \(.*{message}.*\); restore it"):
        parse_record("r.json", content)


def test_a_value_that_a_record_of_an_earlier_version_lacks_is_named():
    for record in (parse_record("r.json", b"{}"), pickle.loads(pickle.dumps(parse_record("r.json", b"{}")))):
        with pytest.raises(AttribError, match=r"^r.json is damaged \(it lacks 'num_rows'\); restore it"):
            record["num_rows"]
        assert record.get("num_rows") is None
