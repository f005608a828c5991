"""`jaxpeft chat`: a conversation on the terminal, with adapters that can be switched meanwhile."""

from __future__ import annotations

import contextlib
import dataclasses
import sys
from pathlib import Path
from typing import Any, NamedTuple

from jaxpeft.cli import decoding, named
from jaxpeft.cli.decoding import DecodingArguments, Words
from jaxpeft.cli.named import NONE
from jaxpeft.errors import InputError, did_you_mean
from jaxpeft.files import expanded

_MOST_CHARACTERS = 2**24  # of a line
HELP = """\
/adapter NAME     go on with this adapter, one of --adapter's or a folder; /adapter none: without one
/system TEXT      what the system turn says; without a text: no system turn
/reset            forget what was said
/quit             end, as the end of the input does"""


@dataclasses.dataclass(frozen=True)
class Chat(DecodingArguments):
    """Talk with a model. Each line is a user's turn; /help lists the commands, the end of the input ends it."""

    json: bool = False
    """Print the conversation as one JSON document on stdout at the end, and nothing else there."""


def run(args: Chat) -> dict[str, Any]:
    """Reads turns from stdin and prints what is answered to each, until the input ends.

    Returns:
      {"messages": what was said since the last /reset, "model", "adapter": the last one, a folder or a name}.

    Raises:
      InputError: for arguments that cannot be used. What cannot be done of a turn or a command is said on stderr.
    """
    decoding.check(args)
    from jaxpeft import compilation

    with compilation.cached(args.compile_cache):
        talk = _Talk(args)
        if sys.stdin.isatty():
            decoding.note(
                f"{talk.base.name}; /help lists what else can be said, Ctrl-C ends an answer, Ctrl-D the conversation"
            )
        while (line := _read_line()) is not None:
            command, _, rest = line.partition(" ")
            try:
                if command in ("/quit", "/exit"):
                    break
                if line.startswith("/"):
                    talk.obey(command, rest.strip())
                elif line:
                    talk.answer(line)
            except InputError as error:
                decoding.note(f"error: {error}")
        return {"messages": talk.messages(), "model": talk.base.name, "adapter": talk.adapter}


def show(document: dict[str, Any]) -> None:
    """Nothing: it has been said."""
    del document


class _Ready(NamedTuple):
    """Who answers: with which template, by which model, and the number of the adapter where it has several."""

    words: Words
    model: Any
    params: Any
    number: int | None = None


class _Talk:
    """A conversation: its turns, and who answers."""

    def __init__(self, args: Chat):
        self.args, self.base = args, decoding.base_of(args)
        self.system = args.system
        self.turns: list[dict[str, Any]] = []
        self.answers = 0
        self.given = named.read(args.adapter)
        self.plain: dict[str | None, tuple[Any, Any]] = {}  # by the scaling of positions, which an adapter may have
        self.ready: dict[Path | str | None, _Ready] = {}  # attached once, and compiled once
        if self.given.named:
            self._all_at_once()
        self._use(next(iter(self.given.named), None) or self.given.one)

    def _checked(self, adapter: Path | None) -> Words:
        words = self.base.words(adapter)
        words.check_talks()
        return words

    def _all_at_once(self) -> None:
        """Adapters with names, and none, are numbers to one program."""
        words = {name: self._checked(folder) for name, folder in self.given.named.items()}
        model, params = self.base.attached(self.given)
        for number, name in enumerate(words):
            self.ready[name] = _Ready(words[name], model, params, number)
        with contextlib.suppress(InputError):  # a base that does not talk may have adapters that do
            self.ready[None] = _Ready(self._checked(None), model, params, -1)

    def _use(self, adapter: Path | str | None) -> None:
        if adapter not in self.ready:
            folder = None if adapter is None else Path(adapter)
            words = self._checked(folder)
            scaling = self.base.scaling(folder)
            if scaling not in self.plain:
                self.plain[scaling] = self.base.load(scaling)
            self.ready[adapter] = _Ready(words, *decoding.adapted(folder, *self.plain[scaling]))
        self.adapter = adapter

    def _called(self, said: str) -> Path | str | None:
        """What /adapter is told: none, a name, or a folder."""
        if said == NONE or said in self.given.named:
            return None if said == NONE else said
        folder = expanded(said)
        return folder if folder.is_dir() or not self.given.named else self.given.known(said, "/adapter")

    def messages(self) -> list[dict[str, Any]]:
        """All turns, the system's first."""
        system = [] if self.system is None else [{"role": "system", "content": self.system}]
        return [*system, *self.turns]

    def answer(self, said: str) -> None:
        """A user's turn, and what is answered; a turn that cannot be answered is forgotten."""
        from jaxpeft.generate import stream

        words, model, params, number = self.ready[self.adapter]
        user = {"role": "user", "content": said}
        alone = words.template.kind == "alpaca"  # which knows single instructions
        ids = words.chat_ids([user] if alone else [*self.messages(), user])
        how = decoding.settings(self.args, words, self.answers)
        how["adapter"] = number
        try:
            tokens = stream(model, params, ids, self.args.most(chat=True), **how)
        except InputError as error:
            raise InputError(f"{error}; /reset forgets what was said") from None
        self.answers += 1
        text, _ = decoding.say(words, ids, tokens, stoppable=True)
        self.turns += [user, {"role": "assistant", "content": text}]

    def obey(self, command: str, rest: str) -> None:
        """A command."""
        if command == "/adapter":
            if rest:
                self._use(self._called(rest))
            decoding.note(f"adapter: {self.adapter or 'none'}")
        elif command == "/system":
            self.system = rest or None
            decoding.note(f"system turn: {self.system or 'none'}")
        elif command == "/reset":
            self.turns.clear()
            decoding.note("what was said is forgotten")
        elif command == "/help":
            print(HELP, file=sys.stderr, flush=True)
        else:
            known = ["/adapter", "/system", "/reset", "/quit", "/help"]
            raise InputError(f"unknown command {command}" + did_you_mean(command, known))


def _read_line() -> str | None:
    """The next line of the input without white space around it; None at its end."""
    try:
        if sys.stdin.isatty():
            with contextlib.suppress(ImportError):
                import readline  # noqa: F401 - input() then edits lines and remembers them
            line = input("> " if sys.stdout.isatty() else "") + "\n"
        else:
            line = sys.stdin.readline(_MOST_CHARACTERS + 1)
    except EOFError:
        print()  # after the prompt
        return None
    except UnicodeDecodeError as error:
        raise InputError(f"standard input: not UTF-8: {error}") from None
    if len(line) > _MOST_CHARACTERS:
        raise InputError(f"standard input: a line of more than {_MOST_CHARACTERS} characters")
    return line.strip().encode("utf-8", "replace").decode() if line else None
