"""The optimizer's state in the host's memory: where it lies, that a step is the ordinary one, and what is refused."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxpeft as jp
from jaxpeft import host, sharding, tree
from jaxpeft.backward.residuals import remat
from jaxpeft.errors import InputError
from jaxpeft.memory import planner, targets
from jaxpeft.train import host_state
from jaxpeft.train.optimizer import make_direction
from tests import runs, tiny

LEAVES = {"embed_tokens/embedding": (192, 128), "layers/mlp/kernel": (3, 64, 128), "layers/norm/scale": (3, 64)}
SIZES = {**tiny.CONFIG, "hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 2, "vocab_size": 256}


def drawn(seed):
    return {p: jax.random.normal(jax.random.key(seed + i), shape) for i, (p, shape) in enumerate(LEAVES.items())}


def two_updates(optimizer):
    update, state = jax.jit(optimizer.update), optimizer.init(drawn(0))
    for seed in (3, 6):
        directions, state = update(drawn(seed), state, drawn(0))
    return directions, state


@pytest.mark.parametrize(
    "kind, away",
    [
        ("adam", 4),
        ("lion", 2),
        pytest.param("adam8bit", 8, marks=pytest.mark.slow),
        pytest.param("sm3", 2, marks=pytest.mark.slow),
        pytest.param("adafactor", 1, marks=pytest.mark.slow),
    ],
)
def test_is_the_optimizer_with_a_state_on_the_device(kind, away):
    """Moments, codes and sums are the same bits; directions to a few roundings: bias corrections are in the loop."""
    (expected, before), (found, after) = (two_updates(make_direction(kind, 1.0, where)) for where in ("device", "host"))
    chex.assert_trees_all_equal(jax.device_get(before), jax.device_get(after))
    for path, direction in expected.items():
        np.testing.assert_allclose(found[path], direction, rtol=2e-6, atol=1e-7, err_msg=path)
    there = [x for x in jax.tree.leaves(after) if host.holds(x)]
    assert len(there) == away and all(x.ndim >= 2 and x.sharding.memory_kind == "pinned_host" for x in there)
    assert not any(map(host.holds, jax.tree.leaves(before)))


def test_a_first_state_is_that_of_the_device():
    for kind in ("adam", "adam8bit", "sm3", "adafactor", "lion"):
        one, two = (make_direction(kind, 1.0, where).init(drawn(0)) for where in ("device", "host"))
        chex.assert_trees_all_equal(jax.device_get(one), jax.device_get(two))
        chex.assert_trees_all_equal_shapes_and_dtypes(one, two)


def made(memory, in_backward, method=None, kind="lion", steps=2):
    method = method or jp.lora(2, targets="q_proj")
    base, params = tiny.model(num_hidden_layers=2)
    model, trainable, rest = jp.setup(method, base, jax.tree.map(jnp.copy, params), jax.random.key(0))
    model, optimizer = remat(model, "blocks"), make_direction(kind, None, memory)
    state = jp.init_state(method, optimizer, jax.tree.map(jnp.copy, trainable), rest, jax.random.key(1), model)
    step = jp.jit_step(jp.make_train_step(model, method, optimizer, rate=1e-2, update_in_backward=in_backward))
    for _ in range(steps):
        state, _ = step(state, tiny.batch())
    return state


@pytest.mark.parametrize("in_backward", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_steps_are_the_same_bits(in_backward):
    """Of Lion, whose directions are signs; the state stays where it began to lie."""
    one, two = (made(memory, in_backward) for memory in ("device", "host"))
    assert all(map(host.holds, jax.tree.leaves(two.opt_state.mu)))
    chex.assert_trees_all_equal(jax.device_get(one._replace(key=None)), jax.device_get(two._replace(key=None)))


@pytest.mark.slow
def test_sampled_layers_begin_anew_there():
    """LISA's moments after a switch, which are written in the host's memory; masters to a share of a step of 1e-2."""
    one, two = (made(memory, False, jp.lisa(1, every=2), "adam") for memory in ("device", "host"))
    masters = two.opt_state.masters.mu
    assert any(map(host.holds, jax.tree.leaves(masters)))
    assert not any(np.any(x) for path, x in masters.items() if tree.layered(path))
    for path, leaf in one.trainable.items():
        np.testing.assert_allclose(two.trainable[path], leaf, atol=1e-5, err_msg=path)


@pytest.mark.slow
def test_a_run_continues_bit_for_bit(tmp_path):
    fields = {"method": "full", "optimizer": "adam8bit", "optimizer_memory": "host", "steps": 4, "save": "blocks"}
    fields |= {"batch_size": 2, "seq_len": 64, "samples": 0, "eval_every": 0, "schedule": "constant"}
    runs.assert_continues(tmp_path, **fields)
    with pytest.raises(InputError, match="--optimizer-memory host -> device"):
        jp.run(**{**fields, "optimizer_memory": "device"}, out=tmp_path / "parts", resume=True)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["h200", "v5p"])
def test_a_device_has_no_state_of_matrices(name):
    """Of the compiled step: arguments are less by the state of all matrices, which is in the host's memory, once.

    Temporaries may be more by the state of a layer and its double, to come and to go; and on a TPU by the gradients,
    which a step whose state is on the device may free leaf by leaf.
    """
    rows, numbers = {}, {}
    for where in ("device", "host"):
        options = {"update_in_backward": True, "optimizer_memory": where}
        step = planner.make_step({**SIZES, "num_hidden_layers": 8}, jp.full(), 2, 128, "blocks", **options)
        rows[where], numbers[where] = planner.row(step, targets.target(name)), step
    leaves = numbers["host"].state.trainable
    matrices = {path: leaf for path, leaf in leaves.items() if leaf.ndim - tree.layered(path) >= 2}
    state = 2 * tree.num_bytes(matrices)
    layer = 2 * sum(tree.num_bytes(leaf) // leaf.shape[0] for path, leaf in matrices.items() if tree.stacked(path))
    one, two = rows["device"]["bytes"], rows["host"]["bytes"]
    assert one["optimizer"] - two["optimizer"] == state
    assert state <= rows["host"]["host_bytes"] <= 1.01 * state
    assert rows["device"]["host_bytes"] == 0
    assert one["arguments"] - two["arguments"] > 0.99 * state
    assert two["temporaries"] - one["temporaries"] < 2 * layer
    assert (rows["host"]["optimizer_memory"], rows["device"]["optimizer_memory"]) == ("host", "device")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["h200x4", "v5e:2x2"])
def test_on_a_mesh_each_device_has_its_part_in_its_hosts_memory(name):
    """A quarter of what one device has there."""
    target, rows = targets.target(name), {}
    mesh = sharding.make_mesh("fsdp=4", targets.devices(target))
    for where in ("device", "host"):
        step = planner.make_step(SIZES, jp.full(), 4, 128, "blocks", mesh=mesh, optimizer_memory=where)
        rows[where] = planner.row(step, target)
    leaves = step.state.trainable
    matrices = {path: leaf for path, leaf in leaves.items() if leaf.ndim - tree.layered(path) >= 2}
    state = 2 * tree.num_bytes(matrices) / 4
    one, two = rows["device"]["bytes"], rows["host"]["bytes"]
    assert one["optimizer"] - two["optimizer"] == state
    assert state <= rows["host"]["host_bytes"] <= 1.02 * state and rows["device"]["host_bytes"] == 0
    assert one["arguments"] - two["arguments"] > 0.98 * state


@pytest.mark.parametrize(
    "method, optimizer, reason",
    [
        (jp.full(), "sgd", "full steps along the gradients themselves, with no state to keep there; leave it out"),
        (jp.ln_tuning(), "adam", "ln_tuning keeps a state of vectors only, which stays on the device; leave it out"),
        (jp.lisa(1, moments="kept"), "adam", "lisa reads and writes the optimizer's state itself, on the device"),
    ],
)
def test_refusals(method, optimizer, reason):
    with pytest.raises(InputError, match=f"^--optimizer-memory host: {reason}"):
        planner.make_step(tiny.CONFIG, method, 2, 32, optimizer=optimizer, optimizer_memory="host")


def test_a_device_without_such_memory_is_refused():
    class Device:
        device_kind = "thing"

        def addressable_memories(self):
            return [type("Memory", (), {"kind": "device"})]

    with pytest.raises(InputError, match="^--optimizer-memory host: thing shows JAX no pinned_host .*, only device"):
        host_state.check_device(Device())
    host_state.check_device(jax.devices()[0])
    with pytest.raises(InputError, match="optimizer memory 'disk' is not one of device, host"):
        make_direction("adam", 1.0, "disk")
