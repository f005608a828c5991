"""`jaxpeft train`: fine-tune a model on a file of examples and leave an adapter.

Every field of a `Run` is a flag; `--config run.yaml` gives the same names in a file, and a flag on the command line
wins over the file. There `method_options` may be a mapping, of a method's name to its options where it is a chain:

    method: meft+lora
    method_options: {meft: {width: 16}, lora.rank: 4}
"""

import dataclasses
from pathlib import Path
from typing import Annotated, Any

import tyro

from jaxpeft.cli import named
from jaxpeft.train import run as of_train
from jaxpeft.train.run import Run


@dataclasses.dataclass(frozen=True)
class Train(Run):
    """Fine-tune a model on a file of examples; without arguments, the embedded ones."""

    adapter: Annotated[tuple[str, ...], tyro.conf.UseAppendAction] = ()  # type: ignore[assignment]
    """PEFT adapter to train on; it brings its method with it: rank, targets, default rate. NAME=FOLDER, once for each,
    is one of several, as in --adapters."""
    config: Path | None = None
    """YAML file whose keys are these flags' names."""
    json: bool = False
    """Print the report as one JSON document on stdout and nothing else there."""

    def __post_init__(self):
        words: Any = self.adapter
        if isinstance(words, tuple):  # as flags are parsed; a run has one, or several with names
            given = named.read(words)
            object.__setattr__(self, "adapter", given.one)
            if given.named:
                of_several = (f"{name}={folder}" for name, folder in given.named.items())
                object.__setattr__(self, "adapters", (*of_several, *self.adapters))
        super().__post_init__()


def run(args: Train) -> dict[str, Any]:
    """Checks the arguments, trains, and returns the report as a JSON-able dict.

    Raises:
        InputError: for arguments or input that cannot be used.
        RunError: for a run that cannot go on.
    """
    return of_train.run(Run(**{field.name: getattr(args, field.name) for field in dataclasses.fields(Run)}))


def show(report: dict[str, Any]) -> None:
    """Prints the report for a reader."""
    from jaxpeft.train.report import print_report

    print_report(report)
