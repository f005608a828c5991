"""LoRA: sites, scales, initialisations, dropout, learning-rate ratio."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import peft
import pytest

import jaxpeft as jp
from jaxpeft import sites, tree
from tests import tiny
from tests.peft import reference


def start(method, **changes):
    base, params = tiny.model(**changes)
    return jp.setup(method, base, params, jax.random.key(0))


def test_the_whole_tree():
    """The adapter's parameters sit in a child scope of their sites, and nowhere else."""
    _, trainable, frozen = start(jp.lora(4, targets=["q_proj", "down_proj"]))
    assert {path: leaf.shape for path, leaf in trainable.items()} == {
        "layers/self_attn/q_proj/lora/a": (3, 32, 4),
        "layers/self_attn/q_proj/lora/b": (3, 4, 32),
        "layers/mlp/down_proj/lora/a": (3, 56, 4),
        "layers/mlp/down_proj/lora/b": (3, 4, 32),
    }
    assert frozen.keys() == tree.flatten(tiny.model()[1]).keys()


def test_parameter_count():
    """r (n + m) per linear map."""
    _, trainable, _ = start(jp.lora(4))
    shapes = [(32, 32), (32, 16), (32, 16), (32, 32), (32, 56), (32, 56), (56, 32)]
    assert tree.size(trainable) == 3 * 4 * sum(n + m for n, m in shapes)


def test_layers_and_sites_start_from_different_random_numbers():
    _, trainable, _ = start(jp.lora(4))
    a = [leaf[i] for path, leaf in trainable.items() if path.endswith("/a") and leaf.shape[1] == 32 for i in range(3)]
    for i, one in enumerate(a):
        assert not any(np.allclose(one, other) for other in a[i + 1 :])


@pytest.mark.parametrize(
    ("init", "deviation"), [("kaiming", 1 / np.sqrt(3 * 32)), ("gaussian", 1 / 16), ("orthonormal", 1 / np.sqrt(32))]
)
def test_initialisations(init, deviation):
    _, trainable, _ = start(jp.lora(16, init=init, targets=["gate_proj"]))
    a = trainable["layers/mlp/gate_proj/lora/a"]
    np.testing.assert_allclose(np.std(a), deviation, rtol=0.1)
    if init == "kaiming":
        assert np.abs(a).max() <= 1 / np.sqrt(32)
    if init == "orthonormal":
        np.testing.assert_allclose(np.einsum("lnr,lns->lrs", a, a), np.tile(np.eye(16), (3, 1, 1)), atol=1e-5)


def test_pissa_holds_the_principal_part():
    """s A B is the best rank-r approximation of W, W keeps the rest, and their sum is W."""
    _, params = tiny.model()
    model, trainable, frozen = start(jp.lora(4, alpha=8, init="pissa", targets=["up_proj"]))
    kernel = np.asarray(params["layers"]["mlp"]["up_proj"]["kernel"])
    product = 2 * np.asarray(trainable["layers/mlp/up_proj/lora/a"] @ trainable["layers/mlp/up_proj/lora/b"])
    u, s, vt = np.linalg.svd(kernel, full_matrices=False)
    np.testing.assert_allclose(product, (u[..., :4] * s[:, None, :4]) @ vt[:, :4], atol=1e-5)
    np.testing.assert_allclose(frozen["layers/mlp/up_proj/kernel"] + product, kernel, atol=1e-6)
    batch = tiny.batch()
    np.testing.assert_allclose(
        model.apply(jp.combine(trainable, frozen), batch),
        tiny.model()[0].apply(params, batch),
        rtol=1e-4,
        atol=1e-4,
    )


def test_olora_starts_where_peft_s_does(tmp_path):
    """The products and what is left of the kernels; B's rows are orthonormal, and the model is the base."""
    folder = reference.write_base(tmp_path / "llama")
    config = peft.LoraConfig(r=4, lora_alpha=6, target_modules=["up_proj", "down_proj"], init_lora_weights="olora")
    theirs = {
        name: p.detach().numpy()
        for name, p in peft.get_peft_model(reference.torch_base(folder), config).named_parameters()
    }
    base, params = reference.load(folder)
    model, trainable, rest = jp.setup(
        jp.lora(4, alpha=6, init="olora", targets=["up_proj", "down_proj"]), base, params, jax.random.key(0)
    )
    for site in ("up_proj", "down_proj"):
        for layer in range(2):
            module = f"base_model.model.model.layers.{layer}.mlp.{site}"
            a, b = (np.asarray(trainable[f"layers/mlp/{site}/lora/{leaf}"][layer]) for leaf in "ab")
            of = lambda leaf, module=module: theirs[f"{module}.lora_{leaf}.default.weight"].T
            reference.assert_close(a @ b, of("A") @ of("B"))
            reference.assert_close(rest[f"layers/mlp/{site}/kernel"][layer], theirs[f"{module}.base_layer.weight"].T)
            np.testing.assert_allclose(b @ b.T, np.eye(4), atol=1e-5)
    reference.assert_close(reference.logits(model, jp.combine(trainable, rest)), reference.logits(base, params))


