"""What compiled programs move, against what is known by hand and what the compilers count themselves."""

import json

import jax
import jax.numpy as jnp
import pytest

import jaxpeft as jp
from jaxpeft import cli
from jaxpeft.backward.flops import count_flops, flops_by_name
from jaxpeft.backward.places import empty
from jaxpeft.cli import plan
from jaxpeft.errors import InputError
from jaxpeft.memory import aot, bars, draw_traffic, dumped, foreign, hlo, targets, traffic
from jaxpeft.memory.movement import AVOIDABLE
from pallas_kernels.lora_matmul import lora_matmul
from pallas_kernels.stacked import Stacked

pytestmark = pytest.mark.usefixtures("optimised")

ROWS, WIDTH, LAYERS = 256, 128, 5
LAYER, STREAM = 4 * WIDTH * WIDTH, 4 * ROWS * WIDTH  # bytes


def f32(*shape):
    return jax.ShapeDtypeStruct(shape, jnp.float32)


X, STACK = f32(ROWS, WIDTH), f32(LAYERS, WIDTH, WIDTH)


def moved(tmp_path, function, *args, target="cpu"):
    """(what it moves, its executable)."""
    device = targets.target(target)
    try:
        targets.devices(device)
    except InputError as error:
        pytest.skip(str(error))
    compiled = aot.compile(device, function, *args, dump=tmp_path)
    program = hlo.read(tmp_path)
    owners = foreign.owners_of(program)
    return traffic.traffic(program, owners, foreign.ForeignAttribution, device), compiled.executable


def product(x, w):
    return x @ w


def in_turn(x, stack):
    """A scan that keeps nothing."""
    return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, stack)[0]


def all_kept(x, stack):
    """A scan that puts its input of every layer into its place."""
    return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), x), x, stack)


@pytest.mark.parametrize("target", ["cpu", "h200", "v5e"])
def test_one_product_is_what_it_is_by_hand(tmp_path, target):
    # Large enough that no compiler cuts the sum in parts, or keeps the operands on the chip.
    n, k, m = 8192, 1024, 8192
    x, w = jax.ShapeDtypeStruct((n, k), jnp.bfloat16), jax.ShapeDtypeStruct((k, m), jnp.bfloat16)
    found, _ = moved(tmp_path, product, x, w, target=target)
    of = found.to_json()
    assert sum(found.flops.values()) == 2 * n * k * m
    if target == "cpu":  # computes in float32
        assert of["kinds"]["product"]["written"] in (2 * n * m, 4 * n * m)
        return
    assert (of["read"], of["written"], of["avoidable_bytes"]) == (2 * k * (n + m), 2 * n * m, 0)
    device = targets.target(target)
    assert of["bandwidth_s"] == pytest.approx(2 * (k * (n + m) + n * m) / device.bandwidth)
    assert of["rate_s"] == pytest.approx(2 * n * k * m / device.flops)
    assert of["least_s"] == max(of["bandwidth_s"], of["rate_s"])


@pytest.mark.parametrize("target", ["cpu", "h200", "v5e"])
def test_a_loop_counts_by_its_trips(tmp_path, target):
    found, _ = moved(tmp_path, in_turn, X, STACK, target=target)
    assert found.unknown_loops == 0
    assert found.times["product"] == LAYERS
    assert sum(found.flops.values()) == 2 * ROWS * WIDTH * WIDTH * LAYERS
    weights = sum(row.read for row in found.rows if row.category == "arguments")
    assert weights <= LAYERS * LAYER + 2 * STREAM  # a layer of the stack each time, not the stack


@pytest.mark.parametrize("target", ["cpu", "h200"])
def test_a_scan_that_copies_moves_what_it_copies(tmp_path, target):
    plain, _ = moved(tmp_path / "plain", in_turn, X, STACK, target=target)
    copies, _ = moved(tmp_path / "copies", all_kept, X, STACK, target=target)
    update = copies.to_json()["kinds"]["copy: update"]
    assert update["times"] == LAYERS
    assert update["written"] == LAYERS * STREAM  # each time its own row, not the whole
    assert update["read"] == pytest.approx(LAYERS * STREAM, rel=1e-3)
    assert "copy: update" not in plain.to_json()["kinds"]
    filled = copies.to_json()["kinds"]["fill"]
    assert filled["written"] == pytest.approx(LAYERS * STREAM, rel=1e-3)  # with zeros, before the loop
    assert copies.avoidable - plain.avoidable >= 3 * LAYERS * STREAM
    assert copies.copies[0].kind in AVOIDABLE and copies.copies[0].bytes == max(copy.bytes for copy in copies.copies)


