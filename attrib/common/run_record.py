"""The record of a run, beside its output. It decides whether a job starts, continues a killed run or returns at once.

`started.json` is written before the work and the job's record (`manifest.json`, `embeddings.json`, ...) after it. Both
hold the identity of the run, a digest of settings and inputs. A run with another identity is refused, so one folder
never holds results of two runs. With `rescan`, a run whose inputs alone differ replaces the results that are there.
While a job runs it holds the lease of the folder (attrib/common/lease.py).
"""

import logging
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from typing import Any

import pyarrow.fs

from attrib.common.config import digest, versions
from attrib.common.errors import AttribError
from attrib.common.json_records import parse_record, with_checksum
from attrib.common.lease import WRITER, Lease
from attrib.common.outputs import check_output, input_uris
from attrib.common.settings import IDENTITY, JobSettings, RescanSettings, result_settings
from attrib.common.storage import Storage, join
from attrib.common.swap import read_or_none

STARTED = "started.json"

Record = dict[str, Any]
Change = Callable[[Record], str]  # what changed in the inputs since a record was written; "" for nothing

logger = logging.getLogger(__name__)


class FinishedRecord(Record):
    """The record of a run that was finished before. made_from: its inputs, for messages."""

    def __init__(self, record: Record, made_from: str):
        super().__init__(record)
        self.made_from = made_from


class ChangedInputsError(AttribError):
    """The inputs changed since a run, and `rescan` is not set. what: the message without the remedy."""

    def __init__(self, what: str):
        super().__init__(
            f"{what}; use --set rescan=true to delete these results and make them again, or choose another output "
            "folder"
        )
        self.what = what


def run_once(
    settings: JobSettings,
    record_name: str,
    inputs: Record,
    storage: Storage,
    work: Callable[[], Record],
    resumable: bool = True,
    change: Change | None = None,
) -> Record:
    """Return the record of the finished run, or call `work`, which returns the results, and write the record.

    change: compares what `inputs` does not tell. Raises AttribError as `finished` and `writing` do.
    """
    if record := finished(settings, record_name, inputs, storage, resumable, change):
        return record
    with writing(settings, record_name, inputs, storage, resumable, change) as lease:
        # Another driver may have finished while this one waited for the lease.
        if record := finished(settings, record_name, inputs, storage, resumable, change):
            return record
        return finish(settings, record_name, inputs, work(), storage, lease)


def finished(
    settings: JobSettings,
    record_name: str,
    inputs: Record,
    storage: Storage,
    resumable: bool = True,
    change: Change | None = None,
) -> Record | None:
    """Return the record of a finished run with the same identity; None if there is work to do.

    inputs: digests of what the job reads; resumable: whether files of an unfinished run are reused. Raises AttribError
    if the output folder belongs to other settings, or to other inputs without `rescan`, if it holds files that this job
    did not make, or overlaps with an input.
    """
    return _found(settings, record_name, inputs, storage, resumable, change)[0]


def _found(
    settings: JobSettings, record_name: str, inputs: Record, storage: Storage, resumable: bool, change: Change | None
) -> tuple[Record | None, str]:
    """Return the record of a finished run, and why results that are there are outdated: "" if they are not."""
    check_output(settings, (record_name, STARTED), storage)
    for name in (record_name, STARTED) if resumable else (record_name,):
        found = _read(join(settings.output, name), storage)
        if found is None:
            continue
        if found["identity"] != run_identity(settings, inputs):
            difference = _difference(found, settings, inputs)
            what = f"{settings.output} belongs to a run with other settings or inputs ({difference})"
            is_same_work = found["identity"] == run_identity(settings, found["inputs"])
            if is_same_work and isinstance(settings, RescanSettings):
                return None, _outdated(settings, f"{what}, of {found['written_at']}")
            remedy = "choose another output folder, set these keys back, or delete the folder to compute again"
            if isinstance(settings, RescanSettings) and settings.rescan:
                remedy += "; rescan=true replaces results of the same settings alone"
            raise AttribError(f"{what}; {remedy}")
        if name != record_name:
            return None, ""
        if change and (changed := change(found)):
            return None, _outdated(settings, f"{settings.output} was made at {found['written_at']}: {changed}")
        made_from = ", ".join(f"{key} {uri}" for key, uri in input_uris(settings)) or "its settings"
        logger.info(f"{settings.output}: finished before, at {found['written_at']}, from {made_from}")
        return FinishedRecord(found, made_from), ""
    return None, ""


def _outdated(settings: JobSettings, what: str) -> str:
    """Return `what`, or raise ChangedInputsError without `rescan`."""
    if isinstance(settings, RescanSettings) and settings.rescan:
        return what
    raise ChangedInputsError(what)


