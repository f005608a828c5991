"""What the commands that decode share, `generate` and `chat`: their flags, and a model that is asked."""

from __future__ import annotations

import copy
import dataclasses
import signal
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, NamedTuple

import tyro

from jaxpeft import interrupts
from jaxpeft.cli.named import Given
from jaxpeft.errors import InputError
from jaxpeft.interrupts import Interrupted
from jaxpeft.train.checks import check_seed

if TYPE_CHECKING:  # help and mistakes answer before JAX and transformers are imported
    from jaxpeft.special import SpecialTokens
    from jaxpeft.template import Template

Messages = Sequence[Mapping[str, Any]]


@dataclasses.dataclass(frozen=True)
class DecodingArguments:
    """The model, and how its tokens are chosen."""

    model: str | None = None
    """Directory or hub id of a Hugging Face checkpoint, or GGUF file. Default: the embedded model."""
    adapter: Annotated[tuple[str, ...], tyro.conf.UseAppendAction] = ()
    """Folder of a PEFT adapter for it; NAME=FOLDER, once for each, for several at once."""
    system: str | None = None
    """What a conversation's system turn says."""
    max_new_tokens: int | None = None
    """The most tokens to add. Default: 64; 512 in a conversation."""
    temperature: float = 0.0
    """0 takes the likeliest token; above, logits are divided by it and a token is drawn."""
    top_k: int | None = None
    """Draw among the K likeliest tokens only."""
    top_p: float | None = None
    """Draw among the fewest tokens that together have this probability."""
    seed: int = 0
    """Seed of the drawing."""
    dtype: Literal["bfloat16", "float32"] | None = None
    """Type of the weights and of the computation. Default: float32 on a CPU, else the checkpoint's."""
    rope_scaling: str | None = None
    """Scales rotary positions for longer texts: linear|dynamic|yarn=FACTOR. Default: as the adapter has them."""

    compile_cache: bool = True
    """Keep compiled programs in the user's cache folder ($JAXPEFT_CACHE), so that the next call starts at once."""

    def most(self, chat: bool) -> int:
        """The most tokens to add."""
        return self.max_new_tokens if self.max_new_tokens is not None else 512 if chat else 64


def check(args: DecodingArguments) -> None:
    """Raises InputError for flags that make no sense, before anything is loaded."""
    for name, value in (("--top-k", args.top_k), ("--top-p", args.top_p)):
        if value is not None and args.temperature == 0:
            raise InputError(f"{name} {value}: has no effect at temperature 0; give --temperature as well")
    check_seed(args.seed)
    for name, text in (("--prompt", getattr(args, "prompt", None)), ("--system", args.system)):
        if text is not None and any("\ud800" <= character <= "\udfff" for character in text):
            raise InputError(f"{name}: is not UTF-8")


class Words(NamedTuple):
    """The text side of a model.

    name: folder or hub id.  trained: whether it, or its adapter, was trained on text that `template` wrote.
    """

    name: str
    tokenizer: Any
    special: SpecialTokens
    template: Template
    trained: bool

    def check_talks(self) -> None:
        """Raises InputError for a model that no template makes conversations of."""
        if not self.trained and not self.tokenizer.chat_template:
            raise InputError(f"{self.name}: has no chat template to talk through; `jaxpeft generate` continues texts")

    def text_ids(self, text: str, where: str = "--prompt") -> list[int]:
        """The ids of a text to continue, as training encodes it; of an empty one, the token that begins a text."""
        from jaxpeft.data.encode import encode_prompt
        from jaxpeft.tokenizing import at

        with at(lambda row: where):
            ids = encode_prompt(text, self.tokenizer, self.special)
        if not ids and self.special.begin is None:
            raise InputError(f"{where}: is empty, and the model has no token that begins a text")
        return ids or [self.special.begin]  # type: ignore[list-item]

    def chat_ids(self, messages: Messages, tools: Messages = (), **options: Any) -> list[int]:
        """The ids of a conversation up to where the assistant is going to speak, as training shows it.

        Raises:
          InputError: for messages that the template refuses.
        """
        from jaxpeft import template

        return template.prompt_ids(messages, self.tokenizer, self.template, tools, **options)


