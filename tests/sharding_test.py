"""Runs on a mesh of eight host devices: equal to one device's, and no more communication than there has to be."""

import itertools
import json
import math
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest

from jaxpeft import constraints, sharding, tree
from jaxpeft.errors import InputError
from jaxpeft.models import FAMILIES, geometries
from tests import methods_test, virtual

MESHES = ("data=8", "fsdp=8", "tensor=8", "seq=8", "data=2,fsdp=2,tensor=2", "fsdp=2,tensor=2,seq=2")
PLANS = ("compressed", "offload", "compressed12", "compressed4", "input_layernorm_normalized=prune")
OPTIMIZERS = ("adam8bit", "adafactor", "sm3")
SIZES = {"vocab_size": 96, "hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 8}
SIZES |= {"num_key_value_heads": 8, "num_hidden_layers": 2}

# Whose leaves lie on a mesh as another's do: numbers and factors at a linear map as LoRA's, and so on.
ALIKE = {"dora", "ia3", "int21", "lamda", "llm_qfa", "loha", "lokr", "lq_lora", "miss", "oft", "paca", "peqa", "speft"}
ALIKE |= {"svfit", "velora", "vera", "welore", "ba_lora", "owlore", "sparse_mezo", "dept", "unipt"}
ALIKE |= {"bitfit", "direft", "ln_tuning", "parallel", "pfeiffer", "natural_galore", "half", "ist", "randlora", "sherl"}
ALIKE |= {"pst", "qzo", "sara", "shira", "snell", "snella", "vblora", "loreft", "houlsby", "lora_fa", "mixlora"}
ALIKE |= {"wta_crs", "meft", "zo2", "lemo", "slimfit", "lst", "prefix", "loraprune"}
ALIKE |= {"colm", "hybrid", "light_peft", "pockengine", "sparsegrad", "spt", "spt_lora"}
METHODS = [name for name in methods_test.METHODS if name not in ALIKE]

# Prints {name: {mesh: {"losses", "leaves": largest difference, relative to the largest number, "hlo"}}}.
WORKER = """
import json, sys
import jax, numpy as np
import jaxpeft as jp
from jaxpeft import sharding, tree
from jaxpeft.backward import residuals
from jaxpeft.backward.plan import parse
from tests import methods_test, sharding_test, tiny

def run(name, meshes):
    name, _, how = name.partition(" ")
    groups, kind = how == "in groups", how if how in sharding_test.OPTIMIZERS else None
    promises = methods_test.contract.about(name).promises
    base, params = tiny.model(**sharding_test.SIZES, **promises.config)
    method = methods_test.made(name)
    model, trainable, rest = jp.setup(method, base, params, jax.random.key(0))
    plan = parse(how) if how and not groups and not kind else residuals.default_plan(model, promises.backward)
    model = residuals.remat(model, plan._replace(tokens=16) if groups else plan, 8 if groups else 1)
    optimizer = methods_test.make_direction(kind or methods_test.defaults(method.specs).direction)
    step = jp.make_train_step(model, method, optimizer, rate=1e-3)
    start = jp.init_state(method, optimizer, trainable, rest, jax.random.key(1), model)
    batch = tiny.batch(rows=32 if groups else 8, vocab=96)

    def steps(state, batch, step):
        losses = []
        for _ in range(3):
            state, metrics = step(state, batch)
            losses.append(float(metrics["loss"]))
        numbers = lambda leaf: np.asarray(leaf).astype(np.float64)
        return losses, {path: numbers(leaf) for path, leaf in {**state.trainable, **state.moved}.items()}

    losses, leaves = steps(start, batch, jax.jit(step))
    found = {"one": {"losses": losses}}
    if name == "lora":
        found["one"]["head"] = sharding_test.head_of_a_table()
    for text in meshes:
        mesh = sharding.make_mesh(text.removesuffix(" backwards"), jax.devices()[:: -1 if "backwards" in text else 1])
        of_state = sharding.of_state(mesh, start, tree.flatten(params))
        state, rows = jax.device_put((start, batch), (of_state, sharding.of_batch(mesh, batch)))
        with jax.set_mesh(mesh):
            compiled = jax.jit(step, out_shardings=(of_state, None)).lower(state, rows).compile()
            losses, other = steps(state, rows, compiled)
        far = [float(np.abs(other[path] - leaf).max() / max(np.abs(leaf).max(), 1e-3)) for path, leaf in leaves.items()]
        found[text] = {"losses": losses, "leaves": max(far)}
        if name in ("lora", "prompt"):
            found[text]["hlo"] = compiled.as_text()
    return found

print(json.dumps({name: run(name, meshes) for name, meshes in json.loads(sys.argv[1]).items()}))
"""


def head_of_a_table():
    """The program of logits whose head is the table of words."""
    mesh = sharding.make_mesh(MESHES[-2])
    table = {"embed_tokens/embedding": jnp.ones((96, 64))}
    table = jax.device_put(table, sharding.of_leaves(mesh, table))
    logits = lambda table, x: x @ constraints.gathered(tree.unflatten(table))["embed_tokens"]["embedding"].T
    with jax.set_mesh(mesh):
        return jax.jit(logits).lower(table, jnp.ones((8, 64))).compile().as_text()


def on_meshes(wanted):
    """What the worker finds of {name: meshes}; LLVM, which is half of the time, is asked for no speed."""
    environment = virtual.devices(8, "--xla_backend_optimization_level=0", "--xla_llvm_disable_expensive_passes=true")
    arguments = [sys.executable, "-c", WORKER, json.dumps(wanted)]
    done = subprocess.run(arguments, env=environment, capture_output=True, text=True, cwd=virtual.ROOT)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def further(names):
    """{name: meshes}: each on one of the other meshes, in turn, with the devices in another order."""
    others = [f"{mesh} backwards" for mesh in MESHES[:-1]]
    return {name: [others[i % len(others)]] for i, name in enumerate(names)}


@pytest.fixture(scope="module")
def found(request):
    """Each method on a mesh of three axes, LoRA on two of one axis, too; of those that are chosen (-k)."""
    own = [item for item in request.session.items if item.module is request.module and "found" in item.fixturenames]
    chosen = {item.callspec.params["name"] for item in own if hasattr(item, "callspec")}
    chosen |= set() if all(hasattr(item, "callspec") for item in own) else {"lora", "lora in groups", "prompt"}
    wanted = {name: [MESHES[-1]] for name in METHODS}
    wanted |= {"lora": ["data=8", "fsdp=8", MESHES[-1]], "lora in groups": ["fsdp=8"]}
    wanted |= {f"lora {plan}": [MESHES[-1]] for plan in PLANS}
    wanted |= {f"full {kind}": [MESHES[-2]] for kind in OPTIMIZERS}
    return on_meshes({name: meshes for name, meshes in wanted.items() if name in chosen})


# One plan and one optimizer that keep what no other does; the others are slow tests.
SLOWLY = [*(f"lora {plan}" for plan in PLANS[2:]), *(f"full {kind}" for kind in OPTIMIZERS[1:])]
HOW = ["lora in groups", *(f"lora {plan}" for plan in PLANS[:2]), f"full {OPTIMIZERS[0]}"]
HOW += [pytest.param(name, marks=pytest.mark.slow) for name in SLOWLY]


@pytest.mark.parametrize("name", [*METHODS, *HOW])
def test_a_mesh_learns_what_one_device_learns(found, name):
    """Losses of three steps to float32's rounding; leaves as Adam magnifies it where a gradient is nearly zero."""
    assert_learns_the_same(name, found[name])


@pytest.mark.slow
def test_a_further_mesh_learns_what_one_device_learns():
    """Every method, in six minutes, LoRA on all; those that lie as others do on the mesh of three axes, too."""
    wanted = further(methods_test.METHODS)
    wanted["lora"] = [*MESHES, f"{MESHES[-1]} backwards"]
    wanted |= {name: [MESHES[-1], *wanted[name]] for name in ALIKE}
    for name, runs in on_meshes(wanted).items():
        assert_learns_the_same(name, runs)


def assert_learns_the_same(name, runs):
    one, *others = runs.values()
    for other in others:
        assert other["losses"] == pytest.approx(one["losses"], rel=1e-5)
        coded = name.startswith("lora compressed") or "=prune" in name  # a rounding may change codes
        assert other["leaves"] < (5e-2 if coded else 1e-2)


def collectives(hlo, kind):
    """(loop or "entry", shapes) of every such collective."""
    where, made = "", []
    for line in hlo.splitlines():
        if line.startswith(("%", "ENTRY")):
            where = "entry" if line.startswith("ENTRY") else "loop"
        if call := re.search(rf" = (.*?) {kind}(?:-start)?\(", line):
            made += [(where, tuple(map(int, re.findall(r"\d+", s)))) for s in re.findall(r"\w+\[([\d,]*)\]", call[1])]
    return made


def test_frozen_matrices_are_gathered_a_layer_at_a_time(found):
    """And never summed up; what is summed up are adapters' gradients, and numbers without a parameter's shape."""
    hlo = found["lora"]["fsdp=8"]["hlo"]
    gathered = [shape for where, shape in collectives(hlo, "all-gather") if where == "loop"]
    kernels = {(64, 64), (64, 128), (128, 64)}
    assert kernels <= set(gathered)
    assert all(len(shape) == 2 for shape in gathered)  # of one layer
    summed = {shape for kind in ("all-reduce", "reduce-scatter") for _, shape in collectives(hlo, kind)}
    assert not summed & {(*lead, *kernel) for kernel in kernels for lead in ((), (1,), (2,))}
    assert {where for where, _ in collectives(hlo, "all-to-all")} <= {"entry"}  # embeddings, from columns to rows


def test_of_groups_of_rows_all_read_what_was_gathered_once(found):
    """Kernels are gathered where the loop over groups is called, not inside of it."""
    hlo = found["lora in groups"]["fsdp=8"]["hlo"]
    places = {}
    for computation in re.split(r"\n(?=%|ENTRY)", hlo):
        shapes = {shape for _, shape in collectives(computation, "all-gather")}
        if {(64, 128), (128, 64)} & shapes:
            places[computation.split()[0]] = " while(" in computation
    assert list(places.values()) == [True, True]  # of the forward and the backward pass


def test_a_prompt_gathers_no_kernel_a_second_time(found):
    """Its tokens are computed once per batch, before the rows, with kernels where they lie."""
    kernels, mesh = {(64, 64), (64, 128), (128, 64), (64, 32), (32, 64)}, MESHES[-1]
    gathered = {
        name: [shape for where, shape in collectives(found[name][mesh]["hlo"], "all-gather") if where == "loop"]
        for name in ("lora", "prompt")
    }
    counts = {name: sum(shape in kernels for shape in shapes) for name, shapes in gathered.items()}
    assert 0 < counts["prompt"] <= counts["lora"]


def test_a_table_becomes_a_head_without_all_of_it_on_a_device(found):
    """Its columns are exchanged for words, and gathered only then."""
    hlo = found["lora"]["one"]["head"]
    assert [shape for _, shape in collectives(hlo, "all-gather")] == [(48, 64)]
    assert collectives(hlo, "all-to-all") and not collectives(hlo, "all-reduce")


def test_without_fsdp_nothing_is_gathered(found):
    hlo = found["lora"]["data=8"]["hlo"]
    assert not collectives(hlo, "all-gather")
    assert collectives(hlo, "all-reduce")


# Rules.


@pytest.mark.parametrize("name", sorted(geometries.GEOMETRIES))
def test_every_parameter_of_every_family_has_a_rule(name):
    config = geometries.load(name)
    family = FAMILIES[config["model_type"]]
    shapes = family.shapes(family.from_hf(config).config)
    layers = {path: leaf.shape[tree.stacked(path) :] for path, leaf in shapes.items()}
    for path, shape in layers.items():
        assert len(sharding.spec_of(path, layers, layers)) in (0, len(shape)), path


def test_a_parameter_without_a_rule_is_named():
    with pytest.raises(InputError, match=r"--mesh: no rule says where layers/mixer/kernel lies"):
        sharding.spec_of("layers/mixer/kernel", {"layers/mixer/kernel": (4, 4)}, {"layers/mixer/kernel"})


def test_factors_follow_their_kernel():
    shapes = {"layers/mlp/down_proj/kernel": (56, 32), "layers/mlp/down_proj/lora/a": (56, 4)}
    shapes |= {"layers/mlp/down_proj/lora/b": (4, 32), "layers/mlp/down_proj/ia3/in": (56,), "layers/mlp/x/y": (3,)}
    axes = {path: sharding.spec_of(path, shapes) for path in shapes}
    assert list(axes.values()) == [("tensor", "fsdp"), ("tensor", None), (None, "fsdp"), ("tensor",), ()]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("data=3", "--mesh data=3: 3 devices, there is 1"),
        ("data=3,seq=2", "--mesh data=3,seq=2: 3 x 2 = 6 devices, there is 1"),
        ("rows=2", "--mesh rows=2: 'rows=2' should be AXIS=DEVICES with one of data, fsdp, tensor, seq"),
        ("data=2,data=2", "--mesh data=2,data=2: data stands twice"),
        ("data=0", "--mesh data=0: data=0 should have a number of devices, at least 1"),
        ("data", "--mesh data: 'data' should be AXIS=DEVICES with one of data, fsdp, tensor, seq"),
        ("data=", "--mesh data=: data= should have a number of devices, at least 1"),
    ],
)
def test_a_mesh_that_is_none(text, message):
    with pytest.raises(InputError, match=re.escape(message)):
        sharding.make_mesh(text, jax.devices()[:1])


