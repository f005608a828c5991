"""`jaxpeft profile` of what other programs wrote: XLA's dumps, and JAX's file of the memory in use."""

import gzip
import json
import os
import subprocess
import sys

import pytest

from jaxpeft import cli
from jaxpeft.memory import hlo, in_use
from tests import tiny
from tests.cli.profile_test import STEP, assert_one_line

WEIGHTS = 4 * (64 * 384 + 384 * 24)
BATCH = 4 * 512 * (64 + 24)
PLAIN = """
import sys
import jax, jax.numpy as jnp

def loss(params, batch):
    return jnp.mean((jnp.tanh(batch["x"] @ params["first"]) @ params["second"] - batch["y"]) ** 2)

def step(params, mu, nu, batch):
    grads = jax.grad(loss)(params, batch)
    mu = jax.tree.map(lambda m, g: 0.9 * m + 0.1 * g, mu, grads)
    nu = jax.tree.map(lambda v, g: 0.99 * v + 0.01 * g * g, nu, grads)
    return jax.tree.map(lambda p, m, v: p - m / (jnp.sqrt(v) + 1e-8), params, mu, nu), mu, nu

def zeros():
    return {"first": jnp.zeros((64, 384)), "second": jnp.zeros((384, 24))}

batch = {"x": jnp.ones((512, 64)), "y": jnp.ones((512, 24))}
state = jax.jit(step, donate_argnums=(0, 1, 2))(zeros(), zeros(), zeros(), batch)
jax.block_until_ready(state)
jax.profiler.save_device_memory_profile(sys.argv[1])
"""


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """A folder of XLA's dumps, xla, and a file, memory.prof, of a program that knows nothing of the library."""
    folder = tmp_path_factory.mktemp("plain")
    (folder / "plain.py").write_text(PLAIN)
    flags = f"--xla_dump_to={folder / 'xla'} --xla_dump_hlo_as_text --xla_dump_hlo_as_proto"
    environment = {**os.environ, "XLA_FLAGS": flags, "JAX_ENABLE_COMPILATION_CACHE": "false"}
    environment.pop("JAX_DISABLE_MOST_OPTIMIZATIONS", None)
    command = [sys.executable, str(folder / "plain.py"), str(folder / "memory.prof")]
    subprocess.run(command, env=environment, check=True)
    return folder


