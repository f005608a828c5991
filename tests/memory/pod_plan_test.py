"""Plans of several devices: their bytes, their collectives and the least time, against what is counted by hand."""

import functools
import importlib.util
import json
import re
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

import jaxpeft as jp
from jaxpeft import cli, recipe, sharding
from jaxpeft.backward.plan import Plan
from jaxpeft.errors import InputError
from jaxpeft.memory import collectives, hlo, interconnect, meshes, movement, planner, pods, search, targets
from jaxpeft.memory.collectives import Collective
from jaxpeft.memory.dataflow import Dataflow
from jaxpeft.memory.wire import Message
from tests import tiny

pytestmark = pytest.mark.usefixtures("optimised")

SIZES = {"hidden_size": 256, "intermediate_size": 512, "vocab_size": 512, "num_attention_heads": 4}
SIZES |= {"num_key_value_heads": 4, "num_hidden_layers": 3}
D, F, V, L = 256, 512, 512, 3
ROWS, LENGTH, RANK = 8, 96, 4
SMALL = ["--batch-size", "8", "--seq-len", "32", "--rank", "2"]


def described(name):
    target = targets.target(name)
    try:
        targets.devices(target)
    except InputError as error:
        pytest.skip(str(error))
    return target


def mesh_of(target, text):
    return sharding.make_mesh(text, targets.devices(target))


def make(mesh, method=None, rows=ROWS, **changes):
    config, method = {**tiny.CONFIG, **SIZES}, method or jp.lora(rank=RANK, targets="all-linear")
    return planner.make_step(config, method, rows, LENGTH, "blocks", jnp.bfloat16, mesh=mesh, **changes)


@functools.cache
def planned(name, text, method=None):
    """(step, row, collectives of the program) of a small step, LoRA's or another method's."""
    import tempfile

    target = described(name)
    step = make(mesh_of(target, text), method and recipe.parse(method))
    with tempfile.TemporaryDirectory() as folder:
        made = pods.row(step, target, dump=folder)
        found, unknown = collectives.collectives(Dataflow(hlo.read(folder)), target.chips)
    assert unknown == 0
    return step, made, found


PODS = [("v5e:2x2", "fsdp=4"), pytest.param("h200x4", "fsdp=2,tensor=2", marks=pytest.mark.slow)]


# Collectives of programs known by hand.

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
    targets.compile_lowered(target, jax.jit(function).lower(x), tmp_path)
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
    targets.compile_lowered(target, function.lower(x), tmp_path)
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


# A step's plan.


