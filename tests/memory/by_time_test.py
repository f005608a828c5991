"""Plans by time: what an option's seconds are, by hand; that the search takes the least by what compiled steps move."""

import dataclasses
import itertools
import json

import jax
import jax.numpy as jnp
import pytest

import jaxpeft as jp
from jaxpeft import cli, tree
from jaxpeft.backward.flops import equation_bytes
from jaxpeft.backward.options import Rates, frontier, tables
from jaxpeft.backward.plan import INPUT, Plan
from jaxpeft.errors import InputError
from jaxpeft.memory import planner, search, targets
from pallas_kernels.lora_matmul import lora_matmul
from pallas_kernels.stacked import Stacked
from tests import tiny

LINK = 1e6  # bytes per second to the host
RATES = Rates(flops=1e9, bandwidth=1e8, host=LINK)


def make(save=None, **changes):
    settings = {"batch_size": 8, "seq_len": 64, "dtype": jnp.float32, **changes}
    return planner.make_step(tiny.CONFIG, jp.lora(rank=4), save=save, **settings)


@pytest.fixture(scope="module")
def segments():
    return planner.cost(make("blocks")).segments


def test_a_product_takes_the_larger_of_its_work_and_its_bytes():
    assert RATES.product(2e9, 1e8) == 2 and RATES.product(1e9, 3e8) == 3


def test_what_an_equation_reads_and_writes():
    x, stack, a, b = (jnp.zeros(s, jnp.bfloat16) for s in ((16, 64), (5, 64, 32), (64, 4), (4, 32)))
    (dot,) = jax.make_jaxpr(lambda x, w: x @ w)(x, stack[0]).eqns
    assert equation_bytes(dot) == 2 * (16 * 64 + 64 * 32 + 16 * 32)
    (draw,) = jax.make_jaxpr(lambda key: jax.random.split(key))(jax.random.key(0)).eqns[-1:]
    assert equation_bytes(draw) == 0  # keys are no numbers
    jaxpr = jax.make_jaxpr(lambda x, stack, a, b: lora_matmul(x, Stacked(stack, jnp.int32(2)), a, b))(x, stack, a, b)
    found = [equation_bytes(eqn) for eqn in jaxpr.eqns if "treedef" in eqn.params]
    # One layer of the stack, its number; z of (4, 16) is a result too.
    assert found and max(found) <= 2 * (16 * 64 + 64 * 32 + 64 * 4 + 4 * 32 + 16 * 32 + 4 * 16) + 16


def test_an_options_seconds_are_those_of_its_plan(segments):
    """Recomputed products, one by one, and what is kept, twice."""
    segment = segments["layers"]
    options = tables(segments, ("save",), rates=RATES)
    least = next(option for option in options if option.plan == Plan("blocks"))
    most = min(options, key=lambda option: (option.flops, option.kept))
    assert most.flops == 0 and most.seconds == pytest.approx(2 * most.kept / RATES.bandwidth)
    assert least.kept == segment.stored_bytes((INPUT, 0), "save")
    again = least.seconds - 2 * least.kept / RATES.bandwidth
    # No less than all the FLOPs at the rate, and no less than the seven maps' kernels once in every step.
    kernels = sum(
        tree.num_bytes(x) // tiny.CONFIG["num_hidden_layers"]
        for path, x in make().state.frozen.items()
        if path.endswith("proj/kernel") and "down_proj" not in path
    )
    assert again >= least.flops / RATES.flops and again >= segment.steps * kernels / RATES.bandwidth
    assert all(option.transfer == 0 for option in options)


def test_what_is_offloaded_takes_the_link_beside(segments):
    for option in tables(segments, ("save", "offload"), rates=RATES):
        assert option.transfer == pytest.approx(2 * option.altered / LINK)
        assert option.seconds >= 2 * (option.kept + option.altered) / RATES.bandwidth


def test_the_frontier_has_ever_more_time_for_ever_less_memory(segments):
    found = tables(segments, ("save", "offload"), rates=RATES)
    cost = lambda option: max(1.0 + option.seconds, option.transfer)
    chosen = frontier(found, cost)
    for a, b in itertools.pairwise(chosen):
        assert cost(a) <= cost(b) and a.kept > b.kept
    for option in found:
        assert any(other.kept <= option.kept and cost(other) <= cost(option) for other in chosen)


def test_low_rank_products_are_kept_longer_by_time_than_by_flops(segments):
    """Hardly any FLOPs, but all of x to read: with less memory they are among the last to be given up."""
    found = tables(segments, ("save",), rates=search.rates(targets.target("h200")))

    def least(cost):
        return min(option.kept for option in frontier(found, cost) if "lora_low" in dict(option.plan.actions))

    assert least(lambda option: option.seconds) < least(lambda option: option.flops)


@pytest.fixture
def timed(monkeypatch):
    """(a CPU of known rates, {plan: seconds}): compiled rows, each once, whose time is their products' unless set."""
    cpu = dataclasses.replace(targets.target("cpu"), bandwidth=1e10, flops=1e11, host_bandwidth=1e9)
    compiled, times = {}, {}

    def moving(step, target, traced):
        plan = str(step.plan)
        compiled[plan] = compiled.get(plan) or planner.row(step, target, traced)
        seconds = times.get(plan, compiled[plan]["flops"] / target.flops)
        return {**compiled[plan], "traffic": {"least_by_module_s": seconds, "bound_s": seconds}}

    monkeypatch.setattr(search, "moving", moving)
    return cpu, times


@pytest.mark.slow
def test_the_search_takes_the_least_of_what_it_compiled(timed):
    cpu, times = timed
    said = []
    _, first = search.fit(make, cpu, 2**40, report=said.append, by="time")
    assert "ms at least" in said[0]
    assert first["save"] != "blocks" and first["recompute_flops"] < planner.cost(make("blocks")).recompute_flops
    # A plan that turns out to take longer than the one that keeps least is not returned.
    times[first["save"]] = 1e6
    _, second = search.fit(make, cpu, 2**40, by="time")
    assert second["save"] != first["save"] and second["traffic"]["bound_s"] < 1e6


def test_by_time_needs_what_a_device_does_in_a_second():
    with pytest.raises(InputError, match="bandwidth and rate of cpu are not known"):
        search.fit(make, targets.target("cpu"), 2**40, by="time")
    assert search.rates(targets.target("v5p:2x2x1")) == Rates(4 * 459e12, 4 * 2765e9, 4 * 16e9)


@pytest.mark.slow
def test_a_plan_by_time_is_no_slower_than_one_by_flops(optimised, capsys, tmp_path):
    """By the traffic of the compiled steps, in a budget between those of the two presets."""
    (tmp_path / "config.json").write_text(json.dumps({**tiny.CONFIG, "hidden_size": 256, "intermediate_size": 512}))
    step = ["plan", "--model", str(tmp_path), "--batch-size", "8", "--seq-len", "128", "--rank", "8", "--json"]
    step += ["--target", "h200", "--traffic", "--dtype", "bfloat16"]
    try:
        targets.devices(targets.target("h200"))
    except InputError as error:
        pytest.skip(str(error))

    def rows(*flags):
        assert cli.main([*step, *flags]) == 0
        return json.loads(capsys.readouterr().out)["rows"]

    least, most = (row["bytes"]["total"] for row in rows("--save", "blocks;matmuls"))
    budget = str((least + most) // 2)
    (flops,), (time,) = rows("--budget", budget), rows("--budget", budget, "--by", "time")
    assert max(flops["bytes"]["total"], time["bytes"]["total"]) <= int(budget)
    assert time["traffic"]["bound_s"] <= flops["traffic"]["bound_s"]
