"""planned_scan, and models whose scans are found: values, gradients, what is kept and by which names; refusals."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

import jaxpeft as jp
from jaxpeft.backward.plan import parse
from jaxpeft.backward.scans import in_scans
from jaxpeft.backward.segments import recorded
from tests.modules import X, losses, mean_square, moved
from tests.nnx_modules import Scanned

LAYERS, WIDTH, INNER = 4, 8, 24
KEYS = jax.random.split(jax.random.key(1), 4)
PARAMS = {
    "up": 0.3 * jax.random.normal(KEYS[0], (LAYERS, WIDTH, INNER)),
    "down": 0.3 * jax.random.normal(KEYS[1], (LAYERS, INNER, WIDTH)),
}
GAIN = 1 + 0.1 * jax.random.normal(KEYS[2], (WIDTH,))
INPUT = X.nbytes * LAYERS
HIDDEN = X.nbytes // WIDTH * INNER * LAYERS


def block(layer, x, ctx):
    """A layer whose products stand in a function that it calls through jit and checkpoint, and have no names."""

    @jax.jit
    def mlp(x):
        return jax.nn.gelu(jnp.dot(x * ctx, layer["up"])) @ layer["down"]

    return x + jax.checkpoint(mlp)(x)


def named(layer, x, ctx):
    """A layer that names one product."""
    hidden = checkpoint_name((x * ctx) @ layer["up"] + 1, "hidden")
    return x + jnp.tanh(hidden) @ layer["down"]


def gradients(loss, *args):
    """(gradients of all args, {segment: what it keeps})."""
    with recorded() as segments:
        found = jax.jit(jax.grad(loss, argnums=tuple(range(len(args)))))(*args)
    return found, {name: segment.kept_bytes() for name, segment in segments.items()}


def assert_equal(a, b):
    """Every leaf, to float32's rounding of its largest number."""
    largest = max(float(jnp.max(jnp.abs(y))) for y in jax.tree.leaves(b))
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-5, atol=2e-6 * largest)


def square(x):
    """A loss."""
    return sum(jnp.sum(leaf**2) for leaf in jax.tree.leaves(x))


@pytest.mark.parametrize("of", [block, named])
@pytest.mark.parametrize("save", ["everything", "matmuls", "blocks", "offload"])
def test_gradients_are_those_of_a_scan(of, save):
    """Of the parameters, of what is closed over, of x; what is kept is what the plan says."""

    def loss(scanned):
        return lambda params, gain, x: square(scanned(lambda layer, x, ctx: of(layer, x, ctx - gain), params, x))

    plain = loss(lambda f, params, x: jax.lax.scan(lambda x, layer: (f(layer, x, 1.0), None), x, params)[0])
    wanted = jax.jit(jax.grad(plain, argnums=(0, 1, 2)))(PARAMS, GAIN, X)
    got, kept = gradients(loss(lambda f, params, x: jp.planned_scan(f, params, x, 1.0, save)), PARAMS, GAIN, X)
    assert_equal(got, wanted)
    if save == "everything":
        return
    where = kept["layers"]
    assert where["device"].pop("block_input") == INPUT
    (name, size), *others = {**where["device"], **where["host"]}.items() if save != "blocks" else [("", 0)]
    assert not others
    assert size == (0 if save == "blocks" else HIDDEN)
    assert bool(where["host"]) == (save == "offload")
    if save != "blocks":
        assert name == "hidden" if of is named else name.startswith("planned_test.py:") and name.endswith("mlp")


def test_a_compiled_step_takes_what_the_plan_keeps():
    """Temporaries of the gradient: fewer than of `lax.scan`; two plans differ by what one keeps, and a layer's work."""
    x = jnp.ones((64, 16, WIDTH))

    def temporaries(loss):
        return jax.jit(jax.grad(loss)).lower(PARAMS).compile().memory_analysis().temp_size_in_bytes

    scan = temporaries(lambda params: square(jax.lax.scan(lambda x, layer: (named(layer, x, 1.0), None), x, params)[0]))
    matmuls, blocks = (
        temporaries(lambda params, save=save: square(jp.planned_scan(named, params, x, 1.0, save)))
        for save in ("matmuls", "blocks")
    )
    hidden = x.nbytes // WIDTH * INNER * LAYERS
    assert blocks < matmuls < scan
    assert 0.98 * hidden <= matmuls - blocks <= hidden + 2 * hidden / LAYERS


