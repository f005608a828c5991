"""What a plan keeps for the backward pass, counted by hand, and what is computed again."""

import jax
import jax.numpy as jnp
import pytest

from jaxpeft import tree
from jaxpeft.backward import loop, residuals
from jaxpeft.backward.flops import count_flops
from jaxpeft.backward.plan import INPUT
from tests import tiny
from tests.backward.gradients import HEADS, LAYERS, METHODS, MHA, MODELS, RANK, D, F, kept, segments, start
from tests.residuals import bytes_per_token, saved


@pytest.mark.parametrize("method", ["lora", "lora_fa", "lora_fa seed"])
def test_matmuls_keeps_twelve_d_and_four_f(method):
    """By hand, in bf16: the input, q, k, v, attention, one of what makes the stream after it: 6 d; gate and up: 2 f."""
    [segment] = segments(method, "matmuls", dtype=jnp.bfloat16, **MHA)
    tokens = 4 * 16
    bytes_of = segment.kept_bytes()
    stream = [name for name in ("o_proj", "after_attention") if name in bytes_of["device"]]
    assert len(stream) == 1
    expected = dict.fromkeys((INPUT, "q_proj", "k_proj", "v_proj", "attention", *stream), 2 * D)
    expected |= {"gate_proj": 2 * F, "up_proj": 2 * F, "lora_low": 7 * 2 * RANK, "attention_lse": 4 * HEADS}
    assert bytes_of == {"device": {name: LAYERS * tokens * size for name, size in expected.items()}, "host": {}}
    assert sum(expected.values()) == 12 * D + 4 * F + 14 * RANK + 4 * HEADS


