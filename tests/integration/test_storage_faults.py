"""A store that fails: nothing counts as written that is not there, and no local file is lost."""

import itertools
import os
import time
from collections import Counter

import aiohttp
import numpy as np
import pyarrow as pa
import pytest
from botocore.exceptions import BotoCoreError, ClientError
from support.faulty_store import Fault, FaultyStore

from attrib.common.run_record import run_once
from attrib.common.settings import StorageSettings
from attrib.common.storage import Storage
from attrib.common.swap import read_or_none, swap
from attrib.train.settings import TrainSettings

LARGE = 11 << 20  # bytes; more than one part of Arrow
PARTS = {"arrow": LARGE, "s3fs": 110 << 20}  # bytes that the client uploads in two parts


@pytest.fixture(scope="module")
def store(s3_endpoint):
    with FaultyStore(s3_endpoint) as proxy:
        yield proxy


@pytest.fixture(params=["arrow", "s3fs"])
def storage(request, store) -> Storage:
    store.fault = lambda method, path, number: None
    settings = StorageSettings(
        client=request.param, endpoint=store.endpoint, region="us-east-1", max_attempts=2, request_timeout_seconds=5
    )
    return Storage(settings)


def written(kind: str, storage: Storage, folder, num_bytes: int) -> str:
    """Write an object in one of the two ways; return its URI."""
    data, uri = os.urandom(num_bytes), f"s3://attrib/faults/{kind}-{num_bytes}-{os.urandom(4).hex()}"
    if kind == "publish":
        (folder / "file").write_bytes(data)
        storage.publish(str(folder / "file"), uri)
    else:
        storage.write_bytes(uri, data)
    return uri


@pytest.mark.parametrize("num_bytes", [1000, LARGE])
@pytest.mark.parametrize("kind", ["publish", "write"])
def test_without_faults_everything_arrives(kind, num_bytes, storage, tmp_path):
    uri = written(kind, storage, tmp_path, num_bytes)
    assert len(storage.read_bytes(uri)) == num_bytes and not (tmp_path / "file").exists()


@pytest.mark.parametrize("num_bytes", [1000, LARGE])
@pytest.mark.parametrize("kind", ["publish", "write"])
@pytest.mark.parametrize("code", ["AccessDenied", "ExpiredToken"])
def test_a_refused_write_is_an_error_and_keeps_the_local_file(code, kind, num_bytes, storage, store, tmp_path):
    store.fault = lambda method, path, number: Fault(code) if method in ("PUT", "POST") else None
    with pytest.raises(OSError):
        written(kind, storage, tmp_path, num_bytes)
    assert kind == "write" or (tmp_path / "file").stat().st_size == num_bytes


@pytest.mark.parametrize("part", ["partNumber=1", "partNumber=2", "uploadId"])
def test_a_part_or_the_end_of_an_upload_that_is_refused_is_an_error(part, storage, store, tmp_path):
    def fault(method, path, number):
        wanted = part in path and (method == "POST") == (part == "uploadId")
        return Fault("AccessDenied") if wanted and method in ("PUT", "POST") else None

    store.fault = fault
    with pytest.raises(OSError):
        written("publish", storage, tmp_path, PARTS[storage.settings.client])
    assert (tmp_path / "file").exists()


def test_an_upload_that_the_store_forgets_is_an_error(storage, store, tmp_path):
    store.fault = lambda method, path, number: Fault("NoSuchUpload") if method == "HEAD" else None
    with pytest.raises(OSError):
        written("publish", storage, tmp_path, 1000)
    assert (tmp_path / "file").exists()


@pytest.mark.parametrize("fault", [Fault("SlowDown"), Fault("InternalError"), Fault(reset=True), Fault(seconds=0.3)])
def test_a_request_that_fails_once_is_repeated(fault, storage, store, tmp_path):
    seen = set()

    def once(method, path, number):
        if (method, path) in seen:
            return None
        seen.add((method, path))
        return fault

    store.fault = once
    uri = written("publish", storage, tmp_path, 1000)
    assert len(storage.read_bytes(uri)) == 1000


