"""What does a step cost that rebuilds its activations?

    python -m experiments.meft.step_time           # five minutes on two CPU cores
    python -m experiments.meft.step_time --draw    # table from the data

On two CPU cores, less than LoRA's. MiniLM's step with exact MEFT1 takes 0.71 times as long as with LoRA of rank 8
(quartiles 0.68 and 0.72), though it computes 1.44 times the products: 36 sites' skinny products are slow on a CPU for
their FLOPs. Full fine-tuning takes as long as LoRA, Adam's pass over 22 million parameters included. Exact streams
cost nothing that could be seen beside floating point ones (304 and 318 ms); a second evaluation for the derivative
costs 18 % (359 ms). On the embedded decoder the ratios to LoRA are 0.78 and, evaluated twice, 0.93. LST takes 0.30
and 0.41, UniPT 0.30 and 0.47, SHERL 0.33 and 0.50.

Train steps in one process, one after the other in turn, medians of the ratios to LoRA's under plain autodiff with the
quartiles: all-MiniLM-L6-v2 (float32, batch 16 x 64, classifier of 77 labels) and the embedded decoder (float32, batch
8 x 256). Products: FLOPs of matrix products, the same ratio. A CPU's times say nothing of a GPU's or TPU's, where
elementwise work is bound by memory; on 7B and larger models products dominate everywhere. Data in
results/memory/meft_step_time.json, table in meft_step_time.md.
"""

from __future__ import annotations

import statistics
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax

import jaxpeft as jp
from experiments.memory import common
from jaxpeft import assets
from jaxpeft.backward import residuals
from jaxpeft.backward.flops import count_flops
from jaxpeft.train.optimizer import make_direction, make_schedule
from jaxpeft.train.task import TASKS

NAME = "meft_step_time"
ROUNDS = 15
MODELS = {"MiniLM": ("classify", 16, 64), "embedded decoder": ("lm", 8, 256)}
# label -> method, plan
FORMS = {
    "lora": (lambda: jp.lora(rank=8), "everything"),
    "lora, matmuls": (lambda: jp.lora(rank=8), "matmuls"),
    "lora, blocks": (lambda: jp.lora(rank=8), "blocks"),
    "full": (jp.full, "everything"),
    "meft 1, published": (lambda: jp.meft(1, exact=False), "everything"),
    "meft 1, exact": (lambda: jp.meft(1), "everything"),
    "meft 2, exact": (lambda: jp.meft(2), "everything"),
    "meft 3, exact": (lambda: jp.meft(3), "everything"),
    "meft 1, exact, evaluated twice": (lambda: jp.meft(1, twice=True), "everything"),
    "lst": (jp.lst, "everything"),
    "unipt": (jp.unipt, "everything"),
    "sherl": (jp.sherl, "everything"),
}


def step_of(model: str, form: str):
    """(compiled step, state, batch, FLOPs)."""
    name, rows, length = MODELS[model]
    task, (factory, save) = TASKS[name], FORMS[form]
    labels = [f"label {i}" for i in range(77)] if name == "classify" else ()
    base, params = jp.load_pretrained(assets.minilm() if model == "MiniLM" else assets.MODEL, "float32", labels=labels)
    method = task.method(factory())
    adapted, trainable, frozen = jp.setup(method, base, params, jax.random.key(0))
    adapted = residuals.remat(adapted, save)
    optimizer = optax.chain(make_direction(), optax.scale_by_learning_rate(make_schedule("constant", 1e-4, 1000, 1)))
    state = jp.init_state(method, optimizer, trainable, frozen, jax.random.key(1))
    rng = np.random.default_rng(0)
    batch = {
        key: jnp.asarray(rng.integers(0, 2, x.shape) if key in ("token_types", "labels") else np.ones(x.shape), x.dtype)
        for key, x in task.shapes(base.config, rows, length).items()
    }
    batch["tokens"] = jnp.asarray(rng.integers(0, base.config.vocab_size, (rows, length)), jnp.int32)
    batch["positions"] = jnp.broadcast_to(jnp.arange(length, dtype=jnp.int32), (rows, length))
    step = jp.make_train_step(adapted, method, optimizer, task.loss)
    flops = count_flops(jax.make_jaxpr(lambda *args: step(*args))(state, batch))
    return jax.jit(step).lower(state, batch).compile(), state, batch, flops


def measure(key: common.Row) -> common.Row:
    """Seconds of every round and form."""
    made = {form: step_of(key["model"], form) for form in FORMS}
    seconds: dict[str, list[float]] = {form: [] for form in FORMS}
    for _ in range(ROUNDS + 2):
        for form, (step, state, batch, _) in made.items():
            start = time.perf_counter()
            jax.block_until_ready(step(state, batch))
            seconds[form].append(time.perf_counter() - start)
    return {
        "seconds": {form: times[2:] for form, times in seconds.items()},
        "flops": {f: x[3] for f, x in made.items()},
    }


def document(rows: list[common.Row]) -> str:
    """Ratios to LoRA under plain autodiff."""
    text = "# Step time, as a ratio to LoRA under plain autodiff (CPU)\n"
    for row in rows:
        name, count, length = MODELS[row["model"]]
        base = row["seconds"]["lora"]
        body = []
        for form, times in row["seconds"].items():
            ratios = [a / b for a, b in zip(times, base, strict=True)]
            low, middle, high = statistics.quantiles(ratios, n=4)
            products = row["flops"][form] / row["flops"]["lora"]
            spread = f"{low:.2f} to {high:.2f}"
            body.append([form, f"{1000 * statistics.median(times):.0f}", f"{middle:.2f}", spread, f"{products:.2f}"])
        text += f"\n## {row['model']}, {name}, {count} x {length}\n\n"
        text += common.table(["", "ms", "ratio", "quartiles", "products"], body)
    return text


if __name__ == "__main__":
    args = common.arguments(__doc__)
    figures = common.Figures(NAME, None if args.draw else measure)
    common.write(f"{NAME}.md", document([figures(model=model) for model in MODELS]))