def document(capsys, *words):
    assert cli.main(["profile", *map(str, words), "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_a_step_of_another_program(written, tmp_path, capsys):
    made = document(capsys, "--xla-dump", written / "xla", "--out", tmp_path / "out")
    assert made["module"].endswith(".jit_step") and len(made["modules"]) > 1
    found = made["profile"]
    sizes = found["categories"]
    assert (sizes["weights"], sizes["optimizer"], sizes["batch"]) == (WEIGHTS, 2 * WEIGHTS, BATCH)
    assert sum(sizes.values()) == found["total_bytes"] and found["unattributed_bytes"] == 0
    assert {"params/first", "mu/second", "batch/x"} <= {row["owner"] for row in found["owners"]}
    assert any(row["owner"].startswith("plain.py:6 loss") for row in found["owners"])
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "profile.html",
        "profile.json",
        "profile.png",
    ]
    assert "jit_step on cpu" in (tmp_path / "out" / "profile.html").read_text()


def test_the_choice_is_said(written, capsys):
    assert cli.main(["profile", "--xla-dump", str(written / "xla")]) == 0
    out, err = capsys.readouterr()
    assert ".jit_step of " in out and "weights" in out
    assert ".jit_step, the largest; --module takes another: " in err and len(err.splitlines()) == 1
    name = next(word for word in err.replace(",", " ").split() if word.startswith("module_") and "step" not in word)
    assert document(capsys, "--xla-dump", written / "xla", "--module", name)["module"] == name


@pytest.mark.slow
def test_a_step_of_ours(tmp_path, capsys):
    """What the library's own compilation writes reads the same without its knowledge of the arguments."""
    (tmp_path / "config.json").write_text(json.dumps(tiny.CONFIG))
    own = document(capsys, "--model", tmp_path, *STEP, "--dump", tmp_path / "xla")["profile"]
    found = document(capsys, "--xla-dump", tmp_path / "xla")["profile"]
    for category in ("weights", "adapters", "batch"):
        assert found["categories"][category] == own["categories"][category], category
    assert found["total_bytes"] == own["total_bytes"] == sum(found["categories"].values())
    assert found["unattributed_bytes"] <= 0.02 * found["live_bytes"]


def test_what_is_in_use(written, tmp_path, capsys):
    made = document(capsys, written / "memory.prof", "--out", tmp_path / "out")["profile"]
    assert made["categories"] == {"buffers": 3 * WEIGHTS + BATCH} and made["total_bytes"] == 3 * WEIGHTS + BATCH
    assert made["devices"] == {"cpu:0": made["total_bytes"]}
    (state, batch) = made["owners"]
    assert (state["owner"], state["arrays"], state["bytes"]) == ("plain.py:18 <module>", 6, 3 * WEIGHTS)
    assert (batch["owner"], batch["arrays"], batch["bytes"]) == ("plain.py:17 <module>", 2, BATCH)
    page = (tmp_path / "out" / "profile.html").read_text()
    assert "Who owns what is in use" in page and "Live memory" not in page
    assert (tmp_path / "out" / "profile.png").read_bytes().startswith(b"\x89PNG")
    assert cli.main(["profile", str(written / "memory.prof")]) == 0
    out = capsys.readouterr().out
    assert "in use 572.00 KiB" in out and "cpu:0" in out


@pytest.mark.parametrize(
    ("flags", "parts"),
    [
        (
            ["--xla-dump", "DIR/xla", "--module", "jit_stop"],
            ["no module is called 'jit_stop'", "did you mean jit_step"],
        ),
        (["--xla-dump", "DIR/none"], ["DIR/none: no such folder"]),
        (["--xla-dump", "DIR/plain.py"], ["is no folder; name the one that --xla_dump_to filled"]),
        (["--xla-dump", "DIR/xla", "--rank", "4"], ["--rank", "not together with --xla-dump"]),
        (["--xla-dump", "DIR/xla", "DIR/memory.prof"], ["not together with DIR/memory.prof"]),
        (["--module", "jit_step"], ["--module jit_step: belongs to --xla-dump"]),
        (["DIR/memory.prof", "--save", "blocks"], ["--save", "of which nothing is compiled"]),
        (["DIR/none"], ["DIR/none: no such file", "jax.profiler.save_device_memory_profile"]),
        (["DIR"], ["is no regular file"]),
        (["DIR/plain.py"], ["damaged, cut short, or not written by jax.profiler.save_device_memory_profile"]),
    ],
)
def test_a_mistake_is_one_line(flags, parts, written, capsys):
    assert cli.main(["profile", *(flag.replace("DIR", str(written)) for flag in flags)]) == 2
    assert_one_line(capsys, [part.replace("DIR", str(written)) for part in parts])


@pytest.mark.parametrize("compiler", ["cpu_", "sm_9.0a_gpu_", "gfx942_gpu_", "cl_933746096.", ""])
def test_modules_are_called_as_functions_are(compiler, written, tmp_path):
    (program,) = (written / "xla").glob("*jit_step*after_optimizations.hlo.pb")
    (tmp_path / f"module_0012.jit_step.{compiler}after_optimizations.hlo.pb").write_bytes(program.read_bytes())
    (module,) = hlo.modules(tmp_path)
    assert (module.name, module.function) == ("module_0012.jit_step", "jit_step")


def test_dumps_that_lack_something(written, tmp_path, capsys):
    def refused(part):
        assert cli.main(["profile", "--xla-dump", str(tmp_path)]) == 2
        assert_one_line(capsys, [part])

    refused("no *after_optimizations.hlo.pb with a buffer assignment")
    for path in (written / "xla").glob("*jit_step*after_optimizations*"):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    (program,) = tmp_path.glob("*.hlo.pb")
    (ranges,) = tmp_path.glob("*live-range.txt")
    text = ranges.read_text()
    ranges.write_text(text[: len(text) // 4])
    refused("damaged or cut short")
    ranges.unlink()
    refused("live-range.txt is missing; add --xla_dump_hlo_as_text")
    ranges.write_text(text)
    program.write_bytes(program.read_bytes()[:-100])
    refused("damaged or cut short")
    with program.open("wb") as opened:
        opened.truncate(2**30)
    refused("has more than")
    program.unlink()
    refused("add --xla_dump_hlo_as_proto")


def test_files_of_memory_in_use_that_are_damaged(written, tmp_path, capsys, monkeypatch):
    good = (written / "memory.prof").read_bytes()
    file = tmp_path / "memory.prof"

    def refused(data, part):
        file.write_bytes(data)
        assert cli.main(["profile", str(file)]) == 2
        assert_one_line(capsys, [part])

    refused(good[:-20], "damaged")
    refused(gzip.compress(gzip.decompress(good)[:-3]), "damaged")
    refused(gzip.compress(b""), "damaged")
    refused(b"", "damaged")
    monkeypatch.setattr(in_use, "_MOST", 2**12)
    refused(gzip.compress(bytes(2**13)), "has more than 4096 bytes, unpacked")