def test_products_are_called_as_their_modules():
    """Without the modules that all of them run in; a name of the user's own stays."""

    class Layer(nn.Module):
        @nn.compact
        def __call__(self, x):
            y = nn.MultiHeadDotProductAttention(2, name="attention")(x)
            hidden = checkpoint_name(nn.Dense(INNER, name="up")(y), "hidden")
            return x + nn.Dense(WIDTH, name="down")(nn.gelu(hidden))

    layer = Layer()
    params = jax.vmap(lambda key: layer.init(key, X)["params"])(jax.random.split(KEYS[3], 2))
    run = lambda save: (
        lambda params: square(
            jp.planned_scan(lambda part, x, ctx: layer.apply({"params": part}, x), params, X, save=save)
        )
    )
    got, kept = gradients(run("matmuls"), params)
    assert_equal(got, jax.jit(jax.grad(run("everything"), argnums=(0,)))(params))
    names = {"attention/query", "attention/key", "attention/value", "hidden", "block_input"}
    assert names <= kept["layers"]["device"].keys() <= {*names, "attention", "attention/out"}
    _, kept = gradients(run("attention/query=save,hidden=offload"), params)
    assert kept["layers"]["device"].keys() == {"attention/query", "block_input"}
    assert kept["layers"]["host"].keys() == {"hidden"}


def test_several_streams_and_rows():
    """x is a tree; a Context says what belongs to rows, of which a few are taken at a time, and has the layer's own."""

    def layer(part, x, ctx):
        stream, total = x
        y = jnp.tanh(stream @ part["up"]) * ctx.rows["mask"] @ part["down"] * (1 + ctx.layer)
        return stream + y, total + jnp.sum(y**2, -1) * ctx.shared["rate"]

    mask, rate = jax.random.uniform(KEYS[3], (*X.shape[:2], 1)), jnp.asarray(0.5)

    def loss(save):
        def value(params, x, rate):
            ctx = jp.Context({"mask": mask}, {"rate": rate})
            return square(jp.planned_scan(layer, params, (x, jnp.zeros(x.shape[:2])), ctx, save))

        return value

    wanted, _ = gradients(loss("everything"), PARAMS, X, rate)
    for save in ("matmuls", f"matmuls,tokens={X.shape[1]}"):
        with recorded() as segments:
            assert_equal(jax.jit(jax.grad(loss(save), argnums=(0, 1, 2)))(PARAMS, X, rate), wanted)
        assert segments["layers"].steps == LAYERS * (1 if save == "matmuls" else len(X))
        assert segments["layers"].kept_bytes()["device"]["block_input"] == INPUT  # of the stream, not of the total


def test_keys_are_the_layers_own():
    """With a key each layer gets one of its own, the same under every plan."""

    def layer(part, x, ctx):
        return x + jax.random.bernoulli(ctx.key, 0.5, x.shape) * (jnp.tanh(x @ part["up"]) @ part["down"])

    run = lambda save, key: jp.planned_scan(layer, PARAMS, X, jp.Context(), save, key=key)
    first, again = (run(save, jax.random.key(3)) for save in ("everything", "matmuls"))
    assert_equal(first, again)
    assert not jnp.allclose(first, run("matmuls", jax.random.key(4)))


@pytest.mark.parametrize(("budget", "kept"), [(INPUT, 0), (INPUT + HIDDEN - 1, 0), (INPUT + HIDDEN, HIDDEN)])
def test_a_budget_chooses_what_is_kept(budget, kept):
    """The plan with the least recomputation under it."""
    _, found = gradients(lambda params: square(jp.planned_scan(block, params, X, GAIN, budget=budget)), PARAMS)
    assert sum(found["layers"]["device"].values()) == INPUT + kept


