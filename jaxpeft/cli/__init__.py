"""The `jaxpeft` command: one file per subcommand, found through `COMMANDS`.

A command's file holds a frozen dataclass whose fields are the flags (one of them `json`),
`run(args) -> dict`, which does the work and returns the document, and `show(document)`, which
prints it for a reader; `live(args)`, where there is one, prints while the work is done and takes the
place of both. With --json the document itself is printed instead, and whatever else is printed
meanwhile goes to stderr.

Only the named command's file is imported, and heavy imports stay inside its `run`: help and
mistakes answer at once.

Exit status: 0 the whole job was done; 2 a mistake in the arguments or the input, or what the machine
refuses (a full disk, a read-only file system, a file that is gone, too little memory); 1 a run that
cannot go on (a loss that is not finite), or a bug; 143 and 130 a command that SIGTERM or SIGINT ended, a
run saved where it was. All but a bug, which shows its traceback, say so in one line on stderr. Signals
before and after a run trains are `jaxpeft.interrupts`'s.
"""

import contextlib
import dataclasses
import errno
import importlib
import io
import os
import re
import select
import signal
import sys
import typing
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from jaxpeft.cli.output import print_error, print_json
from jaxpeft.errors import (
    Elsewhere,
    InputError,
    Notice,
    RunError,
    did_you_mean,
    is_utf8,
    out_of_memory,
    printable,
    shown,
)
from jaxpeft.interrupts import Interrupted
from jaxpeft.memory.kinds import GPU_FRACTION
from jaxpeft.train.hints import in_words

# Command name -> the module in this package and its dataclass, and a line for the help.
COMMANDS = {
    "train": ("train:Train", "fine-tune a model on a file of examples"),
    "plan": ("plan:Plan", "say what a step needs on a device, before the run; fit a budget"),
    "profile": ("profile:Profile", "say who owns the bytes at a step's peak"),
    "generate": ("generate:Generate", "continue prompts or answer them, with or without an adapter"),
    "chat": ("chat:Chat", "talk with a model on the terminal, switching adapters"),
    "merge": ("merge:Merge", "fold an adapter into the weights of its base"),
    "combine": ("combine:Combine", "make one adapter of several, weighted"),
    "prune": ("prune:Prune", "cut heads and neurons out of a base, to train on what is left"),
    "recover": ("recover:Recover", "make an adapter of a pruned base one of the whole base"),
    "scheme": ("scheme:Scheme", "find what pockengine is to train within a limit of memory"),
    "export": ("export:Export", "write a run's checkpoint as an adapter, in PEFT's form where PEFT has one"),
    "import": ("import_:Import", "read a Hugging Face PEFT adapter and check it against its base"),
    "methods": ("methods:Methods", "list the fine-tuning methods"),
}

USAGE = """\
usage: jaxpeft COMMAND [flags]

Parameter-efficient fine-tuning in JAX.

commands:
{commands}

`jaxpeft COMMAND --help` lists a command's flags.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command and returns the exit status.

    Args:
        argv: the arguments after the program's name; those of the process by default.
    """
    own_process = argv is None
    argv = list(sys.argv[1:] if argv is None else argv)
    try:
        with _plain_warnings():
            return _main(argv, own_process)
    except InputError as error:
        print_error(str(error))
        return 2
    except Elsewhere as error:
        return error.status
    except RunError as error:
        print_error(str(error))
        return error.status
    except BrokenPipeError:
        output = select.poll()
        output.register(sys.stdout.fileno(), 0)
        if not output.poll(0):  # some other pipe's reader has gone
            raise
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # ours has seen enough
        return 128 + signal.SIGPIPE
    except SystemExit as stop:  # as rich answers a reader that has gone
        if isinstance(stop.__context__, BrokenPipeError):
            return 128 + signal.SIGPIPE
        raise
    except OSError as error:
        if (line := _of_the_machine(error)) is None:
            raise
        print_error(line)
        return 2
    except Interrupted:
        raise  # to where the signals are ours, in the command's own process
    except KeyboardInterrupt:
        print_error("interrupted")
        return 130
    except Exception as error:
        if (line := out_of_memory(error)) is None:
            raise
        print_error(line)
        return 2


