"""The planner's figures against arrays counted by hand; its frontier against every table; its search under budgets."""

import itertools
import math

import jax
import jax.numpy as jnp
import pytest

import jaxpeft as jp
from jaxpeft import tree
from jaxpeft.backward.options import options
from jaxpeft.backward.plan import INPUT, Plan
from jaxpeft.backward.segments import recorded
from jaxpeft.errors import InputError
from jaxpeft.memory import planner, search, targets
from tests import tiny

ROWS, LENGTH = 8, 64
CPU = targets.target("cpu")
D, F, L, V = (tiny.CONFIG[n] for n in ("hidden_size", "intermediate_size", "num_hidden_layers", "vocab_size"))
KV = D // 2  # two of four heads


def make(save=None, method=None, **changes):
    settings = {"batch_size": ROWS, "seq_len": LENGTH, "dtype": jnp.float32, **changes}
    return planner.make_step(tiny.CONFIG, method or jp.lora(rank=4), save=save, **settings)


@pytest.fixture(scope="module")
def step():
    return make()


def test_the_step_is_the_one_that_trains(step):
    """Its shapes are those of a real state and batch, and it runs on them."""
    base, params = tiny.model()
    model, trainable, frozen = jp.setup(jp.lora(rank=4), base, params, jax.random.key(0))
    assert {path: x.shape for path, x in trainable.items()} == {p: x.shape for p, x in step.state.trainable.items()}
    state = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), step.state._replace(key=None))
    state = state._replace(key=jax.random.key(0), trainable=trainable, frozen=frozen)
    _, metrics = jax.jit(step.function)(state, tiny.batch(ROWS, LENGTH))
    loss = jp.completion_loss(model, tree.combine(trainable, frozen), tiny.batch(ROWS, LENGTH))[0]
    assert metrics["loss"] == pytest.approx(float(loss), rel=1e-6)


def test_bytes_by_owner(step):
    made = planner.row(step, CPU)
    owners = made["bytes"]
    lora = L * 4 * (4 * D + 2 * D + 2 * KV + 3 * (D + F))  # rank 4: (n + m) of q, k, v, o, gate, up, down
    assert owners["adapters"] == owners["gradients"] == 4 * lora
    assert owners["optimizer"] == 2 * 4 * lora + 4  # two moments, and Adam's count
    matrices = L * (2 * D * D + 2 * D * KV + 3 * D * F + 2 * D) + D
    assert owners["weights"] == 4 * (matrices + 2 * V * D)
    assert owners["arguments"] >= owners["weights"] + owners["adapters"] + owners["optimizer"]
    assert (
        owners["arguments"] - owners["weights"] - owners["adapters"] - owners["optimizer"] - 5 * 4 * ROWS * LENGTH < 64
    )
    assert owners["temporaries"] == owners["gradients"] + owners["activations"] + owners["workspace"]
    assert made["fits"] and made["device_bytes"] == CPU.memory_bytes
    assert {"target", "save", "batch_size", "seq_len", "flops", "recompute_flops", "host_bytes", "jax"} <= set(made)


def test_activations_are_those_that_the_layers_keep(step):
    """x, q, k, v, attention and its log-sum-exp, one array after attention, gate, up, seven low-rank products."""
    per_token = 4 * (D + D + 2 * KV + D + D + 2 * F + 7 * 4) + 4 * 4
    assert planner.cost(step).activations == L * ROWS * LENGTH * per_token


def test_flops_by_hand():
    """Forward, and a product for each one that is needed: d x of all, d W of what trains; nothing frozen."""
    tokens = ROWS * LENGTH
    kernels = 2 * D * D + 2 * D * KV + 3 * D * F
    low = 4 * (sum(n + m for n, m in [(D, D), (D, KV), (D, KV), (D, D), (D, F), (D, F), (F, D)]))
    scores = LENGTH * D / 2  # a product of queries and keys, half of it masked, per token
    layers = tokens * L * 2 * (2 * kernels + 3 * low + 7 * scores)
    head = tokens * 2 * D * V
    traced = planner.cost(make("matmuls"))
    assert traced.flops == pytest.approx(layers + 2 * head, rel=1e-12)  # the logits, and d h of them, once
    assert traced.recompute_flops == 0
    blocks = planner.cost(make("blocks"))
    again = tokens * L * 2 * (kernels - F * D + low - 4 * D + 2 * scores)  # all but what only leads to the output
    assert blocks.recompute_flops == pytest.approx(again, rel=1e-12)
    assert blocks.flops - traced.flops == pytest.approx(again, rel=1e-12)


@pytest.mark.parametrize("save", ["blocks", "everything"])
def test_micro_batches_keep_a_part_and_compute_the_same(save):
    whole, parts = planner.cost(make(save)), planner.cost(make(save, accumulate=4))
    assert (parts.flops, parts.recompute_flops) == (whole.flops, whole.recompute_flops)
    assert parts.activations == pytest.approx(whole.activations / 4, rel=0.01)


