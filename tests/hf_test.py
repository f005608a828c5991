"""Checkpoints: what is written is read back bit by bit, and in little more memory than it takes."""

import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors import safe_open

import jaxpeft as jp
from jaxpeft import hf, models, tree
from jaxpeft.errors import InputError
from tests import runs
from tests.checkpoint_files import CONFIG, LAYER, SHAPES, bits, random_tensors, stored, write

# In.


def test_every_tensor_lands_in_its_place(tmp_path):
    tensors = random_tensors()
    _, params = jp.load_pretrained(write(tmp_path / "model", tensors), dtype=jnp.float32)
    flat = tree.flatten(params)
    for i in range(3):
        for name in LAYER:
            module, kind = name.rsplit(".", 1)
            base = f"layers/{module.replace('.', '/')}"
            expected = tensors[f"model.layers.{i}.{name}"]
            if kind == "bias":
                found = flat.pop(f"{base}/bias")[i] if i == 2 else flat[f"{base}/bias"][i]
            elif expected.ndim == 1:
                found = flat.pop(f"{base}/scale")[i] if i == 2 else flat[f"{base}/scale"][i]
            else:
                found = (flat.pop(f"{base}/kernel")[i] if i == 2 else flat[f"{base}/kernel"][i]).T
            np.testing.assert_array_equal(found, expected)
    np.testing.assert_array_equal(flat.pop("embed_tokens/embedding"), tensors["model.embed_tokens.weight"])
    np.testing.assert_array_equal(flat.pop("norm/scale"), tensors["model.norm.weight"])
    np.testing.assert_array_equal(flat.pop("lm_head/kernel").T, tensors["lm_head.weight"])
    assert not flat


@pytest.mark.parametrize("source", [np.float32, np.float16, ml_dtypes.bfloat16])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
def test_dtypes_are_cast_once(tmp_path, source, dtype):
    tensors = random_tensors(source)
    model, params = jp.load_pretrained(write(tmp_path / "model", tensors), dtype=dtype)
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype(dtype)}
    assert model.config.dtype == dtype
    expected = tensors["model.layers.1.mlp.down_proj.weight"].astype(dtype)
    assert bits(params["layers"]["mlp"]["down_proj"]["kernel"][1].T) == bits(expected)


def test_the_default_dtype_on_a_cpu_is_float32(tmp_path):
    _, params = jp.load_pretrained(str(write(tmp_path / "model")))
    assert params["norm"]["scale"].dtype == jnp.float32


