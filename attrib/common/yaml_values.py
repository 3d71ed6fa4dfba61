"""YAML as configs and `--set` use it, and environment variables inside values."""

import os
import re
from typing import IO, Any

import yaml

from attrib.common.errors import AttribError

# PyYAML passes on the errors of int() and date(), e.g. for 2026-02-30, and recurses into nested and cyclic values.
YAML_ERRORS = (yaml.YAMLError, ValueError, RecursionError)
VARIABLE = re.compile(r"\$\{(\w+)\}")
INT_TAG, FLOAT_TAG = "tag:yaml.org,2002:int", "tag:yaml.org,2002:float"


class _UniqueKeys(yaml.SafeLoader):  # type: ignore[misc]  # untyped
    """Refuses a key that occurs twice, of which PyYAML would take the last, and octal and base-60 numbers of YAML 1.1:
    017 and 1:30 are not 15 and 90.
    """

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                continue
            if (key.tag, key.value) in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {key.value!r} occurs twice; keep one", key.start_mark
                )
            seen.add((key.tag, key.value))
        made: dict[Any, Any] = super().construct_mapping(node, deep)
        return made


_UniqueKeys.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag not in (INT_TAG, FLOAT_TAG)]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_UniqueKeys.add_implicit_resolver(
    INT_TAG, re.compile(r"^[-+]?(?:0|[1-9][0-9_]*|0b[01_]+|0x[0-9a-fA-F_]+)$"), list("-+0123456789")
)
_UniqueKeys.add_implicit_resolver(
    FLOAT_TAG,
    re.compile(
        r"^(?:[-+]?(?:[0-9][0-9_]*\.[0-9_]*|\.[0-9][0-9_]*)(?:[eE][-+]?[0-9]+)?|[-+]?\.(?:inf|Inf|INF)|"
        r"\.(?:nan|NaN|NAN))$"
    ),
    list("-+0123456789."),
)


def parse_yaml(text: str | IO[str], as_written: bool = False) -> Any:
    """The value of a YAML text. as_written: all scalars as strings. Raises one of YAML_ERRORS."""
    return yaml.load(text, yaml.BaseLoader if as_written else _UniqueKeys)


def expand(value: Any, origin: str) -> Any:
    """Replace `${NAME}` in every string. After parsing, so that the value of a variable is never read as YAML."""
    if isinstance(value, dict):
        return {key: expand(item, origin) for key, item in value.items()}
    if isinstance(value, list):
        return [expand(item, origin) for item in value]
    if not isinstance(value, str):
        return value
    if not _is_utf8(value):
        raise AttribError(f"{origin}: the value {value!a} is not UTF-8 text; correct it")
    for name in VARIABLE.findall(value):
        if name not in os.environ:
            unset = f"no environment variable {name} is set"
            raise AttribError(f"{origin} uses ${{{name}}}, but {unset}; set it or write the value")
    return VARIABLE.sub(lambda match: os.environ[match[1]], value)


def _is_utf8(text: str) -> bool:
    """Whether a text can be written; bytes of a command line that are not UTF-8 became lone surrogates."""
    return not any("\ud800" <= character <= "\udfff" for character in text)
