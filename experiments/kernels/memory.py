"""Do the fused kernels cost memory?

    python -m experiments.kernels.memory                      # compiles what the data lacks
    python -m experiments.kernels.memory --draw               # table from the data

They don't. The temporaries of the 7B reference step are 46.45 GiB with the kernels and 46.49 in plain JAX on an H200,
46.56 and 46.60 on a v5p; with NF4 kernels (3.90 GiB of arguments instead of 12.85), where plain JAX, and on a GPU both,
unpack a layer's kernel at a time, 46.46 and 46.49, 46.57 and 46.78.

The reference step: Llama-2-7B's geometry, 16 x 1024 tokens, bfloat16, value and gradient of the chunked loss with
respect to adapters of rank 64 on all linear maps, plan `matmuls`, compiled by JAX's ahead-of-time compilers for an H200
and a TPU v5p, with the kernels and in plain JAX (xla); kernels of the layers in bfloat16, or packed in NF4 with double
quantization. GiB of temporaries. Data in results/memory/kernels_memory.json, table in kernels_memory.md.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

import jaxpeft as jp
from experiments.memory import common
from jaxpeft import tree
from jaxpeft.backward import residuals
from jaxpeft.memory import aot, targets
from jaxpeft.method import view_of
from jaxpeft.models import decoder, geometries
from pallas_kernels import packed, platform

NAME = "kernels_memory"
RANK = 64


def measure(key: common.Row) -> common.Row:
    """Bytes of arguments and temporaries of the compiled step."""
    method = jp.lora(RANK)
    base = decoder.from_hf(geometries.load(key["geometry"]), jnp.bfloat16)
    model = method.forward(base, view_of(base, method, {}))
    params = jax.eval_shape(lambda key: model.init(key, {}), jax.random.key(0))
    flat = {path: jax.ShapeDtypeStruct(leaf.shape, jnp.bfloat16) for path, leaf in tree.flatten(params).items()}
    if key["base"] == "nf4":
        for path, leaf in flat.items():
            if path.endswith("/kernel") and len(leaf.shape) == 3:
                flat[path] = jax.eval_shape(jax.vmap(packed.quantize), leaf)
    trainable = {path: leaf for path, leaf in flat.items() if method.trainable(path)}
    frozen = {path: leaf for path, leaf in flat.items() if path not in trainable}
    model = residuals.remat(model, key["save"])
    rows = jax.ShapeDtypeStruct((key["batch_size"], key["seq_len"]), jnp.int32)
    weights = jax.ShapeDtypeStruct(rows.shape, jnp.float32)
    batch = {"tokens": rows, "targets": rows, "loss_weights": weights}

    def step(trainable, frozen, batch):
        def loss(trainable):
            return jp.completion_loss(model, tree.combine(trainable, frozen), batch)[0]

        return jax.value_and_grad(loss)(trainable)

    with platform.forced(None if key["products"] == "kernels" else "xla"):
        memory = aot.compile(targets.target(key["target"]), step, trainable, frozen, batch).memory
    return {"arguments": memory.arguments, "temporaries": memory.temporaries}


def collect(figures: common.Figures, names: list[str]) -> list[common.Row]:
    """All combinations."""
    key: dict[str, Any] = {"geometry": "llama2-7b", "batch_size": 16, "seq_len": 1024, "dtype": "bfloat16"}
    key |= {"method": f"lora, rank {RANK}", "save": "matmuls"}
    return [
        figures(**key, target=target, base=base, products=products)
        for target in names
        for base in ("bfloat16", "nf4")
        for products in ("kernels", "xla")
    ]


def document(rows: list[common.Row]) -> str:
    """One row for each target and base."""
    body = []
    for target, base in dict.fromkeys((row["target"], row["base"]) for row in rows):
        own = {row["products"]: row for row in rows if (row["target"], row["base"]) == (target, base)}
        cells = [f"{own[name]['temporaries'] / common.GIB:.2f}" for name in ("kernels", "xla")]
        body.append([target, base, f"{own['xla']['arguments'] / common.GIB:.2f}", *cells])
    text = "# The 7B reference step with and without the fused kernels, GiB\n\n"
    return text + common.table(["target", "base", "arguments", "temporaries, kernels", "temporaries, xla"], body)


if __name__ == "__main__":
    common.main(__doc__, NAME, measure, collect, document, targets="h200,v5p")