def test_a_zero_and_b_random():
    model, trainable, frozen = start(jp.lora(4, init="zero_a", targets=["gate_proj"]))
    a, b = (np.asarray(trainable[f"layers/mlp/gate_proj/lora/{leaf}"]) for leaf in "ab")
    assert not a.any() and np.abs(b).max() <= 1 / 2 and np.std(b) == pytest.approx(1 / np.sqrt(3 * 4), rel=0.1)
    base, params = tiny.model()
    batch = tiny.batch()
    expected = base.apply(params, batch)
    np.testing.assert_allclose(model.apply(jp.combine(trainable, frozen), batch), expected, atol=1e-5)


@pytest.mark.parametrize(("rslora", "scale"), [(False, 12 / 4), (True, 12 / 2)])
def test_scale(rslora, scale):
    """y - x W = s x A B, read off the merged kernel."""
    method = jp.lora(4, alpha=12, rslora=rslora, targets=["v_proj"])
    _, trainable, frozen = start(method)
    trainable = {path: jax.random.normal(jax.random.key(1), leaf.shape) for path, leaf in trainable.items()}
    merged = tree.flatten(method.merge(jp.combine(trainable, frozen)))["layers/self_attn/v_proj/kernel"]
    a, b = (np.asarray(trainable[f"layers/self_attn/v_proj/lora/{name}"]) for name in "ab")
    np.testing.assert_allclose(merged - frozen["layers/self_attn/v_proj/kernel"], scale * a @ b, atol=2e-5)


def test_patterns_change_rank_and_alpha_of_some_sites():
    method = jp.lora(
        4, alpha=4, rank_pattern={"mlp/": 2, "down": 8}, alpha_pattern={"o_proj$": 40}, targets="all-linear"
    )
    model, trainable, frozen = start(method)
    assert trainable["layers/mlp/down_proj/lora/b"].shape == (3, 2, 32)  # the first match wins
    assert trainable["layers/self_attn/k_proj/lora/b"].shape == (3, 4, 16)
    trainable = {path: jnp.ones_like(leaf) for path, leaf in trainable.items()}
    merged = tree.flatten(method.merge(jp.combine(trainable, frozen)))
    for site, scale, rank in (("self_attn/o_proj", 10, 4), ("self_attn/q_proj", 1, 4), ("mlp/up_proj", 2, 2)):
        path = f"layers/{site}/kernel"
        np.testing.assert_allclose(merged[path] - frozen[path], scale * rank, rtol=1e-4, atol=1e-4)
    batch = tiny.batch()
    base, _ = tiny.model()
    small = {path: leaf * 0.01 for path, leaf in trainable.items()}
    params = jp.combine(small, frozen)
    np.testing.assert_allclose(base.apply(method.merge(params), batch), model.apply(params, batch), atol=1e-3)


@pytest.mark.parametrize(
    ("targets", "names"),
    [
        ("all-linear", {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}),
        ("attention", {"q_proj", "k_proj", "v_proj", "o_proj"}),
        ("qv", {"q_proj", "v_proj"}),
        ("mlp", {"gate_proj", "up_proj", "down_proj"}),
        ("q_proj,v_proj", {"q_proj", "v_proj"}),
        (["self_attn.q_proj", "down_proj"], {"q_proj", "down_proj"}),
        (r"(up|gate)_proj$", {"up_proj", "gate_proj"}),
    ],
)
def test_targets(targets, names):
    """Presets, names as PEFT writes them, names with commas, and regular expressions."""
    _, params = tiny.model()
    assert {site.rsplit("/", 1)[1] for site in sites.find(params, targets)} == names


