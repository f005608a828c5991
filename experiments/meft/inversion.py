"""Do a reversible model's activations come back?

    python -m experiments.meft.inversion           # measures what the data lacks; a quarter of an hour on two CPU cores
    python -m experiments.meft.inversion --draw    # tables from the data

Not as published: each division by lam = 0.1 makes the rounding error of the streams ten times larger, and of a
float32 MiniLM's six layers the first one's input comes back with a relative error of 0.1 (MEFT1), 0.02 (MEFT2) and
200 (MEFT3); in bfloat16 nothing is left of it, nor in float32 after 12 layers. Streams in fixed point come back bit
for bit in every case: 48 layers, random and real weights, post- and pre-norm, float32 and bfloat16, lam = 1/8 and
1/256. In floating point only lam = beta = 1 lasts (1e-3 after 48 random post-norm layers), which starts nowhere near
the base. A pair kept every three layers bounds the error of variants 1 and 2 at 1e-4 in float32 on post-norm layers,
but not in bfloat16, and not in the first of 48 pre-norm layers.

Cosine with the base at the start, MiniLM, MEFT1, 2, 3: published 0.84, 0.84, 0.84, exact with 1/8 0.97, 0.97, 0.95.

Relative error of the rebuilt pair of streams, |rebuilt - true| / |true|, after so many layers run backwards, and the
share of its elements that differ in any bit, in a compiled gradient. Random: 48 layers of d = 256, 4 heads, MLP 1024,
4 x 64 tokens, matrices from N(0, 0.02^2) scaled by 3 so that attention is far from uniform; BERT's blocks (post-norm)
and Llama's (pre-norm). Real: all-MiniLM-L6-v2 on 8 sentences of Banking77, its 6 layers, and as a deeper model of real
weights the 6 layers eight times over. Start: mean cosine between the adapted model's result and the base's, adapters as
they are initialised. Data in results/memory/meft_inversion.json, tables in meft_inversion.md.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import jaxpeft as jp
from experiments.memory import common
from jaxpeft import assets, tree
from jaxpeft.hf import load_tokenizer
from jaxpeft.methods.meft import rebuilding_errors
from jaxpeft.models import family

NAME = "meft_inversion"
DEPTHS = (1, 4, 6, 8, 12, 24, 48)
# label -> (variant, arguments)
FORMS: dict[str, Callable[[int], dict[str, Any]]] = {
    "published, 0.1": lambda v: {"exact": False, **_factors(v, "1/10")},
    "floating point, 1/8": lambda v: {"exact": False, **_factors(v, "1/8")},
    "floating point, 1/2": lambda v: {"exact": False, **_factors(v, "1/2")},
    "floating point, 1": lambda v: {"exact": False, "lam": 1, "beta": 1},
    "exact, 1/8": lambda v: _factors(v, "1/8"),
    "exact, 1/256": lambda v: _factors(v, "1/256"),
    "floating point, 1/8, a pair kept every 3 layers": lambda v: {"exact": False, "every": 3, **_factors(v, "1/8")},
}
MODELS = ("random post-norm", "random pre-norm", "MiniLM", "MiniLM eight times")


def _factors(variant: int, small: str) -> dict[str, object]:
    return {"lam": 1 if variant == 2 else small, "beta": 1 if variant == 1 else small}


def model_of(name: str, dtype):
    """(base, params, batch)."""
    if name.startswith("random"):
        kind = {"post": "bert", "pre-": "llama"}[name.split()[1][:4]]
        config = {
            "model_type": kind,
            "vocab_size": 512,
            "hidden_size": 256,
            "intermediate_size": 1024,
            "num_hidden_layers": 48,
            "num_attention_heads": 4,
            "max_position_embeddings": 128,
            "type_vocab_size": 2,
            "hidden_act": "gelu" if kind == "bert" else "silu",
            "architectures": ["BertModel" if kind == "bert" else "LlamaForCausalLM"],
        }
        base = family(config).from_hf(config, dtype)
        params = base.init(jax.random.key(0), {})
        params = jax.tree.map(lambda x: x * 3 if x.ndim > 1 and x.std() > 0 else x, params)
        return base, params, {"tokens": jax.random.randint(jax.random.key(1), (4, 64), 0, 512)}
    base, params = jp.load_pretrained(assets.minilm(), dtype)
    if name.endswith("times"):
        params = {**params, "layers": jax.tree.map(lambda x: jnp.concatenate([x] * 8), params["layers"])}
    folder = Path(os.environ.get("JAXPEFT_DATA", "../shared/data"))
    lines = (folder / "classify/banking77.train.jsonl").read_text().splitlines()[:400:50]
    texts = [json.loads(line)["text"] for line in lines]
    found = load_tokenizer(assets.minilm())(texts, padding=True, return_tensors="np")
    return base, params, {"tokens": found["input_ids"], "segment_ids": found["attention_mask"]}


def measure(key: common.Row) -> common.Row:
    """Errors by layers run backwards, and the start."""
    base, params, batch = model_of(key["model"], jnp.dtype(key["dtype"]))
    settings = FORMS[key["form"]](key["variant"])
    readout = "last" if settings.get("exact", True) else "mean"
    method = jp.meft(variant=key["variant"], readout=readout, **settings)
    model, trainable, frozen = jp.setup(method, base, params, jax.random.key(0))
    whole = tree.combine(trainable, frozen)
    found = np.asarray(jax.jit(lambda p, b: rebuilding_errors(model, p, b))(whole, batch), np.float64)[::-1]
    hidden, wanted = (jax.jit(m.hidden)(p, batch).astype(jnp.float32) for m, p in ((model, whole), (base, params)))
    seen = batch.get("segment_ids", np.ones(batch["tokens"].shape)) > 0
    product = jnp.sum(hidden * wanted, -1) / jnp.linalg.norm(hidden, axis=-1) / jnp.linalg.norm(wanted, axis=-1)
    size = 2 * hidden.size
    return {
        "errors": [float(np.sqrt(error / norm)) if np.isfinite(error) else None for _, error, norm in found],
        "differ": [float(count) / size for count, _, _ in found],
        "start": float(jnp.mean(product[seen])),
    }


def collect(figures: common.Figures) -> list[common.Row]:
    """Every model, form, variant and type."""
    return [
        figures(model=model, form=form, variant=variant, dtype=dtype)
        for model in MODELS
        for dtype in ("float32", "bfloat16")
        for variant in (1, 2, 3)
        for form in FORMS
    ]


def document(rows: list[common.Row]) -> str:
    """One table for each model."""
    text = "# Reversible models run backwards: relative error of the rebuilt streams\n"
    for model in dict.fromkeys(row["model"] for row in rows):
        own = [row for row in rows if row["model"] == model]
        depths = [depth for depth in DEPTHS if depth <= len(own[0]["errors"])]
        body = []
        for row in own:
            errors = [row["errors"][depth - 1] for depth in depths]
            cells = ["lost" if x is None or x > 1e3 else "0" if x == 0 else f"{x:.0e}" for x in errors]
            exact = max(row["differ"]) == 0
            body.append(
                [
                    f"MEFT{row['variant']}, {row['form']}, {row['dtype']}",
                    *cells,
                    "yes" if exact else "no",
                    f"{row['start']:.3f}",
                ]
            )
        header = ["", *(f"{depth} layers" for depth in depths), "all bits", "cosine at the start"]
        text += f"\n## {model}\n\n" + common.table(header, body)
    return text


if __name__ == "__main__":
    args = common.arguments(__doc__)
    if not args.draw:
        collect(common.Figures(NAME, measure))
    common.write(f"{NAME}.md", document(common.load(NAME)))
