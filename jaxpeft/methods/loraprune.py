"""LoRAPrune: heads and neurons of the frozen base go step by step, by what the gradients of LoRA say of its kernels.

    W' = W + s A B                           what LoRA beside W computes with; dA, dB its gradients in a step
    G  = A dB + dA B - dA dB                 (n, m), in place of dL/dW, which is never made
    I  = |W' * G|                            summed over what a head or neuron has of each matrix, as `jaxpeft.pruning`
                                             cuts them; divided by its norm over all of the layer's heads (neurons), and
                                             added up over q, k, v, o (gate, up, down)
    S <- 0.9 S + 0.1 I                       in each step; at first S = I
    m  = 1 of those with the largest S       every `every` steps; the others' output is 0: o reads m * heads, down m * h

The share of each layer that is pruned rises from 0 at step `begin` to 1 - keep at step `until`, with t the steps done
between them: (1 - keep) (1 - (1 - t / (until - begin))^3). What stays at the end are as many as `jaxpeft prune` keeps
for the same shares.

Kept for the backward pass: what LoRA keeps. A score is made kernel by kernel and layer by layer: W', G and I (n, m) in
float32, of one at a time, and one more reading of all kernels. The base may be packed. So a run takes what LoRA takes;
what it leaves is smaller: merging puts zeros in the place of what is pruned, and

    jaxpeft merge --adapter run/adapter --out zeros;    jaxpeft prune --model zeros --keep 0.5 --out small

cuts them out, as nothing has a smaller norm.

Paper: Zhang et al. 2023, "LoRAPrune: Structured Pruning Meets Low-Rank Parameter-Efficient Fine-Tuning",
arXiv:2305.18403, and its code. Deviations: each layer loses the same share, so that layers stay a stack, where the code
ranks all layers together and spares the first and last ones; where key/value heads are shared they go with the query
heads that read them; `begin`, `until` are steps, there shares of a run; the mask is at what o and down read, there also
at the outputs of the others, which changes no output.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from jaxpeft import pruning, sites, sparse, tree
from jaxpeft.about import About, Promises
from jaxpeft.errors import InputError
from jaxpeft.method import FROZEN, MOVED, Leaves, Method, Moment, Objective, Spec, View, told
from jaxpeft.methods import lora as _lora
from jaxpeft.model import Model
from jaxpeft.quant import dense, matrix
from jaxpeft.quant import merged as as_merged

STEPS = "loraprune/steps"
DECAY = 0.9  # of S


def loraprune(
    keep: float = 0.5,
    begin: int = 0,
    until: int = 100,
    every: int = 10,
    keep_heads: float | None = None,
    keep_neurons: float | None = None,
) -> Method:
    """LoRAPrune of a Llama, Mistral or Qwen decoder, in front of LoRA: `loraprune+lora`.

    Args:
      keep: share of each layer's key/value heads (with the query heads that read them) and neurons that stays.
      begin: step from which on something is pruned.
      until: step at which the share is reached; it should lie before a run's end.
      every: steps between two choices.
      keep_heads: share of the heads; None: keep.
      keep_neurons: share of the neurons; None: keep.

    Returns:
      The method, a modifier. It trains nothing; `<o_proj>/loraprune/m` and `score` (L, K), and those of `<down_proj>`
      (L, F), move.

    Raises:
      InputError: for a share outside 0 to 1, or one that leaves a layer no head or neuron; steps in the wrong order; a
        model that is no such decoder; a chain without `lora` behind it, or a LoRA that adapts nothing of the heads, or
        of the neurons, of which some should go.
    """
    config = dict(locals())
    shares = [keep if own is None else own for own in (keep_heads, keep_neurons)]
    for name, share in zip(("keep_heads", "keep_neurons"), shares, strict=True):
        pruning.check_share(f"loraprune: {name if config[name] is not None else 'keep'}", share)
    if begin < 0:
        raise InputError(f"loraprune: begin {begin} must be at least 0")
    if until <= begin:
        raise InputError(f"loraprune: until {until} must be above begin, {begin}")
    if every < 1:
        raise InputError(f"loraprune: every {every} must be at least 1")

    def forward(model: Model, view: View) -> Model:
        _check_chain(view)
        try:
            pruning.check_family(model.config)
            _counts(model.config, shares)
        except InputError as error:
            raise InputError(f"loraprune: {error}") from None
        sizes = _sizes(model.config)
        own = sites.attach(
            model,
            "loraprune",
            lambda path: pruning.Gate(sizes[pruning.CUT[path.rpartition("/")[2]][0]], differentiated=False),
            lambda params: sites.find(params, list(pruning.READS), "loraprune"),
        )

        def init(key, params):
            flat = tree.flatten(own.init(key, params))
            for path in [path for path in flat if path.endswith("/loraprune/m")]:
                flat.setdefault(_score(path), jnp.zeros(flat[path].shape))
            flat.setdefault(STEPS, jnp.zeros((), jnp.int32))
            return tree.unflatten(flat)

        return own._replace(init=init)

    def gradient(objective: Objective, view: View) -> Objective:
        lora = next(spec.config for spec in view.specs if spec.name == "lora")
        adapted = [path.removesuffix("/lora/a") for path in view.trained if path.endswith("/lora/a")]
        parts = _parts(view, adapted, _counts(view.base.config, shares))

        def value_and_grad(trainable, rest, batch, key, opt_state):
            value, grads = objective.value_and_grad(trainable, rest, batch, key, opt_state)
            leaves = {**rest, **trainable}
            scores = {path: leaf for path, leaf in rest.items() if path.endswith("/loraprune/score")}

            def scored():
                found = dict(scores)
                for path in parts:
                    old = scores[path]
                    new = sum(
                        importance(
                            leaves[sites.kernel_path(leaves, site)],
                            [leaves[f"{site}/lora/{name}"] for name in "ab"],
                            [grads[f"{site}/lora/{name}"] for name in "ab"],
                            _lora.scale_at(lora, site),
                            old.shape[-1],
                            pruning.CUT[site.rpartition("/")[2]][1],
                        )
                        for site in parts[path]
                    )
                    found[path] = jnp.where(rest[STEPS] == 0, new, DECAY * old + (1 - DECAY) * new)
                return found

            scores = jax.lax.cond(rest[STEPS] < until, scored, lambda: scores)
            loss, aux = value
            return (loss, {**aux, **scores}), grads

        return objective._replace(value_and_grad=value_and_grad)

    def move(leaves: Leaves, moment: Moment) -> Leaves:
        moved, config = dict(leaves.moved), moment.view.base.config
        done = moved[STEPS] + 1
        now = (done <= until) & (((done % every == 0) & (done > begin)) | (done == until))
        done_share = 1 - sparse.ahead(done, begin, until)
        for path in [path for path in moved if path.endswith("/loraprune/m")]:
            score = told("loraprune", moment.aux, _score(path))
            what = pruning.CUT[path.split("/")[-3]][0]
            unit = 1 if what == "heads" else pruning.unit_of(config.intermediate_size)
            count = _counts(config, shares)[what]
            gone = jnp.floor(done_share * ((_sizes(config)[what] - count) / unit)).astype(jnp.int32) * unit
            moved[path] = jnp.where(now, most(score, _sizes(config)[what] - gone), moved[path])
            moved[_score(path)] = score
        return Leaves(leaves.trained, {**moved, STEPS: done})

    return Method(
        forward=forward,
        roles=lambda others: lambda path: MOVED if "loraprune/" in path else others(path),
        gradient=gradient,
        move=move,
        merge=fold,
        specs=(Spec("loraprune", config),),
        alone=lambda path: FROZEN,
    )


def _score(path: str) -> str:
    """The path of the score beside a mask."""
    return path.removesuffix("m") + "score"


def _check_chain(view: View) -> None:
    names = [spec.name for spec in view.specs]
    if "lora" not in names:
        raise InputError(f"{'+'.join(names)}: loraprune reads the gradients of LoRA; chain lora to it: loraprune+lora")
    if names.index("lora") < names.index("loraprune"):
        raise InputError(f"{'+'.join(names)}: loraprune masks what LoRA reads too; name it first: loraprune+lora")


def _sizes(config: Any) -> dict[str, int]:
    return {"heads": config.num_key_value_heads, "neurons": config.intermediate_size}


def _counts(config: Any, shares: list[float]) -> dict[str, int]:
    """How many stay."""
    return dict(zip(("heads", "neurons"), pruning.how_many(*_sizes(config).values(), *shares), strict=True))


def _parts(view: View, adapted: list[str], counts: Mapping[str, int]) -> dict[str, list[str]]:
    """{path of a score: the sites with LoRA that tell it}.

    Raises:
      InputError: where some should go and no site tells which.
    """
    found = {}
    for path in view.moved:
        if not path.endswith("/loraprune/score"):
            continue
        block, module = path.split("/")[:-3], path.split("/")[-3]
        what = pruning.CUT[module][0]
        found[path] = [
            site
            for site in adapted
            if site.split("/")[:-1] == block and pruning.CUT.get(site.rpartition("/")[2], ("", False))[0] == what
        ]
        if not found[path]:
            if counts[what] < view.shapes[path].shape[-1]:
                raise InputError(
                    f"loraprune: LoRA is at no linear map of the {what} at {'/'.join(block)}, and tells of none which "
                    f"matter; give lora such targets, or keep_{what} 1"
                )
            del found[path]
    return found


# The scores.


def importance(kernel: Any, factors: Any, gradients: Any, scale: float, groups: int, of_outputs: bool) -> jax.Array:
    """I (L, groups) float32 of one matrix, with norm 1 in each layer, or 0.

    Args:
      kernel: W (L, n, m), plain or packed.
      factors: A (L, n, r) and B (L, r, m).
      gradients: theirs.
      scale: s.
      groups: heads or neurons.
      of_outputs: whether they are groups of the outputs.
    """

    def of_layer(_, layer):
        kernel, (a, b), (da, db) = layer
        low = lambda x, y: jnp.matmul(x, y, precision="highest")
        changed = dense(kernel).astype(jnp.float32) + scale * low(a, b)
        found = jnp.abs(changed * (low(a, db) + low(da, b - db)))
        own = found.sum(0 if of_outputs else 1).reshape(groups, -1).sum(1)
        return None, own / jnp.maximum(jnp.linalg.norm(own), jnp.finfo(jnp.float32).tiny)

    return jax.lax.scan(of_layer, None, (matrix(kernel), tuple(factors), tuple(gradients)))[1]


def most(scores: jax.Array, count: jax.Array) -> jax.Array:
    """1.0 at each layer's `count` () largest scores (L, n), of equal ones the first; 0.0 elsewhere."""
    order = jnp.argsort(-scores, axis=-1, stable=True)
    return (jnp.argsort(order, axis=-1) < count).astype(jnp.float32)


