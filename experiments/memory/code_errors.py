"""How much does each code of each activation move a step's gradient?

    python -m experiments.memory.code_errors           # what the data lacks; some minutes of one core
    python -m experiments.memory.code_errors --draw    # the table from the data

One activation of all layers is kept as a code, everything else exactly: the distance of the gradient from the exact
one, in per cent of its length. That of 12 bits is no noise but a rounding, to bfloat16 and below. Models as they were
pretrained, stories260K and SmolLM2-135M-Instruct; a packed batch of E2E NLG (8 x 256 tokens, 2 x 128); LoRA of rank 8
on all linear maps, alpha 16, its B normal numbers of 0.02, as if it had trained a little; float32, on a CPU. Attention
is computed again under all of them. Data in results/memory/code_errors.json, the table in code_errors.md.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

import jaxpeft as jp
from experiments.compare.quality import place_of, shared
from experiments.memory import common
from jaxpeft import data, hf, tree
from jaxpeft.backward import residuals

NAME = "code_errors"
MODELS = {"stories260K": (8, 256), "SmolLM2-135M": (2, 128)}  # rows, tokens
NAMES = ("block_input", "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj")
NORMS = ("input_layernorm_normalized", "post_attention_layernorm_normalized")
OF_NORMS = ("prune", "compress4")
ACTIONS = ("compress12", "compress", "compress4")
Table = dict[str, dict[str, dict[str, float]]]  # model -> action -> name -> per cent


class Step:
    """A model, its batch, and the gradient of a step under a plan."""

    def __init__(self, name: str):
        rows, length = MODELS[name]
        place: Path = place_of(name)
        base, params = jp.load_pretrained(place, "float32")
        file = shared() / "instruct/e2e_nlg.train.jsonl"
        examples, _ = data.load_examples(file, hf.load_tokenizer(place), length, too_long="drop")
        self.batch, _ = next(data.make_batches(examples, rows, length, 0, pack=True))
        self.model, trainable, self.frozen = jp.setup(jp.lora(8, alpha=16), base, params, jax.random.key(0))
        keys = jax.random.split(jax.random.key(7), len(trainable))
        draw = lambda path, x, key: 0.02 * jax.random.normal(key, x.shape) if path.endswith("/b") else x
        self.trainable = {
            path: draw(path, x, key) for (path, x), key in zip(sorted(trainable.items()), keys, strict=True)
        }
        self.exact = self.gradient("")

    def gradient(self, more: str) -> np.ndarray:
        """All numbers of it, float64."""
        model = residuals.remat(self.model, f"matmuls,attention=recompute,attention_lse=recompute{more}")
        loss = lambda trainable: jp.completion_loss(model, tree.combine(trainable, self.frozen), self.batch)[0]
        found = jax.jit(jax.grad(loss))(self.trainable)
        return np.concatenate([np.asarray(found[path], np.float64).ravel() for path in sorted(found)])


step = functools.lru_cache(maxsize=1)(Step)


def measure(key: common.Row) -> common.Row:
    """{"per_cent": the distance}."""
    of = step(key["model"])
    found = of.gradient(f",{key['name']}={key['action']}")
    return {"per_cent": 100 * float(np.linalg.norm(found - of.exact) / np.linalg.norm(of.exact))}


def collect(figures: common.Figures) -> Table:
    """All figures."""
    found: Table = {}
    for model, action, name in itertools.product(MODELS, ACTIONS, NAMES):
        own = figures(model=model, name=name, action=action)["per_cent"]
        found.setdefault(model, {}).setdefault(action, {})[name] = own
    for model, action, name in itertools.product(MODELS, OF_NORMS, NORMS):
        own = figures(model=model, name=name, action=action)["per_cent"]
        found[model].setdefault(action, {})[name] = own
    return found


def document(found: Mapping[str, Any]) -> str:
    """The page."""

    def table(names, wanted):
        body = [
            [f"{model}, `{action}`", *(f"{actions[action][name]:.2f}" for name in names)]
            for model, actions in found.items()
            for action in wanted
        ]
        return common.table(["model, action", *names], body)

    words = "Distance of the gradient from the exact one, in per cent of its length, of one activation kept as a code."
    more = "Of what a norm's derivative reads, the largest tenth of each row, or 4 bits."
    return f"# Codes and the gradient\n\n{words}\n\n{table(NAMES, ACTIONS)}\n{more}\n\n{table(NORMS, OF_NORMS)}"


def main() -> None:
    args = common.arguments(__doc__)
    found = collect(common.Figures(NAME, None if args.draw else measure))
    common.write(f"{NAME}.md", document(found))


if __name__ == "__main__":
    main()
