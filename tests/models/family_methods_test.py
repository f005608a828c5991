"""What methods need of the families: parts, sites, memory plans, PEFT's adapters."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxpeft as jp
from jaxpeft import models, tree
from jaxpeft.errors import InputError
from jaxpeft.memory import planner
from jaxpeft.models import geometries
from jaxpeft.peft import attach, export_adapter
from tests.models.families import both, close, compiled, counted, inputs, our_output, reference, their_output, torch


def perturbed(model, params, scale=1.0):
    """(model with LoRA everywhere, its parameters with nonzero factors)."""
    new, trainable, frozen = jp.setup(jp.lora(rank=3, alpha=6), model, params, jax.random.key(4))
    keys = jax.random.split(jax.random.key(5), len(trainable))
    noisy = {p: scale * 0.2 * jax.random.normal(k, x.shape) for k, (p, x) in zip(keys, trainable.items(), strict=True)}
    return new, noisy, frozen


@pytest.mark.parametrize("case", ["bert, classifier", "roberta, masked LM", "opt, causal LM", "vit"])
def test_parts_make_up_the_block(case, tmp_path):
    _, base, params = both(case, tmp_path / "model")
    model, trainable, frozen = perturbed(base, params)
    params = tree.combine(trainable, frozen)
    x, ctx = model.stack.embed(params, inputs(case)[1], None)
    layer = jax.tree.map(lambda leaf: leaf[1], params["layers"])
    ctx = ctx.at(jnp.int32(1))

    def in_parts(layer, x):
        for part in model.stack.parts:
            x, _ = part(layer, x, ctx, None, "layers")
        return x

    whole = compiled(lambda layer, x: model.stack.block(layer, x, ctx, None, "layers")[0], layer, x)
    assert len(model.stack.parts) == 2
    np.testing.assert_array_equal(whole, compiled(in_parts, layer, x))


@pytest.mark.parametrize("name", ["bert-base", "roberta-base", "opt-1.3b", "vit-b-16"])
def test_the_stream_stays_in_the_computations_dtype(name):
    """Where parameters train, their float32 masters are what the model is given."""
    raw = geometries.load(name)
    model = models.family(raw).from_hf(raw, jnp.bfloat16)
    shapes = models.family(raw).shapes(model.config)
    params = tree.unflatten({path: jax.ShapeDtypeStruct(leaf.shape, jnp.float32) for path, leaf in shapes.items()})
    batch = {name: jax.ShapeDtypeStruct((2, 8), jnp.int32) for name in ("tokens", "positions", "segment_ids")}
    batch = {"pixels": jax.ShapeDtypeStruct((2, 224, 224, 3), jnp.float32)} if name == "vit-b-16" else batch
    stream, _ = jax.eval_shape(model.stack.embed, params, batch, None)
    assert stream.dtype == jax.eval_shape(model.hidden, params, batch).dtype == jnp.bfloat16
    program = str(jax.make_jaxpr(lambda params, x: model.stack.head(params, x))(params, stream))
    assert "dot_general" in program
    assert not [line for line in program.splitlines() if "dot_general" in line and "f32" in line]


def test_learned_positions_end():
    with pytest.raises(InputError, match="--seq-len 4096: opt has 2048 positions"):
        planner.make_step(geometries.load("opt-1.3b"), jp.lora(rank=2), batch_size=1, seq_len=4096)


@pytest.mark.parametrize("targets", ["all-linear", "attention", "mlp"])
def test_lora_finds_the_sites(targets, tmp_path):
    _, model, params = both("bert, classifier", tmp_path / "model")
    sites = {
        "attention": {f"layers/self_attn/{name}" for name in ("q_proj", "k_proj", "v_proj", "o_proj")},
        "mlp": {"layers/mlp/up_proj", "layers/mlp/down_proj"},
    }
    expected = sites["attention"] | sites["mlp"] if targets == "all-linear" else sites[targets]
    _, trainable, _ = jp.setup(jp.lora(rank=2, targets=targets), model, params, jax.random.key(0))
    assert {path.rsplit("/lora/", 1)[0] for path in trainable} == expected


PLANS = [
    pytest.param("bert, classifier", "blocks", marks=pytest.mark.slow),
    pytest.param("roberta, masked LM", "matmuls", marks=pytest.mark.slow),
    ("opt, causal LM", "matmuls"),
    ("vit", "matmuls"),
]


@pytest.mark.parametrize(("case", "save"), PLANS)
def test_a_memory_plan_changes_no_gradient(case, save, tmp_path):
    _, base, params = both(case, tmp_path / "model")
    model, trainable, frozen = perturbed(base, params)
    batch = inputs(case)[1]

    def gradients(model):
        def total(trainable):
            output = our_output(model)(tree.combine(trainable, frozen), batch)
            return (counted(output) ** 2).sum()

        return compiled(jax.grad(total), trainable)

    found, expected = gradients(jp.remat(model, save)), gradients(model)
    for path, gradient in expected.items():
        close(found[path], gradient, 1e-4, path)


THEIR_TARGETS = {
    "bert": ["query", "output.dense"],
    "roberta": ["value", "intermediate.dense"],
    "opt": ["q_proj", "fc2"],
}


@pytest.mark.parametrize(
    "case",
    [
        pytest.param("bert", marks=pytest.mark.slow),
        "bert, classifier",
        "roberta, classifier",
        "opt, causal LM",
        pytest.param("opt, classifier", marks=pytest.mark.slow),
    ],
)
def test_adapters_are_pefts(case, tmp_path):
    """Exported, PEFT computes the same; imported, they come back; and PEFT's own are read."""
    peft = pytest.importorskip("peft")
    theirs, base, params = both(case, tmp_path / "model")
    method = jp.chain(jp.lora(rank=3, alpha=6), jp.full("^classifier/"))
    model, trainable, frozen = perturbed(base, params)
    params = tree.combine(trainable, frozen)
    export_adapter(tmp_path / "adapter", params, method, model.config, tmp_path / "model")
    arguments, batch = inputs(case)

    def output_of(model):
        with torch.no_grad():
            return counted(their_output(model, arguments))

    expected = output_of(theirs)
    adapted = peft.PeftModel.from_pretrained(theirs, tmp_path / "adapter").eval()
    found = counted(compiled(our_output(model), params, batch))
    close(found, output_of(adapted), 1e-4, "output")
    assert np.abs(found - expected.numpy()).max() > 0.05

    again, restored, _ = attach(tmp_path / "adapter", base, tree.unflatten(frozen))
    np.testing.assert_array_equal(counted(compiled(our_output(again), restored, batch)), found)

    kind = None if base.config.num_labels else "FEATURE_EXTRACTION"  # with SEQ_CLS, PEFT saves a classifier too
    own = peft.LoraConfig(task_type=kind, r=4, target_modules=THEIR_TARGETS[case.split(",")[0]])
    own = peft.get_peft_model(reference(case), own).eval()
    with torch.no_grad():
        for name, parameter in own.named_parameters():
            if ".lora_" in name:
                parameter.normal_(0, 0.2)
    own.save_pretrained(tmp_path / "own")
    again, restored, _ = attach(tmp_path / "own", base, tree.unflatten(frozen))
    close(counted(compiled(our_output(again), restored, batch)), output_of(own), 1e-4, "PEFT's adapter")
