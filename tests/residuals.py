"""What a backward pass keeps, counted on the vjp's own closure, and what a program makes: no compiler, no timing."""

import jax

from jaxpeft import tree
from jaxpeft.train.loss import completion_loss
from pallas_kernels.platform import FLOPS


def saved(model, trainable, frozen, batch, of="hidden", key=None):
    """Shapes and dtypes of everything that the backward pass of hidden states (or the loss) keeps."""

    def function(trainable, frozen):
        def value(trainable):
            params = tree.combine(trainable, frozen)
            if of == "hidden":
                return model.hidden(params, batch, key)
            return completion_loss(model, params, batch, key)[0]

        return jax.vjp(value, trainable)[1]

    return jax.tree.leaves(jax.eval_shape(function, trainable, frozen))


def bytes_per_token(model, trainable, frozen, make_batch, of="hidden"):
    """Slope of the kept bytes in the number of tokens: weights and constants cancel."""
    small, large = make_batch(rows=2), make_batch(rows=6)
    tokens = large["tokens"].size - small["tokens"].size
    kept = [tree.num_bytes(saved(model, trainable, frozen, batch, of)) for batch in (small, large)]
    return (kept[1] - kept[0]) / tokens


def equations(jaxpr):
    """All equations of a jaxpr and of the jaxprs inside it."""
    for equation in jaxpr.eqns:
        yield equation
        for parameter in jax.tree.leaves(equation.params, is_leaf=lambda x: hasattr(x, "eqns") or hasattr(x, "jaxpr")):
            inner = getattr(parameter, "jaxpr", parameter)
            if hasattr(inner, "eqns"):
                yield from equations(inner)


def intermediates(jaxpr):
    """Shapes of all values in a jaxpr and in the jaxprs inside it."""
    return [variable.aval.shape for equation in equations(jaxpr) for variable in equation.outvars]


def products(jaxpr):
    """Shapes of the operands and the result of every matrix product."""
    dots = [equation for equation in equations(jaxpr) if equation.primitive.name == "dot_general"]
    return [[variable.aval.shape for variable in (*dot.invars, *dot.outvars)] for dot in dots]


def operands(jaxpr):
    """The operands of every matrix product and of every operation that has kernels, with shapes and dtypes."""
    read = [equation for equation in equations(jaxpr) if equation.primitive.name in {"dot_general", *FLOPS}]
    return [[variable.aval for variable in equation.invars] for equation in read]
