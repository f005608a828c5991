"""A run's YAML file, read as if its keys had been written as flags."""

from pathlib import Path
from typing import Any

from jaxpeft.cli.output import did_you_mean
from jaxpeft.errors import InputError


def flag(name: str) -> str:
    """The flag of a field: batch_size -> --batch-size."""
    return "--" + name.replace("_", "-")


def config_arguments(path: Path, known: list[str]) -> dict[str, list[str]]:
    """Reads a run's YAML file as command-line arguments: {field name: arguments that set it}.

    Values pass through the same parser as flags, so that both accept and refuse the same things
    (PyYAML, for one, takes 1e-4 for text). Lists become several values; a mapping becomes
    NAME=VALUE pairs; null is the flag's None.

    Args:
        path: the file; keys are flags' names, with dashes or underscores.
        known: the field names that may stand in it.

    Raises:
        InputError: for a file that cannot be read, is not a mapping, or has an unknown key.
    """
    import yaml

    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"--config {path}: {error.strerror or error}") from None
    except UnicodeDecodeError:
        raise InputError(f"--config {path}: is not UTF-8 text") from None
    except yaml.YAMLError as error:
        raise InputError(f"--config {path}: is not YAML: {error}") from None
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
        arguments[name] = _as_arguments(name, value)
    return arguments


def _as_arguments(name: str, value: Any) -> list[str]:
    """One YAML value as command-line arguments."""
    if isinstance(value, bool):
        return [flag(name) if value else "--no-" + name.replace("_", "-")]
    if isinstance(value, dict):
        return [flag(name), *(f"{key}={_plain(item)}" for key, item in value.items())]
    if isinstance(value, list):
        return [flag(name), *(str(item) for item in value)]
    return [f"{flag(name)}={value}"]


def _plain(value: Any) -> str:
    """A value as YAML on one line."""
    import yaml

    return yaml.safe_dump(value, default_flow_style=True, width=10**6).removesuffix("\n...\n").strip()
