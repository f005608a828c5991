"""Runs whose method starts from data: its first batches are still trained on, and a resumed run starts no more."""

import json
import subprocess
import sys

import jax
import numpy as np
import pytest

from jaxpeft import tree
from jaxpeft.checkpoint import Checkpoints
from jaxpeft.cli import export
from jaxpeft.peft import import_adapter
from jaxpeft.starts import probes
from jaxpeft.train import begin
from jaxpeft.train import prepare as preparing
from tests import runs, virtual


@pytest.mark.parametrize("init", ["eva", pytest.param("lora_ga", marks=pytest.mark.slow)])
def test_a_resumed_run_starts_no_more_and_ends_with_the_same_bits(init, files, cache, tmp_path, monkeypatch):
    started = []
    gradients = probes.gradients
    monkeypatch.setattr(probes, "gradients", lambda *given: started.append(given) or gradients(*given))

    def arguments(out, **changes):
        options = (f"init={init}",)
        return runs.arguments(files, tmp_path / out, method="lora", method_options=options, samples=0, **changes)

    begin.train(arguments("whole"))
    assert len(started) == 1
    stopping = Checkpoints.save

    def save(self, state, meta):
        stopping(self, state, meta)
        if int(state.step) == 4:
            self.wait()
            raise KeyboardInterrupt

    monkeypatch.setattr(Checkpoints, "save", save)
    with pytest.raises(KeyboardInterrupt):
        begin.train(arguments("stopped"))
    monkeypatch.setattr(Checkpoints, "save", stopping)
    assert len(started) == 2
    assert begin.train(arguments("stopped", resume=True))["resumed_from"] == 4
    assert len(started) == 2

    def state(args):
        with Checkpoints(args.out / "checkpoints") as checkpoints:
            return checkpoints.restore(preparing.prepare(args, continued=True).state)[0]

    whole, continued = state(arguments("whole")), state(arguments("stopped"))
    for ours, theirs in zip(
        jax.tree.leaves(whole._replace(key=0)), jax.tree.leaves(continued._replace(key=0)), strict=True
    ):
        np.testing.assert_array_equal(ours, theirs)
    first = preparing.prepare(arguments("whole")).state
    assert all(np.any(first.trainable[path] != leaf) for path, leaf in whole.trainable.items())
    for path, leaf in first.frozen.items():  # what is taken out of the kernels, and what is left of them
        np.testing.assert_array_equal(whole.frozen[path], leaf)

    written = export.run(export.Export(tmp_path / "whole", tmp_path / "adapter"))
    _, leaves = import_adapter(written["out"], preparing.prepare(arguments("whole"), continued=True).model.config)
    for path, leaf in whole.trainable.items():
        np.testing.assert_array_equal(leaves[path], leaf)
    assert ("layers/mlp/up_proj/lora/a0" in leaves) == (init == "lora_ga")


def test_a_run_whose_checkpoints_are_all_damaged_starts_again(files, cache, tmp_path):
    options = {"method_options": ("init=lora_ga",), "samples": 0, "steps": 2}
    args = runs.arguments(files, tmp_path / "run", **options)
    begin.train(args)
    with Checkpoints(args.out / "checkpoints") as checkpoints:
        before, _ = checkpoints.restore(preparing.prepare(args, continued=True).state)
    (args.out / "report.json").unlink()
    for step in (args.out / "checkpoints").iterdir():
        if step.name.isdigit():
            largest = max((path for path in step.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)
            largest.write_bytes(b"")
    report = begin.train(runs.arguments(files, tmp_path / "run", resume=True, **options))
    assert report["resumed_from"] is None
    with Checkpoints(args.out / "checkpoints") as checkpoints:
        after, _ = checkpoints.restore(preparing.prepare(args, continued=True).state)
    for path, leaf in before.leaves.items():
        jax.tree.map(np.testing.assert_array_equal, after.leaves[path], leaf)
    assert tree.size(after.trainable)


# Prints {start: the largest difference between what a mesh and one device start from}.
WORKER = """
import json
import jax, numpy as np
import jaxpeft as jp
from jaxpeft import sharding, shares, tree
from tests import tiny

SIZES = {"vocab_size": 96, "intermediate_size": 64, "num_key_value_heads": 4, "num_hidden_layers": 2}
base, params = tiny.model(**SIZES)
batches = lambda: [tiny.batch(rows=4, vocab=96, seed=seed) for seed in range(2)]
mesh = sharding.make_mesh("fsdp=2,tensor=2")
flat = tree.flatten(params)
placed = tree.unflatten(jax.device_put(flat, sharding.of_leaves(mesh, flat, flat)))

def far(init):
    method = jp.lora(2, init=init)
    one = tree.combine(*jp.setup(method, base, params, jax.random.key(0), batches=batches)[1:])
    with jax.set_mesh(mesh):
        on_mesh = lambda: shares.whole_batches(mesh, batches)
        more = tree.combine(*jp.setup(method, base, placed, jax.random.key(0), batches=on_mesh)[1:])
        differ = jax.tree.map(lambda x, y: float(np.abs(np.asarray(x) - np.asarray(y)).max()), one, more)
    return max(jax.tree.leaves(differ))

print(json.dumps({init: far(init) for init in ("eva", "lora_ga")}))
"""


@pytest.mark.slow
def test_on_a_mesh_the_start_is_one_device_s():
    command = [sys.executable, "-c", WORKER]
    done = subprocess.run(command, env=virtual.devices(4), capture_output=True, text=True, check=True)
    assert max(json.loads(done.stdout.splitlines()[-1]).values()) < 1e-4
