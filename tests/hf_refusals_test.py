"""Checkpoints that cannot be read: one line for each mistake."""

import json
import re

import jax.numpy as jnp
import numpy as np
import pytest

import jaxpeft as jp
from jaxpeft import hf
from tests.checkpoint_files import CONFIG, random_tensors, write


def refused(path, match):
    with pytest.raises(jp.InputError, match=match) as caught:
        jp.load_pretrained(path)
    assert "\n" not in str(caught.value)


def test_no_such_directory(tmp_path, monkeypatch):
    import huggingface_hub

    def never(*args, **kwargs):
        raise AssertionError("a path was sent to the hub")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", never)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    paths = ("absent", "./absent", "runs/absent", "a/b/c", "~/absent", "../absent", "absent/", "a/", "a\\b", "", "...")
    for path in (str(tmp_path / "absent"), *paths):
        refused(path, f"^{re.escape(path or repr(path))}: no such directory")


def test_a_hub_id_that_cannot_be_fetched(monkeypatch):
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    refused("nobody-here/no-such-model", "nobody-here/no-such-model: no such directory, and it could not be fetched")


def test_a_hub_id_is_fetched_without_pickles(tmp_path, monkeypatch):
    import huggingface_hub

    asked = {}

    def snapshot(repo_id, allow_patterns):
        asked.update(id=repo_id, patterns=allow_patterns)
        return str(tmp_path / "snapshot")

    write(tmp_path / "snapshot")
    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    jp.load_pretrained("owner/name")
    assert asked["id"] == "owner/name"
    assert {"config.json", "*.safetensors", "tokenizer.json"} <= set(asked["patterns"])
    assert not any(pattern.endswith(("bin", "pt", "*")) for pattern in asked["patterns"])


def test_a_file_instead_of_a_directory(tmp_path):
    refused(write(tmp_path / "model") / "model.safetensors", "is a file; a checkpoint is a directory")


def test_config_json(tmp_path):
    folder = write(tmp_path / "model")
    for content, match in (
        (b"{", "config.json: is not JSON: line 1"),
        (b"\xff{}", "config.json: is not UTF-8 at byte 0"),
        (b"[]", "config.json: should hold a JSON object, not a list"),
        (b'{"model_type": "mamba"}', "unsupported model_type 'mamba'; supported: bert, llama"),
        (b'{"model_type": "llama"}', "config.json: the field '.*' is missing"),
        (json.dumps({**CONFIG, "hidden_size": "64"}).encode(), 'hidden_size "64" should be a whole number'),
        (json.dumps({**CONFIG, "num_hidden_layers": 0}).encode(), "num_hidden_layers 0 should be at least 1"),
        (json.dumps({**CONFIG, "num_key_value_heads": 3}).encode(), "num_attention_heads .* is not a multiple of"),
        (json.dumps({**CONFIG, "quantization_config": {}}).encode(), "the weights are quantized"),
    ):
        (folder / "config.json").write_bytes(content)
        refused(folder, match)
    (folder / "config.json").unlink()
    refused(folder, "model: has no config.json")


def test_weights_only_as_pickle_are_refused_and_not_read(tmp_path):
    folder = write(tmp_path / "model")
    (folder / "model.safetensors").unlink()
    refused(folder, "model: has no weights")
    (folder / "pytorch_model.bin").write_bytes(b"cos\nabort\n(tR.")  # ends the process if unpickled
    refused(folder, r"pickled \(pytorch_model.bin\).*refused; convert .* safe_serialization=True")


@pytest.mark.parametrize("keep", [0, 4, 100, -1, -1000])
def test_a_truncated_file(tmp_path, keep):
    file = write(tmp_path / "model") / "model.safetensors"
    file.write_bytes(file.read_bytes()[:keep])
    refused(tmp_path / "model", r"model.safetensors: not a whole safetensors file \(truncated or damaged\)")


def test_tensors_that_do_not_fit(tmp_path):
    tensors = random_tensors()
    tensors["model.norm.weight"] = np.ones(15, np.float32)
    tensors["model.layers.0.mlp.up_proj.weight"] = np.ones((24, 16), np.int8)
    for i in range(3):
        del tensors[f"model.layers.{i}.self_attn.q_proj.weight"], tensors[f"model.layers.{i}.self_attn.k_proj.bias"]
    tensors["model.vision.weight"] = np.ones(1, np.float32)
    folder = write(tmp_path / "model", tensors)
    refused(folder, r"6 missing: model.layers.0.self_attn.\w+.\w+, .*, \.\.\.; 1 unexpected: model.vision.weight")
    refused(folder, r"2 that differ: .*model.norm.weight has shape \(15,\), expected \(16,\)")
    refused(folder, r"model.layers.0.mlp.up_proj.weight is I8, expected one of BF16")


def test_an_index_and_its_shards(tmp_path):
    source = write(tmp_path / "model")
    _, params = jp.load_pretrained(source, jnp.float32)
    out = jp.save_pretrained(tmp_path / "out", source, params, max_shard_gb=6e-6)
    index = out / "model.safetensors.index.json"
    whole = json.loads(index.read_text())
    victim = whole["weight_map"]["model.norm.weight"]
    other = next(shard for shard in whole["weight_map"].values() if shard != victim)
    index.write_text(json.dumps({"weight_map": {**whole["weight_map"], "model.norm.weight": other}}))
    refused(out, f"{victim}: holds model.norm.weight, which model.safetensors.index.json says is in {other}")
    index.write_text(json.dumps(whole))
    (out / victim).unlink()
    refused(out, f"index.json: the shard {victim} .* is absent")
    for content, match in (
        ({"weight_map": {"model.norm.weight": "../x.safetensors"}}, "should be in a file beside the index"),
        ({"weight_map": {"model.norm.weight": 3}}, r"weight_map.model.norm.weight 3 should be text"),
        ({}, "lacks weight_map"),
    ):
        index.write_text(json.dumps(content))
        refused(out, match)


def test_no_tokenizer(tmp_path):
    folder = write(tmp_path / "model")
    with pytest.raises(jp.InputError, match="model: has no tokenizer"):
        hf.load_tokenizer(folder)
    (folder / "tokenizer.json").write_text("{}")
    with pytest.raises(jp.InputError, match="the tokenizer cannot be read") as caught:
        hf.load_tokenizer(folder)
    assert "\n" not in str(caught.value)