def fold(params: Mapping[str, Any]) -> tree.Params:
    """W <- 0 in the place of what is pruned, whose leaves go."""
    flat = tree.flatten(params)
    merged = {path: leaf for path, leaf in flat.items() if "loraprune/" not in path}
    for path, mask in flat.items():
        if not path.endswith("/loraprune/m"):
            continue
        block, what = path.split("/")[:-3], pruning.CUT[path.split("/")[-3]][0]
        for module, (other, of_outputs) in pruning.CUT.items():
            if other != what:
                continue
            for name in ("kernel", "bias") if of_outputs else ("kernel",):
                at = "/".join([*block, module, name])
                if at not in merged:
                    continue
                leaf = merged[at]
                shape = leaf.shape
                own = jnp.repeat(mask, shape[-1 if of_outputs else -2] // mask.shape[-1], axis=-1)
                if name == "kernel":
                    own = own[..., None, :] if of_outputs else own[..., None]
                    merged[at] = as_merged(leaf, dense(leaf) * own)
                else:
                    merged[at] = leaf * own.astype(leaf.dtype)
    return tree.unflatten(merged)


ABOUT = About(
    summary="heads and neurons of the base are pruned while LoRA trains, by what its gradients say of them",
    level="site",
    trains="nothing; masks of heads and neurons move",
    saves="nothing while it trains; the merged model without what is pruned is smaller",
    reference="Zhang et al. 2023, arXiv:2305.18403",
    example={"until": 4, "every": 2},
    steps="until",
    promises=Promises(site_bytes=lambda *_, **__: 0),
    within="loraprune+lora",
)
