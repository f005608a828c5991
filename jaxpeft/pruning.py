"""A smaller base, cut out of a pretrained decoder, and adapters that were trained on it, made those of the whole one.

Out go whole heads and neurons: of each layer equally many, so that layers stay a stack, but each layer's own.

    heads      key/value head j of a layer with the g query heads that read it: columns of q, k, v, rows of o
    neurons    column j of gate and up, row j of down

The stream keeps its width, so embeddings, norms and head stay whole. What is left is a decoder of fewer heads (its
head_dim is in config.json) and a narrower MLP, which every method and plan takes, transformers too.

A LoRA of the pruned base is one of the whole base, with zeros where something was cut (`recovered`): B's columns at q,
k, v, gate, up, A's rows at o and down. On the whole base with zeros in place of what was cut (`masked`) it computes
what the pruned base and the adapter do; it is meant for the whole base as it is.

What is cut is what matters least, by one of

    magnitude   the norm of all weights of a head or neuron
    taylor      the mean over batches of |dL/dm|, where m = 1 scales what a query head or a neuron hands on to o or
                down: how much the loss changes with m, to first order. Michel et al. 2019, arXiv:1905.10650; it needs
                no weight's gradient, and of memory what a step of LoRA does. A key/value head has its heads' sum.
    random      nothing

Paper: Zhang et al. 2025, "Train Small, Infer Large: Memory-Efficient LoRA Training for Large Language Models" (LoRAM),
arXiv:2502.13533. With `quantize` on the pruned base it is QLoRAM. Its alignment, some further pretraining of the
pruned base, is a run of `full` there. Deviations: of all layers the same share goes, where LLM-Pruner, which the paper
takes, leaves the first and last ones whole; masks within matrices (its semi-structured and unstructured forms) are not
offered, as they shrink no array.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple, cast

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from typing_extensions import TypedDict

from jaxpeft import documents, sites, tree
from jaxpeft.documents import Index, Text
from jaxpeft.errors import InputError
from jaxpeft.model import Batch, Context, Model
from jaxpeft.models.decoder import MODEL_TYPES
from jaxpeft.peft.base import fingerprint
from jaxpeft.peft.schema import Base
from jaxpeft.quant import is_packed
from jaxpeft.train.loss import completion_loss

BY = ("magnitude", "taylor", "random")
FILE = "pruning.json"  # beside the pruned checkpoint: what was kept, and of which base
# Module -> what is cut of it, and whether of its outputs.
CUT = {
    "q_proj": ("heads", True),
    "k_proj": ("heads", True),
    "v_proj": ("heads", True),
    "o_proj": ("heads", False),
    "gate_proj": ("neurons", True),
    "up_proj": ("neurons", True),
    "down_proj": ("neurons", False),
}
READS = ("o_proj", "down_proj")  # of these the inputs are what heads, and neurons, hand on


class Kept(NamedTuple):
    """What stays of each layer, in ascending order.

    heads: (L, K) int32, key/value heads.  neurons: (L, F) int32.
    """

    heads: np.ndarray
    neurons: np.ndarray


class Scores(NamedTuple):
    """How much all of them matter: float32, (L, key/value heads) and (L, neurons)."""

    heads: np.ndarray
    neurons: np.ndarray


def importance(
    model: Model,
    params: Mapping[str, Any],
    by: str = "magnitude",
    batches: Iterable[Batch] = (),
    seed: int = 0,
) -> Scores:
    """How much each head and neuron matters.

    Args:
      model: a decoder of `jaxpeft.load_pretrained`.
      params: its nested parameters.
      by: "magnitude", "taylor" or "random".
      batches: of training, for "taylor".
      seed: of "random".

    Raises:
      InputError: for a model that is no such decoder, packed kernels, an unknown `by`, "taylor" without a batch, or
        scores that are no numbers.
    """
    flat = _checked(model, params)
    if by not in BY:
        raise InputError(f"by {by!r}: expected one of {', '.join(BY)}")
    if by == "random":
        return _random(model.config, seed)
    scores = _magnitude(model.config, flat) if by == "magnitude" else _taylor(model, params, batches)
    for what, own in scores._asdict().items():
        if not np.isfinite(own).all():
            layer = int(np.argmin(np.isfinite(own).all(1)))
            raise InputError(f"by {by!r}: scores of {what} of layer {layer} are no numbers; are the weights whole?")
    return scores


def _random(config: Any, seed: int) -> Scores:
    draw = np.random.default_rng(seed)
    sizes = (config.num_key_value_heads, config.intermediate_size)
    return Scores(*(draw.random((config.num_hidden_layers, n), np.float32) for n in sizes))


def choose(scores: Scores, heads: float, neurons: float) -> Kept:
    """The shares `heads` and `neurons` of each layer that matter most; of neurons multiples of what 128 and all share.

    Raises:
      InputError: for a share outside (0, 1], or one that leaves nothing.
    """
    counts = how_many(scores.heads.shape[1], scores.neurons.shape[1], heads, neurons)
    return Kept(*map(_top, scores, counts))


def unit_of(neurons: int) -> int:
    """What neurons go by."""
    return math.gcd(neurons, 128)


def how_many(of_heads: int, of_neurons: int, heads: float, neurons: float) -> tuple[int, int]:
    """Key/value heads and neurons that are the shares `heads` and `neurons` of all.

    Raises:
      InputError: as `choose` does.
    """
    return (
        _count(of_heads, "heads", "key/value heads", heads, 1),
        _count(of_neurons, "neurons", "neurons", neurons, unit_of(of_neurons)),
    )


def check_share(flag: str, share: float) -> None:
    """Raises InputError for a share that cannot stay."""
    if not 0 < share <= 1:
        raise InputError(f"{flag} {share:g}: the share that stays must be above 0 and at most 1")


def _count(total: int, flag: str, what: str, share: float, unit: int) -> int:
    check_share(flag, share)
    count = math.floor(share * total / unit + 0.5) * unit
    if not count:
        raise InputError(
            f"{flag} {share:g}: leaves none of {total} {what}, which go by {unit}; a share of {unit / total / 2:.3g} "
            "or more should stay"
        )
    return count


def _top(scores: np.ndarray, count: int) -> np.ndarray:
    order = np.argsort(-np.asarray(scores), axis=1, kind="stable")
    return np.sort(order[:, :count], axis=1).astype(np.int32)


def smaller(config: Any, heads: int, neurons: int) -> dict[str, int]:
    """The fields of config.json that change with so many key/value heads, their query heads, and neurons."""
    group = config.num_attention_heads // config.num_key_value_heads
    sizes = {"num_attention_heads": group * heads, "num_key_value_heads": heads, "head_dim": config.head_dim}
    return {**sizes, "intermediate_size": neurons}


def pruned(params: Mapping[str, Any], config: Any, kept: Kept) -> tree.Params:
    """The parameters without what was cut; the leaves that were cut are arrays of the host.

    Args:
      params: nested parameters of the whole base.
      config: its configuration (`Model.config`).
      kept: from `choose`.
    """
    return tree.unflatten(_each(tree.flatten(params), config, kept, _cut))


def masked(params: Mapping[str, Any], config: Any, kept: Kept) -> tree.Params:
    """The parameters with zeros in the place of what was cut: the whole base's shapes, the pruned one's outputs."""
    return tree.unflatten(_each(tree.flatten(pruned(params, config, kept)), config, kept, _spread))


def recovered(leaves: Mapping[str, Any], config: Any, kept: Kept) -> tree.Flat:
    """LoRA's leaves on the whole base: those of the pruned one, and zeros where something was cut.

    Args:
      leaves: {path: array}, `<site>/lora/a` (L, n, r) and `<site>/lora/b` (L, r, m) of the pruned base.
      config: the whole base's configuration.
      kept: what was kept.
    """
    return _each(leaves, config, kept, _spread)


class _Place(NamedTuple):
    """Where a leaf lacks what was cut: its axis, the indices (L, n) that stay there, and how many there were."""

    axis: int
    at: np.ndarray
    total: int


def _each(
    leaves: Mapping[str, Any], config: Any, kept: Kept, change: Callable[[np.ndarray, _Place], np.ndarray]
) -> tree.Flat:
    """Every leaf, changed where it has an axis of heads or neurons."""
    found = {}
    for path, leaf in leaves.items():
        place = _place(path, config, kept)
        found[path] = leaf if place is None else change(np.asarray(leaf), place)
    return found


def _place(path: str, config: Any, kept: Kept) -> _Place | None:
    module = next((word for word in path.split("/") if word in CUT), None)
    if module is None:
        return None
    what, of_outputs = CUT[module]
    axes = {"kernel": -1, "bias": -1, "b": -1} if of_outputs else {"kernel": -2, "a": -2}
    axis = axes.get(path.rpartition("/")[2])
    if axis is None:
        return None
    if what == "neurons":
        return _Place(axis, kept.neurons, config.intermediate_size)
    group = config.num_attention_heads // config.num_key_value_heads
    width = config.head_dim * (1 if module in ("k_proj", "v_proj") else group)
    at = kept.heads[:, :, None] * width + np.arange(width)
    return _Place(axis, at.reshape(len(at), -1), config.num_key_value_heads * width)


def _index(leaf: np.ndarray, place: _Place) -> np.ndarray:
    """The indices with axes of one beside theirs, as `take_along_axis` takes them."""
    shape = [1] * leaf.ndim
    shape[0], shape[place.axis] = place.at.shape
    return place.at.reshape(shape)


def _cut(leaf: np.ndarray, place: _Place) -> np.ndarray:
    return np.take_along_axis(leaf, _index(leaf, place), place.axis)


def _spread(leaf: np.ndarray, place: _Place) -> np.ndarray:
    shape = list(leaf.shape)
    shape[place.axis] = place.total
    whole = np.zeros(shape, leaf.dtype)
    np.put_along_axis(whole, _index(leaf, place), leaf, place.axis)
    return whole


class Document(TypedDict):
    """pruning.json. base: folder or hub id.  fingerprint: of the base, see `jaxpeft.peft.fingerprint`."""

    format: Literal[1]
    base: Text
    fingerprint: Base
    by: Text
    heads: list[list[Index]]
    neurons: list[list[Index]]


def document(base: str, by: str, kept: Kept, config: Any, params: Mapping[str, Any]) -> Document:
    """pruning.json's object, of the whole base's name, configuration and parameters."""
    heads, neurons = kept.heads.tolist(), kept.neurons.tolist()
    return Document(
        format=1,
        base=base,
        fingerprint=cast(Base, fingerprint(config, params)),
        by=by,
        heads=heads,
        neurons=neurons,
    )


def read(folder: Path) -> tuple[Document, Kept]:
    """The pruning.json in the folder of a pruned checkpoint.

    Raises:
      InputError: where there is none, or it is damaged.
    """
    file = folder / FILE
    found = documents.read_json(file, f"{folder}: has no {FILE}; give the folder that `jaxpeft prune` made", Document)
    both = []
    for name in ("heads", "neurons"):
        rows = found[name]  # type: ignore[literal-required]
        widths = {len(row) for row in rows}
        if len(widths) != 1 or not all(row == sorted(set(row)) for row in rows):
            raise InputError(f"{file}: {name}: each layer should have equally many numbers, in ascending order")
        both.append(np.asarray(rows, np.int32))
    return found, Kept(*both)


def check_fits(where: str, kept: Kept, config: Any) -> None:
    """Raises InputError where what was kept is not of a base of this configuration; the line begins with `where`."""
    sizes = {"heads": config.num_key_value_heads, "neurons": config.intermediate_size}
    for name, at in kept._asdict().items():
        if len(at) != config.num_hidden_layers or at.max() >= sizes[name]:
            raise InputError(
                f"{where}: {name} up to {at.max()} of {len(at)} layers, and the base has {sizes[name]} in each of "
                f"{config.num_hidden_layers}"
            )


def _checked(model: Model, params: Mapping[str, Any]) -> tree.Flat:
    check_family(model.config)
    flat = tree.flatten(params)
    if packed := [path for path, leaf in flat.items() if is_packed(leaf)]:
        raise InputError(f"{packed[0]}: is packed, and its heads or neurons cannot be cut out; prune the plain base")
    return flat


def check_family(config: Any) -> None:
    """Raises InputError for a model that has no heads and neurons as these are."""
    kind = getattr(config, "model_type", None)
    if kind not in MODEL_TYPES:
        raise InputError(f"a model of type {kind} cannot be pruned; {', '.join(MODEL_TYPES)} can")


def _magnitude(config: Any, flat: tree.Flat) -> Scores:
    sums: dict[str, Any] = {"heads": 0.0, "neurons": 0.0}
    everything = Kept(*(np.arange(n)[None] for n in (config.num_key_value_heads, config.intermediate_size)))
    for path, leaf in flat.items():
        place = _place(path, config, everything)
        if place is None or not path.endswith("/kernel"):
            continue
        what = CUT[path.split("/")[-2]][0]
        groups = config.num_key_value_heads if what == "heads" else config.intermediate_size
        squares = np.square(np.asarray(leaf).astype(np.float32)).sum(-2 if place.axis == -1 else -1)
        sums[what] = sums[what] + squares.reshape(len(squares), groups, -1).sum(-1)
    return Scores(np.sqrt(sums["heads"]), np.sqrt(sums["neurons"]))


class Gate(nn.Module):
    """A product whose inputs come in `groups`, each scaled by a number of its own: m (groups,), ones, in float32."""

    stacked = True  # it only hands the kernel on

    groups: int
    differentiated: bool = True

    @nn.compact
    def __call__(self, inner: Callable, x: jax.Array, site: sites.Site, ctx: Context) -> jax.Array:
        m = self.param("m", nn.initializers.ones, (self.groups,))

        def scaled(x, m):
            wide = x.reshape(*x.shape[:-1], self.groups, -1).astype(jnp.float32) * m[:, None]
            return wide.reshape(x.shape).astype(x.dtype)

        if self.differentiated:  # x is kept, and not its float32
            scaled = jax.checkpoint(scaled, prevent_cse=False)
        return inner(scaled(x, m))


def _taylor(model: Model, params: Mapping[str, Any], batches: Iterable[Batch]) -> Scores:
    c = model.config
    groups = {"o_proj": c.num_attention_heads, "down_proj": c.intermediate_size}
    gated = sites.attach(
        model,
        "gate",
        lambda path: Gate(groups[path.rpartition("/")[2]]),
        lambda params: sites.find(params, list(READS), "pruning"),
    )
    flat = tree.flatten(gated.init(jax.random.key(0), dict(params)))
    gates = {path: leaf for path, leaf in flat.items() if path.endswith("/gate/m")}
    rest = {path: leaf for path, leaf in flat.items() if path not in gates}

    @jax.jit
    def gradient(gates, rest, batch):
        return jax.grad(lambda gates: completion_loss(gated, tree.combine(gates, rest), batch)[0])(gates)

    sums, count = jax.tree.map(jnp.zeros_like, gates), 0
    for batch in batches:
        sums = jax.tree.map(lambda total, g: total + jnp.abs(g), sums, gradient(gates, rest, batch))
        count += 1
    if not count:
        raise InputError("by 'taylor': needs batches of data; there is none")
    means = {path.split("/")[-3]: np.asarray(total, np.float32) / count for path, total in sums.items()}
    heads = means["o_proj"].reshape(c.num_hidden_layers, c.num_key_value_heads, -1).sum(-1)
    return Scores(heads, means["down_proj"])
