"""Values of `--set KEY=VALUE`.

A value is YAML, so that lists and numbers can be given. Where YAML's meaning does not fit the key, the text is taken
for what it is, e.g. `name=2026-11-30` or `title=Audit: night 2`.
"""

from typing import Any

from pydantic import ValidationError

from attrib.common.errors import AttribError
from attrib.common.secrets import without_secrets
from attrib.common.yaml_values import YAML_ERRORS, expand, parse_yaml

HASH = "\ue000"  # stands for # while YAML is parsed, which would take a comment for it; a character for private use

Path = tuple[int | str, ...]


class Override:
    """One KEY=VALUE. Raises AttribError if it has another form or uses an unset environment variable."""

    def __init__(self, text: str):
        shown = without_secrets(text.encode("utf-8", "backslashreplace").decode())
        self.text, self.name = shown, f"--set {shown}"
        key, separator, value = text.partition("=")
        if not separator or not key:
            raise AttribError(f"--set {shown!r} is not of the form key=value, e.g. --set backbone.name=resnet50")
        self.key, self.candidate = key.split("."), 0
        self.wants_text = False  # whether the key asks for a string
        self.is_yaml, candidates = _candidates(value)
        self.candidates = [expand(candidate, self.name) for candidate in candidates]

    def apply(self, values: dict[str, Any]) -> None:
        """Set the key. Raises AttribError if it lies in a value that is no section."""
        *parents, last = self.key
        for parent in parents:
            if values.get(parent) is None:  # absent, or a section whose keys are all commented out
                values[parent] = {}
            values = values[parent]
            if not isinstance(values, dict):
                raise AttribError(f"--set {self.text!r}: {parent!r} holds a value, not a section; correct the key")
        values[last] = self.candidates[self.candidate]

    def take_next(self, error: ValidationError) -> bool:
        """Take the next meaning of the value if the error is about this one. Returns False if there is none.

        If none fits, messages are about the first, or the text where a string is asked for. Raises AttribError if that
        is no YAML.
        """
        if self.candidate < 0 or not any(self.holds(found["loc"]) for found in error.errors()):
            return False
        if self.candidate == 0 and len(self.candidates) > 2:
            self.wants_text = all(e["type"] == "string_type" for e in error.errors() if self.holds(e["loc"]))
        self.candidate += 1
        if self.candidate == len(self.candidates):
            if not self.is_yaml:
                raise AttribError(f"--set {self.text!r}: the value is not valid YAML; correct or quote it")
            self.candidates, self.candidate = self.candidates[self.wants_text :][:1], -1
        return True

    def holds(self, path: Path) -> bool:
        """Whether this override set the value at a path, or what holds it."""
        return list(map(str, path[: len(self.key)])) == self.key

    def lies_in(self, path: Path) -> bool:
        """Whether this override set a key below a path."""
        return self.key[: len(path)] == list(map(str, path))


def _candidates(text: str) -> tuple[bool, list[Any]]:
    """Whether a text is YAML, and what it may mean: YAML, the text, YAML with all values as they are written, a list of
    the text.
    """
    hidden = text.replace("#", HASH)
    try:
        parsed, written = (_restored(parse_yaml(hidden, as_written)) for as_written in (False, True))
    except YAML_ERRORS:
        return False, [text, [text]]
    is_plain = isinstance(parsed, str) and not text.lstrip().startswith(("'", '"'))
    return True, [text, [text]] if is_plain else [parsed, text, written, [text]]


def _restored(value: Any) -> Any:
    if isinstance(value, dict):
        return {_restored(key): _restored(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_restored(item) for item in value]
    return value.replace(HASH, "#") if isinstance(value, str) else value