@pytest.mark.parametrize("direction", ["up", "down"])
def test_trips_that_only_the_condition_tells(tmp_path, direction):
    def count(x):
        step, test = (1, lambda s: s[0] < 9) if direction == "up" else (-1, lambda s: s[0] > 2)
        return jax.lax.while_loop(test, lambda s: (s[0] + step, jnp.sin(s[1])), (jnp.int32(9 - 7 * step), x))

    found, _ = moved(tmp_path, count, X)
    assert found.unknown_loops == 0 and found.times["elementwise"] >= 7


@pytest.mark.parametrize("target", ["cpu", "h200", "v5e"])
@pytest.mark.parametrize(("step", "trips"), [(1, 9), (2, 5), (-3, 3)])
def test_a_counter_may_go_by_more_than_one(tmp_path, target, step, trips):
    """As in loops that a compiler has unrolled; the bound is data of the loop's state, so that XLA writes no count."""
    size = 1024

    def run(x):
        test = (lambda s: s[0] < s[2]) if step > 0 else (lambda s: s[0] > s[2])
        turn = lambda s: (s[0] + step, s[1] @ s[1] / size, s[2])
        first, last = (jnp.int32(0), jnp.int32(9)) if step > 0 else (jnp.int32(9), jnp.int32(0))
        return jax.lax.while_loop(test, turn, (first, x, last))[1]

    found, _ = moved(tmp_path, run, f32(size, size), target=target)
    assert found.unknown_loops == 0 and found.times["product"] == trips


def test_a_loop_of_unknown_length_is_said(tmp_path):
    def until(x):
        return jax.lax.while_loop(lambda x: jnp.sum(x) < 1e3, lambda x: x + 1, x)

    found, _ = moved(tmp_path, until, X)
    assert found.unknown_loops == 1
    assert "loops of unknown length, counted once: 1" in traffic.text(found.to_json())


def loss(params, x):
    hidden = jnp.tanh(x @ params["first"])
    return jnp.mean((hidden @ params["second"]).astype(jnp.float32) ** 2)


PARAMS = {"first": f32(WIDTH, 384), "second": f32(384, 24)}


@pytest.mark.parametrize("function", [loss, jax.grad(loss)], ids=["value", "gradient"])
def test_without_loops_it_is_the_compilers_own_count(tmp_path, function):
    found, executable = moved(tmp_path, function, PARAMS, X)
    assert found.bytes == pytest.approx(executable.cost_analysis()["bytes accessed"], rel=0.03)


@pytest.mark.parametrize("target", ["cpu", "h200", "v5e"])
def test_owners_kinds_and_arrays_add_up(tmp_path, target):
    found, _ = moved(tmp_path, jax.grad(loss), PARAMS, X, target=target)
    of = found.to_json(3)
    for field in ("kinds", "categories"):
        assert sum(row["read"] + row["written"] for row in of[field].values()) == pytest.approx(of["bytes"])
        assert sum(row["avoidable"] for row in of[field].values()) == pytest.approx(of["avoidable_bytes"])
    assert sum(row["read"] + row["written"] for row in of["owners"]) == pytest.approx(of["bytes"])
    assert sum(row["flops"] for row in of["owners"]) == pytest.approx(of["flops"])
    assert of["flops"] == 2 * ROWS * (2 * WIDTH * 384 + 3 * 384 * 24)
    json.dumps(of)


def test_products_by_name_add_up_to_the_count():
    jaxpr = jax.make_jaxpr(jax.grad(lambda stack, x: jnp.sum(in_turn(x, stack))))(STACK, X)
    assert sum(flops_by_name(jaxpr).values()) == count_flops(jaxpr) == 3 * 2 * ROWS * WIDTH * WIDTH * LAYERS