class Base(NamedTuple):
    """A checkpoint as it is loaded once: its model, which adapters are put on, and its tokenizer."""

    name: str
    dtype: str | None
    tokenizer: Any
    rope_scaling: str | None = None

    def words(self, adapter: Path | None) -> Words:
        """What the model and the adapter make of text.

        Raises:
          InputError: for an adapter that is none, or continues no text.
        """
        from jaxpeft import hf, template
        from jaxpeft.cli.models import labels_of
        from jaxpeft.special import special_tokens

        if adapter is not None and not adapter.is_dir():
            raise InputError(f"--adapter {adapter}: no such directory")
        if labels_of(adapter):
            raise InputError(f"{adapter}: classifies rows and continues no text")
        folders = (adapter, hf.resolve(self.name))
        tokenizer = copy.copy(self.tokenizer)  # which an adapter's template is put on
        found = template.read(tokenizer, *folders)
        special = special_tokens(self.name, tokenizer)
        return Words(self.name, tokenizer, special, found, template.find(*folders) is not None)

    def scaling(self, adapter: Path | None) -> str | None:
        """How rotary positions are scaled: as was asked for, else as the adapter was trained."""
        from jaxpeft.cli.models import scaling_of

        return scaling_of(adapter, self.rope_scaling)

    def attached(self, given: Given) -> tuple[Any, Any]:
        """(Model, parameters) with all adapters that were given, the base loaded once.

        Raises:
          InputError: for an adapter that cannot be used, or beside the others.
        """
        from jaxpeft import peft

        if not given.named:
            return adapted(given.one, *self.load(self.scaling(given.one)))
        scalings = {name: self.scaling(folder) for name, folder in given.named.items()}
        first = next(iter(scalings))
        for name, scaling in scalings.items():
            if scaling != scalings[first]:
                raise InputError(
                    f"--adapter {name}={given.named[name]}: was trained with rope scaling {scaling or 'none'}, and "
                    f"{first} with {scalings[first] or 'none'}; one base has one"
                )
        return peft.attach_several(given.named, *self.load(scalings[first]))[:2]

    def load(self, scaling: str | None = None) -> tuple[Any, Any]:
        """(Model, parameters) without an adapter; `scaling` is that of the adapter that is going to be put on it."""
        from jaxpeft.cli.models import load
        from jaxpeft.special import check_vocabulary

        model, params, _ = load(self.name, None, self.dtype, scaling)
        if model.config.num_labels:
            raise InputError(f"{self.name}: classifies rows and continues no text")
        check_vocabulary(self.name, self.tokenizer, model.config.vocab_size)
        return model, params


def base_of(args: DecodingArguments) -> Base:
    """The checkpoint that the arguments name, with its tokenizer."""
    from jaxpeft import hf
    from jaxpeft.cli.models import model_or_default

    name = model_or_default(args.model)
    return Base(name, args.dtype, hf.load_tokenizer(name), args.rope_scaling)


def adapted(adapter: Path | None, model: Any, params: Any) -> tuple[Any, Any]:
    """(Model, parameters) with the adapter, where there is one."""
    from jaxpeft import peft

    return (model, params) if adapter is None else peft.attach(adapter, model, params)[:2]


def settings(args: DecodingArguments, words: Words, turn: int = 0) -> dict[str, Any]:
    """What `generate` and `stream` are told besides the prompt; each turn of a conversation draws anew."""
    import jax

    key = jax.random.fold_in(jax.random.key(args.seed), turn) if turn else jax.random.key(args.seed)
    drawn = {"temperature": args.temperature, "top_k": args.top_k, "top_p": args.top_p, "key": key}
    return {**drawn, "eos": words.special.ends}


def say(
    words: Words, prompt: Sequence[int], tokens: Iterator[list[int]], before: str = "", stoppable: bool = False
) -> tuple[str, list[int]]:
    """Prints a continuation as it comes, after `before`; (its text, its ids).

    `stoppable`: an interruption (Ctrl-C) ends the continuation and nothing else.
    """
    from jaxpeft.detokenize import TextStream

    text = TextStream(words.tokenizer, prompt)
    try:
        for ids in tokens:
            print(before + text.add(ids), end="", flush=True)
            before = ""
    except KeyboardInterrupt as error:
        if not stoppable or (isinstance(error, Interrupted) and error.number != signal.SIGINT):
            raise
        interrupts.answered()
    finally:
        print(before + text.rest(), flush=True)
    return text.text, text.ids


def note(message: str) -> None:
    """A remark on stderr."""
    print(f"jaxpeft: {message}", file=sys.stderr, flush=True)
