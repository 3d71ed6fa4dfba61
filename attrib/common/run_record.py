"""The record of a run, beside its output. It decides whether a job starts, continues a killed run or returns at once.

`started.json` is written before the work and the job's record (`manifest.json`, `embeddings.json`, ...) after it. Both
hold the identity of the run, a digest of settings and inputs. A run with another identity is refused, so one folder
never holds results of two runs.
"""

from collections.abc import Iterator
from datetime import UTC, datetime
from typing import Any

from attrib.common.config import digest, versions
from attrib.common.errors import AttribError
from attrib.common.settings import IDENTITY, JobSettings, result_settings
from attrib.common.storage import Storage, join

STARTED = "started.json"

Record = dict[str, Any]


def begin(
    settings: JobSettings, record_name: str, inputs: Record, storage: Storage, resumable: bool = True
) -> Record | None:
    """The record of a finished run with the same identity; else None, and `started.json` is written.

    inputs: digests of what the job reads; resumable: whether files of an unfinished run are reused. Raises AttribError
    if the output folder belongs to other settings or inputs.
    """
    identity = run_identity(settings, inputs)
    for name in (record_name, STARTED) if resumable else (record_name,):
        uri = join(settings.output, name)
        if not storage.exists(uri):
            continue
        found = storage.read_json(uri)
        if found["identity"] != identity:
            other = _difference(found, settings, inputs)
            raise AttribError(
                f"{settings.output} belongs to a run with other settings or inputs ({other}); choose another output "
                "folder, set these keys back, or delete the folder to compute again"
            )
        return dict(found) if name == record_name else None
    storage.write_json(join(settings.output, STARTED), _record(settings, inputs))
    return None


def finish(settings: JobSettings, record_name: str, inputs: Record, results: Record, storage: Storage) -> Record:
    """Write and return the record that declares the output complete."""
    record = _record(settings, inputs) | results
    storage.write_json(join(settings.output, record_name), record)
    return record


def run_identity(settings: JobSettings, inputs: Record) -> str:
    """Digest of everything that affects the results of a run, 64 hex digits."""
    return digest([type(settings).__name__, result_settings(settings, IDENTITY), inputs])


def _record(settings: JobSettings, inputs: Record) -> Record:
    return {
        "identity": run_identity(settings, inputs),
        "inputs": inputs,
        "settings": settings.model_dump(mode="json"),
        "versions": versions(),
        "written_at": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def _difference(found: Record, settings: JobSettings, inputs: Record) -> str:
    changed = [f"input {key}" for key in inputs if found["inputs"].get(key) != inputs[key]]
    return "; ".join([*_differing(found["settings"], result_settings(settings), ""), *changed])[:400]


def _differing(there: Any, now: Any, key: str) -> Iterator[str]:
    if isinstance(there, dict) and isinstance(now, dict):
        for name in now:
            yield from _differing(there.get(name), now[name], f"{key}.{name}".lstrip("."))
    elif there != now:
        yield f"{key}: there {there!r}, now {now!r}"
