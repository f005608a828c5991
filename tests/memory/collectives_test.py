"""What programs of several devices send each other, and how long it takes, against what is counted by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from jaxpeft.memory import aot, collectives, hlo, interconnect
from jaxpeft.memory.collectives import Collective
from jaxpeft.memory.dataflow import Dataflow
from jaxpeft.memory.wire import Message
from tests.memory.pods import described, mesh_of

pytestmark = pytest.mark.usefixtures("optimised")

TURNS, N, M = 5, 1024, 512


def exchanged(x):
    """What each of four devices does with its (N, M) float32: all kinds, one of them in a loop."""
    x = jax.lax.fori_loop(0, TURNS, lambda i, x: jnp.tanh(jax.lax.psum(x, "fsdp")), x)
    x = x + jnp.tanh(jax.lax.all_gather(x, ("data", "fsdp"), tiled=True))[:N]
    x = x + jnp.tile(jnp.tanh(jax.lax.psum_scatter(x, "data", tiled=True)), (2, 1))
    x = x + jnp.tanh(jax.lax.all_to_all(x, ("data", "fsdp"), 0, 1, tiled=True)).reshape(N, M)
    return jnp.tanh(jax.lax.ppermute(x, "fsdp", [(0, 1), (1, 0)]))


@pytest.mark.parametrize("name", ["v5e:2x2", "h200x4"])
def test_collectives_are_those_of_the_program_by_their_trips(name, tmp_path):
    target = described(name)
    mesh = mesh_of(target, "data=2,fsdp=2")
    over = PartitionSpec(("data", "fsdp"))
    function = jax.shard_map(exchanged, mesh=mesh, in_specs=over, out_specs=over, check_vma=False)
    x = jax.ShapeDtypeStruct((4 * N, M), jnp.float32, sharding=NamedSharding(mesh, over))
    aot.compile_lowered(target, jax.jit(function).lower(x), tmp_path)
    found, unknown = collectives.collectives(Dataflow(hlo.read(tmp_path)), target.chips)
    assert unknown == 0
    part = 4 * N * M
    by_hand = {
        "all-gather": (1, 4 * part, 3 / 4),
        "all-reduce": (TURNS, part, 2 * 1 / 2),
        "reduce-scatter": (1, part, 1 / 2),
        "all-to-all": (1, part, 3 / 4),
        "collective-permute": (1, part, 1.0),
    }
    expected = {
        kind: {"times": times, "bytes": times * size, "sent": times * size * share}
        for kind, (times, size, share) in by_hand.items()
    }
    assert collectives.by_kind(found) == expected
    groups = {one.kind: one.group for one in found}
    assert groups["all-gather"] == (0, 1, 2, 3)
    assert groups["all-reduce"] in ((0, 1), (2, 3)) and groups["reduce-scatter"] in ((0, 2), (1, 3))


def test_an_all_gather_that_is_a_sum_is_an_all_gather(tmp_path):
    """Over all axes of a torus a TPU's compiler sums up each device's part among zeros, and sends twice as much."""
    target = described("v5p:4x4x4")
    mesh = mesh_of(target, "fsdp=64")
    place = lambda *axes: NamedSharding(mesh, PartitionSpec(*axes))
    x = jax.ShapeDtypeStruct((64 * 64, M), jnp.bfloat16, sharding=place("fsdp"))
    function = jax.jit(lambda x: jax.lax.with_sharding_constraint(jnp.tanh(x), place()))
    aot.compile_lowered(target, function.lower(x), tmp_path)
    found, _ = collectives.collectives(Dataflow(hlo.read(tmp_path)), target.chips)
    [one] = found
    size = 2 * 64 * 64 * M
    assert (one.kind, one.bytes, len(one.group)) == ("all-gather", size, 64)
    assert one.summed and one.sent == 2 * size * 63 / 64


def varint(number):
    return bytes([number]) if number < 128 else bytes([number & 127 | 128]) + varint(number >> 7)


def field(number, value):
    if isinstance(value, int):
        return varint(number << 3) + varint(value)
    return varint(number << 3 | 2) + varint(len(value)) + value


def test_groups_in_all_their_forms():
    """Listed, as parts of an iota, as axes of a mesh and parts of such: XLA writes any of them."""
    listed = field(49, field(1, 0) + field(1, 1)) + field(49, field(1, 2) + field(1, 3))
    nested = field(87, field(1, field(1, bytes([1, 3, 5]))))
    iota = field(87, field(2, field(1, 2) + field(2, 4) + field(3, bytes([4, 2])) + field(4, bytes([1, 0]))))
    axes = b"".join(field(1, field(1, b"a") + field(2, size)) for size in (2, 8))
    whole = field(93, field(1, axes) + field(2, field(1, 1)))
    part = field(93, field(1, axes) + field(2, field(1, 1) + field(2, field(1, 2) + field(2, 2))))
    group = lambda proto: collectives._group(Message(proto), 8, permutes=False)
    assert group(listed) == (0, 1) and group(nested) == (1, 3, 5) and group(b"") == tuple(range(8))
    assert group(iota) == (0, 2, 4, 6)
    assert group(whole) == tuple(range(8)) and group(part) == (0, 2)
    pairs = field(52, field(1, 0) + field(2, 0)) + field(52, field(1, 2) + field(2, 5))
    assert collectives._group(Message(pairs), 8, permutes=True) == (2, 5)


# How long they take.


@pytest.mark.parametrize(
    ("name", "mesh", "axis", "rate"),
    [
        ("v5p:2x2x2", "fsdp=8", "fsdp", 3 * 100e9),  # a link in each of three dimensions
        ("v5p:4x4x4", "fsdp=64", "fsdp", 6 * 100e9),  # rings
        ("v5p:4x4x8", "data=8,fsdp=16", "data", 2 * 100e9),
        ("v5e:4x8", "data=4,tensor=8", "tensor", 50e9),
        ("v6e:16x16", "data=16,tensor=16", "tensor", 2 * 100e9),
        ("tpu7x:2x2x1", "data=4,fsdp=2", "fsdp", 6 * 100e9),  # the halves of a chip
        ("h200x8", "fsdp=8", "fsdp", 450e9),
        ("h100x8x2", "data=2,fsdp=8", "fsdp", 450e9),
    ],
)
def test_an_all_gather_takes_what_the_links_of_its_group_take(name, mesh, axis, rate):
    target = described(name)
    mesh = mesh_of(target, mesh)
    numbers = np.arange(mesh.size).reshape(mesh.devices.shape)
    where = tuple(slice(None) if other == axis else 0 for other in mesh.axis_names)
    group = tuple(int(n) for n in numbers[where].ravel())
    n = mesh.shape[axis]
    found = [Collective("all-gather", "", "", (), group, 1e9, 10)]
    seconds = interconnect.seconds(found, target, list(mesh.devices.flat))
    assert seconds == pytest.approx(10 * 1e9 * (n - 1) / n / rate)


def test_between_hosts_it_is_the_network():
    target = described("h200x8x2")
    devices = list(mesh_of(target, "fsdp=16").devices.flat)
    seconds = lambda kind, group: interconnect.seconds([Collective(kind, "", "", (), group, 1e9, 1)], target, devices)
    everyone, apart = tuple(range(16)), (0, 8)
    # Half of it comes through eight GPUs' network, and what the seven others of a host have got through NVLink.
    within = 1e9 * 7 / 8 / 450e9
    assert within > 0.5e9 / (8 * 50e9)
    assert seconds("all-gather", everyone) == pytest.approx(within)
    assert seconds("all-reduce", everyone) == pytest.approx(2 * within)
    assert seconds("all-gather", apart) == pytest.approx(0.5e9 / 50e9)
    assert seconds("all-to-all", everyone) == pytest.approx(1e9 * 8 / 16 / 50e9)
    assert seconds("collective-permute", apart) == pytest.approx(1e9 / 50e9)