def test_grouped_queries_keep_smaller_keys_and_values():
    [segment] = segments("lora", "matmuls,tokens=16")
    assert segment.steps == 4 * LAYERS and segment.shapes["k_proj", 0].shape == (1, 16, D // 2)
    assert segment.kept_bytes()["device"]["k_proj"] == 4 * LAYERS * 64 * D // 2


def test_qwen3_keeps_no_second_copy_of_queries_and_keys():
    """The norm on the heads and the rotation are computed again from q_proj and k_proj."""
    [segment] = segments("lora", "matmuls", **MODELS["qwen3"])
    assert not {"q_norm", "k_norm", "q_rotary", "k_rotary"} & set(kept(segment))


@pytest.mark.parametrize("method", ["lora", "lora_fa", "full"])
@pytest.mark.parametrize("save", ["matmuls", "blocks"])
def test_the_closure_holds_what_was_planned_and_nothing_else(method, save):
    """bf16: the bytes that the backward function itself holds; of float32 only log-sum-exp, once rotary tables."""
    made = start(METHODS[method], jnp.bfloat16, **MHA)
    model = residuals.remat(made[0], save)
    [segment] = segments(method, save, dtype=jnp.bfloat16, **MHA)
    planned = sum(segment.kept_bytes()["device"].values()) / 64
    context = 2 * 4 * (D // HEADS // 2) + 4 + 4  # cos and sin, positions, segment ids
    token_ids = 4 if method == "full" else 0  # for the gradient of the embeddings
    assert bytes_per_token(model, *made[1:], tiny.batch) == planned + context + token_ids
    own = {leaf.shape for leaf in jax.tree.leaves(made[1:])}
    wide = [leaf.shape for leaf in saved(model, *made[1:], tiny.batch(rows=2)) if leaf.dtype == jnp.float32]
    tables = [(2, 16, 1, D // HEADS // 2), (1, 2, 16, 1, D // HEADS // 2)]
    lse = (LAYERS, 2, HEADS, 16)
    assert set(wide) - own - set(tables) == ({lse} if save == "matmuls" else set())


def test_plain_autodiff_keeps_more():
    """Without a plan: what the adapters of q, k, v, of o, of gate, up and of down read, beside the products that
    `matmuls` keeps; a float32 for each norm; and no float32 copy of the stream."""
    made = start(METHODS["lora"], jnp.bfloat16, **MHA)
    everything = bytes_per_token(*made, tiny.batch)
    assert residuals.remat(made[0], "everything") is made[0]
    positions = 4  # read to make the rotary tables, which are kept
    inputs = LAYERS * (3 * 2 * D + 2 * F + 2 * 4)
    assert everything + positions == bytes_per_token(residuals.remat(made[0]), *made[1:], tiny.batch) + inputs
    assert (LAYERS, 2, 16, D) not in {
        leaf.shape for leaf in saved(*made, tiny.batch(rows=2)) if leaf.dtype == jnp.float32
    }


def test_only_layers_that_train_are_kept():
    """Below the last layer nothing is differentiated."""
    [segment] = segments("last:1", "matmuls")
    assert segment.steps == 1


def test_what_nothing_would_read_is_not_kept():
    """o_proj is not read once the stream after it is there, nor are a block's last ones."""
    [segment] = segments("lora", "matmuls,after_attention=save,o_proj=save")
    assert "after_attention" in kept(segment) and "o_proj" not in kept(segment)
    [segment] = segments("lora", "blocks,down_proj=save,block_output=save")
    assert kept(segment) == [INPUT]


def test_offload_keeps_the_large_ones_on_the_host():
    [here], [there] = segments("lora", "matmuls"), segments("lora", "offload")
    before, after = here.kept_bytes(), there.kept_bytes()
    assert set(after["device"]) == {INPUT, "lora_low", "attention_lse"}
    assert {**after["device"], **after["host"]} == before["device"]


def test_compressed_keeps_a_byte_per_number():
    """Per number a byte; per token a float32; per row and channel two bf16, per step a seed. Attention runs again."""
    [exact], [small] = segments("lora", "matmuls", **MHA), segments("lora", "compressed", **MHA)
    expected = dict(exact.kept_bytes()["device"])
    del expected["attention"], expected["attention_lse"]
    for name in ("gate_proj", "up_proj", "q_proj", "k_proj", "v_proj"):
        width = F if name in ("gate_proj", "up_proj") else D
        expected[name] = LAYERS * (64 * width + 64 * 4 + 4 * width * 2 * 2 + 4)
    assert small.kept_bytes()["device"] == expected
    _, attention, *_ = products(D)
    assert small.recompute_flops() == LAYERS * 64 * attention


def products(q, r=0):
    """FLOPs per token of the forward products of one layer: seven kernels, attention, adapters of rank r."""
    kernels = [(D, D), (D, q), (D, q), (D, D), (D, F), (D, F), (F, D)]
    attention = 2 * 2 * 16 * D / 2
    return [2 * n * m for n, m in kernels], attention, [2 * r * n for n, _ in kernels], [2 * r * m for _, m in kernels]


@pytest.mark.parametrize("method", ["lora", "lora_fa", "full"])
def test_no_product_is_computed_twice(method):
    """The whole gradient's FLOPs under `matmuls` are those of plain autodiff."""
    model, trainable, frozen = start(METHODS[method])
    counts = []
    for each in (model, residuals.remat(model, "matmuls,tokens=16")):

        def function(trainable, each=each):
            return each.hidden(tree.combine(trainable, frozen), tiny.batch()).sum()

        counts.append(count_flops(jax.make_jaxpr(jax.grad(function))(trainable)))
    assert counts[0] == counts[1]
    [segment] = segments(method, "matmuls,tokens=16")
    assert segment.recompute_flops() == 0


def test_blocks_computes_the_forward_products_again():
    """All but the last, whose output nothing reads; of its adapter x A."""
    [segment] = segments("lora", "blocks", **MHA)
    kernels, attention, down, up = products(D, RANK)
    per_token = sum(kernels[:-1]) + attention + sum(down) + sum(up[:-1])
    assert segment.recompute_flops() == LAYERS * 64 * per_token
    [segment] = segments("full", "blocks", **MHA)
    kernels, attention, *_ = products(D)
    assert segment.recompute_flops() == LAYERS * 64 * (sum(kernels[:-1]) + attention)


def test_a_table_is_charged_for_what_it_leaves_out():
    kernels, attention, down, up = products(D, RANK)
    [segment] = segments("lora", "matmuls,attention=recompute", **MHA)
    assert segment.recompute_flops() == LAYERS * 64 * attention
    assert "attention_lse" not in kept(segment)  # the kernel that makes one makes the other
    [segment] = segments("lora", "matmuls,gate_proj=recompute", **MHA)
    # One operation makes x W + s (x A) B and x A, though x A is kept.
    assert segment.recompute_flops() == LAYERS * 64 * (kernels[4] + down[4] + up[4])


@pytest.mark.parametrize(
    ("rows", "length", "tokens", "groups"),
    [(8, 16, 2048, 1), (8, 16, 32, 4), (8, 16, 1, 8), (6, 16, 64, 2), (7, 5, 30, 7)],
)
def test_groups_are_equal_and_as_few_as_fit(rows, length, tokens, groups):
    assert loop.num_groups(rows, length, tokens) == groups