@pytest.mark.parametrize(("name", "text"), PODS)
def test_bytes_are_those_of_one_device(name, text):
    step, made, _ = planned(name, text)
    sizes = sharding.parse(text)
    fsdp, tensor = sizes["fsdp"], sizes["tensor"]
    matrices = L * (4 * D * D + 3 * D * F) + 2 * V * D  # all of them over fsdp and tensor
    vectors = L * 2 * D + D  # the norms', whole
    assert made["bytes"]["weights"] == 2 * (matrices // (fsdp * tensor) + vectors)
    opens, closes = [(D, D)] * 3 + [(D, F)] * 2, [(D, D), (F, D)]  # by columns over tensor; by rows
    a = sum(n // fsdp for n, _ in opens) + sum(n // tensor for n, _ in closes)
    b = sum(m // tensor for _, m in opens) + sum(m // fsdp for _, m in closes)
    adapters = 4 * L * RANK * (a + b)
    assert made["bytes"]["adapters"] == made["bytes"]["gradients"] == adapters
    assert made["bytes"]["optimizer"] == 2 * adapters + 4
    _, batch = planner.local(step)
    assert batch["tokens"].shape == (ROWS // (sizes["data"] * fsdp), LENGTH)
    rest = made["bytes"]["arguments"] - sum(made["bytes"][part] for part in ("weights", "adapters", "optimizer"))
    if name.startswith("h200"):  # a TPU's arrays come in tiles, which its small factors do not fill
        assert 0 <= rest - 5 * 4 * batch["tokens"].size < 4096
    assert made["bytes"]["temporaries"] == sum(made["bytes"][p] for p in ("gradients", "activations", "workspace"))
    assert made["mesh"] == text and made["chips"] == 4 and made["fits"]


@pytest.mark.parametrize(("name", "text"), PODS)
def test_what_is_kept_is_that_of_its_own_rows(name, text):
    """A layer's input; of a GPU's array that is not filled, every device would have the whole."""
    step, made, _ = planned(name, text)
    inputs = L * (ROWS // step.shards) * LENGTH * D * 2
    if made["target"].startswith("h200"):  # a TPU has small arrays on its chip
        assert inputs <= made["bytes"]["activations"] < 1.3 * inputs


@pytest.mark.parametrize(("name", "text"), PODS)
def test_frozen_matrices_are_gathered_a_layer_at_a_time_and_never_summed(name, text):
    _, _, found = planned(name, text)
    sizes = sharding.parse(text)
    fsdp, tensor = sizes["fsdp"], sizes["tensor"]
    opens, closes = [(D, D)] * 3 + [(D, F)] * 2, [(D, D), (F, D)]
    parts = [(n // fsdp, m // tensor) for n, m in opens] + [(n // tensor, m // fsdp) for n, m in closes]
    whole = {(n, m // tensor) for n, m in opens} | {(n // tensor, m) for n, m in closes} | {*opens, *closes}
    given = {kind: [] for kind in collectives.KINDS}
    for one in found:
        given[one.kind] += [(tuple(n for n in shape if n > 1), one.times) for _, shape in one.shapes]
    per_layer = [shape for shape, times in given["all-gather"] if times == L and min(shape) > RANK]
    assert sorted(map(sorted, per_layer)) == sorted(map(sorted, 2 * parts))  # forwards and backwards, turned or not
    assert not [shape for shape, _ in given["all-gather"] if len(shape) > 2 and shape[0] == L]  # none of the stack
    summed = {shape for shape, _ in given["all-reduce"] + given["reduce-scatter"]}
    assert not summed & (whole | set(parts)) and not any(shape[:1] == (L,) and len(shape) > 2 for shape in summed)


def test_gradients_of_layers_are_scattered_not_summed_whole():
    """In full fine-tuning no device gets the sum of a whole matrix over `fsdp`, but its part.

    On GPUs; a TPU's compiler sums matrices as small as these, and over a whole torus those of any size.
    """
    fsdp = 4
    _, _, found = planned("h200x4", f"fsdp={fsdp}", "full")
    kernels = {tuple(sorted(shape)) for shape in [(D, D), (D, F)]}
    summed = [
        tuple(sorted(n for n in shape if n > 1))
        for one in found
        for _, shape in one.shapes
        if one.kind == "all-reduce" and one.times == L
    ]
    assert not kernels & {*summed}
    scattered = [one for one in found if one.kind == "reduce-scatter" and one.times == L]
    whole = 2 * L * (4 * D * D + 3 * D * F)  # bfloat16
    assert sum(one.bytes * one.times for one in scattered) == whole
    assert sum(one.sent for one in scattered) == whole * (fsdp - 1) / fsdp


@pytest.mark.parametrize(("name", "text"), PODS)
def test_the_bound_is_the_largest_of_its_parts(name, text):
    step, made, found = planned(name, text)
    target, bound = targets.target(name), made["bound"]
    assert made["collectives"] == collectives.by_kind(found)
    assert bound["compute_s"] == pytest.approx(made["flops_per_chip"] / target.flops)
    assert bound["memory_s"] == pytest.approx(made["traffic"]["bytes"] / target.bandwidth)
    sent = interconnect.seconds(found, target, list(step.mesh.devices.flat))
    assert bound["interconnect_s"] == pytest.approx(sent)
    assert (
        bound["step_s"]
        == bound[f"{bound['by']}_s"]
        == max(bound[f"{p}_s"] for p in ("compute", "memory", "interconnect"))
    )
    asked = made["flops"] - made["recompute_flops"]
    assert bound["utilisation"] == pytest.approx(asked / 4 / target.flops / bound["step_s"])
    assert bound["tokens_per_s"] == pytest.approx(ROWS * LENGTH / bound["step_s"])
    # Each device computes its part: of the products none is done by two of them.
    assert made["flops"] / 4 <= made["flops_per_chip"] < 1.2 * made["flops"] / 4
    assert made["rematerialised"] == {"instructions": 0, "flops": 0.0}


def test_what_the_compiler_computes_again_is_said(monkeypatch):
    """By the names that XLA's pass gives to what it puts in a second time; a loop's by its trips."""
    named = lambda name: hlo.Instruction(1, name, "fusion", "", (), (), 0, "", 0, b"")
    found = [("fusion.1", 3, 8.0), ("fusion.1.remat", 3, 8.0), ("copy.2.remat2", 1, 0.0), ("kernel.remat", 2, None)]
    made = [movement.Move(named(name), "product", times, (), (), flops) for name, times, flops in found]
    monkeypatch.setattr(pods, "moves", lambda flow: (made, 0))
    assert pods.rematerialised(None) == {"instructions": 3, "flops": 24.0}


# Which mesh.


def test_meshes_divide_devices_and_rows():
    found = meshes.candidates(8, 4)
    assert "fsdp=8" not in found and {"fsdp=4,tensor=2", "data=4,tensor=2", "data=2,fsdp=2,tensor=2"} <= set(found)
    for text in found:
        sizes = sharding.parse(text)
        assert np.prod(list(sizes.values())) == 8 and 4 % (sizes["data"] * sizes["fsdp"]) == 0
    assert meshes.candidates(8, 8, accumulate=4) == ["fsdp=2,tensor=4", "data=2,tensor=4", "tensor=8"]
    assert meshes.candidates(8, 3) == ["tensor=8"] and meshes.candidates(64, 3) == []


def test_the_best_mesh_is_the_fastest_that_fits(monkeypatch):
    target = described("v5p:2x2x2")
    times = {"data=8": (3.0, False), "fsdp=8": (2.0, True), "data=2,fsdp=4": (1.0, True)}
    seen = []

    def row(step, target):
        mesh = pods.text_of(step.mesh)
        seen.append(mesh)
        seconds, fits = times.get(mesh, (9.0, True))
        return {"mesh": mesh, "bytes": {"total": 1 << 30}, "fits": fits, "bound": {"step_s": seconds}}

    monkeypatch.setattr(pods, "row", row)
    said = []
    step, made = meshes.best(make, target, ROWS, report=said.append, most=20)
    assert made["mesh"] == "data=2,fsdp=4" == pods.text_of(step.mesh)
    assert len(made["tried"]) == made["meshes"] == len(seen) == len(said) == len(meshes.candidates(8, ROWS))
    assert seen[0] == "data=8"  # nothing to gather, and little to sum up
    assert said[0] == "v5p:2x2x2, data=8: 1.00 GiB, does not fit, 3000.0 ms at least"
    # None is begun that would end too late if it took as long as the longest before it: 30, 50 seconds, 20.
    clock = iter([0, 0, 30, 30, 80, 80])
    monkeypatch.setattr(meshes, "time", types.SimpleNamespace(monotonic=lambda: next(clock)))
    seen.clear()
    meshes.best(make, target, ROWS, most_seconds=100.0)
    assert len(seen) == 2


def test_no_mesh_is_one_line(monkeypatch):
    target = described("v5p:2x2x2")
    with pytest.raises(
        InputError, match="--batch-size 3: must be a multiple of the 64 devices of v5p:4x4x4, or of a half"
    ):
        meshes.best(make, targets.target("v5p:4x4x4"), 3)
    monkeypatch.setattr(meshes, "promise", lambda step, target: (2**40, 1.0))
    with pytest.raises(InputError, match=r"--mesh auto: the arguments alone .* take 1024.00 GiB of each device of v5p"):
        meshes.best(make, target, ROWS)


@pytest.mark.slow
def test_a_budget_is_one_devices(monkeypatch):
    """The plan that the search returns keeps what fits beside a device's part of the arguments."""
    target, rest = described("h200x4"), 10 << 20
    mesh = mesh_of(target, "fsdp=4")
    config, method = {**tiny.CONFIG, **SIZES}, jp.lora(rank=RANK)
    by_plan = lambda plan: planner.make_step(config, method, ROWS, LENGTH, plan, jnp.bfloat16, mesh=mesh)
    total = lambda kept: rest + kept // 4
    row = lambda step, target, traced: {"bytes": {"total": total(traced.activations)}, "mesh": pods.text_of(step.mesh)}
    monkeypatch.setattr(pods, "row", row)
    least, most = (planner.cost(by_plan(plan)).activations for plan in (Plan("blocks"), Plan("matmuls")))
    for kept in (most, (least + most) // 2, least):
        step, made = search.fit(by_plan, target, total(kept))
        assert least <= planner.cost(step).activations <= kept and made["mesh"] == "fsdp=4"
        assert made["bytes"]["total"] <= total(kept)
    assert str(search.fit(by_plan, target, total(most))[0].plan) != "blocks"
    with pytest.raises(InputError, match="the arguments alone"):
        search.fit(by_plan, target, 1 << 18)


# The command.


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    path = tmp_path_factory.mktemp("model") / "config.json"
    path.write_text(json.dumps({**tiny.CONFIG, **SIZES}))
    return str(path)


def test_the_command_shows_what_is_sent_and_the_bound(config, capsys, monkeypatch):
    made = planned("h200x4", "fsdp=2,tensor=2")[1]
    asked = []

    def row(step, target):
        asked.append((pods.text_of(step.mesh), step.rows, target.name))
        return made

    monkeypatch.setattr(pods, "row", row)
    assert cli.main(["plan", *SMALL, "--model", config, "--target", "h200x4", "--save", "blocks"]) == 0
    assert asked == [("fsdp=4", 8, "h200x4")]
    shown = capsys.readouterr()
    assert "compiling lora for h200x4 (fsdp=4), blocks" in shown.err
    assert len(re.findall(r"lora +h200x4 +fsdp=2,tensor=2 ", shown.out)) == 2
    for word in ("all-gather", "all-reduce", "compute", "memory", "interconnect", "utilisation", "tokens/s"):
        assert word in shown.out


@pytest.mark.slow
def test_a_profile_of_one_of_them(config, capsys, tmp_path):
    described("v5e:2x2")
    flags = ["--target", "v5e:2x2", "--mesh", "data=2,fsdp=2", "--save", "blocks", "--json", "--traffic"]
    assert cli.main(["profile", *SMALL, "--model", config, *flags]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["mesh"] == "data=2,fsdp=2" and found["profile"]["unattributed_bytes"] == 0
    assert found["profile"]["total_bytes"] == pytest.approx(found["bytes"]["total"], rel=0.02)
    assert found["profile"]["categories"]["weights"] == pytest.approx(found["bytes"]["weights"], rel=0.01)
    assert {"all-gather", "all-reduce"} <= set(found["collectives"])


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (
            ["--target", "v5p:2x2x2", "--mesh", "fsdp=4"],
            "--mesh fsdp=4: 4 devices, and --target v5p:2x2x2 has 8 devices",
        ),
        (["--target", "h200", "--mesh", "fsdp=8"], "--mesh fsdp=8: 8 devices, and --target h200 has 1 device"),
        (["--target", "h200x8", "--mesh", "rows=8"], "--mesh rows=8: 'rows=8' should be AXIS=DEVICES"),
        (
            ["--target", "h200x8", "--batch-size", "12"],
            "--batch-size 12: must be a multiple of the mesh's data x fsdp = 8",
        ),
        (["--target", "v5p:2x3x2"], "there is no such slice of v5p; near are v5p:2x2x4"),
        (["--target", "h200x8", "--check"], "--check: runs the step on one device, and --target h200x8 has 8"),
        (["--target", "h200x8", "--mesh", "auto", "--budget", "1GiB"], "--mesh auto: not together with --budget"),
        (
            ["--target", "v5e:4x4", "--mesh", "auto", "--batch-size", "3"],
            "--batch-size 3: must be a multiple of the 16",
        ),
    ],
)
@pytest.mark.parametrize("command", ["plan", "profile"])
def test_bad_input_is_one_line(command, flags, message, config, capsys):
    described("h200x8"), described("v5p:2x2x2")
    if command == "profile" and {"--check", "--budget"} & set(flags):
        return
    if command == "profile" and "auto" in flags:
        message = "--mesh auto: `jaxpeft plan` finds it; name it here"
    assert cli.main([command, *SMALL, "--model", config, *flags]) == 2
    shown = capsys.readouterr()
    assert message in shown.err and "Traceback" not in shown.err and shown.out == ""
    assert len([line for line in shown.err.splitlines() if line.startswith(("jaxpeft", "error"))]) <= 1


def test_without_the_compilers_it_is_said():
    if importlib.util.find_spec("libtpu") is None:
        with pytest.raises(InputError, match=r"pip install 'jaxpeft\[describe\]'"):
            targets.devices(targets.target("v5p:2x2x2"))
