"""Runs on a quantized base: what they keep, and that one which is continued ends as if it had not been stopped."""

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest

import jaxpeft as jp
from jaxpeft import hf, tree
from jaxpeft.checkpoint import Checkpoints
from jaxpeft.quant import is_packed
from jaxpeft.train import base, begin, config
from jaxpeft.train import prepare as preparing
from tests import runs

METHODS = {
    "quantize+lora": {},
    "lora_fa+quantize": {"method_options": ("quantize.format=int8",)},
    "peqa": {"method_options": ("bits=3",), "rank": None},
}


def kernels(leaves):
    return {path: leaf for path, leaf in leaves.items() if path.endswith("_proj/kernel")}


def stored(folder):
    """The paths of what a run keeps once for all its checkpoints."""
    if not (folder / "frozen").exists():
        return []
    with ocp.StandardCheckpointer() as checkpointer:
        return sorted(checkpointer.metadata(folder.absolute() / "frozen").item_metadata.tree)


ANOTHER_ORDER = pytest.param("lora_fa+quantize", marks=pytest.mark.slow)
SCALES_TRAIN = pytest.param("peqa", marks=pytest.mark.slow)


@pytest.mark.parametrize("name", ["quantize+lora", ANOTHER_ORDER, SCALES_TRAIN])
def test_packed_kernels_are_made_again_and_a_run_continues_bit_by_bit(name, files, cache, tmp_path, monkeypatch):
    def arguments(out, **changes):
        return runs.arguments(files, tmp_path / out, method=name, samples=0, **METHODS[name], **changes)

    def state(args):
        with Checkpoints(args.out / "checkpoints") as checkpoints:
            return checkpoints.restore(preparing.prepare(args).state)[0]

    begin.train(arguments("whole"))
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
    assert begin.train(arguments("stopped", resume=True))["resumed_from"] == 4

    whole, continued = state(arguments("whole")), state(arguments("stopped"))
    assert all(is_packed(kernel) for kernel in kernels(whole.frozen).values()) and kernels(whole.frozen)
    for ours, theirs in zip(
        jax.tree.leaves(whole._replace(key=0)), jax.tree.leaves(continued._replace(key=0)), strict=True
    ):
        np.testing.assert_array_equal(ours, theirs)
    own = stored(tmp_path / "whole" / "checkpoints")
    assert not kernels(dict.fromkeys(own))
    assert own == sorted(path for path in whole.frozen if path.endswith("/lora_fa/a"))


def test_what_is_left_of_a_decomposed_kernel_is_kept_packed(files, cache, tmp_path):
    """It comes from a decomposition, which other devices may not make again bit by bit."""
    chain = {"method": "lora+quantize", "method_options": ("init=pissa",)}
    args = runs.arguments(files, tmp_path / "run", samples=0, **chain)
    begin.train(args)
    assert kernels(dict.fromkeys(stored(args.out / "checkpoints")))
    job = preparing.prepare(args)
    blank = {path: jax.tree.map(jnp.zeros_like, leaf) for path, leaf in job.state.frozen.items()}
    with Checkpoints(args.out / "checkpoints") as checkpoints:
        restored, _ = checkpoints.restore(job.state._replace(frozen={**job.state.frozen, **kernels(blank)}))
    for path, kernel in kernels(job.state.frozen).items():
        jax.tree.map(np.testing.assert_array_equal, restored.frozen[path], kernel)

    from jaxpeft.cli import export

    export.run(export.Export(args.out, tmp_path / "adapter"))
    _, leaves = jp.import_adapter(tmp_path / "adapter", job.model.config)
    np.testing.assert_array_equal(leaves["layers/mlp/up_proj/lora/a"], restored.trainable["layers/mlp/up_proj/lora/a"])


def test_a_run_whose_frozen_leaves_are_all_packed_is_exported(files, tmp_path):
    """Of welore's the run keeps nothing frozen but places of kernels that are gone."""
    from jaxpeft.cli import export

    changes = {"method": "welore", "rank": None, "method_options": ("threshold=0.5",), "steps": 1, "eval_every": 0}
    args = runs.arguments(files, tmp_path / "run", samples=0, **changes)
    begin.train(args)
    export.run(export.Export(args.out, tmp_path / "adapter"))
    for path in (args.out / "adapter").iterdir():
        assert (tmp_path / "adapter" / path.name).read_bytes() == path.read_bytes(), path.name


def test_a_digest_of_booleans():
    """As of an adapter's that goes on: which entries train (sara), which matrices are factors (spt_lora)."""
    leaves = {"a": jnp.array([True, False, True]), "b": jnp.array(2, jnp.int32)}
    assert config.digest(leaves) == config.digest({**leaves, "a": jnp.array([True, False, True])})
    assert config.digest(leaves) != config.digest({**leaves, "a": jnp.array([True, True, False])})


def test_the_digest_is_of_the_base_as_the_file_has_it(files):
    model = str(files / "model")
    method = jp.chain(jp.quantize(), jp.lora(2))
    _, params, digest = base.load(model, jnp.float32, method)
    plain = hf.load_pretrained(model, jnp.float32)[1]
    assert kernels(tree.flatten(params)) and all(is_packed(leaf) for leaf in kernels(tree.flatten(params)).values())
    assert digest == config.digest_of_base(plain) == base.load(model, jnp.float32)[2]
    assert config.digest_of_base(params) != digest  # of the codes


def test_loading_packs_as_preparing_does(files):
    method = jp.quantize("int4")
    _, read = hf.load_pretrained(str(files / "model"), jnp.bfloat16, convert=method.convert)
    _, params = hf.load_pretrained(str(files / "model"), jnp.bfloat16)
    prepared = method.prepare(params, None)
    assert jax.tree.structure(read) == jax.tree.structure(prepared)
    jax.tree.map(np.testing.assert_array_equal, read, prepared)
