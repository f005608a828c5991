"""Starts of LoRA that are calculated: LoftQ."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxpeft as jp
from jaxpeft import quant, tree
from jaxpeft.quant import dense
from tests import tiny
from tests.peft import reference

KEY, BATCH = jax.random.key(0), tiny.batch()
UP = "layers/mlp/up_proj"


def loftq_of(w, quantize, rank, rounds):
    """Algorithm 1 of the paper, on one matrix: (Q_T, s A_T B_T)."""
    low = np.zeros_like(w)
    for _ in range(rounds):
        q = np.asarray(quantize(w - low))
        u, s, vt = np.linalg.svd(w - q, full_matrices=False)
        low = (u[:, :rank] * s[:rank]) @ vt[:rank]
    return q, low


@pytest.mark.parametrize("rounds", [1, 4])
def test_loftq_alternates_as_its_paper_does(rounds):
    """Packed kernels and the product beside them; each round comes nearer to W; merged, the start is nearer to W."""
    lora = jp.lora(4, alpha=6, init="loftq", init_options={"iterations": rounds}, targets=["up_proj"])
    method = jp.chain(lora, jp.quantize("int4", group=8))
    base, params = tiny.model()
    model, trainable, rest = jp.setup(method, base, params, KEY)
    kernel = np.asarray(params["layers"]["mlp"]["up_proj"]["kernel"])
    pack = lambda w: dense(quant.pack(jnp.asarray(w), "int4", 8))
    for layer in range(3):
        q, low = loftq_of(kernel[layer], pack, 4, rounds)
        np.testing.assert_allclose(dense(rest[f"{UP}/kernel"])[layer], q, atol=1e-6)
        ours = 6 / 4 * trainable[f"{UP}/lora/a"][layer] @ trainable[f"{UP}/lora/b"][layer]
        np.testing.assert_allclose(ours, low, atol=1e-4)
        plain = np.linalg.norm(pack(kernel[layer]) - kernel[layer])
        assert np.linalg.norm(q + low - kernel[layer]) < 0.9 * plain
    assert (f"{UP}/lora/a0" in rest) == (rounds > 1)
    whole = jp.combine(trainable, rest)
    np.testing.assert_allclose(base.apply(method.merge(whole), BATCH), model.apply(whole, BATCH), rtol=1e-4, atol=1e-4)


def test_loftq_of_a_bfloat16_base_starts_from_the_codes_that_are_kept():
    """What is subtracted is rounded to the kernel's type before it is packed, and the pair is made of these codes."""
    lora = jp.lora(4, init="loftq", init_options={"iterations": 2}, targets=["up_proj"])
    base, params = tiny.model(jnp.bfloat16)
    _, trainable, rest = jp.setup(jp.chain(lora, jp.quantize()), base, params, KEY)
    lost = np.asarray(params["layers"]["mlp"]["up_proj"]["kernel"], np.float32) - dense(rest[f"{UP}/kernel"])
    u, s, vt = np.linalg.svd(lost, full_matrices=False)
    low = trainable[f"{UP}/lora/a"] @ trainable[f"{UP}/lora/b"]
    np.testing.assert_allclose(low, (u[..., :4] * s[:, None, :4]) @ vt[:, :4], atol=1e-4)


def test_loftq_of_other_packed_formats():
    """PEQA's codes are iterated on as well."""
    lora = jp.lora(4, init="loftq", init_options={"iterations": 3})
    base, params = tiny.model()
    found = {}
    for name, first in {"plain": jp.lora(4), "loftq": lora}.items():
        model, trainable, rest = jp.setup(jp.chain(first, jp.peqa(4)), base, params, KEY)
        found[name] = np.abs(model.apply(jp.combine(trainable, rest), BATCH) - base.apply(params, BATCH)).mean()
    assert found["loftq"] < 0.8 * found["plain"]


@pytest.mark.parametrize("rounds", [1, 3])
def test_loftq_in_files(rounds, tmp_path):
    """An adapter comes back bit by bit with the codes; for PEFT it is one of the quantized base, or of the original."""
    lora = jp.lora(4, init="loftq", init_options={"iterations": rounds}, targets="mlp")
    method = jp.chain(lora, jp.quantize())
    folder = reference.write_base(tmp_path / "llama")
    base, params = reference.load(folder)
    model, trainable, rest = jp.setup(method, base, params, KEY)
    whole = tree.combine(reference.randomise(trainable), rest)
    jp.export_adapter(tmp_path / "adapter", whole, method, base.config, folder)
    again, leaves = jp.import_adapter(tmp_path / "adapter", base.config, params)
    assert again.specs == method.specs
    _, *parts = jp.setup(again, base, tree.unflatten({**tree.flatten(params), **leaves}), KEY)
    back = tree.flatten(jp.combine(*parts))
    for path, leaf in tree.flatten(whole).items():
        jax.tree.map(np.testing.assert_array_equal, back[path], leaf)
    # On the base with what is left of the kernels unpacked, PEFT computes what ours does.
    theirs = reference.torch_base(folder)
    names = {f"layers/mlp/{name}": f"model.layers.{{}}.mlp.{name}" for name in ("gate_proj", "up_proj", "down_proj")}
    for site, name in names.items():
        kernel = np.array(dense(tree.flatten(whole)[f"{site}/kernel"]))
        if rounds > 1:
            kernel += np.asarray(tree.flatten(whole)[f"{site}/lora/a0"] @ tree.flatten(whole)[f"{site}/lora/b0"])
        for layer in range(2):
            theirs.get_submodule(name.format(layer)).weight.data.copy_(reference.torch.tensor(kernel[layer].T))
    for name, module in ((f"{at}_proj", f"self_attn/{at}_proj") for at in "qkvo"):
        kernel = np.array(dense(tree.flatten(whole)[f"layers/{module}/kernel"]))
        for layer in range(2):
            at = theirs.get_submodule(f"model.layers.{layer}.self_attn.{name}")
            at.weight.data.copy_(reference.torch.tensor(kernel[layer].T))
    adapted = reference.peft.PeftModel.from_pretrained(theirs, tmp_path / "adapter").eval()
    reference.assert_close(reference.logits(model, whole), reference.torch_logits(adapted))


@pytest.mark.parametrize(
    ("members", "says"),
    [
        (
            lambda: [jp.lora(4, init="loftq")],
            "init 'loftq' starts from what quantization loses of layers/mlp/down_proj",
        ),
        (lambda: [jp.quantize(), jp.lora(4, init="loftq")], "needs the kernel as it was, .*, as lora[+]quantize"),
        (
            lambda: [jp.lora(4, init="loftq", targets="mlp"), jp.quantize(targets="attention")],
            "starts from what quantization loses of layers/mlp/down_proj",
        ),
        (lambda: [jp.lora(4, init="loftq", init_options={"iterations": 0})], "iterations 0 must be at least 1"),
        (lambda: [jp.lora(4, init="loftq", init_options={"rounds": 2})], "no option 'rounds'; it has iterations"),
        (lambda: [jp.lora(4, init="pissa", init_options={"rounds": 2})], "no option 'rounds'; it has none"),
        (lambda: [jp.lora(4, init_options={"rounds": 2})], "init 'kaiming' has no options; leave init_options rounds"),
        (
            lambda: [jp.lora(4, init="loftq", init_options={"iterations": "two"})],
            "lora, init 'loftq': iterations 'two' should be a whole number",
        ),
    ],
)
def test_bad_starts_say_what_would_be_right(members, says):
    with pytest.raises(jp.InputError, match=says):
        jp.setup(jp.chain(*members()), *tiny.model(), KEY)
