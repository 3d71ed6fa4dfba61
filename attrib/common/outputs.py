"""Protects data that a job did not make: the check of its output folder, before any work."""

import json
import os
from collections.abc import Iterator
from typing import Any, get_args

from pydantic import BaseModel

from attrib.common.errors import AttribError
from attrib.common.lease import WRITER
from attrib.common.settings import IS_URI, JobSettings
from attrib.common.storage import Storage, has_odd_parts, is_remote, join

STARTED = "started.json"  # written by a job before its work
SUBMITTED = "RAY_JOB_CONFIG_JSON_ENV_VAR"  # environment variable of a driver that `ray job submit` started


def check_output(
    settings: JobSettings, own_files: tuple[str, ...], storage: Storage, output_key: str = "output"
) -> None:
    """Raise AttribError unless a job may write to its output folder. To be called before any other work.

    The folder is absent or empty, or this job made it: one of `own_files`, its records, is in it. The folder must not
    equal, contain or lie inside an input, which is any other URI in the settings. An own folder may contain inputs.
    output_key: the key of the settings that names the folder.
    """
    output = getattr(settings, output_key)
    if SUBMITTED in os.environ and not is_remote(output) and not settings.storage.local_is_shared:
        raise AttribError(
            f"output {output} is a local path of one node, and may be gone when the submitted job ends; give an s3:// "
            "URI, or set storage.local_is_shared=true if all nodes share this path and it stays"
        )
    if is_remote(output) and has_odd_parts(output):
        raise AttribError(f"output {output}: a prefix must not have an empty part, . or ..; choose another output")
    is_own = any(storage.exists(join(output, name)) for name in own_files)
    for key, uri in input_uris(settings, output_key=output_key):
        relation = _relation(_canonical(output), _canonical(uri))
        if relation and not (is_own and relation == "contains"):
            raise AttribError(f"output {output} {relation} the input {key} ({uri}); choose another output folder")
    if is_own:
        return
    if not is_remote(output):
        _check_folder(output)
    found = [name for name in storage.names(output) if _is_foreign(name, settings, join(output, name), storage)]
    # The record is looked for again: another driver of this job may have begun since, with its record first.
    if found and not any(storage.exists(join(output, name)) for name in own_files):
        raise AttribError(
            f"output {output} holds files that this job did not make ({', '.join(found[:3])}"
            f"{', ...' if len(found) > 3 else ''}); choose another output folder. Nothing was changed"
        )


def check_output_file(uri: str, mark: bytes, storage: Storage) -> None:
    """Raise AttribError if a file is there that this job did not make: one without `mark` in its first bytes."""
    if not storage.exists(uri):
        return
    with storage.open(uri) as file:
        if mark in file.read(4096):
            return
    raise AttribError(f"output {uri} is a file that this job did not make; choose another output. Nothing was changed")


def input_uris(settings: BaseModel, prefix: str = "", output_key: str = "output") -> Iterator[tuple[str, str]]:
    """Dotted key and value of every URI in the settings and their sections, except the output."""
    for name, field in type(settings).model_fields.items():
        value, key = getattr(settings, name), f"{prefix}{name}"
        is_uri = IS_URI in field.metadata or _mentions_uri(field.annotation)
        for part in value.values() if isinstance(value, dict) else value if isinstance(value, tuple) else (value,):
            if isinstance(part, BaseModel):
                yield from input_uris(part, f"{key}.", output_key)
            elif is_uri and isinstance(part, str) and key != output_key:
                yield key, part


def _holds_files(uri: str) -> bool:
    """Whether it is a file, or a folder with files below it. Hidden files, such as locks of records, do not count."""
    if os.path.basename(uri).startswith("."):
        return False
    if is_remote(uri) or not os.path.isdir(uri):
        return True
    return any(not name.startswith(".") for _, _, names in os.walk(uri) for name in names)


def _check_folder(output: str) -> None:
    """Raise AttribError if a local output, or the place where it would be made, is not a folder."""
    place = output
    while not os.path.lexists(place):
        place = os.path.dirname(place)
    if not os.path.isdir(place):
        kind = "a link to nothing" if os.path.islink(place) else "not a folder"
        raise AttribError(f"output {output}: {place} is {kind}; choose another output folder. Nothing was changed")


def _is_foreign(name: str, settings: JobSettings, uri: str, storage: Storage) -> bool:
    """Whether this job did not make a file or folder of an output without its record. Empty folders do not count."""
    if name == WRITER:
        return not _is_lease(uri, storage)
    if name in settings.own_folders and any(i.base_name == STARTED for i in storage.list_folder(uri, recursive=True)):
        return False  # of a run that ended, or was refused, before its own record was written
    return _holds_files(uri)


def _is_lease(uri: str, storage: Storage) -> bool:
    """Whether a file of the name of a lease is one."""
    try:
        return bool(json.loads(storage.read_bytes(uri)).keys() >= {"machine", "pid", "started"})
    except FileNotFoundError:  # its driver ended meanwhile
        return True
    except (OSError, ValueError, AttributeError):
        return False


def _mentions_uri(annotation: Any) -> bool:
    """Whether the type is `Uri` or has it as an argument: `Uri | None`, `dict[str, Uri]`."""
    return IS_URI in getattr(annotation, "__metadata__", ()) or any(map(_mentions_uri, get_args(annotation)))


def _canonical(uri: str) -> str:
    return uri.rstrip("/") if is_remote(uri) else os.path.realpath(uri)


def _relation(output: str, other: str) -> str:
    """How the output folder lies to another place: "equals", "contains", "lies inside" or ""."""
    if output == other:
        return "equals"
    if other.startswith(join(output, "")):
        return "contains"
    return "lies inside" if output.startswith(join(other, "")) else ""
