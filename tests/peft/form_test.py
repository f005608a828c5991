"""PEFT's forms, on small methods whose forms differ from LoRA's: DoRA, IA3, prefixes; and on a modifier in a chain."""

import json
from types import SimpleNamespace

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import peft
import pytest
import torch

import jaxpeft as jp
from jaxpeft import method as methods
from jaxpeft import sites, tree
from jaxpeft.about import About, Promises
from jaxpeft.errors import InputError
from jaxpeft.peft import attach, export_adapter, form, import_adapter
from tests import tiny
from tests.peft import reference

# A method's file each: a factory and PEFT.


class TrialDoRA(nn.Module):
    rank: int
    scale: float

    @nn.compact
    def __call__(self, inner, x, site, ctx):
        kernel, (n, m) = site.kernel, site.kernel.shape
        a = self.param("a", nn.initializers.normal(), (n, self.rank))
        b = self.param("b", nn.initializers.zeros, (self.rank, m))
        magnitude = self.param("magnitude", lambda key: jnp.linalg.norm(kernel, axis=0))
        whole = kernel + self.scale * a @ b
        return (x @ whole) * (magnitude / jnp.linalg.norm(whole, axis=0))


def trial_dora(
    rank=4, alpha=None, targets="all-linear", dropout=0.0, rslora=False, rank_pattern=None, alpha_pattern=None
):
    config = dict(locals())
    same = jp.lora(**config)

    def adapter(site):
        r = sites.first_match(rank_pattern or {}, site, rank)
        return TrialDoRA(r, dora_scale(config, site))

    return same._replace(
        forward=lambda model, view: sites.attach(
            model, "trial_dora", adapter, lambda params: sites.find(params, targets)
        ),
        roles=methods.trains(lambda path: "/trial_dora/" in path),
        specs=(methods.Spec("trial_dora", config),),
    )


def dora_scale(config, site):
    rank = sites.first_match(config["rank_pattern"] or {}, site, config["rank"])
    alpha = sites.first_match(config["alpha_pattern"] or {}, site, config["alpha"] or rank)
    return alpha / np.sqrt(rank) if config["rslora"] else alpha / rank


DORA = form.lora_pairs(
    "trial_dora",
    scale=dora_scale,
    tensors={"magnitude": form.Tensor("lora_magnitude_vector", "m")},
    fill={"magnitude": lambda kernel: np.linalg.norm(kernel, axis=0)},
    fields=lambda config: {"use_rslora": config["rslora"], "use_dora": True},
    when={"use_dora": True},
)


class TrialIA3(nn.Module):
    over_inputs: bool

    @nn.compact
    def __call__(self, inner, x, site, ctx):
        kernel, (n, m) = site.kernel, site.kernel.shape
        if self.over_inputs:
            return (x * self.param("in", nn.initializers.ones, (n,))) @ kernel
        return (x @ kernel) * self.param("out", nn.initializers.ones, (m,))


def trial_ia3(targets=("k_proj", "v_proj", "down_proj"), feedforward=("down_proj",)):
    config = dict(locals())

    def adapter(site):
        return TrialIA3(any(site.endswith(f"/{name}") for name in feedforward))

    return methods.Method(
        forward=lambda model, view: sites.attach(
            model, "trial_ia3", adapter, lambda params: sites.find(params, targets)
        ),
        roles=methods.trains(lambda path: "/trial_ia3/" in path),
        specs=(methods.Spec("trial_ia3", config),),
    )


IA3 = form.vectors(
    "IA3",
    "trial_ia3",
    "ia3_l",
    arguments=lambda targets, feedforward: {"targets": targets, "feedforward": feedforward},
)


def trial_prefix(tokens=2):
    config = dict(locals())

    def forward(model, view):
        c = model.config
        own = jnp.zeros((c.num_hidden_layers, tokens, c.num_key_value_heads * c.head_dim))
        init = lambda key, params: tree.unflatten({KEYS: own, VALUES: own, **tree.flatten(model.init(key, params))})
        return model._replace(init=init)

    return methods.Method(
        forward=forward,
        roles=methods.trains(lambda path: "/trial_prefix/" in path),
        specs=(methods.Spec("trial_prefix", config),),
    )


KEYS, VALUES = "layers/self_attn/trial_prefix/keys", "layers/self_attn/trial_prefix/values"


def prefix_fields(config, tensors, base):
    c, width = base.config, tensors["prompt_embeddings"].shape[1] // (2 * base.config.num_hidden_layers)
    return {
        "encoder_hidden_size": width,
        "num_attention_heads": c.num_key_value_heads,
        "num_layers": c.num_hidden_layers,
        "num_transformer_submodules": 1,
        "num_virtual_tokens": config["tokens"],
        "prefix_projection": False,
        "token_dim": width,
    }