def test_plain_autodiff_keeps_more():
    everything, matmuls = planner.cost(make("everything")), planner.cost(make("matmuls"))
    assert everything.activations > 1.5 * matmuls.activations
    assert everything.flops == matmuls.flops


def test_several_devices_need_their_mesh():
    """What they need is in pod_plan_test.py."""
    target = targets.target("v5e:2x2")
    with pytest.raises(ValueError, match=r"a step of 1 device\(s\), and v5e:2x2 has 4: give it their mesh"):
        planner.row(make(batch_size=6), target)


# The search.


@pytest.fixture(scope="module")
def segments(step):
    return planner.cost(make("blocks")).segments


def test_the_frontier_is_that_of_every_table(segments):
    """Every subset of the names, each through the plan itself: none keeps less for no more recomputation."""
    names = ["q_proj", "k_proj", "v_proj", "attention", "o_proj", "gate_proj", "up_proj", "lora_low"]
    frontier = options(segments)
    assert [option.flops for option in frontier] == sorted(option.flops for option in frontier)
    assert [option.kept for option in frontier] == sorted((option.kept for option in frontier), reverse=True)
    assert frontier[0].flops == 0 and frontier[-1].plan == Plan("blocks")
    segment = segments["layers"]
    for chosen in itertools.product((False, True), repeat=len(names)):
        saved = {name for name, use in zip(names, chosen, strict=True) if use}
        saved |= {"attention_lse"} & {f"{name}_lse" for name in saved}
        given = [name for name in segment.programs.names if name[0] in saved]
        _, _, read = segment.programs.backward(given)
        kept = sum(segment.stored_bytes(name, "save") for name in [*read, (INPUT, 0)])
        flops = segment.programs.recompute_flops(read) * segment.steps
        assert any(option.kept <= kept and option.flops <= flops for option in frontier)


@pytest.mark.parametrize("index", [0, 3, 10, -1])
def test_an_option_costs_what_its_plan_costs(segments, index):
    option = options(segments)[index]
    traced = planner.cost(make(option.plan))
    assert traced.activations == option.kept
    assert traced.recompute_flops == pytest.approx(option.flops)


def test_compression_and_offloading_are_options_only_if_asked_for(segments):
    assert {a for o in options(segments) for _, a in o.plan.actions} == {"save"}
    wider = options(segments, ("save", "compress"))
    assert any(action == "compress" for option in wider for _, action in option.plan.actions)
    assert all(option.altered == 0 for option in options(segments))
    assert wider[0].altered == 0  # what needs no compression uses none


@pytest.mark.slow
def test_a_budget_is_kept_and_used(monkeypatch):
    compiled = {}  # the three searches meet the same plans

    def row(step, target, traced):
        plan = str(step.plan)
        compiled[plan] = compiled.get(plan) or planner.row(step, target, traced)
        return compiled[plan]

    monkeypatch.setattr(search, "row", row)
    totals = {save: planner.row(make(save), CPU)["bytes"]["total"] for save in ("blocks", "matmuls")}
    chosen = []
    for part in (0.0, 0.6, 1.0):
        budget = math.ceil(totals["blocks"] + part * (totals["matmuls"] - totals["blocks"]))
        step, made = search.fit(make, CPU, budget)
        assert made["bytes"]["total"] <= budget
        assert made["save"] == str(step.plan)
        chosen.append(made["recompute_flops"])
    assert chosen == sorted(chosen, reverse=True) and len(set(chosen)) >= 3
    assert chosen[-1] == planner.cost(make("matmuls")).recompute_flops


def test_a_budget_that_nothing_fits():
    arguments = tree.num_bytes((make().state._replace(key=None), make().batch))
    with pytest.raises(InputError, match="the arguments alone"):
        search.fit(make, CPU, arguments // 2)
    with pytest.raises(InputError, match="the plan that keeps least needs"):
        search.fit(make, CPU, arguments + 1000)


@pytest.mark.parametrize(
    "slope, quantum, most, wanted", [(7, 1, None, 142), (7, 8, None, 136), (7, 1, 100, 100), (2000, 1, None, 0)]
)
def test_largest(slope, quantum, most, wanted):
    asked = []

    def total(n):
        asked.append(n)
        return 3 + slope * n

    assert search.largest(total, 1000, start=8, quantum=quantum, most=most) == wanted
    assert len(asked) == len(set(asked)) <= 12


def test_a_recorded_segment_is_gone_after_its_context():
    with recorded() as found:
        planner.cost(make("matmuls"))
    before = dict(found)
    planner.cost(make("matmuls"))
    assert list(before) == ["layers"] and found["layers"] is before["layers"]
