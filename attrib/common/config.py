"""Reads a job's settings from a YAML file and the command line; digests and versions for the records of runs."""

# Not pydantic-settings: its YAML and command-line sources report an unknown key without the known ones, end in a
# traceback on invalid YAML and unreadable files, and have no ${NAME} for environment variables inside values.

import argparse
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
RECORDED_PACKAGES = [
    "attrib",
    "faiss-gpu",
    "faiss-cpu",
    "numpy",
    "pyarrow",
    "ray",
    "timm",
    "torch",
    "torchcodec",
    "torchvision",
]

logger = logging.getLogger(__name__)


def parse_arguments(
    settings: type[T], description: str | None, arguments: list[str] | None = None, needs_config: bool = True
) -> T:
    """Settings of a job from `--config FILE --set KEY=VALUE`; sets up its log. Exits with 2 if they are invalid."""
    parser = argparse.ArgumentParser(description=description)
    file_help = "YAML file; configs/ holds commented examples" + ("" if needs_config else "; default: the defaults")
    set_help = "override one key, e.g. attribute.top_k=20; may be repeated"
    parser.add_argument("--config", required=needs_config, metavar="FILE", help=file_help)
    parser.add_argument("--set", action="append", default=[], dest="overrides", metavar="KEY=VALUE", help=set_help)
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

    `${NAME}` in a value is replaced by the environment variable.

    Raises AttribError that names the file, the key, the value and the rule it breaks.
    """
    values = _read_yaml(path) if path else {}
    origin = path or "the command line"
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
    """Settings from values; origin: the file they come from, for messages. Old keys are accepted with a warning."""
    _rename_old_keys(settings, values, origin)
    try:
        return settings.model_validate(values)
    except ValidationError as error:
        lines = "\n".join(f"  {line}" for line in _explain(error, settings))
        raise AttribError(f"{origin} is not a valid {settings.__name__}:\n{lines}") from error


def _rename_old_keys(settings: type[BaseModel], values: dict[str, Any], origin: str) -> None:
    for old, new in getattr(settings, "old_keys", {}).items():
        if old not in values:
            continue
        if new in values:
            raise AttribError(f"{origin} has both {new!r} and its old name {old!r}; keep {new!r}")
        logger.warning(
            f"{origin}: the key {old!r} is now called {new!r}; the old name will be refused in a later version"
        )
        values[new] = values.pop(old)
    for name, section in getattr(settings, "sections", {}).items():
        if isinstance(values.get(name), dict):
            _rename_old_keys(section, values[name], origin)


def _explain(error: ValidationError, settings: type[BaseModel]) -> Iterator[str]:
    """One line per error: key, rule and value; for an unknown key the known ones."""
    for found in error.errors():
        path, message = found["loc"], found["msg"]
        if found["type"] == "extra_forbidden":
            known = _known_keys(settings, path[:-1])
            near = difflib.get_close_matches(str(path[-1]), known, n=1)
            message = f"unknown key; did you mean {near[0]}?" if near else f"unknown key; known are {', '.join(known)}"
        value = repr(found["input"])
        shown = value if len(value) <= 80 else value[:77] + "..."
        yield f"{'.'.join(map(str, path)) or '(top)'}: {message} (got {shown})"


def _known_keys(settings: type[BaseModel], path: tuple[int | str, ...]) -> list[str]:
    for key in path:
        if key not in settings.model_fields:
            continue  # a position in a list, or a name that the user chose
        types = (getattr(settings, "sections", {}).get(key), *_inner_types(settings.model_fields[str(key)].annotation))
        sections = (found for found in types if isinstance(found, type) and issubclass(found, BaseModel))
        settings = next(sections, settings)  # a name that the user chose may equal that of a field without keys
    return sorted(settings.model_fields)


def _inner_types(annotation: Any) -> Iterator[Any]:
    """The annotation and every type in its brackets: `dict[str, X] | None` gives X, too."""
    yield annotation
    for inner in get_args(annotation):
        yield from _inner_types(inner)


def _expand(value: Any, origin: str) -> Any:
    """Replace `${NAME}` in every text. Done after parsing, so that a variable's value is never read as YAML."""
    if isinstance(value, dict):
        return {key: _expand(item, origin) for key, item in value.items()}
    if isinstance(value, list):
        return [_expand(item, origin) for item in value]
    if not isinstance(value, str):
        return value
    for name in VARIABLE.findall(value):
        if name not in os.environ:
            raise AttribError(
                f"{origin} uses ${{{name}}}, but no environment variable {name} is set; set it or write the value"
            )
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
            raise AttribError(f"--set {override!r}: {parent!r} holds a value, not a section")
    try:
        values[last] = yaml.safe_load(text)
    except yaml.YAMLError as error:
        example = "--set 'title=\"a: b\"'"
        raise AttribError(f"--set {override!r}: the value is not valid YAML; quote it, e.g. {example}") from error


def digest(value: Any) -> str:
    """SHA-256 of a JSON-like value, as 64 hex digits."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that decide results, for the record of a run."""
    found = {"python": platform.python_version()}
    for package in RECORDED_PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found