def test_old_buffers_and_a_missing_prefix_are_accepted(tmp_path):
    tensors = random_tensors()
    _, expected = jp.load_pretrained(write(tmp_path / "a", tensors), jnp.float32)
    old = {**tensors, "model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(2, np.float32)}
    bare = {name.removeprefix("model."): tensor for name, tensor in tensors.items()}
    for name, changed in (("b", old), ("c", bare)):
        _, params = jp.load_pretrained(write(tmp_path / name, changed), jnp.float32)
        jax.tree.map(np.testing.assert_array_equal, params, expected)


def test_a_tied_head_may_be_stored_if_it_is_the_embedding(tmp_path):
    config = {**CONFIG, "tie_word_embeddings": True}
    tensors = random_tensors()
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
    _, params = jp.load_pretrained(write(tmp_path / "same", tensors, config))
    assert "lm_head" not in params
    del tensors["lm_head.weight"]
    jp.load_pretrained(write(tmp_path / "absent", tensors, config))
    with pytest.raises(jp.InputError, match=r"lm_head.weight differs .* set tie_word_embeddings to false"):
        jp.load_pretrained(write(tmp_path / "other", random_tensors(), config))


def test_loaded_parameters_can_be_donated(tmp_path):
    """Leaves may share memory with the array they were read into; a donating step must not write there."""
    _, params = jp.load_pretrained(write(tmp_path / "model"), jnp.float32)
    expected = jax.tree.map(lambda leaf: np.array(leaf) * 2, params)
    doubled = jax.jit(lambda p: jax.tree.map(lambda leaf: leaf * 2, p), donate_argnums=0)(params)
    jax.tree.map(np.testing.assert_array_equal, doubled, expected)


def test_real_tokenizer(shared_data):
    tokenizer = hf.load_tokenizer(shared_data / "checkpoints" / "stories260K")
    assert tokenizer.decode(tokenizer("Once upon a time", add_special_tokens=False).input_ids) == "Once upon a time"


# Out.


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
@pytest.mark.parametrize("max_shard_gb", [5.0, 4e-6])
def test_round_trip_is_bit_identical(tmp_path, dtype, max_shard_gb):
    source = write(tmp_path / "model", random_tensors(dtype))
    _, params = jp.load_pretrained(source, dtype)
    out = jp.save_pretrained(tmp_path / "new" / "out", source, params, max_shard_gb=max_shard_gb)
    before, after = stored(source), stored(out)
    assert before.keys() == after.keys()
    assert all(after[name].dtype == dtype and bits(after[name]) == bits(before[name]) for name in before)
    assert json.loads((out / "config.json").read_text()) == {**CONFIG, "torch_dtype": np.dtype(dtype).name}
    _, again = jp.load_pretrained(out, dtype)
    assert [bits(leaf) for leaf in jax.tree.leaves(again)] == [bits(leaf) for leaf in jax.tree.leaves(params)]
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["out"]


def test_shards_keep_to_their_size_and_are_indexed(tmp_path):
    source = write(tmp_path / "model")
    _, params = jp.load_pretrained(source, jnp.float32)
    out = jp.save_pretrained(tmp_path / "out", source, params, max_shard_gb=6e-6)
    index = json.loads((out / "model.safetensors.index.json").read_text())
    files = sorted(file.name for file in out.glob("*.safetensors"))
    assert files == [f"model-{i + 1:05}-of-{len(files):05}.safetensors" for i in range(len(files))]
    assert len(files) > 2
    assert index["weight_map"].keys() == SHAPES.keys()
    sizes = {}
    for name, shape in SHAPES.items():
        sizes[index["weight_map"][name]] = sizes.get(index["weight_map"][name], 0) + 4 * int(np.prod(shape))
    assert sum(sizes.values()) == index["metadata"]["total_size"]
    assert max(sizes.values()) <= 6000
    with safe_open(out / files[0], framework="numpy") as opened:
        assert opened.metadata() == {"format": "pt"}


def test_a_cut_stack_is_joined(tmp_path):
    source = write(tmp_path / "model")
    _, params = jp.load_pretrained(source, jnp.float32)
    cut = tree.cut_layers(tree.cut_layers(params, 1), 2)
    assert "layers_1_2" in cut
    out = jp.save_pretrained(tmp_path / "out", CONFIG, cut)
    before, after = stored(source), stored(out)
    assert all(bits(after[name]) == bits(before[name]) for name in before)


def test_transformers_reads_what_is_written(tmp_path, shared_data):
    torch = pytest.importorskip("torch")
    import transformers

    source = shared_data / "checkpoints" / "stories260K"
    _, params = jp.load_pretrained(source, jnp.float32)
    jp.save_pretrained(tmp_path / "out", source, params, max_shard_gb=3e-4)
    ours = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    original = transformers.AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    expected = dict(original.named_parameters())
    assert {name for name, _ in ours.named_parameters()} == expected.keys()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in ours.named_parameters())
    ids = hf.load_tokenizer(source)("Lily saw a ball").input_ids
    assert hf.load_tokenizer(tmp_path / "out")("Lily saw a ball").input_ids == ids


def test_nothing_is_overwritten_and_nothing_is_left_after_an_error(tmp_path, monkeypatch):
    source = write(tmp_path / "model")
    _, params = jp.load_pretrained(source, jnp.float32)
    with pytest.raises(jp.InputError, match="exists and is not an empty directory"):
        jp.save_pretrained(source, CONFIG, params)
    (tmp_path / "file").write_text("mine")
    with pytest.raises(jp.InputError, match="file: is a file; give a folder"):
        jp.save_pretrained(tmp_path / "file", CONFIG, params)

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(jp.InputError, match="out: cannot be written: No space left on device"):
        jp.save_pretrained(tmp_path / "out", CONFIG, params)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "model"]
    monkeypatch.undo()
    (tmp_path / "out").mkdir()
    jp.save_pretrained(tmp_path / "out", CONFIG, params)
    assert (tmp_path / "out" / "model.safetensors").is_file()


def test_parameters_that_are_not_the_models_are_refused(tmp_path):
    _, params = jp.load_pretrained(write(tmp_path / "model"), jnp.float32)
    flat = tree.flatten(params)
    with pytest.raises(ValueError, match="q_proj/lora/a has no name"):
        extra = {**flat, "layers/self_attn/q_proj/lora/a": jnp.zeros((3, 16, 2))}
        jp.save_pretrained(tmp_path / "out", CONFIG, tree.unflatten(extra))
    with pytest.raises(ValueError, match="lack norm/scale"):
        jp.save_pretrained(tmp_path / "out", CONFIG, {k: v for k, v in params.items() if k != "norm"})
    with pytest.raises(ValueError, match="norm/scale: expected an array of .*, found int8"):
        jp.save_pretrained(tmp_path / "out", CONFIG, {**params, "norm": {"scale": jnp.ones(16, jnp.int8)}})
    with pytest.raises(ValueError, match=r"norm/scale: shape \(15,\) does not fit"):
        jp.save_pretrained(tmp_path / "out", CONFIG, {**params, "norm": {"scale": jnp.ones(15)}})
    assert not (tmp_path / "out").exists()