def test_head_can_be_adapted():
    model, trainable, frozen = start(jp.lora(4, targets="lm_head"))
    assert {path: leaf.shape for path, leaf in trainable.items()} == {
        "lm_head/lora/a": (32, 4),
        "lm_head/lora/b": (4, 97),
    }
    trainable = {path: leaf + 0.1 for path, leaf in trainable.items()}
    batch = tiny.batch()
    method = jp.lora(4, targets="lm_head")
    params = jp.combine(trainable, frozen)
    base, original = tiny.model()
    assert np.abs(model.apply(params, batch) - base.apply(original, batch)).max() > 1e-2
    np.testing.assert_allclose(base.apply(method.merge(params), batch), model.apply(params, batch), atol=1e-4)


def test_dropout_acts_with_a_key_only_and_is_a_function_of_it():
    model, trainable, frozen = start(jp.lora(4, dropout=0.5))
    params = jp.combine({path: leaf + 0.1 for path, leaf in trainable.items()}, frozen)
    batch = tiny.batch()
    apply = jax.jit(model.apply)
    still, one, again, two = (apply(params, batch, key) for key in (None, *(jax.random.key(i) for i in (1, 1, 2))))
    np.testing.assert_array_equal(one, again)
    assert np.abs(one - two).max() > 1e-2 and np.abs(one - still).max() > 1e-2


def test_dropout_keeps_the_mean():
    from jaxpeft.methods.lora import drop

    x = jax.random.normal(jax.random.key(0), (50, 40))
    keys = jax.random.split(jax.random.key(1), 2000)
    mean = jax.vmap(lambda key: drop(x, 0.3, key))(keys).mean(0)
    np.testing.assert_allclose(mean, x, atol=5 * np.sqrt(0.3 / 0.7 / 2000) * np.abs(x).max())


def test_lora_plus_scales_the_steps_of_b():
    base, params = tiny.model()
    batch = tiny.batch()
    moved = {}
    for ratio in (1.0, 16.0):
        method = jp.lora(4, lr_ratio=ratio)
        model, trainable, frozen = jp.setup(method, base, params, jax.random.key(0))
        trainable = {path: leaf + 0.01 for path, leaf in trainable.items()}
        optimizer = optax.adam(1e-3)
        state = jp.init_state(method, optimizer, trainable, frozen, jax.random.key(1))
        after, _ = jax.jit(jp.make_train_step(model, method, optimizer))(state, batch)
        moved[ratio] = {path: np.asarray(after.trainable[path] - leaf) for path, leaf in trainable.items()}
    for path, step in moved[1.0].items():
        factor = 16 if path.endswith("/b") else 1
        np.testing.assert_allclose(moved[16.0][path], factor * step, rtol=1e-2, atol=1e-6)


def test_bf16_base_keeps_float32_masters_and_a_bf16_stream():
    model, trainable, frozen = start(jp.lora(4), dtype=jnp.bfloat16)
    assert {leaf.dtype for leaf in trainable.values()} == {jnp.dtype("float32")}
    assert {leaf.dtype for leaf in frozen.values()} == {jnp.dtype("bfloat16")}
    assert model.hidden(jp.combine(trainable, frozen), tiny.batch()).dtype == jnp.bfloat16


@pytest.mark.parametrize(
    ("bad", "says"),
    [
        ({"rank": 0}, "rank 0 must be at least 1"),
        ({"alpha": 0.0}, "alpha 0.0 must be a finite number above 0"),
        ({"alpha_pattern": {"mlp": -1.0}}, "alpha_pattern 'mlp': -1.0 must be a finite number above 0"),
        ({"lr_ratio": 0.0}, "lr_ratio 0.0 must be a finite number above 0"),
        (
            {"rank_pattern": {"q_porj": 2}},
            "rank_pattern 'q_porj' is found in no site that targets choose; nearest: .*q_proj",
        ),
        ({"alpha_pattern": {"up": 2.0}, "targets": ["q_proj"]}, "alpha_pattern 'up' is found in no site that targets"),
        ({"rank": 17}, r"rank 17 is above the smaller side of layers/self_attn/k_proj, a kernel of 32 x 16"),
        ({"init": "zeros"}, "init 'zeros' is not one of kaiming"),
        ({"dropout": -0.1}, "dropout -0.1"),
        ({"targets": "q_prj"}, "targets 'q_prj': matches no linear site; nearest: q_proj"),
        ({"targets": ["v_proj", "dwn_proj"]}, "targets 'dwn_proj': .*nearest: down_proj"),
        ({"targets": "(q_proj"}, "not a regular expression"),
        ({"rank_pattern": {"mlp": 0}}, "rank 0"),
    ],
)
def test_bad_configurations_say_what_would_be_right(bad, says):
    with pytest.raises(jp.InputError, match=says):
        start(jp.lora(**bad))
