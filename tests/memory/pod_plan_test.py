"""Plans of several devices: their bytes, what they send and the least time, against what is counted by hand."""

import functools
import importlib.util
import json
import re
import types

import jax.numpy as jnp
import numpy as np
import pytest

import jaxpeft as jp
from jaxpeft import cli, recipe, sharding
from jaxpeft.backward.plan import Plan
from jaxpeft.errors import InputError
from jaxpeft.memory import collectives, hlo, interconnect, meshes, movement, planner, pods, search, targets
from jaxpeft.memory.dataflow import Dataflow
from tests import tiny
from tests.memory.pods import described, mesh_of

pytestmark = pytest.mark.usefixtures("optimised")

SIZES = {"hidden_size": 256, "intermediate_size": 512, "vocab_size": 512, "num_attention_heads": 4}
SIZES |= {"num_key_value_heads": 4, "num_hidden_layers": 3}
D, F, V, L = 256, 512, 512, 3
ROWS, LENGTH, RANK = 8, 96, 4
SMALL = ["--batch-size", "8", "--seq-len", "32", "--rank", "2"]


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