def prefix_leaves(config, tensors, base):
    return dict(
        zip(
            (KEYS, VALUES),
            form.to_keys_values(tensors["prompt_embeddings"], base.config.num_hidden_layers),
            strict=True,
        )
    )


PREFIX = form.per_model(
    "PREFIX_TUNING",
    "trial_prefix",
    ("prompt_embeddings",),
    to_tensors=lambda config, leaves, base: {"prompt_embeddings": form.from_keys_values(leaves[KEYS], leaves[VALUES])},
    from_tensors=prefix_leaves,
    to_config=prefix_fields,
    from_config=lambda fields, tensors, base: {"tokens": len(tensors["prompt_embeddings"])},
    fields="encoder_hidden_size init_weights num_attention_heads num_layers num_transformer_submodules "
    "num_virtual_tokens prefix_projection token_dim".split(),
)


def trial_rounding():
    """A modifier: the base's kernels are stored in another way, and no leaf is added."""

    def prepare(params, view):
        flat = tree.flatten(params)
        return tree.unflatten(
            {path: jnp.round(x * 16) / 16 if path.endswith("/kernel") else x for path, x in flat.items()}
        )

    return methods.Method(prepare=prepare, specs=(methods.Spec("trial_rounding", {}),))


def about(**fields):
    return About("a trial", "site", "leaves", "all", "none", {}, Promises(site_bytes=lambda **_: 0), **fields)


FILES = {
    "trial_dora": SimpleNamespace(trial_dora=trial_dora, ABOUT=about(peft=DORA)),
    "trial_ia3": SimpleNamespace(trial_ia3=trial_ia3, ABOUT=about(peft=IA3)),
    "trial_prefix": SimpleNamespace(trial_prefix=trial_prefix, ABOUT=about(peft=PREFIX)),
    "trial_rounding": SimpleNamespace(trial_rounding=trial_rounding, ABOUT=about(changes_kernels=lambda config: True)),
}


@pytest.fixture(autouse=True)
def methods_here(monkeypatch):
    """The trial methods beside LoRA and LoRA-FA, and no others."""
    real = methods.module
    monkeypatch.setattr(methods, "names", lambda: ["full", "lora", "lora_fa", *FILES])
    monkeypatch.setattr(methods, "module", lambda name: FILES[name] if name in FILES else real(name))


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return reference.write_base(tmp_path_factory.mktemp("base") / "llama")


def of_peft(base, config, folder):
    """PEFT's model with random leaves of its adapter, saved."""
    model = peft.get_peft_model(reference.torch_base(base), config)
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = 0.5 + 0.3 * torch.randn(parameter.shape, generator=generator)
    model.save_pretrained(folder)
    return model.eval()


def tensors_of(folder):
    from safetensors.numpy import load_file

    return load_file(folder / "adapter_model.safetensors")


def fields_of(folder):
    return json.loads((folder / "adapter_config.json").read_text())


ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
ADAPTERS = {
    "dora": (
        peft.LoraConfig(task_type="CAUSAL_LM", r=3, lora_alpha=6, use_dora=True, target_modules=ALL),
        DORA,
    ),
    "dora with patterns": (
        peft.LoraConfig(
            task_type="CAUSAL_LM",
            r=3,
            use_dora=True,
            use_rslora=True,
            target_modules=["q_proj", "down_proj"],
            rank_pattern={"down_proj": 5},
            alpha_pattern={"q_proj": 4},
        ),
        DORA,
    ),
    "ia3": (peft.IA3Config(task_type="CAUSAL_LM"), IA3),
    "ia3 on inputs alone": (
        peft.IA3Config(task_type="CAUSAL_LM", target_modules=["o_proj"], feedforward_modules=["o_proj"]),
        IA3,
    ),
}


@pytest.mark.parametrize("name", ADAPTERS)
def test_an_adapter_of_pefts_computes_the_same_goes_back_as_it_was_and_comes_back_bit_for_bit(name, base, tmp_path):
    config, kind = ADAPTERS[name]
    theirs = of_peft(base, config, tmp_path / "theirs")
    model, params = reference.load(base)
    new, adapted, method = attach(tmp_path / "theirs", model, params)
    assert [spec.name for spec in method.specs] == [kind.scope]
    reference.assert_close(reference.logits(new, adapted), reference.torch_logits(theirs))

    export_adapter(tmp_path / "ours", adapted, method, model.config, base)
    before, after = tensors_of(tmp_path / "theirs"), tensors_of(tmp_path / "ours")
    assert before.keys() == after.keys()
    for key, tensor in before.items():
        np.testing.assert_array_equal(tensor, after[key], err_msg=key)
    ours, stated = fields_of(tmp_path / "ours"), fields_of(tmp_path / "theirs")
    assert ours.keys() <= stated.keys()
    for field in ours.keys() - {"peft_version", "rank_pattern", "alpha_pattern", "r", "lora_alpha"}:
        same = sorted if field.endswith("_modules") and ours[field] else lambda value: value
        assert same(ours[field]) == same(stated[field]), field
    reference.assert_close(reference.with_adapter(base, tmp_path / "ours"), reference.torch_logits(theirs))

    _, again, restored = attach(tmp_path / "ours", model, params)
    assert json.dumps(restored.specs) == json.dumps(method.specs)
    before, after = tree.flatten(adapted), tree.flatten(again)
    assert before.keys() == after.keys()
    for path, leaf in before.items():
        np.testing.assert_array_equal(leaf, after[path], err_msg=path)