def test_an_automatic_mesh_divides_the_batch_or_says_that_it_cannot():
    for devices, rows, accumulate in itertools.product((1, 2, 6, 8, 64), (1, 2, 8, 24), (1, 2)):
        sizes = sharding.parse(sharding.auto(devices, rows * accumulate, 4096 * 3, accumulate))
        assert math.prod(sizes.values()) == devices
        assert rows % sizes["fsdp"] == 0
    with pytest.raises(InputError, match="the 8 parts of a row that are left for each do not divide --seq-len 30"):
        sharding.auto(64, 1, 30)


@pytest.mark.parametrize(("kind", "shards"), [("Auto", (4, 2)), ("Explicit", (1, 1)), ("Manual", (1, 1))])
def test_only_axes_that_the_compiler_divides_are_spoken_of(kind, shards, monkeypatch):
    """A user's own mesh may have the same names in the arrays' types, and a `shard_map` its axes."""
    kinds = (getattr(jax.sharding.AxisType, kind),) * 4
    mesh = jax.sharding.AbstractMesh((2, 2, 2, 2), sharding.AXES, axis_types=kinds)
    monkeypatch.setattr(jax.sharding, "get_abstract_mesh", lambda: mesh)
    assert constraints.shards(8, 6) == shards
    assert constraints.shards(3, 5) == (1, 1)
