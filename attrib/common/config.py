"""Settings of a job from a YAML file and the command line; digests and versions for the record of a run."""

# Not pydantic-settings: it reports unknown keys without suggestions, raises a traceback on invalid YAML or unreadable
# files, and does not expand environment variables inside values.

import argparse
import contextlib
import difflib
import hashlib
import importlib.metadata
import json
import logging
import os
import platform
import re
from collections.abc import Iterator, Sequence
from typing import Any, TypeVar, get_args

import yaml
from pydantic import BaseModel, ValidationError

from attrib.common import logs
from attrib.common.errors import AttribError

T = TypeVar("T", bound=BaseModel)
VARIABLE = re.compile(r"\$\{(\w+)\}")
RECORDED_PACKAGES = (
    "attrib", "faiss-gpu", "faiss-cpu", "numpy", "pyarrow", "ray", "timm", "torch", "torchcodec", "torchvision",
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

    `${NAME}` in a value is replaced by the environment variable. Raises AttribError with file, key, value and rule.
    """
    values, origin = (_read_yaml(path), path) if path else ({}, "the command line")
    for override in overrides:
        _apply(values, override)
    return validate(settings, _expand(values, origin), origin)


def _read_yaml(path: str) -> dict[str, Any]:
    try:
        with open(path, encoding="utf-8") as file:
            values = yaml.safe_load(file) or {}
    except OSError as error:
        raise AttribError(f"cannot read the config {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise AttribError(f"the config {path} is not UTF-8 text; save it as UTF-8") from error
    except yaml.YAMLError as error:
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
        lines = "\n".join(f"  {line}" for line in _explain(error, settings))
        raise AttribError(f"{origin}: these settings are not valid:\n{lines}") from error


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


def _explain(error: ValidationError, settings: type[BaseModel]) -> Iterator[str]:
    """One line per error: key, rule and value; for an unknown key the known ones."""
    for found in error.errors():
        path, message = found["loc"], found["msg"].removeprefix("Value error, ")
        if found["type"] == "extra_forbidden":
            known = _known_keys(settings, path[:-1])
            near = difflib.get_close_matches(str(path[-1]), known, n=1)
            message = "unknown key; " + (f"did you mean {near[0]}?" if near else f"known are {', '.join(known)}")
        value = repr(found["input"])
        value = value if len(value) <= 80 else value[:77] + "..."
        given = "" if isinstance(found["input"], dict) else f" (got {value})"
        yield (f"{'.'.join(map(str, path))}: " if path else "") + message + given


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


def _expand(value: Any, origin: str) -> Any:
    """Replace `${NAME}` in every string. After parsing, so that the value of a variable is never read as YAML."""
    if isinstance(value, dict):
        return {key: _expand(item, origin) for key, item in value.items()}
    if isinstance(value, list):
        return [_expand(item, origin) for item in value]
    if not isinstance(value, str):
        return value
    for name in VARIABLE.findall(value):
        if name not in os.environ:
            unset = f"no environment variable {name} is set"
            raise AttribError(f"{origin} uses ${{{name}}}, but {unset}; set it or write the value")
    return VARIABLE.sub(lambda match: os.environ[match[1]], value)


def _apply(values: dict[str, Any], override: str) -> None:
    key, separator, text = override.partition("=")
    if not separator or not key:
        raise AttribError(f"--set {override!r} is not of the form key=value, e.g. --set backbone.name=resnet50")
    *parents, last = key.split(".")
    for parent in parents:
        if values.get(parent) is None:  # absent, or a section whose keys are all commented out
            values[parent] = {}
        values = values[parent]
        if not isinstance(values, dict):
            raise AttribError(f"--set {override!r}: {parent!r} holds a value, not a section; correct the key")
    try:
        values[last] = yaml.safe_load(text)
    except yaml.YAMLError as error:
        example = "--set 'title=\"a: b\"'"
        raise AttribError(f"--set {override!r}: the value is not valid YAML; quote it, e.g. {example}") from error


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