def test_many_names_are_given_up_one_by_one():
    """Of more names than every subset could be looked at: less is kept for more recomputation, down to nothing."""
    params = jnp.stack([jnp.eye(WIDTH)] * 24).reshape(2, 12, WIDTH, WIDTH)

    def layer(part, x, ctx):
        for n in range(12):
            x = checkpoint_name(jnp.sin(x) @ part[n], f"y{n}")
        return x

    kept = []
    for count in (0, 5, 11):
        loss = lambda params, count=count: square(jp.planned_scan(layer, params, X, budget=X.nbytes * 2 * (1 + count)))
        kept.append(len(gradients(loss, params)[1]["layers"]["device"]) - 1)
    assert kept == [0, 5, 11]


def test_odd_blocks():
    """No layers; names that only a rule of differentiation gives; what has no codes; a name that ends in _lse."""
    assert jp.planned_scan(block, jax.tree.map(lambda leaf: leaf[:0], PARAMS), X, GAIN) is X

    @jax.custom_vjp
    def product(x, w):
        return jnp.tanh(x @ w)

    def forward(x, w):
        hidden = checkpoint_name(x @ w, "inside")
        return jnp.tanh(hidden), (x, w, hidden)

    def backward(kept, d_y):
        x, w, hidden = kept
        d = d_y * (1 - jnp.tanh(hidden) ** 2)
        return d @ w.T, jnp.einsum("bsi,bsj->ij", x, d)

    product.defvjp(forward, backward)

    def layer(part, x, ctx):
        gate = checkpoint_name(jnp.sum(x * part["up"][:, 0]), "gate")
        return x + jnp.sin(gate) * checkpoint_name(product(x, part["up"]) @ part["down"], "out_lse")

    run = lambda **given: gradients(lambda params: square(jp.planned_scan(layer, params, X, **given)), PARAMS)
    wanted, _ = run(save="everything")
    for given in ({"save": "gate=compress"}, {"budget": 10**9}):
        got, kept = run(**given)
        assert_equal(got, wanted)
        assert ("gate" if "save" in given else "out_lse") in kept["layers"]["device"]


REFUSED = {
    "name": ({"save": "hiden=save"}, "no activation is called 'hiden'; nearest: hidden"),
    "budget": ({"budget": INPUT - 1}, f"budget={INPUT - 1}: the inputs of 4 layers alone take {INPUT} bytes"),
    "no_choice": ({"budget": 10, "save": "blocks"}, "leaves a budget no choice"),
    "text": ({"budget": "1GiB"}, "budget='1GiB' should be bytes"),
    "compressed12": ({"save": "compressed12"}, "nothing is called so here; write NAME=compress12; known: hidden, "),
    "compressed": ({"save": "compressed"}, "nothing is called so here; write NAME=compress; known: hidden, "),
    "rows": ({"save": "matmuls,tokens=4"}, "tokens=4 needs a Context as ctx"),
    "key": ({"key": KEYS[0]}, "a key needs a Context"),
    "layers": ({"params": {**PARAMS, "up": PARAMS["up"][:2]}}, "params has leaves of 2, 4 layers"),
    "none": ({"params": {}}, "params has no leaves"),
    "integers": ({"x": jnp.zeros((3, 6, 8), int)}, "x is int32[3, 6, 8]"),
    "result": (
        {"block": lambda layer, x, ctx: x @ layer["up"]},
        "the block gives float32[3, 6, 24], x is float32[3, 6, 8]",
    ),
}


@pytest.mark.parametrize(("given", "said"), REFUSED.values(), ids=REFUSED)
def test_is_refused_in_a_line(given, said):
    """What, where, the value."""
    args = {"block": named, "params": PARAMS, "x": X, "ctx": 1.0, **given}
    with pytest.raises(jp.InputError) as error:
        jax.grad(lambda x: square(jp.planned_scan(**{**args, "x": x})), allow_int=True)(args["x"])
    assert said in str(error.value)
    assert "\n" not in str(error.value)


# Scans that are found.