def _of_the_machine(error: OSError) -> str | None:
    """The line for an error that names a file, or comes of no file in particular; None for what may be a bug."""
    if error.filename is not None:
        name = os.fsdecode(error.filename) if isinstance(error.filename, bytes) else str(error.filename)
        return f"{name if len(name) <= 200 else name[:60] + '...'}: {error.strerror}"
    anywhere = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO, errno.EMFILE, errno.ENFILE)
    none_temporary = "temporary directory" in (error.strerror or "")  # as `tempfile` says where it finds none
    return error.strerror if error.errno in anywhere or none_temporary else None


@contextlib.contextmanager
def _plain_warnings() -> Iterator[None]:
    """A notice, as that a kernel does not serve, is said in one line, without a place in our code."""
    before = warnings.formatwarning

    def form(message: Warning | str, category: type[Warning], *place: Any) -> str:
        plain = issubclass(category, Notice) or category.__name__ == "KernelFallback"
        return f"jaxpeft: {printable(str(message))}\n" if plain else before(message, category, *place)

    warnings.formatwarning = form  # type: ignore[assignment]
    try:
        yield
    finally:
        warnings.formatwarning = before


def _without_accelerator() -> bool:
    """Whether Linux shows none; then JAX need not ask the plugins of GPUs and TPUs, which complain at length."""
    nodes = ("nvidia*", "accel*", "vfio/[0-9]*", "kfd", "dxg")
    return sys.platform == "linux" and not any(True for node in nodes for _ in Path("/dev").glob(node))


def _without_torch() -> None:
    """Transformers, of which we want the tokenizers, would import it where it is installed: three seconds."""
    sys.modules.setdefault("torch", None)  # type: ignore[arg-type]  # none is found then
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")  # that there is none, and what it is needed for


def _quiet_matplotlib() -> None:
    """It warns where it cannot keep its list of fonts, as in a home folder that is read-only; it draws as well."""
    import logging

    logging.getLogger("matplotlib").setLevel(logging.ERROR)


def _main(argv: list[str], own_process: bool = False) -> int:
    if _without_accelerator():
        os.environ.setdefault("JAX_PLATFORMS", "cpu")
    if not os.environ.get("XLA_PYTHON_CLIENT_MEM_FRACTION"):  # the old name; JAX refuses both at a time
        os.environ.setdefault("XLA_CLIENT_MEM_FRACTION", str(GPU_FRACTION))  # what plans count on
    if not argv or argv[0] in ("-h", "--help"):
        width = max(map(len, COMMANDS)) + 2
        lines = [f"  {name:{width}}{summary}" for name, (_, summary) in COMMANDS.items()]
        print(USAGE.format(commands="\n".join(lines)), end="")
        return 0
    if argv[0] == "--version":
        from importlib.metadata import version

        print(f"jaxpeft {version('jaxpeft')}")
        return 0
    name, *flags = argv
    for word in flags:
        if not is_utf8(word):  # Python hides such bytes in characters that nothing can write again
            raise InputError(f"{name}: the argument {shown(word)} is not UTF-8")
    if name not in COMMANDS:
        raise InputError(f"unknown command {name!r}" + did_you_mean(name, COMMANDS))

    module_name, class_name = COMMANDS[name][0].split(":")
    module = importlib.import_module(f"{__name__}.{module_name}")
    kind = getattr(module, class_name)
    if "-h" in flags or "--help" in flags:
        _print_help(kind, name)
        return 0

    args = parse(kind, name, flags)
    if own_process:
        _without_torch()
        _quiet_matplotlib()
    if args.json:
        with contextlib.redirect_stdout(sys.stderr):
            document = module.run(args)
        if _speaks():
            print_json(document)
    elif hasattr(module, "live"):
        module.live(args)
    else:
        document = module.run(args)
        if _speaks():
            module.show(document)
    return 0


def _speaks() -> bool:
    """Whether this process shows the document: of several that train together, the first."""
    if "jaxpeft.distributed" not in sys.modules:
        return True
    from jaxpeft import distributed

    return distributed.is_first()


