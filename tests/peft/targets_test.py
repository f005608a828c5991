"""What adapter_config.json names and the file has lost; which modules PEFT's fields choose."""

import hashlib
import json

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import jaxpeft as jp
from jaxpeft import tree
from jaxpeft.errors import InputError
from jaxpeft.peft import export_adapter, import_adapter
from jaxpeft.peft.base import modules
from jaxpeft.peft.chosen import is_target
from tests import tiny
from tests.peft import reference

WEIGHTS = "adapter_model.safetensors"
METHODS = {
    "dora": jp.dora(2),
    "ia3": jp.ia3(),
    "ln_tuning": jp.ln_tuning(),
    "loha": jp.loha(2),
    "lokr": jp.lokr(2),
    "lora": jp.lora(2),
    "lora of few": jp.lora(2, targets="qv"),
    "miss": jp.miss(2),
    "oft": jp.oft(4),
    "randlora": jp.randlora(2),
    "shira": jp.shira(2),
    "vblora": jp.vblora(2, vectors=8, length=8, topk=2),
    "vera": jp.vera(4),
}


def lose(folder, keep):
    """Takes tensors out of an adapter's file, and makes jaxpeft.json fit."""
    save_file({name: x for name, x in load_file(folder / WEIGHTS).items() if keep(name)}, folder / WEIGHTS)
    if (own := folder / "jaxpeft.json").exists():
        digest = hashlib.sha256((folder / WEIGHTS).read_bytes()).hexdigest()
        own.write_text(json.dumps({**json.loads(own.read_text()), "sha256": digest}))


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return reference.write_base(tmp_path_factory.mktemp("base") / "llama")


@pytest.mark.parametrize("name", METHODS)
def test_a_file_that_has_lost_modules_is_refused(name, tmp_path):
    method, (model, params) = METHODS[name], tiny.model()
    _, trainable, rest = jp.setup(method, model, params, jax.random.key(0))
    whole = tree.combine(reference.randomise(trainable), rest)
    folder = export_adapter(tmp_path / "adapter", whole, method, model.config)
    import_adapter(folder, model.config, params)
    layer, kind = "model.layers.1.self_attn.v_proj", "self_attn"
    if name == "ln_tuning":
        layer, kind = "model.layers.1.post_attention_layernorm", "input_layernorm"
    lose(folder, lambda tensor: f"{layer}." not in tensor)
    refused = (
        rf"{WEIGHTS}: (has no tensor of {layer}, which target_modules of adapter_config.json names|{layer} has no)"
    )
    with pytest.raises(InputError, match=refused):
        import_adapter(folder, model.config, params)
    (folder / "jaxpeft.json").unlink()
    with pytest.raises(InputError, match=refused):
        import_adapter(folder, model.config, params)
    if name != "lora of few":
        lose(folder, lambda tensor: f".{kind}." not in tensor)
        refused = rf"{WEIGHTS}: has no tensor of model.layers.0.{kind}\S* and of \d+ more, which target_modules"
        with pytest.raises(InputError, match=refused):
            import_adapter(folder, model.config, params)


def test_layers_of_rank_none_are_not_named(tmp_path):
    """So that what has been left out in writing is not asked for."""
    method, (model, params) = jp.lora(2, targets="qv"), tiny.model()
    _, trainable, rest = jp.setup(method, model, params, jax.random.key(0))
    some = {path: leaf.at[1].set(0) for path, leaf in reference.randomise(trainable).items()}
    folder = export_adapter(tmp_path / "adapter", tree.combine(some, rest), method, model.config)
    _, leaves = import_adapter(folder, model.config, params)
    for path, leaf in some.items():
        np.testing.assert_array_equal(leaves[path], leaf)


NARROW = {
    "layers": {"target_modules": ["q_proj", "down_proj"], "layers_to_transform": 1},
    "layers by a pattern": {
        "target_modules": ["q_proj"],
        "layers_to_transform": [0],
        "layers_pattern": ["blocks", "layers"],
    },
    "excluded by name": {"target_modules": ["q_proj", "v_proj"], "exclude_modules": ["0.self_attn.q_proj"]},
    "excluded by an expression": {"target_modules": "all-linear", "exclude_modules": r".*\.mlp\..*|.*\.0\..*"},
    "an expression": {"target_modules": r"model\.layers\.(0\.mlp\.up|1\.self_attn\.q)_proj"},
    "a whole name beside layers": {
        "target_modules": ["model.layers.0.self_attn.q_proj", "v_proj"],
        "layers_to_transform": [1],
    },
    "what is saved whole": {"target_modules": ["q_proj", "v_proj"], "modules_to_save": [r"1.self_attn"]},
}


@pytest.mark.parametrize("case", NARROW)
def test_modules_are_chosen_as_peft_chooses_them(case, base, tmp_path):
    reference.make_peft(base, r=2, **NARROW[case]).save_pretrained(tmp_path)
    fields, model = json.loads((tmp_path / "adapter_config.json").read_text()), reference.load(base)[0]
    chosen = [name for name in modules(model.config) if is_target(fields, name)]
    assert {name for name in load_file(tmp_path / WEIGHTS) if ".lora_A" in name} == {
        f"base_model.model.{name}.lora_A.weight" for name in chosen
    }
    if "modules_to_save" not in NARROW[case]:  # which has no place in an adapter here
        import_adapter(tmp_path, model.config)
        lose(tmp_path, lambda tensor: f"{chosen[-1]}." not in tensor)
        with pytest.raises(InputError, match=f"no tensor of {chosen[-1]},|holds no adapter"):
            import_adapter(tmp_path, model.config)
