"""`jaxpeft generate`: continue a prompt, with or without an adapter."""

import dataclasses
from pathlib import Path
from typing import Any, Literal

from jaxpeft.errors import InputError


@dataclasses.dataclass(frozen=True)
class Generate:
    """Continue a prompt, greedily or by sampling."""

    prompt: str
    """The text to continue."""
    model: str | None = None
    """Directory or hub id of a Hugging Face checkpoint. Default: the embedded model."""
    adapter: Path | None = None
    """Folder of a PEFT adapter for it."""
    max_new_tokens: int = 64
    """The most tokens to add."""
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
    json: bool = False
    """Print one JSON document on stdout and nothing else there."""


def run(args: Generate) -> dict[str, Any]:
    """Returns {"prompt", "continuation", "tokens" (the new ids), "model", "adapter"}.

    Raises:
      InputError: for arguments or input that cannot be used.
    """
    for name, value in (("--top-k", args.top_k), ("--top-p", args.top_p)):
        if value is not None and args.temperature == 0:
            raise InputError(f"{name} {value}: has no effect at temperature 0; give --temperature as well")
    if args.seed < 0:
        raise InputError(f"--seed {args.seed}: must be at least 0")

    import jax

    from jaxpeft import hf
    from jaxpeft.cli.models import load, model_or_default, scaling_of
    from jaxpeft.generate import generate

    name = model_or_default(args.model)
    tokenizer = hf.load_tokenizer(name)
    model, params, _ = load(name, args.adapter, args.dtype, scaling_of(args.adapter, args.rope_scaling))
    if model.config.num_labels:
        raise InputError(f"{args.adapter or name}: classifies rows and continues no text")
    prompt = (
        tokenizer(args.prompt).input_ids
        or [token for token in (tokenizer.bos_token_id, model.config.bos_token_id) if token is not None][:1]
    )
    if not prompt:
        raise InputError("--prompt: is empty, and the model has no token that begins a text")
    (new,) = generate(
        model,
        params,
        [prompt],
        args.max_new_tokens,
        temperature=args.temperature,
        top_k=args.top_k,
        top_p=args.top_p,
        key=jax.random.key(args.seed),
    )
    # The continuation as it reads after the prompt: tokenizers drop a leading space where a text begins.
    before, whole = (tokenizer.decode(ids, skip_special_tokens=True) for ids in (prompt, prompt + new))
    continuation = whole[len(before) :] if whole.startswith(before) else tokenizer.decode(new, skip_special_tokens=True)
    return {
        "prompt": args.prompt,
        "continuation": continuation,
        "tokens": new,
        "model": name,
        "adapter": args.adapter,
    }


def show(document: dict[str, Any]) -> None:
    """Prints the prompt and its continuation."""
    print(document["prompt"] + document["continuation"])