@contextmanager
def writing(
    settings: JobSettings,
    record_name: str,
    inputs: Record,
    storage: Storage,
    resumable: bool = True,
    change: Change | None = None,
) -> Iterator[Lease]:
    """Hold the lease of the output folder and write `started.json`. Outdated results are deleted before.

    If the body fails before it has written anything, the folder is left as it was, free for other settings. Raises
    AttribError if another driver writes to the folder, or has begun a run with another identity.
    """
    uri = join(settings.output, STARTED)
    with Lease(settings.output, storage) as lease:
        # Again: the files of a faster driver may be of other settings.
        _, outdated = _found(settings, record_name, inputs, storage, resumable, change)
        if outdated and isinstance(settings, RescanSettings):
            logger.info(f"rescan: {outdated}; its results are deleted and made again")
            _delete_results(settings, record_name, storage)
        before = None if outdated else read_or_none(uri, storage)
        if before is None or not resumable:
            storage.write_json(uri, _record(settings, inputs))
        try:
            yield lease
        except BaseException:
            with suppress(OSError):
                names = {name for name in storage.names(settings.output) if not name.startswith(".")}
                if before is None and names <= {STARTED, WRITER, *settings.own_folders}:
                    storage.delete_file(uri)
            raise


def _delete_results(settings: RescanSettings, record_name: str, storage: Storage) -> None:
    """Delete what the job made in its output: first the record, so that no record tells of files that are gone.

    `started.json` is left, so that a run that is killed meanwhile finds it and deletes the rest.
    """
    if storage.exists(record := join(settings.output, record_name)):
        storage.delete_file(record)
    for pattern in settings.made:
        *folder, name = pattern.split("/")
        for info in storage.list_folder(join(settings.output, *folder)):
            if re.fullmatch(name, info.base_name):
                is_folder = info.type == pyarrow.fs.FileType.Directory
                delete = storage.delete_folder if is_folder else storage.delete_file
                delete(join(settings.output, *folder, info.base_name))


@contextmanager
def rewriting(settings: JobSettings, record_name: str, storage: Storage) -> Iterator[Lease]:
    """Hold the lease of the output folder of a job that computes all of its results anew in each run.

    Raises AttribError if the folder holds files that this job did not make, or another driver writes to it.
    """
    check_output(settings, (record_name, STARTED), storage)
    with Lease(settings.output, storage) as lease:
        storage.write_json(join(settings.output, STARTED), _record(settings, {}))
        yield lease


def finish(
    settings: JobSettings, record_name: str, inputs: Record, results: Record, storage: Storage, lease: Lease
) -> Record:
    """Write and return the record that declares the output complete. Raises AttribError if the lease was lost."""
    record = with_checksum(_record(settings, inputs) | results)
    lease.check()
    storage.write_json(join(settings.output, record_name), record)
    return record


def run_identity(settings: JobSettings, inputs: Record) -> str:
    """Digest of everything that affects the results of a run, 64 hex digits."""
    return digest([type(settings).__name__, result_settings(settings, IDENTITY), inputs])


def _read(uri: str, storage: Storage) -> Record | None:
    """A record; None if there is none. Raises AttribError if it is damaged."""
    content = read_or_none(uri, storage)
    if content is None:
        return None
    record = parse_record(uri, content)
    is_whole = record.keys() >= {"identity", "inputs", "settings", "written_at"}
    if not is_whole or not isinstance(record["inputs"], dict) or not isinstance(record["settings"], dict):
        raise AttribError(f"{uri} is damaged: it is not the record of a run; restore it, or delete its folder")
    return record


def _record(settings: JobSettings, inputs: Record) -> Record:
    return {
        "identity": run_identity(settings, inputs),
        "inputs": inputs,
        "settings": settings.model_dump(mode="json"),
        "versions": versions(),
        "written_at": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def _difference(found: Record, settings: JobSettings, inputs: Record) -> str:
    keys = [*inputs, *(key for key in found["inputs"] if key not in inputs)]
    changed = [f"input {key}" for key in keys if found["inputs"].get(key) != inputs.get(key)]
    return "; ".join([*_differing(found["settings"], result_settings(settings), ""), *changed])[:400]


def _differing(there: Any, now: Any, key: str) -> Iterator[str]:
    if isinstance(there, dict) and isinstance(now, dict):
        for name in now:
            yield from _differing(there.get(name), now[name], f"{key}.{name}".lstrip("."))
    elif there != now:
        yield f"{key}: there {there!r}, now {now!r}"
