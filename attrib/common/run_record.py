"""The record beside every output, and what lets a killed job continue: one output folder belongs to one identity.

`started.json` appears before any work and the job's own record (`manifest.json`, `embeddings.json`, ...) after all of it. A restart with
the same identity continues or finds the work done; any other identity is refused rather than mixed in.
"""

from datetime import UTC, datetime

from attrib.common.config import digest, versions
from attrib.common.errors import AttribError
from attrib.common.settings import JobSettings, result_settings
from attrib.common.storage import Storage, join

STARTED = "started.json"


def begin(
    settings: JobSettings, record_name: str, inputs: dict, storage: Storage, resumable: bool = True
) -> dict | None:
    """The record of a finished run with the same identity, else None after noting that this one has started.

    inputs: digests of what the job reads; resumable: whether an unfinished run leaves anything that this one would use. Raises AttribError if the output folder belongs to other settings or inputs.
    """
    identity = run_identity(settings, inputs)
    for name in (record_name, STARTED) if resumable else (record_name,):
        uri = join(settings.output, name)
        if not storage.exists(uri):
            continue
        found = storage.read_json(uri)
        if found["identity"] != identity:
            raise AttribError(
                f"{settings.output} holds results of other {_difference(found, settings, inputs)}; choose another output or delete it"
            )
        return found if name == record_name else None
    storage.write_json(join(settings.output, STARTED), _record(settings, inputs))
    return None


def finish(settings: JobSettings, record_name: str, inputs: dict, results: dict, storage: Storage) -> dict:
    """Write the record that declares the output complete."""
    record = _record(settings, inputs) | results
    storage.write_json(join(settings.output, record_name), record)
    return record


def run_identity(settings: JobSettings, inputs: dict) -> str:
    return digest([type(settings).__name__, result_settings(settings), inputs])


def _record(settings: JobSettings, inputs: dict) -> dict:
    return {
        "identity": run_identity(settings, inputs),
        "inputs": inputs,
        "settings": settings.model_dump(mode="json"),
        "versions": versions(),
        "written_at": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def _difference(found: dict, settings: JobSettings, inputs: dict) -> str:
    current = result_settings(settings)
    keys = [f"{key} = {found['settings'].get(key)!r}" for key in current if found["settings"].get(key) != current[key]]
    changed = [f"input {key}" for key in inputs if found["inputs"].get(key) != inputs[key]]
    return "settings or inputs (" + "; ".join(keys + changed)[:400] + ")"
