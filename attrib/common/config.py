"""Reading a job's config file and `--set` overrides into settings, and stamping outputs with them."""

import argparse
import difflib
import hashlib
import importlib.metadata
import json
import os
import platform
import re
import sys
from collections.abc import Iterator
from typing import TypeVar, get_args

import yaml
from pydantic import BaseModel, ValidationError

from attrib.common.errors import AttribError

T = TypeVar("T", bound=BaseModel)
VARIABLE = re.compile(r"\$\{(\w+)\}")
STAMPED_PACKAGES = (
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
)


def parse_arguments(
    settings: type[T], description: str, arguments: list[str] | None = None, default: str | None = None
) -> T:
    """Settings of a job from `--config FILE [--set key=value ...]`; prints the error and exits with 2 if they are invalid."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument(
        "--config",
        required=default is None,
        default=default,
        metavar="FILE",
        help="YAML file; configs/ holds commented examples",
    )
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        dest="overrides",
        metavar="KEY=VALUE",
        help="override one key, e.g. attribute.top_k=20",
    )
    given = parser.parse_args(arguments)
    try:
        return load_settings(settings, given.config, given.overrides)
    except AttribError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None


def load_settings(settings: type[T], path: str, overrides: list[str] = ()) -> T:
    """Settings of type `settings` from a YAML file with dotted-key overrides; `${NAME}` takes an environment variable.

    Raises AttribError that names the file, the key, the value and the rule it breaks.
    """
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
    for override in overrides:
        _apply(values, override)
    return validate(settings, _expand(values, path), path)


def validate(settings: type[T], values: dict, origin: str) -> T:
    try:
        return settings.model_validate(values)
    except ValidationError as error:
        lines = "\n".join(f"  {line}" for line in _explain(error, settings))
        raise AttribError(f"{origin} is not a valid {settings.__name__}:\n{lines}") from error


def _explain(error: ValidationError, settings: type[BaseModel]) -> Iterator[str]:
    """A line for each thing that is wrong: where, what, the value, and for an unknown key the known ones."""
    for found in error.errors():
        place, message = found["loc"], found["msg"]
        if found["type"] == "extra_forbidden":
            known = _known_keys(settings, place[:-1])
            near = difflib.get_close_matches(str(place[-1]), known, n=1)
            message = f"unknown key; did you mean {near[0]}?" if near else f"unknown key; known are {', '.join(known)}"
        yield f"{'.'.join(map(str, place)) or '(top)'}: {message} (got {_brief(found['input'])})"


def _known_keys(settings: type[BaseModel], place: tuple) -> list[str]:
    for key in place:
        if key not in settings.model_fields:
            continue  # a position in a list, or a name that the user gave
        kinds = (getattr(settings, "sections", {}).get(key), *_flattened(settings.model_fields[key].annotation))
        sections = (kind for kind in kinds if isinstance(kind, type) and issubclass(kind, BaseModel))
        settings = next(sections, settings)  # a name that the user gave may be that of a field without keys of its own
    return sorted(settings.model_fields)


def _flattened(annotation) -> Iterator:
    """An annotation and all that stands in its brackets: `dict[str, X] | None` gives X, too."""
    yield annotation
    for inner in get_args(annotation):
        yield from _flattened(inner)


def _expand(value, origin: str):
    """`${NAME}` replaced in every text of a config. Comments are left alone, and what a variable holds is never read as YAML."""
    if isinstance(value, dict):
        return {key: _expand(item, origin) for key, item in value.items()}
    if isinstance(value, list):
        return [_expand(item, origin) for item in value]
    return VARIABLE.sub(lambda match: _variable(match[1], origin), value) if isinstance(value, str) else value


def _variable(name: str, origin: str) -> str:
    if name not in os.environ:
        raise AttribError(
            f"{origin} uses ${{{name}}}, but no environment variable {name} is set; set it or write the value itself"
        )
    return os.environ[name]


def _apply(values: dict, override: str) -> None:
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
        raise AttribError(
            f"--set {override!r}: the value is not valid YAML; quote it, e.g. --set 'title=\"a: b\"'"
        ) from error


def _brief(value) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def digest(value) -> str:
    """64 hex digits that identify a JSON-like value."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def versions() -> dict[str, str]:
    """Versions of what took part, for the record beside every output."""
    found = {"python": platform.python_version()}
    for package in STAMPED_PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found
