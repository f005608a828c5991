"""Half Fine-Tuning: in each layer half of the matrices train and the other half stay as they are.

    attention      2 of the 4 matrices of each layer train
    feed-forward   1 of 3 in one half of the layers, 2 of 3 in the other        (of k others: k/2, rounded down and up)

Which ones is drawn at random, and stays for a run, the paper's round; `every` draws anew within a run. What else the
layers have, norms and biases, trains, and so does what lies outside the layers: they are few numbers, and no matrices
of a layer.

Layers are drawn in pairs: the matrices that train in one layer of a pair are those that stay in the other. So in each
layer all choices are equally likely, as in the paper, and of each stack W (L, n, m) half of the layers train, whatever
is drawn: its masters are (L/2, n, m) (see `jaxpeft.sampling`). Of an odd number of layers the last one is alone, and a
stack of which it does not train has an idle master. `half/active/<site>` (L/2,) int32 says which layers they are.

Kept for the backward pass: what full fine-tuning keeps. dW is computed in each layer, as which ones train is known only
when the step runs.

Paper: Hui et al. 2024, "HFT: Half Fine-Tuning for Large Language Models", arXiv:2404.18466. Deviation: the pairs, as
above; the published choice of layers is that of each one by itself.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from jaxpeft import sampling, tree
from jaxpeft.about import About, Defaults, Promises
from jaxpeft.errors import InputError
from jaxpeft.method import FROZEN, TRAINED, Method, Spec, View
from jaxpeft.methods import full as _full


def half(every: int = 0, which: str = "all") -> Method:
    """HFT on the model itself, or on what the chain trains of it.

    Args:
      every: steps of a round, after which other halves are drawn and their moments start anew; 0: one round.
      which: what trains where nothing else in the chain does: "all", "layers", or a regular expression found in the
        path; of the matrices in the layers half, all else whole.

    Returns:
      The method; it trains `half/<site>/kernel` (L/2, n, m) and the other leaves that `which` names.

    Raises:
      InputError: for rounds of fewer than 0 steps, an expression that does not compile, a chain in which no matrix of
        a layer trains, or quantized kernels.
    """
    config = dict(locals())
    if every < 0:
        raise InputError(f"half: every {every} must be at least 0; 0: one draw for the whole run")
    pattern = _full.pattern_of(which, "half: which")

    def draw(key, stacks, moved):
        del moved
        modules: dict[str, list[str]] = {}
        for path in sorted(stacks):
            modules.setdefault(_site(path).rpartition("/")[0], []).append(path)
        found: dict[str, jax.Array] = {}
        for module, paths in modules.items():
            numbers = halves(jax.random.fold_in(key, zlib.crc32(module.encode())), len(paths), stacks[paths[0]])
            found |= {f"active/{_site(path)}": numbers[i] for i, path in enumerate(paths)}
        return found

    sampler = sampling.Sampler(
        "half",
        draw,
        every,
        takes=lambda path: path.endswith("/kernel"),
        drawn_as=lambda path: f"active/{_site(path)}",
        what=f" that is a kernel{_full.of(which)}",
    )
    own = Method(
        forward=sampler.forward,
        roles=sampler.roles,
        move=sampler.move,
        merge=sampler.merge,
        specs=(Spec("half", config),),
        alone=lambda path: TRAINED if pattern.found(path) else FROZEN,
    )
    return own._replace(update=sampler.update) if every else own


def _site(path: str) -> str:
    return path.rpartition("/")[0]


def halves(key: jax.Array, count: int, layers: Sequence[int]) -> jax.Array:
    """(count, L/2 rounded up) int32: for each of `count` matrices, the layers in which it trains."""
    of_order, of_pairs, of_last = jax.random.split(key, 3)
    order = jax.random.permutation(of_order, jnp.asarray(layers, jnp.int32))
    pairs = order[: len(layers) // 2 * 2].reshape(-1, 2)
    ranks = jax.vmap(lambda key: jax.random.permutation(key, count))(jax.random.split(of_pairs, len(pairs)))
    # Of a pair's first layer those of the lowest ranks train, of its second all others.
    found = jnp.where(ranks < count // 2, pairs[:, :1], pairs[:, 1:]).T
    if len(layers) % 2 == 0:
        return found
    ranks = jax.random.permutation(of_last, count)
    train = count // 2 + jax.random.bernoulli(jax.random.fold_in(of_last, 0)) * (count % 2)
    return jnp.concatenate([found, jnp.where(ranks < train, order[-1], sampling.NO_LAYER)[:, None]], axis=1)


def state_numbers(view: View, every: int, **_) -> int:
    """Numbers of Adam's state: two for each trained one; with rounds, the moments of norms that parts are told of."""
    return 2 * tree.size(view.trained) + (4 if every else 0)


ABOUT = About(
    summary="in each layer half of the matrices train, drawn at random",
    level="step",
    trains="half of the matrices of each layer, and all that is no matrix of a layer",
    saves="gradients, masters and optimizer state of the other half; no activations, no computation",
    chain="full+half",
    reference="Hui et al. 2024, arXiv:2404.18466",
    example={"every": 4},
    promises=Promises(site_bytes=_full.saved_bytes, state=state_numbers),
    defaults=Defaults(lr=2e-5),
    stored="base",
    remade=lambda path: path.startswith("half/"),
)