def test_counters_constants_and_collections_pass():
    """A scan that carries a counter, a constant and two streams, and collects of each, gives what it gave."""

    def function(params, x, mask):
        def body(carry, layer):
            x, total, n, mask = carry
            y = jnp.tanh(x @ layer["up"]) @ layer["down"] * mask * (1 + 0.1 * n)
            return (x + y, total + jnp.mean(y**2), n + 1, mask), (2 * n, layer["up"], jnp.max(y, 1), 3.0)

        carry, collected = jax.lax.scan(body, (x, 0.0, 0, mask), params)
        return square(carry) + sum(jnp.sum(jnp.sin(y)) for y in collected)

    args = (PARAMS, X, jax.random.uniform(KEYS[3], (X.shape[1], 1)))
    wanted = jax.jit(jax.value_and_grad(function, argnums=(0, 1, 2)))(*args)
    found = jax.jit(jax.value_and_grad(in_scans(function, parse("matmuls")), argnums=(0, 1, 2)))(*args)
    assert_equal(found, wanted)


def test_two_scans_have_names_of_their_own():
    """A plan may speak of what only one of them names; effects happen once."""
    calls = []

    def function(params, x):
        def layer(name):
            def body(carry, layer):
                x, n = carry
                jax.debug.callback(calls.append, n)
                return (x + jnp.tanh(checkpoint_name(x @ layer["up"], name)) @ layer["down"], n + 1), None

            return body

        carry, _ = jax.lax.scan(layer("first"), (x, 0), params)
        return square(jax.lax.scan(layer("second"), carry, params)[0][0])

    with recorded() as segments:
        planned = in_scans(function, parse("first=save"))
        assert_equal(jax.jit(jax.grad(planned))(PARAMS, X), jax.grad(function)(PARAMS, X))
    kept = {name: segment.kept_bytes()["device"].keys() for name, segment in segments.items()}
    assert kept == {"layers": {"first", "block_input"}, "layers_1": {"block_input"}}
    with pytest.raises(jp.InputError, match="no activation is called 'third'; nearest: first"):
        in_scans(function, parse("third=save"))(PARAMS, X)
    calls.clear()
    jax.block_until_ready(jax.jit(planned)(PARAMS, X))
    jax.effects_barrier()
    assert len(calls) == 2 * LAYERS


def test_packed_layers_are_layers():
    """Stacked parameters need not be floats."""
    codes = jnp.round(100 * PARAMS["up"] @ PARAMS["down"]).astype(jnp.int8)
    layer = lambda x, codes, scale: x + jnp.tanh(x @ codes.astype(jnp.float32) * scale)
    function = lambda params, x: jax.lax.scan(lambda x, w: (layer(x, w, params["scale"]), None), x, params["codes"])[0]
    params = {"codes": codes, "scale": jnp.asarray(0.01)}
    got, kept = gradients(lambda x: square(in_scans(function, parse("blocks"))(params, x)), X)
    assert_equal(got, jax.grad(lambda x: square(function(params, x)), argnums=(0,))(X))
    assert kept["layers"]["device"] == {"block_input": INPUT}


def test_scans_that_cannot_be_are_refused():
    """What is carried and made of floats must be of floats; there must be a scan over parameters."""

    def counts(params, x):
        step = lambda carry, layer: ((jnp.tanh(carry[0] @ layer["up"] @ layer["down"]), jnp.sum(carry[0] > 0)), None)
        return jax.lax.scan(step, (x, 0), params)[0]

    with pytest.raises(jp.InputError, match=r"scan at planned_test.py:\d+ .*counts carries int32\[\] made of floats"):
        in_scans(counts, parse("matmuls"))(PARAMS, X)
    over_rows = lambda params, x: jax.lax.scan(lambda c, row: (c + row @ params["up"][0], None), jnp.zeros(INNER), x[0])
    with pytest.raises(jp.InputError, match="runs no scan over stacked parameters"):
        in_scans(over_rows, parse("matmuls"))(PARAMS, X)


class Block(nn.Module):
    """A Linen layer of a scanned stack."""

    @nn.compact
    def __call__(self, x, _):
        """With dropout where there is a key."""
        y = nn.gelu(nn.Dense(INNER, name="up")(nn.LayerNorm()(x)))
        y = nn.Dropout(0.1, deterministic=not self.has_rng("dropout"))(y)
        return x + nn.Dense(WIDTH, name="down")(y), None


class Stacked(nn.Module):
    """A scanned stack of layers that are computed again, and a head."""

    @nn.compact
    def __call__(self, x):
        """x through all of it."""
        rngs = {"params": True, "dropout": True}
        stack = nn.scan(nn.remat(Block), variable_axes={"params": 0}, split_rngs=rngs, length=3)
        return nn.Dense(4, name="head")(stack(name="stack")(x, None)[0])