@pytest.mark.parametrize(
    "config",
    [
        peft.LoraConfig(task_type="CAUSAL_LM", r=2, use_dora=True, target_modules=["q_proj"], layers_to_transform=[1]),
        peft.IA3Config(
            task_type="CAUSAL_LM",
            target_modules=r".*\.1\.(self_attn\.k_proj|mlp\.down_proj)",
            feedforward_modules=r".*down_proj",
        ),
    ],
)
def test_layers_without_an_adapter_are_filled_with_what_computes_the_same(config, base, tmp_path):
    theirs = of_peft(base, config, tmp_path / "theirs")
    model, params = reference.load(base)
    new, adapted, method = attach(tmp_path / "theirs", model, params)
    reference.assert_close(reference.logits(new, adapted), reference.torch_logits(theirs))
    export_adapter(tmp_path / "ours", adapted, method, model.config, base)
    reference.assert_close(reference.with_adapter(base, tmp_path / "ours"), reference.torch_logits(theirs))


def test_a_fill_that_needs_the_kernel_says_so(base, tmp_path):
    config = peft.LoraConfig(r=2, use_dora=True, target_modules=["q_proj"], layers_to_transform=[1])
    of_peft(base, config, tmp_path / "theirs")
    with pytest.raises(InputError, match="layers.0.self_attn.q_proj is read with the base's kernel; give"):
        import_adapter(tmp_path / "theirs", reference.load(base)[0].config)


@pytest.mark.parametrize("projected", [False, True])
def test_a_prefix_of_pefts_is_its_keys_and_values_and_goes_back(projected, base, tmp_path):
    config = peft.PrefixTuningConfig(
        task_type="CAUSAL_LM", num_virtual_tokens=3, prefix_projection=projected, encoder_hidden_size=8
    )
    theirs = of_peft(base, config, tmp_path / "theirs")
    model, params = reference.load(base)
    method, leaves = import_adapter(tmp_path / "theirs", model.config, params)
    assert method.specs == (methods.Spec("trial_prefix", {"tokens": 3}),)
    cache = theirs.get_prompt(1)
    for layer in range(2):
        for path, expected in ((KEYS, cache.layers[layer].keys), (VALUES, cache.layers[layer].values)):
            heads = np.asarray(leaves[path][layer]).reshape(3, 2, 8).swapaxes(0, 1)
            np.testing.assert_array_equal(heads, expected[0].detach().numpy())

    adapted = tree.unflatten({**tree.flatten(params), **leaves})
    export_adapter(tmp_path / "ours", adapted, method, model.config, base)
    np.testing.assert_array_equal(*(tensors_of(tmp_path / which)["prompt_embeddings"] for which in ("theirs", "ours")))
    ours, stated = fields_of(tmp_path / "ours"), fields_of(tmp_path / "theirs")
    for field in ours.keys() - {"peft_version", "prefix_projection", "encoder_hidden_size"}:
        assert ours[field] == stated[field], field
    reference.assert_close(reference.with_adapter(base, tmp_path / "ours"), reference.torch_logits(theirs))
    again, restored = import_adapter(tmp_path / "ours", model.config, params)
    assert again.specs == method.specs and restored.keys() == leaves.keys()
    for path, leaf in leaves.items():
        np.testing.assert_array_equal(leaf, restored[path])


@pytest.mark.parametrize(("name", "adapter"), [("lora", jp.lora(rank=3)), ("trial_dora", trial_dora(rank=3))])
@pytest.mark.parametrize("first", [True, False])
def test_a_chain_is_written_by_the_one_form_that_owns_its_leaves_and_is_read_as_the_chain(
    name, adapter, first, base, tmp_path
):
    method = jp.chain(trial_rounding(), adapter) if first else jp.chain(adapter, trial_rounding())
    model, params = reference.load(base)
    new, trainable, frozen = jp.setup(method, model, params, jax.random.key(1))
    mine = tree.combine(reference.randomise(trainable), frozen)
    export_adapter(tmp_path / "adapter", mine, method, model.config, base)
    assert fields_of(tmp_path / "adapter")["peft_type"] == "LORA"
    again, restored, found = attach(tmp_path / "adapter", model, params)
    assert json.dumps(found.specs) == json.dumps(method.specs) and len(found.specs) == 2
    before, after = tree.flatten(mine), tree.flatten(restored)
    assert before.keys() == after.keys()
    for path, leaf in before.items():
        np.testing.assert_array_equal(leaf, after[path], err_msg=path)
    np.testing.assert_array_equal(reference.logits(again, restored), reference.logits(new, mine))