def test_profile_says_what_a_function_moves(tmp_path):
    found = jp.profile(jax.grad(loss), PARAMS, X, traffic=True, dump=tmp_path / "dump")
    assert "moved " in str(found) and found.to_json()["traffic"]["bytes"] == found.traffic.bytes
    assert dumped.read(tmp_path / "dump", moved=True).profile.traffic.bytes == found.traffic.bytes
    assert "traffic" not in jp.profile(loss, PARAMS, X).to_json()
    found.write_html(tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text()
    assert "What moves" in page and '<svg id="traffic"' in page


@pytest.mark.slow
def test_a_step_is_said_by_module(tmp_path, capsys):
    flags = ["--traffic", "--batch-size", "2", "--seq-len", "32", "--json", "--limit", "100"]
    assert cli.main(["profile", *flags]) == 0
    document = json.loads(capsys.readouterr().out)
    found = document["profile"]["traffic"]
    assert found["flops"] == document["flops"]
    owners = {row["owner"]: row for row in found["owners"]}
    of_products = {name for name, row in owners.items() if row["flops"]}
    assert {"layers/mlp/gate_proj/lora", "layers/self_attn/q_proj/lora", "lm_head"} & of_products
    assert "" not in of_products
    assert found["categories"]["weights"]["read"] > document["bytes"]["weights"] / 2
    assert found["bytes"] == pytest.approx(sum(row["read"] + row["written"] for row in owners.values()))
    assert "least_s" not in found  # a CPU's bandwidth is not known


@pytest.mark.slow
def test_a_plan_says_what_its_steps_move(capsys):
    assert cli.main(["plan", "--batch-size", "2", "--seq-len", "32", "--traffic", "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    row = document["rows"][0]
    assert row["traffic"]["bytes"] > row["bytes"]["weights"] and row["traffic"]["flops"] == row["flops"]
    plan.show(document)
    shown = capsys.readouterr().out
    assert "moved" in shown and "ms at least" in shown
    moves = {"bytes": 3e9, "bound_s": 0.0125}
    assert bars.label({"bytes": {"total": 2e9}}, "GB", 10**9) == "2.0"
    said = bars.label({"bytes": {"total": 2e9}, "traffic": moves}, "GB", 10**9)
    assert said == "2.0; moves 3.0 GB, 12.5 ms at least"


def test_the_hosts_memory_is_apart(tmp_path):
    device = targets.target("v5e")
    try:
        on = jax.sharding.SingleDeviceSharding(targets.devices(device)[0])
    except InputError as error:
        pytest.skip(str(error))

    def there(x):
        return jax.device_put(jnp.sin(x), on.with_memory_kind("pinned_host"))

    compiled = jax.jit(there, out_shardings=on.with_memory_kind("pinned_host"))
    shape = jax.ShapeDtypeStruct((1024, 1024), jnp.float32, sharding=on)
    aot.compile_lowered(device, compiled.lower(shape), tmp_path)
    program = hlo.read(tmp_path)
    of = traffic.traffic(program, foreign.owners_of(program), foreign.ForeignAttribution, device).to_json()
    assert of["host_bytes"] == 4 * 1024 * 1024 and of["avoidable_bytes"] == 0
    assert "to and from the host's memory 4.00 MiB" in traffic.text(of)


def test_a_kernel_reads_a_layer_of_the_stack(tmp_path):
    layers, n = 4, 256
    shapes = [jax.ShapeDtypeStruct(s, jnp.bfloat16) for s in ((512, n), (layers, n, n), (n, 64), (64, n))]

    def run(x, stack, a, b):
        def layer(x, index):
            return lora_matmul(x, Stacked(stack, index), a, b), None

        return jax.lax.scan(layer, x, jnp.arange(layers))[0]

    found, _ = moved(tmp_path, run, *shapes, target="h200")
    kernels = [row for row in found.rows if row.kind == "kernel"]
    x, w, low = 2 * 512 * n, 2 * n * n, 2 * 64 * n
    assert sum(row.written for row in kernels) == layers * (x + 2 * 512 * 64)
    read = layers * (x + low) + layers * (x + w + 2 * 512 * 64 + low)  # x A, then all of it
    assert sum(row.read for row in kernels) == pytest.approx(read, rel=1e-3)


def adapted(x, w, a, b):
    return lora_matmul(x, w, a, b)


ADAPTED = [jax.ShapeDtypeStruct(s, jnp.bfloat16) for s in ((512, 256), (256, 256), (256, 64), (64, 256))]
FLOPS = 2 * 512 * 256 * 256 + 4 * 512 * 256 * 64


def test_a_kernel_that_says_its_flops_is_counted(tmp_path):
    found, _ = moved(tmp_path, adapted, *ADAPTED, target="v5e")
    assert found.unknown_kernels == 0 and found.times["kernel"] >= 1
    assert sum(found.flops.values()) == FLOPS
    assert "kernels unknown" not in traffic.text(found.to_json())


@pytest.fixture(scope="module")
def on_h200(tmp_path_factory):
    """(the profile of a function with kernels for a GPU, XLA's files of it)."""
    dump = tmp_path_factory.mktemp("h200")
    try:
        return jp.profile(adapted, *ADAPTED, target="h200", traffic=True, dump=dump), dump
    except InputError as error:
        pytest.skip(str(error))


def test_kernels_that_say_nothing_are_said(on_h200):
    found = on_h200[0].traffic
    assert found.unknown_kernels == 2  # x A, and all of it
    assert "FLOPs of 2 kernels unknown, counted as none" in str(on_h200[0])


def test_a_dump_has_the_times_of_a_target(on_h200, capsys):
    profile, dump = on_h200
    assert cli.main(["profile", "--xla-dump", str(dump), "--traffic", "--target", "h200", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["profile"]["traffic"]
    assert found["bound_s"] == profile.traffic.least > 0
    assert found["bandwidth_s"] == pytest.approx(found["bytes"] / targets.target("h200").bandwidth)
    assert cli.main(["profile", "--xla-dump", str(dump), "--traffic", "--target", "v5e"]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert "--target v5e: jit_adapted was compiled for gpu" in line
    assert cli.main(["profile", "--xla-dump", str(dump), "--target", "h200"]) == 2
    assert "--target: not together with --xla-dump" in capsys.readouterr().err


def test_a_picture_has_the_bars(on_h200, tmp_path):
    from matplotlib.image import imread

    profile, _ = on_h200
    profile.write_png(tmp_path / "with.png")
    profile._replace(traffic=None).write_png(tmp_path / "without.png")
    assert imread(tmp_path / "with.png").shape[0] > 1.2 * imread(tmp_path / "without.png").shape[0]


def test_bars_are_as_long_as_the_time(on_h200):
    from matplotlib.figure import Figure

    profile, _ = on_h200
    axes = Figure().subplots()
    draw_traffic.draw(axes, profile.traffic)
    drawn = sum(patch.get_width() for patch in axes.patches)
    assert drawn == pytest.approx(1e3 * profile.traffic.bytes / targets.target("h200").bandwidth)


def test_the_bound_is_the_larger_of_what_the_modules_and_the_link_take():
    rows = (traffic.Row("a", "weights", "product", 300.0, 100.0, 0.0), traffic.Row("b", "weights", "host", 0, 0, 50.0))
    found = traffic.Traffic(rows, {}, {"a": 10.0}, (), 0, bandwidth=100.0, rate=1.0, host_bandwidth=10.0)
    assert (found.by_module, found.least) == (10.0, 10.0)
    assert found._replace(host_bandwidth=2.0).least == 25.0
    of = found._replace(host_bandwidth=2.0).to_json()
    assert (of["host_s"], of["bound_s"], of["least_by_module_s"]) == (25.0, 25.0, 10.0)
    assert "at the link's bandwidth 25000.00 ms" in traffic.text(of)


def test_a_file_of_what_is_in_use_moves_nothing(tmp_path, capsys):
    (tmp_path / "memory.prof").write_bytes(b"")
    assert cli.main(["profile", str(tmp_path / "memory.prof"), "--traffic"]) == 2
    assert "--traffic: not together with" in capsys.readouterr().err


@pytest.mark.parametrize("target", ["h200", "v5e"])
def test_what_a_loop_writes_whole_is_not_filled_before(tmp_path, target):
    def all_written(x, stack):
        def layer(carry, step):
            x, kept = carry
            kept = jax.lax.dynamic_update_index_in_dim(kept, x, step, 0)
            return (jnp.tanh(x @ stack[step]), kept), None

        kept = empty((LAYERS, *x.shape), x.dtype)
        return jax.lax.scan(layer, (x, kept), jnp.arange(LAYERS))[0]

    found, _ = moved(tmp_path, all_written, X, STACK, target=target)
    assert sum(row.written for row in found.rows if row.kind == "fill") < STREAM


def test_what_looks_for_nan_sees_zeros():
    with jax.debug_nans(True):
        assert not empty((3, 2), jnp.float32).any()
