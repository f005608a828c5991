"""`jaxpeft generate`: continue prompts, or answer them through the chat template, with or without an adapter."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any, NamedTuple

from jaxpeft.cli import decoding
from jaxpeft.cli.decoding import DecodingArguments, Words
from jaxpeft.cli.prompts import Prompt, read_prompts
from jaxpeft.errors import InputError


@dataclasses.dataclass(frozen=True)
class Generate(DecodingArguments):
    """Continue prompts, or answer them through the chat template, greedily or by sampling."""

    prompt: str | None = None
    """The text to continue, or what the user says."""
    prompts: Path | None = None
    """File of prompts instead: a text per line, or .jsonl rows with prompt, messages or instruction."""
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

    chats: which of the prompts are conversations.
    """

    args: Generate
    words: Words
    prompts: list[Prompt]
    ids: list[list[int]]
    chats: list[bool]
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
      "adapter"}, in the file's order.

    Raises:
      InputError: for arguments or input that cannot be used.
    """
    prompts = _prompts(args)
    from jaxpeft import compilation
    from jaxpeft.detokenize import continuation
    from jaxpeft.generate import generate

    with compilation.cached(args.compile_cache):
        asked = _prepare(args, prompts)
        how = decoding.settings(args, asked.words)
        new = generate(asked.model, asked.params, asked.ids, asked.most, batch_size=args.batch_size, **how)
    texts = [continuation(asked.words.tokenizer, *pair) for pair in zip(asked.ids, new, strict=True)]
    return _document(asked, texts, new)


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
        how = decoding.settings(args, asked.words)
        tokens = stream(asked.model, asked.params, asked.ids[0], asked.most, **how)
        before = "" if asked.chats[0] else asked.prompts[0].text
        text, ids = decoding.say(asked.words, asked.ids[0], tokens, before)
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
    base = decoding.base_of(args)
    words = base.words(args.adapter)
    chat = args.chat or (words.trained and not args.plain)
    headings = args.plain or words.template.kind == "alpaca"  # under which an instruction is a text
    chats = [not (prompt.text and headings) if prompt.messages else chat for prompt in prompts]
    if any(chats):
        words.check_talks()
    for prompt, is_chat in zip(prompts, chats, strict=True):
        if args.plain and is_chat:
            raise InputError(f"{prompt.where}: is a conversation, which --plain does not continue")
        if args.system is not None and not is_chat:
            raise InputError(f"--system: {prompt.where} is a text to continue, which has no system turn; add --chat")
    ids = [_encode(words, *pair, args.system) for pair in zip(prompts, chats, strict=True)]
    model, params = decoding.adapted(args.adapter, *base.load(base.scaling(args.adapter)))
    return _Asked(args, words, prompts, ids, chats, model, params)


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
    args, words = asked.args, asked.words
    results: list[dict[str, Any]] = [
        {
            **({"messages": list(prompt.messages)} if prompt.messages else {"prompt": prompt.text}),
            "chat": chat,
            "continuation": text,
            "tokens": tokens,
        }
        for prompt, chat, text, tokens in zip(asked.prompts, asked.chats, texts, new, strict=True)
    ]
    silent = [result for result in results if not result["chat"] and not result["continuation"].strip()]
    if silent and words.tokenizer.chat_template:
        where = silent[0]["prompt"] if args.prompts is None else f"{len(silent)} of {len(results)} prompts"
        decoding.note(f"nothing was added to {where!r}; {words.name} has a chat template, through which --chat asks")
    facts = {"model": words.name, "adapter": args.adapter}
    return {**results[0], **facts} if args.prompts is None else {"results": results, **facts}
