"""What a process reads and holds of the whole: parts of tensors, and no more of the file than these."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

import jaxpeft as jp
from jaxpeft import hf, sharding, shares, tree
from jaxpeft.hf import read
from tests import runs

PARTS = {
    "layers/self_attn/q_proj/kernel": (slice(1, 2), slice(4, 12), slice(0, 8)),
    "layers/mlp/down_proj/kernel": (slice(0, 2), slice(8, 16), slice(8, 16)),
    "layers/input_layernorm/scale": (slice(0, 2), slice(0, 8)),
    "embed_tokens/embedding": (slice(20, 40), slice(0, 4)),
}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return runs.make_files(tmp_path_factory.mktemp("files")) / "model"


@pytest.mark.parametrize("stored", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_of_a_checkpoint_the_parts_alone_are_read(stored, dtype, model, tmp_path, monkeypatch):
    """Whatever is divided: layers, inputs, outputs, rows of a table."""
    params = jax.tree.map(lambda leaf: leaf.astype(stored), jp.load_pretrained(model, jnp.float32)[1])
    folder = hf.save_pretrained(tmp_path / "model", runs.CONFIG, params)
    whole = tree.flatten(jp.load_pretrained(folder, dtype)[1])
    elements, part_of = [], read._read_part

    def counted(*args):
        array = part_of(*args)
        elements.append(array.size)
        return array

    monkeypatch.setattr(read, "_read_part", counted)
    monkeypatch.setattr(read, "_read", lambda *args: pytest.fail("a whole tensor was read"))
    monkeypatch.setattr(shares, "made", lambda shape, where, part: part(where))
    placement = lambda path, leaf: PARTS.get(path, tuple(slice(0, n) for n in leaf.shape))
    parts = tree.flatten(read.load_pretrained(folder, dtype, placement=placement)[1])
    assert set(PARTS) <= set(whole) == set(parts)
    for path, leaf in whole.items():
        np.testing.assert_array_equal(parts[path], np.asarray(leaf)[PARTS.get(path, ...)], err_msg=path)
    assert sum(elements) == sum(part.size for part in parts.values())


def test_on_a_mesh_a_model_is_the_same(model):
    mesh = sharding.make_mesh("fsdp=1", jax.devices()[:1])
    placement = lambda path, leaf: sharding.of_leaves(mesh, {path: leaf}, {path})[path]
    whole, placed = (
        tree.flatten(read.load_pretrained(model, jnp.float32, placement=how)[1]) for how in (None, placement)
    )
    assert whole.keys() == placed.keys()
    for path, leaf in whole.items():
        np.testing.assert_array_equal(leaf, placed[path])
        assert isinstance(placed[path].sharding, NamedSharding)


def test_one_process_has_all_rows():
    mesh = sharding.make_mesh("data=1", jax.devices()[:1])
    assert shares.rows_of(mesh, 8) is None and shares.rows_of(None, 8) is None
    batch = {"tokens": np.arange(8).reshape(4, 2)}
    assert shares.batch_of(None, batch, None) is batch
    np.testing.assert_array_equal(shares.batch_of(mesh, batch, None)["tokens"], batch["tokens"])
    assert shares.shapes_of(batch, shares.Rows(16, np.arange(4)))["tokens"].shape == (16, 2)
    key, where = jax.random.key(3), NamedSharding(mesh, PartitionSpec())
    assert jnp.array_equal(jax.random.key_data(shares.placed(key, where)), jax.random.key_data(key))
    assert int(shares.Largest(mesh)(15)) == 15
