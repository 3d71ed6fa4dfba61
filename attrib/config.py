"""Reading a job's config file and `--set` overrides into settings, and stamping outputs with them."""

import argparse
import hashlib
import importlib.metadata
import json
import os
import platform
import sys
from typing import TypeVar

import yaml
from pydantic import BaseModel, ValidationError

from attrib.errors import AttribError

T = TypeVar("T", bound=BaseModel)
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


def parse_arguments(settings: type[T], description: str, arguments: list[str] | None = None) -> T:
    """Settings of a job from `--config FILE [--set key=value ...]`; prints the error and exits with 2 if they are invalid."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--config", required=True, metavar="FILE", help="YAML file; configs/ holds commented examples")
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        dest="overrides",
        metavar="KEY=VALUE",
        help="override one key, e.g. index.top_k=20",
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
            values = yaml.safe_load(os.path.expandvars(file.read())) or {}
    except OSError as error:
        raise AttribError(f"cannot read the config {path}: {error.strerror}") from error
    except yaml.YAMLError as error:
        raise AttribError(f"the config {path} is not valid YAML: {error}") from error
    if not isinstance(values, dict):
        raise AttribError(f"the config {path} must hold key: value pairs, not a {type(values).__name__}")
    for override in overrides:
        _apply(values, override)
    return validate(settings, values, path)


def validate(settings: type[T], values: dict, origin: str) -> T:
    try:
        return settings.model_validate(values)
    except ValidationError as error:
        lines = [
            f"  {'.'.join(map(str, e['loc'])) or '(top)'}: {e['msg']} (got {_brief(e['input'])})"
            for e in error.errors()
        ]
        raise AttribError(f"{origin} is not a valid {settings.__name__}:\n" + "\n".join(lines)) from error


def _apply(values: dict, override: str) -> None:
    key, separator, text = override.partition("=")
    if not separator or not key:
        raise AttribError(f"--set {override!r} is not of the form key=value, e.g. --set backbone.name=resnet50")
    *parents, last = key.split(".")
    for parent in parents:
        values = values.setdefault(parent, {})
        if not isinstance(values, dict):
            raise AttribError(f"--set {override!r}: {parent!r} holds a value, not a section")
    values[last] = yaml.safe_load(os.path.expandvars(text))


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
