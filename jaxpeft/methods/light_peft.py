"""Light-PEFT, its estimation: masks of heads and neurons train beside LoRA for some steps, to tell what can go.

    o reads m * heads,   down reads m * neurons        m = 1 at first: a number for each head and neuron of a layer
    loss + l1 sum |m|,   m's rate: the run's times 100 at heads, 50 at neurons

After these steps `jaxpeft prune --adapter RUN/adapter --data rows.jsonl` (`jaxpeft.early`) cuts out the heads and
neurons with the smallest |m| and the parts of LoRA that matter least, and training goes on with what is left:

    jaxpeft train --method light_peft+lora --data rows.jsonl --steps 200 --out early
    jaxpeft prune --adapter early/adapter --data rows.jsonl --keep 0.667 --out small
    jaxpeft train --model small --adapter small/adapter --data rows.jsonl --out run

Kept for the backward pass: what o and down read, beside what LoRA keeps. The estimation takes a little more memory than
LoRA; what comes after it is LoRA on a smaller model.

Paper: Gu et al. 2024, "Light-PEFT: Lightening Parameter-Efficient Fine-Tuning via Early Pruning", arXiv:2406.03792, and
its code. Deviations: masks are at a head's output, where they do what they do at its probabilities there; shared
key/value heads have one mask with the query heads that read them; merging folds the masks in.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import optax

from jaxpeft import pruning, sites, tree
from jaxpeft.about import About, Promises
from jaxpeft.errors import InputError
from jaxpeft.method import Method, Spec, View, layer_by_layer, trains
from jaxpeft.model import Model
from jaxpeft.quant import dense, matrix
from jaxpeft.quant import merged as as_merged

MASK = "/light_peft/m"


def saved_bytes(inputs: int, outputs: int, itemsize: int, **_) -> int:
    """Bytes per token kept at a linear map at most: what o and down read, without its mask."""
    del outputs
    return inputs * itemsize


def light_peft(l1: float = 1e-4, rate_heads: float = 100.0, rate_neurons: float = 50.0) -> Method:
    """Masks of a Llama, Mistral or Qwen decoder's heads and neurons, in front of LoRA: `light_peft+lora`.

    Args:
      l1: factor of the masks' sum in the loss.
      rate_heads: rate of the heads' masks over the run's.
      rate_neurons: of the neurons'.

    Returns:
      The method. It trains `<o_proj>/light_peft/m` (L, key/value heads) and `<down_proj>/light_peft/m` (L, neurons).

    Raises:
      InputError: for a negative or infinite factor; a model that is no such decoder; or behind `lora`, which reads what
        is masked.
    """
    config = dict(locals())
    for name, value in config.items():
        if not 0 <= value < float("inf"):
            raise InputError(f"light_peft: {name} {value} must be a finite number of at least 0")

    def forward(model: Model, view: View) -> Model:
        names = [spec.name for spec in view.specs]
        if "lora" in names and names.index("lora") < names.index("light_peft"):
            raise InputError(f"{'+'.join(names)}: light_peft masks what LoRA reads; name it first: light_peft+lora")
        try:
            pruning.check_family(model.config)
        except InputError as error:
            raise InputError(f"light_peft: {error}") from None
        sizes = {"heads": model.config.num_key_value_heads, "neurons": model.config.intermediate_size}
        return sites.attach(
            model,
            "light_peft",
            lambda path: pruning.Gate(sizes[pruning.CUT[path.rpartition("/")[2]][0]]),
            lambda params: sites.find(params, list(pruning.READS), "light_peft"),
        )

    def loss(inner, view):
        del view

        def value(model, params, batch, key=None):
            plain, aux = inner(model, params, batch, key)
            masks = [leaf for path, leaf in tree.flatten(params).items() if path.endswith(MASK)]
            return plain + l1 * sum(jnp.sum(jnp.abs(mask)) for mask in masks), aux

        return value

    @layer_by_layer
    def update(optimizer, view):
        del view
        rates = {"o_proj": rate_heads, "down_proj": rate_neurons}
        for module, rate in rates.items():
            own = lambda leaves, module=module: {path: path.endswith(f"/{module}{MASK}") for path in leaves}
            optimizer = optax.chain(optimizer, optax.masked(optax.scale(rate), own))
        return optimizer

    return Method(
        forward=forward,
        roles=trains(lambda path: path.endswith(MASK)),
        loss=loss,
        update=update,
        merge=fold,
        specs=(Spec("light_peft", config),),
    )


def fold(params: Mapping[str, Any]) -> tree.Params:
    """W <- diag(m) W at o and down, whose masks go; in float32, rounded once to W's dtype."""
    flat = tree.flatten(params)
    merged = {path: leaf for path, leaf in flat.items() if "/light_peft/" not in path}
    for path, mask in flat.items():
        if path.endswith(MASK):
            at = sites.kernel_path(flat, path.removesuffix(MASK))
            kernel = matrix(merged[at])
            factors = jnp.repeat(mask, kernel.shape[-2] // mask.shape[-1], axis=-1)[..., None]
            merged[at] = as_merged(merged[at], dense(kernel) * factors)
    return tree.unflatten(merged)


ABOUT = About(
    summary="masks of heads and neurons train beside LoRA, to tell what of base and LoRA can go early",
    level="site",
    trains="a number for each key/value head and neuron of a layer",
    saves="nothing; training goes on with a smaller base and fewer parts of LoRA",
    reference="Gu et al. 2024, arXiv:2406.03792",
    example={"rate_heads": 1.0, "rate_neurons": 1.0},
    promises=Promises(site_bytes=saved_bytes),
    within="light_peft+lora",
)