def test_a_refused_read_is_not_reported_as_an_absent_file(storage, store, tmp_path):
    uri = written("write", storage, tmp_path, 1000)
    store.fault = lambda method, path, number: Fault("AccessDenied") if method in ("GET", "HEAD") else None
    for read in (storage.read_bytes, storage.exists):
        with pytest.raises(OSError) as caught:
            read(uri)
        assert not isinstance(caught.value, FileNotFoundError)


def test_a_truncated_download_is_repeated_or_an_error(storage, store, tmp_path):
    uri = f"s3://attrib/faults/{os.urandom(4).hex()}.parquet"
    table = pa.table({"x": np.arange(100_000)})
    storage.write_table(uri, table)
    store.fault = lambda method, path, number: Fault(truncated=True) if method == "GET" else None
    with pytest.raises((OSError, aiohttp.ClientError)):
        storage.read_bytes(uri)
    with pytest.raises((OSError, aiohttp.ClientError)):
        storage.localise(uri, str(tmp_path))
    store.fault = lambda method, path, number: None
    assert storage.read_table(uri).equals(table)


CALLS = {
    "exists": lambda storage, uri: storage.exists(uri),
    "list": lambda storage, uri: storage.list_folder(uri),
    "read": lambda storage, uri: storage.read_bytes(uri),
    "write": lambda storage, uri: storage.write_bytes(uri, b"x"),
    "read or none": lambda storage, uri: read_or_none(uri, storage),
    "swap": lambda storage, uri: swap(uri, b"x", None, storage),
}


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("fault", [Fault("SlowDown"), Fault("InternalError"), Fault(reset=True)])
def test_a_request_is_repeated_as_often_as_the_settings_say(fault, call, storage, store):
    """More than one layer with repetitions would multiply them, and the wait before a job ends."""
    before, started = len(store.requests), time.monotonic()
    store.fault = lambda method, path, number: fault
    with pytest.raises((OSError, BotoCoreError, ClientError)):
        CALLS[call](storage, "s3://attrib/faults/throttled/object")
    methods = Counter(method for method, _ in store.requests[before:])
    # A connection that was kept may be gone: aiohttp tries a new one once, without a wait.
    assert max(methods.values()) <= storage.settings.max_attempts * (1 + fault.reset), methods
    assert time.monotonic() - started < 10


def test_a_store_that_throttles_from_some_moment_on_ends_a_job_after_one_wait(storage, store):
    """What is tidied after the error does not wait for the store again, and the error is the job's own."""
    output = f"s3://attrib/faults/{os.urandom(4).hex()}"
    settings = TrainSettings(manifest="m", output=output, backbone={"name": "x"})
    patient = Storage(storage.settings.model_copy(update={"max_attempts": 3}))

    def work():
        store.requests.clear()
        store.fault = lambda method, path, number: Fault("SlowDown")
        patient.write_bytes(f"{output}/part", b"x")

    with pytest.raises(OSError, match=f"{output.removeprefix('s3://')}|SLOW_DOWN"):
        run_once(settings, "train.json", {}, patient, work)
    writes = [method for method, path in store.requests if path.endswith("/part")]
    assert writes == ["PUT"] * 3
    assert len(store.requests) - len(writes) == 2, "the listing and the lease, once each"


def test_a_small_file_that_others_replace_is_read_whole(storage, store):
    """A size that was asked for in one request and used in the next would cut a longer version."""
    uri, lengths = f"s3://attrib/faults/{os.urandom(4).hex()}", itertools.cycle((9, 10, 1000))

    def replace(method, path, number):
        if method in ("GET", "HEAD"):
            other.write_bytes(uri, b"x" * next(lengths) + b"end")

    other = Storage(storage.settings.model_copy(update={"endpoint": f"http://{store.target}"}))
    other.write_bytes(uri, b"end")
    store.fault = replace
    for _ in range(4):
        assert read_or_none(uri, storage).endswith(b"end")
