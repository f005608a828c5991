"""VeLoRA: PEFT's gradient, which is that of the inputs' part along v, what is kept, and the error at equal bytes."""

from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import peft
import pytest
import torch

import jaxpeft as jp
from jaxpeft import assets, hf, sites, tree
from jaxpeft.backward.compressed import compress, decompress
from jaxpeft.methods import velora
from jaxpeft.model import Context
from jaxpeft.peft import attach, export_adapter
from jaxpeft.quant import dot
from pallas_kernels.packed import dequantize, quantize
from tests import residuals, tiny
from tests.peft import reference

RNG = np.random.default_rng(0)


def normal(*shape):
    return jnp.asarray(RNG.normal(size=shape), jnp.float32)


def rebuilt(x, groups):
    """The inputs (B, S, n) that dA is made of, by NumPy."""
    x = np.asarray(x, np.float64)
    width = -(-x.shape[-1] // groups)
    padded = np.concatenate([x, np.zeros((*x.shape[:-1], groups * width - x.shape[-1]))], -1)
    parts = padded.reshape(*x.shape[:-1], groups, width)
    rows = []
    for row in parts:
        v = row.reshape(-1, width).mean(0)
        v = v / np.linalg.norm(v)
        rows.append(((row @ v)[..., None] * v).reshape(len(row), -1))
    return np.stack(rows)[..., : x.shape[-1]]


@pytest.mark.parametrize("groups", [8, 5])
def test_gradients_and_files_are_those_of_peft(groups, tmp_path):
    """Of one row, whose mean is the batch's; where the groups do not divide the inputs, too."""
    llama = reference.write_base(tmp_path / "llama")
    names, tokens = ["q_proj", "k_proj", "down_proj"], reference.TOKENS[:1]
    config = {"num_groups": groups}
    settings = {"r": 4, "lora_alpha": 8, "target_modules": names, "velora_config": peft.VeloraConfig(**config)}
    theirs = reference.make_peft(llama, **settings).train()
    base, params = reference.load(llama)
    method = jp.velora(4, 8, names, groups)
    model, trainable, rest = jp.setup(method, base, params, jax.random.key(0))
    parameters = dict(theirs.named_parameters())

    def of_torch(path, value):
        module, leaf = path.split("/velora/")
        name = f"base_model.model.model.{module.replace('/', '.').replace('layers', 'layers.{}')}"
        rows = [parameters[f"{name.format(layer)}.lora_{leaf.upper()}.default.weight"] for layer in range(2)]
        return np.stack([value(parameter).numpy().T for parameter in rows])

    trainable = {path: jnp.asarray(of_torch(path, lambda parameter: parameter.data)) for path in trainable}
    weights = np.asarray(normal(1, 21, 97))
    expected = theirs(torch.tensor(tokens).long()).logits
    (expected * torch.tensor(weights)).sum().backward()

    def loss(trainable):
        logits = model.apply(tree.combine(trainable, rest), {"tokens": tokens})
        return jnp.sum(logits * weights), logits

    gradients, logits = jax.jit(jax.grad(loss, has_aux=True))(trainable)
    reference.assert_close(logits, expected.detach().numpy())
    for path, gradient in gradients.items():
        reference.assert_close(gradient, of_torch(path, lambda parameter: parameter.grad))

    whole = tree.combine(trainable, rest)
    export_adapter(tmp_path / "adapter", whole, method, base.config, llama)
    reference.assert_close(reference.with_adapter(llama, tmp_path / "adapter")[:1], logits)
    assert attach(tmp_path / "adapter", base, params)[2].specs == method.specs


@pytest.mark.parametrize(("n", "groups"), [(24, 6), (22, 6), (22, 22), (24, 1)])
def test_the_gradient_is_that_of_the_inputs_along_v(n, groups):
    """Row by row; of y, x and B nothing changes. With a group for each feature it is LoRA's."""
    x, kernel, a, b, dy = normal(3, 7, n), normal(n, 10), normal(n, 4), normal(4, 10), normal(3, 7, 10)
    site, module = sites.Site("layers/v_proj", kernel, None, True), velora.VeLoRA(4, 0.5, groups)

    def ours(a, b, x):
        y = module.apply({"params": {"a": a, "b": b}}, lambda x: dot(x, kernel), x, site, Context())
        return jnp.sum(y * dy), y

    (_, y), found = jax.value_and_grad(ours, argnums=(0, 1, 2), has_aux=True)(a, b, x)
    np.testing.assert_allclose(y, x @ kernel + 0.5 * x @ a @ b, rtol=1e-4, atol=1e-4)
    lora = jax.grad(lambda a, b, x: jnp.sum((x @ kernel + 0.5 * x @ a @ b) * dy), argnums=(0, 1, 2))(a, b, x)
    for one, other in zip(found[1:], lora[1:], strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-4)
    wanted = np.einsum("bsn,bsr->nr", rebuilt(x, groups), 0.5 * np.asarray(dy @ b.T, np.float64))
    np.testing.assert_allclose(found[0], wanted, rtol=1e-3, atol=1e-4)
    if groups == n:
        np.testing.assert_allclose(found[0], lora[0], rtol=1e-3, atol=1e-4)


def test_rows_that_are_zero_or_have_no_axis_of_tokens():
    z, v = velora.project(jnp.zeros((2, 5, 8)), 4)
    assert not z.any() and np.allclose(v, 2**-0.5)
    x = normal(5, 8)
    (z, v), (rows, own) = velora.project(x, 4), velora.project(x[None], 4)
    np.testing.assert_allclose(z, rows[0], rtol=1e-6)
    np.testing.assert_allclose(v, own, rtol=1e-6)


def test_on_a_packed_kernel_in_bfloat16():
    """Values and gradients of the unpacked kernel; z is of the stream's type."""
    kernel = quantize(normal(128, 16), "int8")
    plain, x = dequantize(kernel, jnp.float32), normal(2, 40, 128).astype(jnp.bfloat16)
    own = {"a": normal(128, 4), "b": normal(4, 16)}
    assert velora.project(x, 8)[0].dtype == jnp.bfloat16

    def loss(own, x, kernel):
        site = sites.Site("layers/v_proj", kernel, None, True)
        y = velora.VeLoRA(4, 1.0, 8).apply({"params": own}, lambda x: dot(x, kernel), x, site, Context())
        assert y.dtype == x.dtype
        return jnp.sum(jnp.square(y.astype(jnp.float32)))

    found, wanted = jax.grad(loss)(own, x, kernel), jax.grad(loss)(own, x.astype(jnp.float32), plain)
    for name, leaf in wanted.items():
        np.testing.assert_allclose(found[name], leaf, atol=0.03 * np.abs(leaf).max())


def test_keeps_a_number_per_group_and_no_input():
    start = lambda method: jp.setup(method, *tiny.model(), jax.random.key(0))
    ours = residuals.bytes_per_token(*start(jp.velora(2, groups=4)), tiny.batch)
    floor = residuals.bytes_per_token(*start(jp.full("embeddings")), tiny.batch)
    lora = residuals.bytes_per_token(*start(jp.lora(2)), tiny.batch)
    assert ours - floor <= 3 * (7 * (4 + 2) * 4 + 4 * (6 * 8 + 14) / 16) < lora - floor


class Approximate(nn.Module):
    """LoRA whose dA is made of `of(x)` in the place of x."""

    of: object

    @nn.compact
    def __call__(self, inner, x, site, ctx):
        n, m = site.kernel.shape
        a, b = (
            self.param("a", nn.initializers.normal(n**-0.5), (n, 8)),
            self.param("b", nn.initializers.normal(0.05), (8, m)),
        )
        fixed = jax.lax.stop_gradient
        if self.is_initializing():
            return inner(x)
        other = self.of(fixed(x)) @ a
        return inner(x) + (x @ fixed(a) + other - fixed(other)) @ b


@pytest.mark.slow
def test_of_equal_bytes_codes_are_closer():
    """dA of a pretrained model, of all its kernels: of 8-bit codes, and of z in bfloat16 in as many bytes and fewer."""
    base, params = jp.load_pretrained(assets.MODEL, jnp.float32)
    text = Path(velora.__file__).read_text(encoding="utf-8")
    tokens = jnp.asarray(hf.load_tokenizer(assets.MODEL).encode(text)[: 4 * 128], jnp.int32).reshape(4, 128)
    batch = {"tokens": tokens, "targets": jnp.roll(tokens, -1, 1), "loss_weights": jnp.ones((4, 128))}

    def along_v(x, share):
        z, v = velora.project(x.astype(jnp.bfloat16), x.shape[-1] // share)
        return jnp.einsum("bsg,bd->bsgd", z.astype(jnp.float32), v).reshape(*x.shape[:2], -1)[..., : x.shape[-1]]

    def gradient(of):
        model = sites.attach(base, "near", lambda site: Approximate(of), sites.find)
        leaves = tree.flatten(model.init(jax.random.key(0), params))
        own = {path: leaf for path, leaf in leaves.items() if path.endswith("/near/a")}
        rest = {path: leaf for path, leaf in leaves.items() if path not in own}
        loss = lambda own: jp.completion_loss(model, tree.combine(own, rest), batch, None)[0]
        return np.concatenate([np.ravel(leaf) for leaf in jax.jit(jax.grad(loss))(own).values()])

    exact = gradient(lambda x: x)
    ways = {
        "codes": lambda x: decompress(compress(x, jnp.uint32(0)), x.dtype),
        "equal": lambda x: along_v(x, 2),
        "eighth": lambda x: along_v(x, 16),
        "64th": lambda x: along_v(x, 128),
    }
    errors = {name: np.linalg.norm(gradient(of) - exact) / np.linalg.norm(exact) for name, of in ways.items()}
    assert errors["codes"] < 0.01
    assert 0.5 < errors["equal"] < min(errors["eighth"], errors["64th"])
    assert max(errors.values()) < 1.05


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": 0}, "velora: rank 0 must be at least 1"),
        ({"rank": 17}, "velora: rank 17 is above the smaller side of layers/self_attn/k_proj, a kernel of 32 x 16"),
        ({"groups": 0}, "velora: groups 0 must be at least 1"),
        ({"groups": 33}, "velora: groups 33 are above the inputs of layers/.*, a kernel of 32 x "),
        ({"targets": ["q_prj"]}, "targets 'q_prj': matches no linear site; nearest: q_proj"),
    ],
)
def test_refusals(options, message):
    with pytest.raises(jp.InputError, match=message):
        jp.setup(jp.velora(**{"rank": 4, "groups": 4, **options}), *tiny.model(), jax.random.key(0))