def _linen():
    base = jp.from_linen(Stacked(), {"x": X})
    return base, base.init(jax.random.key(0), {})


STACKS = {
    "linen": (_linen, "stack", "up/lora"),
    "nnx": (lambda: jp.from_nnx(Scanned(nnx.Rngs(0))), "layers", "split/LoRA"),
}


@pytest.mark.parametrize(
    "make", [jp.lora, lambda rank: jp.chain(jp.quantize("nf4"), jp.lora(rank))], ids=["lora", "nf4"]
)
@pytest.mark.parametrize("stack", STACKS)
def test_scanned_stacks_of_flax_run_under_a_plan(stack, make):
    """Gradients are those of the model, with dropout; products are called as their modules; less memory is taken."""
    build, segment, product = STACKS[stack]
    base, params = build()
    model, trainable, frozen = jp.setup(make(2), base, params, jax.random.key(0))
    trainable = moved(trainable)
    loss = lambda model: lambda leaves: mean_square(model, jp.combine(leaves, frozen), {"x": X}, jax.random.key(5))[0]
    wanted = jax.jit(jax.grad(loss(model)))(trainable)
    (found,), kept = gradients(loss(jp.remat(model, "matmuls")), trainable)
    assert_equal(found, wanted)
    assert kept[segment]["device"].keys() == {product, "lora_low", "block_input"}
    (_,), kept = gradients(loss(jp.remat(model, "blocks")), trainable)
    assert kept[segment]["device"].keys() == {"block_input"}
    with pytest.raises(jp.InputError, match="this model shows no layers; give jp.checkpoint_policy"):
        jp.remat(model, "blocks", form="policy")


def test_an_adapter_without_effect_is_refused_under_a_plan():
    """As without one, by its name."""

    class Dead(nn.Module):
        @nn.compact
        def __call__(self, x, _):
            return nn.Dense(WIDTH, name="used")(x) + jax.lax.stop_gradient(nn.Dense(WIDTH, name="dead")(x)), None

    class Tower(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.scan(Dead, variable_axes={"params": 0}, split_rngs={"params": True}, length=2)()(x, None)[0]

    base, method = jp.from_linen(Tower(), {"x": X}), jp.lora(2)
    model, *leaves = jp.setup(method, base, base.init(jax.random.key(0), {}), jax.random.key(0))
    with pytest.raises(jp.InputError, match="lora: the loss does not depend on ScanDead_0/dead by"):
        losses(jp.remat(model, "matmuls"), method, *leaves, 1)


class Normed(nnx.Module):
    """A layer with batch statistics and a count of its calls."""

    def __init__(self, rngs):
        """Of width 8."""
        self.hidden = nnx.Linear(WIDTH, WIDTH, rngs=rngs)
        self.norm = nnx.BatchNorm(WIDTH, rngs=rngs)
        self.calls = nnx.Cache(jnp.zeros((), jnp.int32))

    def __call__(self, x):
        """x and what the layer makes of it."""
        self.calls.set_value(self.calls[...] + 1)
        return x + nnx.relu(self.norm(self.hidden(x)))


class NormedStack(nnx.Module):
    """Three of them."""

    def __init__(self, rngs):
        """Stacked by vmap."""
        self.layers = nnx.vmap(Normed)(rngs.split(3))

    def __call__(self, x):
        """Through all."""
        return nnx.scan(lambda x, layer: layer(x), in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)(x, self.layers)


def test_state_of_scanned_layers_is_carried():
    """Batch statistics are what layers collect: the steps are those without a plan; the module comes back."""
    base, params = jp.from_nnx(NormedStack(nnx.Rngs(0)))
    method = jp.chain(jp.lora(2), jp.carry(base))
    model, trainable, frozen = jp.setup(method, base, params, jax.random.key(0))
    planned = jp.remat(model, "matmuls")
    assert losses(planned, method, trainable, frozen, 3) == pytest.approx(losses(model, method, trainable, frozen, 3))
    assert jp.to_nnx(planned, jp.combine(trainable, frozen))(X).shape == X.shape
