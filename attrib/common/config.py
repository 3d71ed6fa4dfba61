"""Settings of a job from a YAML file and the command line; digests and versions for the record of a run."""

# Not pydantic-settings: it reports unknown keys without suggestions, raises a traceback on invalid YAML or unreadable
# files, and does not expand environment variables inside values.

import argparse
import contextlib
import copy
import difflib
import hashlib
import importlib.metadata
import json
import logging
import platform
from collections.abc import Iterator, Sequence
from typing import Any, TypeVar, get_args

from pydantic import BaseModel, ValidationError

from attrib.common import logs
from attrib.common.errors import AttribError
from attrib.common.overrides import Override
from attrib.common.secrets import is_secret_name, without_secrets
from attrib.common.yaml_values import YAML_ERRORS, expand, parse_yaml

T = TypeVar("T", bound=BaseModel)
RECORDED_PACKAGES = (
    "attrib", "faiss-gpu", "faiss-cpu", "numpy", "pyarrow", "ray", "timm", "torch", "simplejpeg", "torchvision",
)  # fmt: skip

logger = logging.getLogger(__name__)


def parse_arguments(
    settings: type[T], description: str | None, arguments: list[str] | None = None, needs_config: bool = True
) -> T:
    """Settings of a job from `--config FILE --set KEY=VALUE`; sets up its log. Exits with 2 if they are invalid."""
    parser = argparse.ArgumentParser(description=description)
    text = "YAML file; configs/ holds commented examples" + ("" if needs_config else "; default: the defaults")
    parser.add_argument("--config", required=needs_config, metavar="FILE", help=text)
    text = "override one key, e.g. attribute.top_k=20; may be repeated"
    parser.add_argument("--set", action="append", default=[], dest="overrides", metavar="KEY=VALUE", help=text)
    parser.add_argument("--log-format", choices=logs.FORMATS, default="text", help="of messages on stderr")
    given = parser.parse_args(arguments)
    logs.set_up(given.log_format)
    try:
        return load_settings(settings, given.config, given.overrides)
    except AttribError as error:
        logger.error(error)
        raise SystemExit(2) from None


def load_settings(settings: type[T], path: str | None, overrides: Sequence[str] = ()) -> T:
    """Settings from a YAML file (None: all defaults) and dotted `KEY=VALUE` overrides.

    `${NAME}` in a value is replaced by the environment variable. Raises AttribError with file or override, key, value
    and rule.
    """
    values, origin = (_read_yaml(path), path) if path else ({}, "the command line")
    _rename_old_keys(settings, values, origin)
    given = [Override(text) for text in overrides]
    while True:
        merged = copy.deepcopy(values)
        for override in given:
            override.apply(merged)
        _rename_old_keys(settings, merged, "--set")
        try:
            return settings.model_validate(merged)
        except ValidationError as error:
            # One at a time: the check of a section may wait for that of another one.
            if not any(override.take_next(error) for override in given):
                raise _not_valid(error, settings, origin, given) from error


def _read_yaml(path: str) -> dict[str, Any]:
    try:
        with open(path, encoding="utf-8") as file:
            values = expand(parse_yaml(file) or {}, path)
    except OSError as error:
        raise AttribError(f"cannot read the config {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise AttribError(f"the config {path} is not UTF-8 text; save it as UTF-8") from error
    except YAML_ERRORS as error:
        raise AttribError(f"the config {path} is not valid YAML: {error}") from error
    if not isinstance(values, dict):
        raise AttribError(f"the config {path} must hold key: value pairs, not a {type(values).__name__}")
    return values


def validate(settings: type[T], values: dict[str, Any], origin: str) -> T:
    """Settings from parsed values. origin: their file, for messages. Old keys are accepted with a warning."""
    _rename_old_keys(settings, values, origin)
    try:
        return settings.model_validate(values)
    except ValidationError as error:
        raise _not_valid(error, settings, origin) from error


def _not_valid(
    error: ValidationError, settings: type[BaseModel], origin: str, overrides: Sequence[Override] = ()
) -> AttribError:
    """The error with a line per key; a line about what an override set stands under that override."""
    lines: dict[str, list[str]] = {}
    for path, line in _explain(error, settings):
        # Of a whole section, the file and the overrides in it may be the cause.
        causes = [o.name for o in overrides if o.holds(path)][-1:]
        causes = causes or [origin, *(o.name for o in overrides if o.lies_in(path))]
        lines.setdefault(" with ".join(causes), []).append(f"  {line}")
    return AttribError("\n".join(f"{at}: these settings are not valid:\n" + "\n".join(lines[at]) for at in lines))


def _rename_old_keys(settings: type[BaseModel], values: dict[str, Any], origin: str) -> None:
    for old, new in getattr(settings, "old_keys", {}).items():
        if old in values:
            renamed = f"the key {old!r} is now called {new!r}"
            logger.warning(f"{origin}: {renamed}; the old name will be refused in a later version")
            given, present = values.pop(old), values.get(new)
            if new in values and not (isinstance(given, dict) and isinstance(present, dict)):
                raise AttribError(f"{origin} has both {new!r} and its old name {old!r}; keep {new!r}")
            values[new] = present | given if present else given  # a section by --set with its old name, and the file's
    for name, section in getattr(settings, "sections", {}).items():
        if isinstance(values.get(name), dict):
            _rename_old_keys(section, values[name], origin)


def _explain(error: ValidationError, settings: type[BaseModel]) -> Iterator[tuple[tuple[int | str, ...], str]]:
    """Path and line of each error: key, rule and value; for an unknown key the known ones."""
    for found in error.errors():
        path, message = found["loc"], found["msg"].removeprefix("Value error, ")
        if found["type"] == "extra_forbidden":
            known = _known_keys(settings, path[:-1])
            near = difflib.get_close_matches(str(path[-1]), known, n=1)
            message = "unknown key; " + (f"did you mean {near[0]}?" if near else f"known are {', '.join(known)}")
        value = without_secrets(repr(found["input"]))
        value = value if len(value) <= 80 else value[:77] + "..."
        is_secret = found["type"] == "secret" or (path and is_secret_name(str(path[-1])))
        given = "" if isinstance(found["input"], dict) or is_secret else f" (got {value})"
        yield path, (f"{'.'.join(map(str, path))}: " if path else "") + without_secrets(message) + given


def _known_keys(settings: type[BaseModel], path: tuple[int | str, ...]) -> list[str]:
    for key in path:
        if key not in settings.model_fields:
            continue  # an index of a list, or a name chosen by the user
        types = (getattr(settings, "sections", {}).get(key), *_inner_types(settings.model_fields[str(key)].annotation))
        sections = (found for found in types if isinstance(found, type) and issubclass(found, BaseModel))
        settings = next(sections, settings)  # a name chosen by the user may equal a field
    return sorted(settings.model_fields)


def _inner_types(annotation: Any) -> Iterator[Any]:
    """The annotation and all type arguments in it: `dict[str, X] | None` also gives X."""
    yield annotation
    for inner in get_args(annotation):
        yield from _inner_types(inner)


def digest(value: Any) -> str:
    """SHA-256 of a JSON-like value, 64 hex digits."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def versions() -> dict[str, str]:
    """Versions of Python and of the installed packages that affect results, for the record of a run."""
    found = {"python": platform.python_version()}
    for package in RECORDED_PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[package] = importlib.metadata.version(package)
    return found
