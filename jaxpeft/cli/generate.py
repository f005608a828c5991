"""`jaxpeft generate`: continue prompts, or answer them through the chat template, each with an adapter or without."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any, NamedTuple

from jaxpeft.cli import decoding, named
from jaxpeft.cli.decoding import DecodingArguments, Words
from jaxpeft.cli.named import NONE, Given
from jaxpeft.cli.prompts import Prompt, read_prompts
from jaxpeft.errors import InputError


@dataclasses.dataclass(frozen=True)
class Generate(DecodingArguments):
    """Continue prompts, or answer them through the chat template, greedily or by sampling."""

    prompt: str | None = None
    """The text to continue, or what the user says."""
    prompts: Path | None = None
    """File of prompts instead: a text per line, or .jsonl rows with prompt, messages or instruction, and adapter."""
    use: str | None = None
    """Which of several adapters prompts have that name none: a name, or none. Default: the first."""
    chat: bool = False
    """The prompt is a user's turn. Default: where the adapter was trained on conversations or instructions."""
    plain: bool = False
    """The prompt is a text to continue, whatever the adapter was trained on."""
    batch_size: int = 32
    """Prompts of a file that are decoded at once."""
    json: bool = False
    """Print one JSON document on stdout and nothing else there."""


class _Asked(NamedTuple):
    """What is decoded: the prompts' ids and how each was asked; the model.

    words: of each prompt, by its adapter.
    chats: which of the prompts are conversations.
    adapters: each prompt's, by name, and `numbers` theirs; None where there are not several.
    """

    args: Generate
    given: Given
    words: list[Words]
    prompts: list[Prompt]
    ids: list[list[int]]
    chats: list[bool]
    adapters: list[str] | None
    numbers: list[int] | None
    model: Any
    params: Any

    @property
    def most(self) -> int:
        """The most tokens to add to each."""
        return self.args.most(any(self.chats))


def run(args: Generate) -> dict[str, Any]:
    """All prompts at once.

    Returns:
      {"prompt" (of --prompt), "chat" (whether it was a user's turn), "continuation", "tokens" (the new ids), "model",
      "adapter"}; for --prompts {"results": [{"prompt" or "messages", "chat", "continuation", "tokens"}, ...], "model",
      "adapter"}, in the file's order. With several adapters each result has its "adapter", by name, and the document
      has "adapters": {name: folder}.

    Raises:
      InputError: for arguments or input that cannot be used.
    """
    prompts = _prompts(args)
    from jaxpeft import compilation
    from jaxpeft.detokenize import continuation

    with compilation.cached(args.compile_cache):
        asked = _prepare(args, prompts)
        new = _decoded(asked)
    texts = [continuation(words.tokenizer, *pair) for words, *pair in zip(asked.words, asked.ids, new, strict=True)]
    return _document(asked, texts, new)


def _decoded(asked: _Asked) -> list[list[int]]:
    """The new ids of each prompt; those that end by the same tokens are decoded together."""
    from jaxpeft.generate import generate

    together: dict[tuple[int, ...], list[int]] = {}
    for i, words in enumerate(asked.words):
        together.setdefault(tuple(words.special.ends), []).append(i)
    found: dict[int, list[int]] = {}
    for own in together.values():
        how = decoding.settings(asked.args, asked.words[own[0]])
        how["adapters"] = None if asked.numbers is None else [asked.numbers[i] for i in own]
        ids = [asked.ids[i] for i in own]
        new = generate(asked.model, asked.params, ids, asked.most, batch_size=asked.args.batch_size, **how)
        found.update(zip(own, new, strict=True))
    return [found[i] for i in range(len(asked.ids))]


def live(args: Generate) -> None:
    """Prints the prompt and its continuation as it comes, or only the answer; those of a file at the end."""
    if args.prompts is not None:
        show(run(args))
        return
    prompts = _prompts(args)
    from jaxpeft import compilation
    from jaxpeft.generate import stream

    with compilation.cached(args.compile_cache):
        asked = _prepare(args, prompts)
        how = decoding.settings(args, asked.words[0])
        how["adapter"] = None if asked.numbers is None else asked.numbers[0]
        tokens = stream(asked.model, asked.params, asked.ids[0], asked.most, **how)
        before = "" if asked.chats[0] else asked.prompts[0].text
        text, ids = decoding.say(asked.words[0], asked.ids[0], tokens, before)
    _document(asked, [text], [ids])


def show(document: dict[str, Any]) -> None:
    """Prints prompts and continuations; what was asked of an assistant is set off."""
    for number, result in enumerate(document.get("results", [document])):
        said = result["prompt"] if "prompt" in result else result["messages"][-1]["content"]
        opening = "".join(f"> {line}\n" for line in said.splitlines()) if result["chat"] else said
        print("\n" * (number > 0) + opening + result["continuation"])


