"""What tests of networks beside a frozen backbone share: products on the trace, memory per layer, frozen states."""

import jax
import numpy as np

import jaxpeft as jp
from jaxpeft import tree, zeroth_order
from jaxpeft.backward.flops import count_flops
from tests import residuals, tiny


def start(method, dtype=np.float32, **changes):
    """(model, trainable, frozen) of the tiny decoder under a method."""
    base, params = tiny.model(dtype, **changes)
    return jp.setup(method, base, params, jax.random.key(0))


def moved(trainable, scale=0.3):
    """Trainable leaves away from their start, so that nothing is zero or symmetric by accident."""
    return {
        path: leaf + scale * jax.random.normal(jax.random.key(len(path)), leaf.shape) * (leaf.std() + 0.1)
        for path, leaf in trainable.items()
    }


def noisy(leaves, words, eps):
    """Whole leaves + eps z of MeZO, by the numbers of their elements."""
    found = {}
    for path, leaf in leaves.items():
        along, index = zeroth_order.direction(words, path, leaf, {}, zeroth_order.Settings("mezo", eps))
        found[path] = leaf + eps * along(leaf, index)
    return found


def states(stack, params, batch):
    """h_0 .. h_L of the stack, block by block without a scan, and the context."""

    @jax.jit
    def every(params):
        x, ctx = stack.embed(params, batch, None)
        found = [x]
        for i in range(len(jax.tree.leaves(params["layers"])[0])):
            layer = jax.tree.map(lambda leaf, i=i: leaf[i], params["layers"])
            found.append(stack.block(layer, found[-1], ctx.at(i), None, "layers")[0])
        return found, ctx

    return every(params)


def gradient_trace(model, trainable, frozen, batch, of=None):
    """The jaxpr of the gradient of a sum over the stream (or over what `of` makes of model and parameters)."""

    def value(trainable, frozen):
        params = tree.combine(trainable, frozen)
        return (of or (lambda model, params: model.hidden(params, batch)))(model, params).sum()

    return jax.make_jaxpr(jax.grad(value))(trainable, frozen)


def gradient_flops(model, trainable, frozen, batch, of=None):
    """Of its matrix products."""
    return count_flops(gradient_trace(model, trainable, frozen, batch, of))


def forward_flops(base, params, batch):
    """Of the base model's stream."""
    return count_flops(jax.make_jaxpr(lambda params: base.hidden(params, batch))(params))


def transposed_products(jaxpr, kernels):
    """dot_generals that contract the second axis of a matrix of one of these shapes, or whose result has one."""
    found = []
    for equation in equations(jaxpr.jaxpr):
        if equation.primitive.name == "dot_general":
            (contracted, _) = equation.params["dimension_numbers"]
            for variable, axes in zip(equation.invars, contracted, strict=True):
                if variable.aval.shape in kernels and tuple(axes) == (1,):
                    found.append(equation)
            if equation.outvars[0].aval.shape in kernels:
                found.append(equation)
    return found


def equations(jaxpr):
    """All equations of a jaxpr and of the jaxprs inside it."""
    for equation in jaxpr.eqns:
        yield equation
        for parameter in jax.tree.leaves(equation.params, is_leaf=lambda x: hasattr(x, "eqns") or hasattr(x, "jaxpr")):
            inner = getattr(parameter, "jaxpr", parameter)
            if hasattr(inner, "eqns"):
                yield from equations(inner)


def backbone_kernels(params):
    """Shapes (n, m) of the layers' kernels."""
    return {leaf.shape[1:] for path, leaf in tree.flatten(params["layers"]).items() if path.endswith("/kernel")}


def kept_per_layer(method, **changes):
    """Bytes per token that one more layer keeps, by the difference of two depths."""
    kept = [
        residuals.bytes_per_token(*start(method, num_hidden_layers=count, **changes), tiny.batch) for count in (3, 7)
    ]
    return (kept[1] - kept[0]) / 4


def padded(rows=3, length=16, seed=0):
    """(batch, the same with other tokens in its padding, whether a position counts (B, S))."""
    batch = tiny.batch(rows, length, seed)
    lengths = np.linspace(length // 3, length, rows).astype(int)
    counts = np.arange(length) < lengths[:, None]
    batch = {**batch, "segment_ids": counts.astype(np.int32)}
    other = np.random.default_rng(seed + 1).integers(0, 97, batch["tokens"].shape).astype(np.int32)
    return batch, {**batch, "tokens": np.where(counts, batch["tokens"], other)}, counts
