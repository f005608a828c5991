"""CoLM: of a large batch the rows of a coreset train, chosen by what moves the last layer's loss.

    a batch of B rows        no gradient: g_i = (l_i(theta + eps z) - l_i(theta - eps z)) / (2 eps)
    as Adam would step       m_i = b1 m + (1 - b1) g_i,   v_i = b2 v + (1 - b2) g_i^2
                             s_i = m_i / (1 - b1^t) / (sqrt(v_i / (1 - b2^t)) + 1e-8)
    small sources            all of their rows are kept
    each other source        its share of the ratio B rows that are left, which greedily enlarge
                             f(S) = sum_i max_{j in S} (d - |s_i - s_j|),   d the largest distance in the source
    the chosen rows          one ordinary step; m, v <- the means of their m_i, v_i

l_i is the loss of row i, the mean over its tokens that count; theta are leaves of the last layer alone, those that
train at its value projection. So the B rows pass the other layers once, a few at a time, and the last one twice. What
is kept for the backward pass is that of ratio B rows.

z is the same in all steps and for all rows. The published features g_i z, of thousands of numbers, their moments, and
the largest coordinates of them are then one number a row times the same vector: their distances in L1 are |s_i - s_j|
times a constant of the run, but for Adam's 1e-8, and so s_i is all that is computed and kept. With `directions=n` there
are n numbers a row, of n vectors z.

A row's source is what the batch says (`sources`, see `jaxpeft.data.batches`): the file of a folder or the row's field
`source`. A packed row is of the source that most of its tokens are of; rows that are single examples are `--no-pack`.

Paper: Nguyen et al. 2024, "Mini-batch Coresets for Memory-efficient Language Model Training on Data Mixtures",
arXiv:2407.19580; constants are those of its published code. Deviations: that code is told which sources are small; here
they are those that have fewer rows of the batch than `small` times the mean of its sources. Of rows that enlarge f
alike the first is chosen. Losses are without dropout.
"""

from __future__ import annotations

import re
import zlib
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxpeft import constraints, tree
from jaxpeft.about import About, Promises
from jaxpeft.errors import InputError
from jaxpeft.method import FROZEN, MOVED, Leaves, Method, Moment, Objective, Spec, View, layer_by_layer, told
from jaxpeft.model import Batch, Model, entered, joined, runs_through_blocks
from jaxpeft.quant import is_packed
from jaxpeft.train.loss import by_row, weights_of

BETAS, EPSILON = (0.9, 0.999), 1e-8  # Adam's, of the features
GROUP = 4096  # tokens of the rows that pass the layers together where no gradient is taken
# Gains that are nearer to each other, in parts of a source's largest distance, are equal, and the first row is chosen:
# of numbers on a line the two in the middle enlarge f alike, and rounding would choose.
TIE = 1e-4
_VALUE = re.compile(r"/(v_proj|value)/")
_STATE = ("mean", "square", "steps")