def test_two_forms_in_a_chain_are_written_in_our_own(base, tmp_path):
    method = jp.chain(jp.lora(rank=2, targets=["q_proj"]), trial_ia3())
    model, params = reference.load(base)
    _, trainable, frozen = jp.setup(method, model, params, jax.random.key(1))
    export_adapter(tmp_path / "adapter", tree.combine(trainable, frozen), method, model.config, base)
    assert fields_of(tmp_path / "adapter")["peft_type"] == "JAXPEFT"


def test_what_jaxpeft_json_said_before_it_named_the_spec_is_read(base, tmp_path):
    method = jp.chain(trial_rounding(), jp.lora(rank=2))
    model, params = reference.load(base)
    _, trainable, frozen = jp.setup(method, model, params, jax.random.key(1))
    export_adapter(tmp_path / "adapter", tree.combine(reference.randomise(trainable), frozen), method, model.config)
    file = tmp_path / "adapter" / "jaxpeft.json"
    own = json.loads(file.read_text())
    assert own.pop("spec") == 1
    before = import_adapter(tmp_path / "adapter", model.config)[1]
    file.write_text(json.dumps(own))
    after = import_adapter(tmp_path / "adapter", model.config)[1]
    assert before.keys() == after.keys()


@pytest.fixture(scope="module")
def ia3(base, tmp_path_factory):
    folder = tmp_path_factory.mktemp("ia3")
    of_peft(base, peft.IA3Config(task_type="CAUSAL_LM"), folder)
    return folder


def test_mistakes_are_one_line(base, ia3, tmp_path):
    model, _ = reference.load(base)
    stated, tensors = fields_of(ia3), tensors_of(ia3)
    first = "base_model.model.model.layers.0.self_attn.k_proj.ia3_l"
    from safetensors.numpy import save_file

    def refused(match, fields=stated, tensors=tensors):
        (tmp_path / "adapter_config.json").write_text(json.dumps(fields))
        save_file(tensors, tmp_path / "adapter_model.safetensors")
        with pytest.raises(InputError, match=match) as error:
            import_adapter(tmp_path, model.config)
        assert "\n" not in str(error.value) and str(error.value).startswith(str(tmp_path))

    refused(
        "peft_type 'LOHA' is not supported; supported: 'IA3', 'LORA', 'PREFIX_TUNING'", {**stated, "peft_type": "LOHA"}
    )
    refused("fan_in_fan_out = true is not supported", {**stated, "fan_in_fan_out": True})
    refused(
        r"k_proj.ia3_l has shape \(3, 1\), where \S*k_proj has 16 outputs and 32 inputs",
        tensors={**tensors, first: np.ones((3, 1), np.float32)},
    )
    refused(
        "layers.0.self_attn.k_proj scales its inputs, other layers do not",
        tensors={**tensors, first: np.ones((1, 32), np.float32)},
    )
    refused("the tensor prompt is not supported; supported: <module>.ia3_l", tensors={**tensors, "prompt": np.ones(3)})
    prefix = {"peft_type": "PREFIX_TUNING"}
    refused("the tensor x is not supported; supported: prompt_embeddings", prefix, {"x": np.ones(3, np.float32)})
    refused("has no prompt_embeddings", prefix, {})
    wrong = {"prompt_embeddings": np.ones((3, 66), np.float32)}
    refused("66 numbers per token are not keys and values of 2 layers", prefix, wrong)


def test_a_peft_type_whose_methods_all_want_another_field(base, ia3, tmp_path, monkeypatch):
    monkeypatch.setattr(methods, "names", lambda: ["trial_dora"])
    with pytest.raises(InputError, match="use_dora None is not supported; supported: True"):
        form.method_for({"peft_type": "LORA"})


def test_a_packed_base_has_kernels_too():
    """What fills layers without an adapter asks for a module's kernel, however the base stores it."""
    model, params = tiny.model()
    view = methods.View(model, (), lambda path: methods.FROZEN, {})
    packed = form.base_of(model.config, jp.quantize().prepare(params, view))
    plain = form.base_of(model.config, params)
    for name in ("model.layers.1.mlp.up_proj", "model.layers.2.self_attn.q_proj", "lm_head"):
        found, kernel = packed.kernel(name), plain.kernel(name)
        assert found.shape == kernel.shape and found.dtype == np.float32
        assert np.abs(found - kernel).max() <= 0.2 * np.abs(kernel).max()