# Memory.

MEASURE = """
    import sys, threading, time
    from pathlib import Path
    import jax, jax.numpy as jnp
    import jaxpeft as jp
    from jaxpeft import tree

    def resident():
        return int(Path("/proc/self/statm").read_text().split()[1]) * 4096

    def growth(work):
        peak, done = [resident()], threading.Event()
        def watch():
            while not done.is_set():
                peak[0] = max(peak[0], resident())
                time.sleep(0.0005)
        before, thread = resident(), threading.Thread(target=watch)
        thread.start()
        result = work()
        jax.block_until_ready(result)
        done.set()
        thread.join()
        return peak[0] - before, result

    source, target = sys.argv[1:]
    jnp.zeros(3).block_until_ready()
    loading, (model, params) = growth(lambda: jp.load_pretrained(source, jnp.bfloat16))
    saving, _ = growth(lambda: jp.save_pretrained(target, source, params) and None)
    print(loading, saving, tree.num_bytes(params))
"""


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads /proc")
def test_host_memory_stays_near_one_tensor_above_the_model(tmp_path):
    config = {**CONFIG, "hidden_size": 640, "intermediate_size": 2560, "num_hidden_layers": 16, "vocab_size": 25600}
    config |= {
        "num_attention_heads": 10,
        "num_key_value_heads": 10,
        "attention_bias": False,
        "tie_word_embeddings": True,
    }
    family = models.family(config)
    shapes = family.shapes(family.from_hf(config, jnp.bfloat16).config)
    params = tree.unflatten({path: np.ones(leaf.shape, leaf.dtype) for path, leaf in shapes.items()})
    total, largest = tree.num_bytes(params), 2 * 25600 * 640
    assert total > 220e6
    jp.save_pretrained(tmp_path / "model", config, params)
    del params
    environment = {**os.environ, "PYTHONPATH": str(Path(jp.__file__).parent.parent)}
    command = [sys.executable, "-c", textwrap.dedent(MEASURE), str(tmp_path / "model"), str(tmp_path / "out")]
    ran = subprocess.run(command, capture_output=True, text=True, env=environment, check=True)
    loading, saving, in_memory = map(int, ran.stdout.split())
    assert in_memory == total
    print(f"model {total}, loading +{loading}, saving +{saving}, largest tensor {largest} bytes")
    slack = 40e6  # modules imported and small programs compiled on the way
    assert loading < total + 2 * largest + slack
    assert saving < 3 * largest + slack


def test_a_classifier_in_place_of_the_head(tmp_path):
    """Everything else comes from the checkpoint; the classifier is new, and a function of the key."""
    folder = write(tmp_path / "model")
    _, plain = jp.load_pretrained(folder, jnp.float32)
    model, params = jp.load_pretrained(folder, jnp.float32, labels=("no", "yes", "maybe"), key=jax.random.key(1))
    flat, expected = tree.flatten(params), tree.flatten(plain)
    assert flat.keys() - expected.keys() == {"classifier/kernel"} and expected.keys() - flat.keys() == {
        "lm_head/kernel"
    }
    for path in flat.keys() & expected.keys():
        assert bits(flat[path]) == bits(expected[path]), path
    assert flat["classifier/kernel"].shape == (16, 3) and model.config.num_labels == 3
    _, other = jp.load_pretrained(folder, jnp.float32, labels=("no", "yes", "maybe"), key=jax.random.key(2))
    assert bits(other["classifier"]["kernel"]) != bits(params["classifier"]["kernel"])


def test_names_of_code_are_left_behind_and_code_is_not_asked_for(tmp_path):
    folder = runs.make_files(tmp_path) / "model"
    for name in ("config.json", "tokenizer_config.json"):
        document = json.loads((folder / name).read_text())
        (folder / name).write_text(json.dumps({**document, "auto_map": {"AutoModel": "evil.Evil"}}))
    out = hf.save_pretrained(tmp_path / "out", folder, hf.load_pretrained(folder)[1])
    for name in ("config.json", "tokenizer_config.json"):
        assert "auto_map" not in json.loads((out / name).read_text())
    changed = {"auto_map": {"AutoTokenizer": ["evil.Evil", None]}, "tokenizer_class": "Evil"}
    document = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps({**document, **changed}))
    with pytest.raises(InputError, match="needs Python code of its own, which is never run"):
        hf.load_tokenizer(folder)