def colm(
    ratio: float = 0.5, eps: float = 1e-3, directions: int = 1, small: float = 1.0, weighted: bool = False
) -> Method:
    """CoLM on what the members before it train.

    Args:
      ratio: of a batch's rows, those that train.
      eps: how far the two evaluations lie from theta.
      directions: n, vectors z, each of two evaluations of the last layer.
      small: a source is small, and all its rows are kept, if it has fewer of the batch than this times the mean of its
        sources; 0: none is.
      weighted: whether a chosen row counts as many times as there are rows that it stands for.

    Returns:
      The method, a modifier: `lora+colm`.

    Raises:
      InputError: for an argument outside its range. When a step is traced: for a chain that trains nothing in the last
        layer, or rows that a micro-batch or a mesh does not divide.
    """
    config = dict(locals())
    if not 0 < ratio <= 1:
        raise InputError(f"colm: ratio {ratio} must be above 0 and at most 1")
    if not 0 < eps < float("inf"):
        raise InputError(f"colm: eps {eps} must be a finite number above 0")
    if directions < 1:
        raise InputError(f"colm: directions {directions} must be at least 1")
    if not 0 <= small < float("inf"):
        raise InputError(f"colm: small {small} must be a finite number of at least 0")

    def forward(model: Model, view: View) -> Model:
        del view
        if not model.stack.layered:
            raise InputError("colm: the model shows no layers, of which the last one says how rows differ")
        zeros = {"mean": jnp.zeros(directions), "square": jnp.zeros(directions), "steps": jnp.zeros((), jnp.int32)}
        return model._replace(init=lambda key, params: {"colm": zeros, **model.init(key, params)})

    @layer_by_layer
    def gradient(objective: Objective, view: View) -> Objective:
        paths = compared(view)

        def value_and_grad(trainable, rest, batch, key, opt_state):
            count = chosen_count(ratio, batch, objective.parts)
            slopes = _slopes(objective, paths, eps, directions, count // objective.parts, trainable, rest, batch)
            before = Moments(*(rest[f"colm/{name}"] for name in _STATE))
            features, means, squares = before.features(slopes)
            found = coreset(features, _sources(batch), _lengths(batch) > 0, count, small)
            part = jax.tree.map(lambda x: constraints.rows(jnp.take(x, found.rows, axis=0)), dict(batch))
            if weighted:
                name = weights_of(batch)
                part[name] = part[name] * found.sizes.reshape(-1, *[1] * (part[name].ndim - 1))
            (value, aux), grads = objective.value_and_grad(trainable, rest, part, key, opt_state)
            after = before.after(means, squares, found.ours)
            return (value, {**aux, "colm/mean": after.mean, "colm/square": after.square}), grads

        return objective._replace(value_and_grad=value_and_grad)

    def move(leaves: Leaves, moment: Moment) -> Leaves:
        own = {path: told("colm", moment.aux, path) for path in ("colm/mean", "colm/square")}
        own["colm/steps"] = leaves.moved["colm/steps"] + 1
        return leaves._replace(moved={**leaves.moved, **own})

    return Method(
        forward=forward,
        roles=lambda others: lambda path: MOVED if path.startswith("colm/") else others(path),
        gradient=gradient,
        move=move,
        merge=lambda params: {name: value for name, value in params.items() if name != "colm"},
        specs=(Spec("colm", config),),
        alone=lambda path: FROZEN,
    )


def chosen_count(ratio: float, batch: Batch, parts: int) -> int:
    """Rows that are chosen of a batch, in so many micro-batches.

    Raises:
      InputError: for rows that the micro-batches, or the devices of a mesh, do not divide.
    """
    rows, tokens = _shape(batch)
    count, shards = max(1, round(ratio * rows)), constraints.shards(rows, tokens)[0]
    if count % (parts * shards):
        devices = f" on each of the mesh's {shards} parts of it" if shards > 1 else ""
        raise InputError(
            f"colm: ratio {ratio} of a batch of {rows} rows is {count}, which {parts} micro-batches{devices} do not "
            "divide; change --batch-size or ratio"
        )
    return count


# Features: how much a row's loss changes with theta.


def compared(view: View) -> list[str]:
    """The leaves theta, of the stack that the last layer is in.

    Of what trains at the value projection, B where there is one; without that, all that trains in the layer.

    Raises:
      InputError: where nothing does.
    """
    last = tree.segments(tree.unflatten(dict(view.shapes)))[-1][0]
    names = "+".join(spec.name for spec in view.specs)

    def changes(path, leaf):
        role = view.role(path)
        if role.host:
            raise InputError(
                f"{names}: colm does not run layers that lie in the host's memory; put mezo in zo2's place"
            )
        number = not is_packed(leaf) and jnp.issubdtype(leaf.dtype, jnp.floating)
        return number and (role.name == "trained" or role == MOVED)  # not a stack with masters that train in its place

    own = [path for path, leaf in view.shapes.items() if path.startswith(f"{last}/") and changes(path, leaf)]
    if not own:
        raise InputError(
            f"{names}: colm compares rows by what trains in the last layer in each step, and nothing does; as lora+colm"
        )
    at_value = [path for path in own if _VALUE.search(path)] or own
    return [path for path in at_value if path.endswith("/b")] or at_value


def _slopes(
    objective: Objective, paths: list[str], eps: float, directions: int, most: int, trainable, rest, batch
) -> jax.Array:
    """g (B, n) of a batch, at most so many rows at a time."""
    rows, tokens = _shape(batch)
    parts, shards = objective.parts, constraints.shards(rows, tokens)[0]
    for count in range(parts, rows + 1):
        if rows % (count * shards) == 0:
            parts = count
            if rows // count <= most and rows // count * tokens <= GROUP * shards:
                break
    split = jax.tree.map(lambda x: x.reshape(rows // parts, parts, *x.shape[1:]).swapaxes(0, 1), dict(batch))
    points = [(i, sign * eps) for i in range(directions) for sign in (1.0, -1.0)]
    which, how_far = (jnp.array(column) for column in zip(*points, strict=True))

    def of_part(_, part):
        losses = _evaluated(objective, paths, trainable, rest, part)
        found = jax.lax.scan(lambda _, point: (None, losses(*point)), None, (which, how_far))[1]
        return None, ((found[0::2] - found[1::2]) / (2 * eps)).T

    found = jax.lax.scan(of_part, None, split)[1]  # (parts, rows of each, n)
    return found.swapaxes(0, 1).reshape(rows, directions)


def _evaluated(objective: Objective, paths: list[str], trainable, rest, batch):
    """(the number of a z, how far) -> the rows' losses (b,) with theta so far along z."""
    seen: list[Model] = []
    objective.on(lambda model: seen.append(model) or model)  # type: ignore[func-returns-value]
    (model,) = seen  # as the chain has made it
    leaves = {**rest, **trainable}

    def whole(number, amount):  # a run that may read its layers in any way
        moved = {path: leaves[path].at[-1].add(_along(path, leaves[path], number, amount)) for path in paths}
        ours = {path: moved.get(path, leaf) for path, leaf in trainable.items()}
        return _losses(objective, ours, {path: moved.get(path, leaf) for path, leaf in rest.items()}, batch)

    if not runs_through_blocks(model.stack.run):
        return whole
    x, ctx, params, said = before_last(model, tree.combine(trainable, rest), batch)
    segment, first, end = tree.segments(params)[-1]
    layer = constraints.gathered(_layer(params[segment], end - 1 - first), segment)

    def last(number, amount):
        flat = tree.flatten(layer)
        for path in paths:
            own = path.removeprefix(f"{segment}/")
            flat[own] = flat[own] + _along(path, leaves[path], number, amount)
        y, sums = model.stack.block(tree.unflatten(flat), x, ctx.at(jnp.int32(end - 1)), None, segment)
        sums = joined([*said, jax.tree.map(lambda s: s[None], sums)])
        run = lambda *_: (constraints.rows(y), sums)
        changed = objective.on(lambda model: model._replace(stack=model.stack._replace(run=run)))
        return _losses(changed, trainable, rest, batch)

    return last


def before_last(model: Model, params: tree.Params, batch: Batch) -> tuple[jax.Array, Any, tree.Params, list[Any]]:
    """(the stream in front of the last layer, its context, the parameters that layers read, what the others say)."""
    x, ctx, params = entered(model.stack, params, batch)
    segments, said = tree.segments(params), []
    for number, (segment, first, end) in enumerate(segments):
        stop = end - 1 if number == len(segments) - 1 else end

        def step(x, index, segment=segment, first=first):
            layer = constraints.gathered(_layer(params[segment], index - first), segment)
            x, sums = model.stack.block(layer, x, ctx.at(index), None, segment)
            return constraints.rows(x), sums

        x, sums = jax.lax.scan(step, x, jnp.arange(first, stop, dtype=jnp.int32))
        said.append(sums)
    return x, ctx, params, said


def _losses(objective: Objective, trainable, rest, batch: Batch) -> jax.Array:
    """The loss of each row (b,): the mean over what counts of it."""
    sums = by_row(lambda batch: objective.value(trainable, rest, batch, None), batch)
    return sums / jnp.maximum(_lengths(batch), 1e-9)


def _layer(stack: Any, index: Any) -> Any:
    """A layer's parameters, of a stack that is not copied."""
    return jax.tree.map(lambda leaf: jax.lax.dynamic_index_in_dim(leaf, index, keepdims=False), stack)


def _along(path: str, leaf: jax.Array, number: Any, amount: Any) -> jax.Array:
    """amount z of one layer's leaf; z is a function of its path and number alone."""
    key = jax.random.fold_in(jax.random.key(zlib.crc32(path.encode())), number)
    return (amount * jax.random.normal(key, leaf.shape[1:])).astype(leaf.dtype)


def _shape(batch: Batch) -> tuple[int, int]:
    """Rows, and tokens of each; one where there are none."""
    return len(batch[weights_of(batch)]), jnp.shape(batch["tokens"])[1] if "tokens" in batch else 1


def _lengths(batch: Batch) -> jax.Array:
    """How much of each row counts, (B,)."""
    weights = batch[weights_of(batch)]
    return weights.reshape(len(weights), -1).sum(-1)


def _sources(batch: Batch) -> jax.Array:
    """(B,); a batch that names none is of one."""
    return batch.get("sources", jnp.zeros(batch[weights_of(batch)].shape[:1], jnp.int32))


class Moments(NamedTuple):
    """Adam's of the features, for each z: those of the rows that were chosen.

    mean, square: (n,).  steps: () int32.
    """

    mean: jax.Array
    square: jax.Array
    steps: jax.Array

    def features(self, slopes: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """s of g (B, n), and the means and squares as each row would leave them."""
        (b1, b2), t = BETAS, self.steps + 1
        means = b1 * self.mean + (1 - b1) * slopes
        squares = b2 * self.square + (1 - b2) * jnp.square(slopes)
        return means / (1 - b1**t) / (jnp.sqrt(squares / (1 - b2**t)) + EPSILON), means, squares

    def after(self, means: jax.Array, squares: jax.Array, ours: jax.Array) -> Moments:
        """After a step on the rows that `ours` (B,) says; without any as they were."""
        count = jnp.sum(ours)
        mean = lambda x, old: jnp.where(count > 0, (x * ours[:, None]).sum(0) / jnp.maximum(count, 1), old)
        return Moments(mean(means, self.mean), mean(squares, self.square), self.steps + 1)


# The coreset.


class Coreset(NamedTuple):
    """Chosen rows.

    rows: (K,) int32, ascending.  sizes: (K,) float32, how many rows each stands for.
    ours: (B,) bool, the rows that were chosen for their features.
    """

    rows: jax.Array
    sizes: jax.Array
    ours: jax.Array


def coreset(features: jax.Array, sources: jax.Array, there: jax.Array, count: int, small: float) -> Coreset:
    """`count` of B rows.

    Args:
      features: (B, n), which distances in L1 are of.
      sources: (B,) int32.
      there: (B,) bool: rows that are none are chosen last.
      count: K.
      small: of the mean of the sources' rows, below which all of a source are kept.
    """
    same = (sources[:, None] == sources[None, :]) & there[:, None] & there[None, :]
    rows, sizes = jnp.arange(len(sources)), same.sum(1)
    opens = there & (jnp.argmax(same, axis=1) == rows)  # the first row of each source
    mean = there.sum() / jnp.maximum(opens.sum(), 1)
    of_small = there & (sizes < small * mean)
    kept = of_small & (jnp.cumsum(of_small) <= count)
    ours, quotas = there & ~of_small, jnp.zeros_like(sizes)
    quotas = _quotas(sizes, ours, opens & ours, jnp.argmax(same, axis=1), count - kept.sum())

    distances = jnp.abs(features[:, None] - features[None, :]).sum(-1)
    widest = jnp.max(jnp.where(same, distances, 0), axis=1)
    widest = jnp.max(jnp.where(same, widest[None, :], 0), axis=1)  # of the source
    likeness = jnp.where(same, widest[:, None] - distances, 0)

    def one(_, found):
        taken, best, used = found
        gains = jnp.maximum(likeness - best[:, None], 0).sum(0)
        free = ours & ~taken & (used < quotas)
        more = jnp.any(free)
        most = jnp.max(jnp.where(same & free[None, :], gains[None, :], 0), axis=1)  # of the source
        row = jnp.argmax(free & (gains + TIE * widest >= most))
        best = jnp.where(more, jnp.maximum(best, likeness[:, row]), best)
        return taken.at[row].set(taken[row] | more), best, used + (more & same[row])

    start = jnp.zeros_like(there), jnp.zeros(len(rows)), jnp.zeros_like(sizes)
    chosen = jax.lax.fori_loop(0, count, one, start)[0]
    picked = kept | chosen
    first = jnp.sort(jnp.argsort(~picked, stable=True)[:count]).astype(jnp.int32)
    return Coreset(first, _stands_for(likeness, same, ours, chosen, rows)[first], chosen)


def _quotas(sizes: jax.Array, ours: jax.Array, opens: jax.Array, source: jax.Array, left: jax.Array) -> jax.Array:
    """Rows (B,) to choose of each row's source: its share of `left`, rounded down, and one more of the smallest."""
    share = jnp.where(ours, jnp.minimum(sizes * left // jnp.maximum(ours.sum(), 1), sizes), 0)
    missing = left - jnp.where(opens, share, 0).sum()
    rows = jnp.arange(len(sizes))
    rank = jnp.where(opens, share * len(sizes) + rows, jnp.iinfo(jnp.int32).max)
    before = (rank[None, :] < rank[source][:, None]).sum(1)
    return jnp.where(ours, share + (before < missing), 0)


def _stands_for(likeness, same, ours, chosen, rows) -> jax.Array:
    """(B,): how many rows are nearest to each chosen one, itself among them; 1 for all that are kept."""
    near = jnp.argmax(jnp.where(same & chosen[None, :], likeness, -1), axis=1)
    near = jnp.where(chosen, rows, near)
    return jnp.where(ours, jnp.zeros(len(rows)).at[near].add(ours), 1.0)


ABOUT = About(
    summary="of a large batch the rows of a coreset train, chosen by zeroth-order features of the last layer",
    level="step",
    trains="what the chain trains, on a share of the batch's rows",
    saves="activations of the rows that are not chosen; their forward pass keeps none",
    reference="Nguyen et al. 2024, arXiv:2407.19580",
    example={"ratio": 0.5},
    promises=Promises(block_bytes=lambda *_, **__: 0),
    within="lora+colm",
)