def _prompts(args: Generate) -> list[Prompt]:
    """What is asked; arguments that make no sense are refused before anything is loaded."""
    decoding.check(args)
    if (args.prompt is None) == (args.prompts is None):
        raise InputError("generate: give either --prompt TEXT or --prompts FILE")
    if args.chat and args.plain:
        raise InputError("generate: --chat and --plain contradict each other; give one of them")
    if args.batch_size < 1:
        raise InputError(f"--batch-size {args.batch_size}: must be at least 1")
    return [Prompt(args.prompt)] if args.prompt is not None else read_prompts(args.prompts)  # type: ignore[arg-type]


def _prepare(args: Generate, prompts: list[Prompt]) -> _Asked:
    """Everything that decoding needs; whatever can be refused is refused before the weights are read."""
    given = named.read(args.adapter)
    own = _adapters(args, given, prompts)
    base = decoding.base_of(args)
    names: list[str | None] = [None] * len(prompts) if own is None else [*own]
    by_name = {name: base.words(given.folder(name)) for name in dict.fromkeys(names)}
    words = [by_name[name] for name in names]
    chats = [_is_chat(args, *pair) for pair in zip(prompts, words, strict=True)]
    ids = [_encode(*each, args.system) for each in zip(words, prompts, chats, strict=True)]
    numbers = None if own is None else [-1 if name == NONE else list(given.named).index(name) for name in own]
    return _Asked(args, given, words, prompts, ids, chats, own, numbers, *base.attached(given))


def _adapters(args: Generate, given: Given, prompts: list[Prompt]) -> list[str] | None:
    """The name of each prompt's adapter; None where adapters have no names."""
    if not given.named:
        if args.use is not None:
            raise InputError(f"--use {args.use}: no adapter has a name; give --adapter {args.use}=FOLDER")
        return None
    default = given.known(args.use, f"--use {args.use}") if args.use is not None else next(iter(given.named))
    found = []
    for prompt in prompts:
        name = NONE if prompt.adapter is None else prompt.adapter
        if not isinstance(name, str):
            raise InputError(f"{prompt.where}: field adapter must be a name, a string")
        found.append(given.known(name or default, prompt.where))
    return found


def _is_chat(args: Generate, prompt: Prompt, words: Words) -> bool:
    """Whether a prompt is a conversation, if it can be."""
    headings = args.plain or words.template.kind == "alpaca"  # under which an instruction is a text
    asked = args.chat or (words.trained and not args.plain)
    is_chat = not (prompt.text and headings) if prompt.messages else asked
    if is_chat:
        words.check_talks()
    if args.plain and is_chat:
        raise InputError(f"{prompt.where}: is a conversation, which --plain does not continue")
    if args.system is not None and not is_chat:
        raise InputError(f"--system: {prompt.where} is a text to continue, which has no system turn; add --chat")
    return is_chat


def _encode(words: Words, prompt: Prompt, chat: bool, system: str | None) -> list[int]:
    if not chat:
        return words.text_ids(prompt.text, prompt.where)
    messages = list(prompt.messages) or [{"role": "user", "content": prompt.text}]
    if system is not None and messages[0]["role"] != "system":
        messages = [{"role": "system", "content": system}, *messages]
    try:
        return words.chat_ids(messages, prompt.tools, **prompt.options)
    except InputError as error:
        raise InputError(f"{prompt.where}: {error}") from None


def _document(asked: _Asked, texts: list[str], new: list[list[int]]) -> dict[str, Any]:
    """What `run` returns. Says so where an instruction-tuned model had nothing to add to a bare prompt."""
    args, words = asked.args, asked.words[0]
    results: list[dict[str, Any]] = [
        {
            **({"messages": list(prompt.messages)} if prompt.messages else {"prompt": prompt.text}),
            "chat": chat,
            "continuation": text,
            "tokens": tokens,
        }
        for prompt, chat, text, tokens in zip(asked.prompts, asked.chats, texts, new, strict=True)
    ]
    for result, name in zip(results, asked.adapters or (), strict=False):
        result["adapter"] = name
    silent = [result for result in results if not result["chat"] and not result["continuation"].strip()]
    if silent and words.tokenizer.chat_template:
        where = silent[0]["prompt"] if args.prompts is None else f"{len(silent)} of {len(results)} prompts"
        decoding.note(f"nothing was added to {where!r}; {words.name} has a chat template, through which --chat asks")
    facts = {"model": words.name, **asked.given.document}
    return {**results[0], **facts} if args.prompts is None else {"results": results, **facts}
