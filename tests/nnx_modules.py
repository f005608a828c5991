"""NNX modules of every kind that the tests adapt."""

import jax
import jax.numpy as jnp
from flax import nnx

import jaxpeft as jp
from tests.modules import X, moved


class Attends(nnx.Module):
    """Attention of several heads, and a head on its flat result."""

    def __init__(self, rngs):
        self.attention = nnx.MultiHeadAttention(2, 8, qkv_features=12, decode=False, rngs=rngs)
        self.out = nnx.LinearGeneral((6, 8), 5, axis=(-2, -1), rngs=rngs)

    def __call__(self, x):
        return self.out(x + self.attention(x))


class Block(nnx.Module):
    """A layer of several kinds of axes, with dropout."""

    def __init__(self, rngs):
        self.split = nnx.LinearGeneral(8, (2, 4), rngs=rngs)
        self.join = nnx.LinearGeneral((2, 4), 8, axis=(-2, -1), use_bias=False, rngs=rngs)
        self.dropout = nnx.Dropout(0.2, rngs=rngs)

    def __call__(self, x):
        heads = self.split(x).reshape(*x.shape[:-1], *self.split.kernel.shape[1:])  # as modules ask for their sizes
        return x + self.dropout(self.join(nnx.relu(heads)))


class Scanned(nnx.Module):
    """Layers stacked by `nnx.vmap`, run by `nnx.scan`, each computed again in the backward pass."""

    def __init__(self, rngs):
        self.layers = nnx.vmap(Block)(rngs.fork(split=3))
        self.head = nnx.Linear(8, 4, rngs=rngs)

    def __call__(self, x):
        layer = nnx.remat(lambda x, layer: layer(x))
        return self.head(nnx.scan(layer, in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)(x, self.layers))


class Listed(nnx.Module):
    """Lists, plain and NNX's, and a dict."""

    def __init__(self, rngs):
        self.layers = nnx.List([nnx.Linear(8, 8, rngs=rngs), nnx.Linear(8, 8, use_bias=False, rngs=rngs)])
        self.plain = nnx.data([nnx.Linear(8, 8, rngs=rngs)])
        self.named = nnx.Dict(out=nnx.Linear(8, 3, rngs=rngs))

    def __call__(self, x):
        for layer in (*self.layers, *self.plain):
            x = nnx.tanh(layer(x))
        return self.named.out(x)


class Equations(nnx.Module):
    """`nnx.Einsum`, one of which is no matrix from its first axis to its last; a convolution; a table."""

    def __init__(self, rngs):
        self.heads = nnx.Einsum("btd,dnh->btnh", (8, 2, 4), (2, 4), rngs=rngs)
        self.join = nnx.Einsum("btnh,nhd->btd", (2, 4, 8), rngs=rngs)
        self.diagonal = nnx.Einsum("btd,td->btd", (6, 8), rngs=rngs)
        self.conv = nnx.Conv(8, 8, (3,), rngs=rngs)
        self.table = nnx.Embed(9, 8, rngs=rngs)

    def __call__(self, x):
        x = self.diagonal(self.join(self.heads(x)))
        return self.table.attend(x + self.conv(x))


class Ensemble(nnx.Module):
    """Members under `nnx.vmap`, each on the same input."""

    def __init__(self, rngs):
        self.members = nnx.vmap(lambda rngs: nnx.Linear(8, 5, rngs=rngs))(rngs.fork(split=3))

    def __call__(self, x):
        return nnx.vmap(lambda member, x: member(x), in_axes=(0, None))(self.members, x)


class Shared(nnx.Module):
    """One module under two names, one kernel in two modules, and one that never runs."""

    def __init__(self, rngs):
        self.first = nnx.Linear(8, 8, rngs=rngs)
        self.second = self.first
        self.third, self.tied = nnx.Linear(8, 8, rngs=rngs), nnx.Linear(8, 8, rngs=rngs)
        self.tied.kernel = self.third.kernel
        self.idle = nnx.Linear(8, 8, rngs=rngs)

    def __call__(self, x):
        return self.tied(self.third(self.second(nnx.relu(self.first(x)))))


class Normed(nnx.Module):
    """Batch statistics, dropout, and a count of the calls."""

    def __init__(self, rngs):
        self.hidden = nnx.Linear(8, 16, rngs=rngs)
        self.norm = nnx.BatchNorm(16, rngs=rngs)
        self.dropout = nnx.Dropout(0.5, rngs=rngs)
        self.calls = nnx.Cache(jnp.zeros((), jnp.int32))
        self.out = nnx.Linear(16, 3, rngs=rngs)

    def __call__(self, x):
        self.calls.set_value(self.calls[...] + 1)
        return self.out(self.dropout(self.norm(self.hidden(x))))


MODULES = {
    "attention": (Attends, {"attention/query", "attention/key", "attention/value", "attention/out", "out"}),
    "scanned": (Scanned, {"layers/split", "layers/join", "head"}),
    "listed": (Listed, {"layers/0", "layers/1", "plain/0", "named/out"}),
    "equations": (Equations, {"heads", "join"}),
    "ensemble": (Ensemble, {"members"}),
    "normed": (Normed, {"hidden", "out"}),
}


def adapt(method, module):
    """(model, moved trainable leaves, frozen ones, the leaves at the start)."""
    base, params = jp.from_nnx(module)
    model, trainable, frozen = jp.setup(method, base, params, jax.random.key(0))
    return model, moved(trainable), frozen, trainable


def evaluated(module, x=X):
    """What a module computes in evaluation mode."""
    module = nnx.clone(module)
    module.eval()
    return module(x)
