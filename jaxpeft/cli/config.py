"""A run's YAML file, read as if its keys had been written as flags."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jaxpeft.errors import InputError, did_you_mean, shown
from jaxpeft.files import from_yaml, read_text, to_yaml
from jaxpeft.train.checks import flag
from jaxpeft.train.hints import is_of_form, one_word, wanted

_MOST_BYTES = 2**20
_REPEATED = ("adapter",)  # flags that stand once for each value


def config_arguments(path: Path, known: Mapping[str, Any]) -> dict[str, list[str]]:
    """Reads a run's YAML file as command-line arguments: {field name: arguments that set it}.

    Values pass through the same parser as flags, so that both accept and refuse the same things. Lists become several
    values, targets names with commas; a mapping becomes NAME=VALUE pairs, or of adapters NAME where there is no folder;
    null is the flag's None.

    Args:
        path: the file; keys are flags' names, with dashes or underscores.
        known: {field that may stand in it: its type}.

    Raises:
        InputError: for a file that cannot be read, is not a mapping, or has an unknown key, or a value that no flag
          could have.
    """
    try:
        text = read_text(path, f"{path}: No such file or directory", _MOST_BYTES, pipe=True)
    except InputError as error:
        raise InputError(f"--config {error}") from None
    content = from_yaml(f"--config {path}", text)
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise InputError(f"--config {path}: must be a mapping from flags' names to values")

    arguments = {}
    for key, value in content.items():
        name = str(key).lstrip("-").replace("-", "_")
        if name not in known:
            spelt = [other.replace("_", "-") for other in known]
            raise InputError(f"--config {path}: unknown key {key!r}" + did_you_mean(name.replace("_", "-"), spelt))
        if name in arguments:
            raise InputError(f"--config {path}: {key!r} is given twice")
        value = one_word(name, value)
        if name not in _REPEATED and not is_of_form(value, known[name]):
            raise InputError(f"--config {path}: {key}: {shown(value)} must be {wanted(name, known[name])}")
        arguments[name] = _as_arguments(name, value)
    return arguments


def _as_arguments(name: str, value: Any) -> list[str]:
    """One YAML value as command-line arguments."""
    if isinstance(value, bool):
        return [flag(name) if value else "--no-" + name.replace("_", "-")]
    if name in _REPEATED and isinstance(value, dict | list):
        words = value if isinstance(value, list) else [f"{key}={item}" for key, item in value.items()]
        return [f"{flag(name)}={word}" for word in words]
    if isinstance(value, dict) and name == "adapters":
        return [flag(name), *(str(key) if item is None else f"{key}={item}" for key, item in value.items())]
    if isinstance(value, dict):
        return [flag(name), *(f"{key}={to_yaml(f'{name}: {key}', item)}" for key, item in value.items())]
    if isinstance(value, list):
        return [flag(name), *(str(item) for item in value)]
    return [f"{flag(name)}={value}"]