def parse(kind: type, name: str, flags: list[str]) -> Any:
    """A command's flags as an instance of its dataclass.

    Args:
        kind: the dataclass; a field `config` names a YAML file that is read first.
        name: the command's name, for messages.
        flags: the arguments after the command's name.

    Raises:
        InputError: for an unknown flag, a stray argument, or a value that does not fit its flag.
    """
    args = _parse_flags(kind, name, flags)
    path: Path | None = getattr(args, "config", None)
    if path is None:
        return args

    from jaxpeft.cli.config import config_arguments

    hints = typing.get_type_hints(kind)
    fields = {field.name: hints[field.name] for field in dataclasses.fields(kind) if field.name != "config"}
    from_file = config_arguments(path, fields)
    try:
        _parse_flags(kind, name, [word for words in from_file.values() for word in words])
    except InputError as error:
        raise InputError(f"--config {path}: {error}") from None
    given = {_field_name(word) for word in flags if word.startswith("--")}
    defaults = [word for key, words in from_file.items() if key not in given for word in words]
    return _parse_flags(kind, name, defaults + flags)


def _parse_flags(kind: type, name: str, flags: list[str]) -> Any:
    import tyro

    args: Any
    box = io.StringIO()
    try:
        with contextlib.redirect_stderr(box):
            args, unknown = tyro.cli(kind, prog=f"jaxpeft {name}", args=flags, return_unknown_args=True)
    except SystemExit:
        fields = {field.name for field in dataclasses.fields(kind)}
        strange = [word for word in flags if word.startswith("--") and _field_name(word) not in fields]
        said = _unknown_message(kind, strange) if strange else _in_our_words(kind, _box_message(box.getvalue()))
        raise InputError(f"{name}: {said}") from None
    if unknown:
        raise InputError(f"{name}: {_unknown_message(kind, unknown)}")
    return args


def _in_our_words(kind: type, message: str) -> str:
    """tyro's message; that a value is not of its flag's type in the words of `jaxpeft.train.run`."""
    if "Missing from" in message:
        return f"needs {', '.join(re.findall(r'(--[a-z-]+) [^a-z ]', message))}"
    if choice := re.search(r"(?i)invalid choice '(.*?)' for argument '?--([\w-]+)", message):
        hint = typing.get_type_hints(kind).get(choice[2].replace("-", "_"))
        return message if hint is None else f"--{choice[2]} {shown(choice[1])}: must be {in_words(hint)}"
    found = re.search(r"Error parsing --([\w-]+).*: no type matching .* instantiated from \['(.*?)'\]", message)
    if found is None:
        return message
    hint = typing.get_type_hints(kind).get(found[1].replace("-", "_"))
    return message if hint is None else f"--{found[1]} {shown(found[2])}: must be {in_words(hint)}"


def _unknown_message(kind: type, unknown: list[str]) -> str:
    """Names the first unknown flag with its nearest relatives, else the first stray argument."""
    flag = next((word for word in unknown if word.startswith("--")), None)
    if flag is None:
        return f"unexpected argument {unknown[0]!r}; every argument is a --flag or its value"
    flag = flag.partition("=")[0]
    known = ["--" + field.name.replace("_", "-") for field in dataclasses.fields(kind)]
    return f"unknown flag {flag}" + did_you_mean(flag, known)


def _box_message(box: str) -> str:
    """The message in one of tyro's error boxes, without the frame and the help under it."""
    words: list[str] = []
    for line in box.splitlines():
        if line.startswith(("╭", "╰")):
            continue
        text = line.strip("│ ").strip()
        if words and set(text) == {"-"}:
            continue
        if words and text.startswith("──"):
            break
        words.append(text)
    return " ".join(words)


def _field_name(flag: str) -> str:
    """The field that a flag sets: --no-skip-bad-lines -> skip_bad_lines."""
    return flag.partition("=")[0].lstrip("-").replace("-", "_").removeprefix("no_")


def _print_help(kind: type, name: str) -> None:
    import tyro

    with contextlib.suppress(SystemExit):
        tyro.cli(kind, prog=f"jaxpeft {name}", args=["--help"])
