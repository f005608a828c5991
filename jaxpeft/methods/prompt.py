"""Prompt tuning: trained embeddings in front of every text.

    [P; E[tokens]]        P (p, d) float32 trained; the loss is of the tokens, which are at positions p, p + 1, ...

Every text sees all of P: each document of a packed row, whatever its place, behind any window; padding on either side
sees and is seen by nothing, as ever. Learned positions are added to P as to tokens. Decoding puts the prompt's keys and
values into the first slots of the cache, and a token then costs what it costs behind p tokens. It cannot be merged into
the base. P starts at the embeddings of words: drawn from all, or those of a text, cut or repeated to p tokens; or at
N(0, 1).

In a causal model the states of P are those of every row. So they are computed once per batch and not once per row, as p
tokens more would be: the layers make keys and values of P (L, p, N, D) before they read the rows. The numbers are those
of p tokens in front of each row.

Kept for the backward pass: per row of the batch a copy of each layer's p keys and values beside its own, as of
`prefix`; once per batch the prompt's states between the layers, L p d numbers. Of p x S scores none. The gradient
passes every layer of the frozen backbone, for the rows and for the prompt. Each pass reads the kernels once more; on a
mesh with `fsdp` it gathers none of them for the prompt, and sums up p tokens instead.

Paper: Lester, Al-Rfou & Constant 2021, "The Power of Scale for Parameter-Efficient Prompt Tuning", arXiv:2104.08691.
Starts and numbers are those of Hugging Face PEFT, whose default is N(0, 1).

Deviations: encoders, whose prompt would read each row, are refused (`prefix` is for them). In models with sliding
windows PEFT lets them hide the prompt from tokens further on; before these the numbers are the same. Rotary positions
that are scaled by the row's length (`dynamic`) are the prompt's own in it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jaxpeft import features, prompts, tree
from jaxpeft.about import About, Defaults, Promises
from jaxpeft.errors import InputError
from jaxpeft.in_front import row_bytes
from jaxpeft.method import Method, Spec, trains
from jaxpeft.peft import form


def prompt(length: int = 20, init: str = "vocabulary", text: str = "", tokenizer: str = "") -> Method:
    """Prompt tuning of a decoder.

    Args:
      length: p.
      init: "vocabulary": embeddings of p words, drawn from all of the model's; "text": of a text's tokens; "random":
        N(0, 1).
      text: for init="text": what P starts as, cut to p tokens or repeated until there are p.
      tokenizer: for init="text": folder or hub id of the tokenizer that reads it, the model's own.

    Returns:
      The method. It trains `prompt/embedding` (p, d), and the adapted model has room for p tokens fewer.

    Raises:
      InputError: for a setting out of range, or a text without a tokenizer. Of the model, when set up: if it is no
        decoder, shows no layers or has no more than p positions; for a text that it has no tokens for.
    """
    config = {"length": length, "init": init, "text": text, "tokenizer": tokenizer}
    prompts.check("prompt", length, init, text, tokenizer)
    begin = prompts.start("prompt", length, init, text, tokenizer)

    def forward(model, view):
        return prompts.attach("prompt", model, length, lambda *given: {"embedding": begin(*given)})

    return Method(
        forward=forward,
        roles=trains(lambda path: "/prompt/" in f"/{path}"),
        merge=features.no_merge("prompt", "serve it as the first entries of a cache"),
        specs=(Spec("prompt", config),),
    )


# Hugging Face PEFT: P as it is.

_TENSOR = "prompt_embeddings"  # (p, d)


def _fields(config: Mapping[str, Any], tensors: Mapping[str, Any], base: form.Base) -> dict[str, Any]:
    del config
    length, d = tensors[_TENSOR].shape
    return {
        "num_attention_heads": base.config.num_attention_heads,
        "num_layers": base.config.num_hidden_layers,
        "num_transformer_submodules": 1,
        "num_virtual_tokens": length,
        "prompt_tuning_init": "RANDOM",
        "token_dim": d,
    }


def _arguments(fields: Mapping[str, Any], tensors: Mapping[str, Any], base: form.Base) -> dict[str, Any]:
    del fields
    shape, d = tensors[_TENSOR].shape, base.config.hidden_size
    if len(shape) != 2 or shape[1] != d:
        raise InputError(f"an adapter for another base: {_TENSOR} {shape} should be (tokens, {d})")
    return {"length": shape[0]}


def _leaves(config: Mapping[str, Any], tensors: Mapping[str, Any], base: form.Base) -> tree.Flat:
    del config, base
    return {"prompt/embedding": tensors[_TENSOR]}


PEFT = form.per_model(
    "PROMPT_TUNING",
    "prompt",
    (_TENSOR,),
    to_tensors=lambda config, leaves, base: {_TENSOR: leaves["prompt/embedding"]},
    from_tensors=_leaves,
    to_config=_fields,
    from_config=_arguments,
    fields="num_attention_heads num_layers num_transformer_submodules num_virtual_tokens prompt_tuning_init "
    "prompt_tuning_init_text token_dim tokenizer_kwargs tokenizer_name_or_path".split(),
)

ABOUT = About(
    summary="trained embeddings in front of every text",
    level="input",
    trains="p d numbers: p embeddings",
    saves="gradients and optimizer state of all but the prompt; no activations, of p tokens once per batch a few more",
    reference="Lester et al. 2021, arXiv:2104.08691",
    example={"length": 4},
    promises=Promises(block_bytes=lambda *_, **__: 0, row_bytes=row_bytes, starts_at_base=False, merges=False),
    defaults=Defaults(lr=1e-2),
    peft=PEFT,
)
