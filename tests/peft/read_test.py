"""Adapters in: PEFT's own, with equal logits and gradients, training on; and what is refused."""

import hashlib
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import optax
import peft
import pytest
import torch

import jaxpeft as jp
from jaxpeft import tree
from jaxpeft.errors import InputError
from jaxpeft.peft import attach, export_adapter, import_adapter
from tests.peft import reference

TENSORS = "adapter_model.safetensors"
ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
PEFTS = {
    "all linear": {"r": 4, "lora_alpha": 8, "target_modules": "all-linear"},
    "a regular expression": {"r": 4, "target_modules": r".*\.1\.self_attn\.(q|v)_proj"},
    "some layers": {"r": 3, "target_modules": ["q_proj", "up_proj"], "layers_to_transform": [1]},
    "rslora": {"r": 4, "lora_alpha": 6, "use_rslora": True, "target_modules": ALL},
    "head": {"r": 4, "lora_alpha": 2, "target_modules": ["o_proj", "lm_head"]},
    "ranks and alphas": {
        "r": 4,
        "lora_alpha": 8,
        "target_modules": ALL,
        "rank_pattern": {"q_proj": 2, "layers.1.mlp.up_proj": 7},
        "alpha_pattern": {"v_proj": 3, r"0.mlp.\w+": 5},
    },
}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return reference.write_base(tmp_path_factory.mktemp("base") / "llama")


@pytest.fixture(scope="module")
def simple(base, tmp_path_factory):
    """A folder with a small adapter of PEFT's, to be damaged in copies."""
    folder = tmp_path_factory.mktemp("adapter")
    reference.make_peft(base, r=2, target_modules=["q_proj"]).save_pretrained(folder)
    return folder


def test_pefts_own_files_have_the_fields_that_ours_have(base, simple, tmp_path):
    model, params = reference.load(base)
    _, found, method = attach(simple, model, params)
    export_adapter(tmp_path / "ours", found, method, model.config, base)
    ours, theirs = (json.loads((path / "adapter_config.json").read_text()) for path in (tmp_path / "ours", simple))
    assert ours.keys() <= theirs.keys()
    for name in ours.keys() - {"peft_version"}:
        assert ours[name] == theirs[name], name


@pytest.mark.parametrize("name", PEFTS)
def test_an_adapter_of_pefts_computes_the_same_here_and_goes_back_as_it_was(name, base, tmp_path):
    theirs = reference.make_peft(base, **PEFTS[name])
    theirs.save_pretrained(tmp_path / "theirs")
    model, params = reference.load(base)
    new, adapted, method = jp.attach(tmp_path / "theirs", model, params)
    reference.assert_close(reference.logits(new, adapted), reference.torch_logits(theirs))

    export_adapter(tmp_path / "ours", adapted, method, model.config, base)
    reference.assert_close(reference.with_adapter(base, tmp_path / "ours"), reference.torch_logits(theirs))
    from safetensors.numpy import load_file

    before, after = (load_file(tmp_path / which / TENSORS) for which in ("theirs", "ours"))
    # PEFT adds the embedding and the head to an adapter on the head.
    before = {key: tensor for key, tensor in before.items() if ".lora_" in key}
    assert before.keys() == after.keys()
    for key, tensor in before.items():
        if "lora_A" in key or name != "ranks and alphas":  # there, scales that differ are folded into B
            np.testing.assert_array_equal(tensor, after[key])
        assert tensor.shape == after[key].shape


def test_gradients_are_pefts_and_training_goes_on(base, tmp_path):
    """Also of an adapter whose layers differ: the padding gets no gradient and stays zero."""
    settings = {"r": 4, "lora_alpha": 8, "target_modules": ALL, "rank_pattern": {"layers.1.mlp.up_proj": 6}}
    theirs = reference.make_peft(base, **settings, lora_dropout=0.0)
    theirs.save_pretrained(tmp_path / "theirs")
    tokens = reference.TOKENS
    theirs(torch.tensor(tokens).long(), labels=torch.tensor(tokens).long()).loss.backward()
    expected = {
        name.replace(".default", ""): parameter.grad.numpy()
        for name, parameter in theirs.named_parameters()
        if parameter.grad is not None
    }

    model, params = reference.load(base)
    method, leaves = import_adapter(tmp_path / "theirs", model.config, params)
    new, trainable, frozen = jp.setup(
        method, model, tree.unflatten({**tree.flatten(params), **leaves}), jax.random.key(0)
    )
    _, attached, _ = jp.attach(tmp_path / "theirs", model, params)
    jax.tree.map(np.testing.assert_array_equal, jp.split(attached, method.trainable), (trainable, frozen))
    batch = {
        "tokens": tokens,
        "targets": np.roll(tokens, -1, 1),
        "loss_weights": np.tile(np.arange(tokens.shape[1]) < tokens.shape[1] - 1, (2, 1)).astype(np.float32),
        "positions": np.tile(np.arange(tokens.shape[1], dtype=np.int32), (2, 1)),
        "segment_ids": np.ones(tokens.shape, np.int32),
    }
    grads = jax.jit(jax.grad(lambda t: jp.completion_loss(new, tree.combine(t, frozen), batch, jax.random.key(0))[0]))(
        trainable
    )
    checked = 0
    for path, grad in grads.items():
        site, _, leaf = path.rpartition("/lora/")
        for layer in range(2):
            name = site.replace("layers/", f"base_model.model.model.layers.{layer}.").replace("/", ".")
            theirs_grad = expected[f"{name}.lora_{leaf.upper()}.weight"].T
            r = min(theirs_grad.shape[-1 if leaf == "a" else 0], grad.shape[-1 if leaf == "a" else 1])
            ours_grad = np.asarray(grad[layer])
            used, padding = (ours_grad[:, :r], ours_grad[:, r:]) if leaf == "a" else (ours_grad[:r], ours_grad[r:])
            if path != "layers/mlp/up_proj/lora/b":  # the scale of one layer is folded in here
                reference.assert_close(used, theirs_grad)
            assert not padding.any()
            checked += 1
    assert checked == len(expected) == 2 * 7 * 2

    state = jp.init_state(method, optax.adam(1e-2), trainable, frozen, jax.random.key(0))
    step = jax.jit(jp.make_train_step(new, method, optax.adam(1e-2)))
    losses = []
    for _ in range(5):
        state, metrics = step(state, batch)
        losses.append(float(metrics["loss"]))
    assert losses[-1] < losses[0]
    trained = tree.combine(state.trainable, state.frozen)
    export_adapter(tmp_path / "trained", trained, method, model.config, base)
    reference.assert_close(reference.logits(new, trained), reference.with_adapter(base, tmp_path / "trained"))
    config = json.loads((tmp_path / "trained" / "adapter_config.json").read_text())
    assert config["r"] == 4 and config["rank_pattern"] == {"model.layers.1.mlp.up_proj": 6}


def rewrite(folder, change):
    """Replaces the tensors of an adapter by change(tensors)."""
    from safetensors.torch import load_file, save_file

    tensors = change(load_file(folder / TENSORS))
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / TENSORS)


@pytest.fixture
def copy(simple, tmp_path):
    return shutil.copytree(simple, tmp_path / "adapter")


def test_names_with_the_adapters_name_and_tensors_in_bfloat16(copy, base):
    model, _ = reference.load(base)
    _, before = import_adapter(copy, model.config)
    rewrite(copy, lambda ts: {name.replace(".weight", ".default.weight"): t.bfloat16() for name, t in ts.items()})
    _, after = import_adapter(copy, model.config)
    for path, leaf in before.items():
        assert after[path].dtype == jnp.float32
        np.testing.assert_array_equal(after[path], leaf.astype(jnp.bfloat16).astype(jnp.float32))


def first(tensors, change):
    """The tensors with the first one (lora_A of layer 0's q_proj) changed."""
    name = min(tensors)
    return {**tensors, name: change(tensors[name])}


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (
            lambda ts: first(ts, lambda t: t[:, :-1]),
            r"another base: \S*layers.0.self_attn.q_proj\S* has shape \(2, 31\)",
        ),
        (lambda ts: first(ts, lambda t: t[:1]), r"layers.0.self_attn.q_proj has lora_A of rank 1 and lora_B of rank 2"),
        (lambda ts: {k.replace("q_proj", "query"): t for k, t in ts.items()}, "another base: it adapts .*query"),
        (lambda ts: {k.replace("layers.1", "layers.7"): t for k, t in ts.items()}, "another base: .*layers.7"),
        (lambda ts: dict(sorted(ts.items())[1:]), "layers.0.self_attn.q_proj has no lora_A.weight"),
        (
            lambda ts: {**ts, "base_model.model.lm_head.weight": torch.ones(99, 32)},
            r"lm_head.weight has shape \(99, 32\), the base's has \(97, 32\)",
        ),
        (
            lambda ts: {**ts, "base_model.model.model.embed_tokens.weight": torch.ones(99, 32)},
            r"embed_tokens.weight has shape \(99, 32\), the base's has \(97, 32\)",
        ),
        (lambda ts: {**ts, "base_model.model.lm_head.weight": torch.ones(97, 32)}, "brings its own .*lm_head.weight"),
        (
            lambda ts: {k.replace("lora_A", "lora_embedding_A"): t for k, t in ts.items()},
            "lora_embedding_A.*not supported",
        ),
        (lambda ts: {}, "holds no adapter"),
        (lambda ts: first(ts, lambda t: t.double() * 0 + 1e300), "q_proj.lora_A.weight holds 1e.300, expected finite"),
        (lambda ts: {k: t[:0] if "lora_A" in k else t[:, :0] for k, t in ts.items()}, "has shape .0, 32.: a rank of 0"),
        (lambda ts: first(ts, lambda t: t.int()), "q_proj.lora_A.weight is int32, expected floating-point numbers"),
        (lambda ts: first(ts, lambda t: t * torch.nan), "q_proj.lora_A.weight holds nan, expected finite numbers"),
        (lambda ts: first(ts, lambda t: (t / 0).bfloat16()), "q_proj.lora_A.weight holds -?inf, expected finite"),
        (lambda ts: first(ts, lambda t: t.to(torch.float8_e4m3fn)), "q_proj.lora_A.weight is F8_E4M3, expected one of"),
        (
            lambda ts: {k: torch.ones((40, 32) if "lora_A" in k else (32, 40)) for k in ts},
            "q_proj has rank 40, above the smaller side of its 32 x 32 kernel",
        ),
    ],
)
def test_tensors_that_do_not_fit_are_refused(change, reason, copy, base):
    rewrite(copy, change)
    model, params = reference.load(base)
    with pytest.raises(InputError, match=reason) as error:
        import_adapter(copy, model.config, params)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("peft_type", "XLORA"),
        ("bias", "all"),
        ("fan_in_fan_out", True),
        ("modules_to_save", ["lm_head"]),
        ("init_lora_weights", "pissa"),
        ("init_lora_weights", "olora"),
        ("layer_replication", [[0, 2]]),
        ("trainable_token_indices", [1]),
        ("lora_bias", True),
        ("a_field_of_the_future", 3),
        ("lora_alpha", float("nan")),
        ("lora_alpha", "16"),
        ("lora_alpha", 1e308),
        ("alpha_pattern", {"q_proj": float("inf")}),
        ("rank_pattern", [4]),
        ("r", 0),
        ("r", 3),
        ("rank_pattern", {"q_proj": 3}),
        ("lora_dropout", 1),
        ("use_rslora", "yes"),
        ("target_modules", {"q_proj": 1}),
    ],
)
def test_features_that_would_compute_something_else_are_refused(field, value, copy, base):
    config = json.loads((copy / "adapter_config.json").read_text())
    (copy / "adapter_config.json").write_text(json.dumps({**config, field: value}))
    model, _ = reference.load(base)
    with pytest.raises(InputError, match=field) as error:
        import_adapter(copy, model.config)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "settings",
    [
        {"init_lora_weights": "eva", "eva_config": {"rho": 2.0, "whiten": True}},
        {"velora_config": {"num_groups": 4}},
        {"monteclora_config": {"num_samples": 3, "buffer_size": 4}},
    ],
    ids=lambda settings: "-".join(settings),
)
def test_what_changes_training_alone_is_read(settings, base, tmp_path):
    """In evaluation PEFT computes the same with these fields and tensors as without."""
    theirs = reference.make_peft(base, r=2, target_modules=["q_proj"], **settings)
    theirs.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert all(config[name] for name in settings)
    new, adapted, _ = attach(tmp_path, *reference.load(base))
    reference.assert_close(reference.logits(new, adapted), reference.torch_logits(theirs))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("init_lora_weights", "mica"),
        ("eva_config", {"rho": 2.0}),
        ("corda_config", {"corda_method": "kpm"}),
        ("loftq_config", {"loftq_bits": 4}),
        ("lora_ga_config", {"direction": "ArB2r"}),
        ("megatron_config", {"num_layers": 2}),
    ],
)
def test_fields_that_change_nothing_are_read(field, value, copy, base):
    model, _ = reference.load(base)
    before = import_adapter(copy, model.config)
    config = json.loads((copy / "adapter_config.json").read_text())
    (copy / "adapter_config.json").write_text(json.dumps({**config, field: value}))
    after = import_adapter(copy, model.config)
    assert after[0].specs == before[0].specs
    for path, leaf in before[1].items():
        np.testing.assert_array_equal(after[1][path], leaf)


def test_files_that_are_no_adapter_are_refused(copy, base, tmp_path):
    model, _ = reference.load(base)

    def refused(reason, folder=copy):
        with pytest.raises(InputError, match=reason):
            import_adapter(folder, model.config)

    refused("no such directory", tmp_path / "nowhere")
    refused("has no adapter_config.json", base)
    whole = (copy / TENSORS).read_bytes()
    (copy / TENSORS).write_bytes(whole[: len(whole) // 2])
    refused("truncated or damaged")
    (copy / TENSORS).rename(copy / "adapter_model.bin")
    refused(r"pickled \(adapter_model.bin\), which can run code.*safe_serialization=True")
    (copy / "adapter_model.bin").unlink()
    refused(f"has no {TENSORS}")
    (copy / "adapter_config.json").write_text("{")
    refused("is not JSON")
    (copy / "adapter_config.json").write_text("[]")
    refused("should hold a JSON object")


def test_an_adapter_for_another_base_is_told_by_sizes_and_by_values(base, tmp_path):
    method = jp.lora(rank=2)
    model, params = reference.load(base)
    _, trainable, frozen = jp.setup(method, model, params, jax.random.key(0))
    export_adapter(tmp_path / "adapter", tree.combine(trainable, frozen), method, model.config, base)

    wider, _ = reference.load(reference.write_base(tmp_path / "wider", intermediate_size=64))
    with pytest.raises(InputError, match="another base: intermediate_size is 64 here, 56 there"):
        import_adapter(tmp_path / "adapter", wider.config)
    other, values = reference.load(reference.write_base(tmp_path / "other", seed=9))
    with pytest.raises(InputError, match="another base: the values of .* differ .*remove its jaxpeft.json to use it"):
        attach(tmp_path / "adapter", other, values)
    merged = method.merge(tree.combine(reference.randomise(trainable), frozen))
    with pytest.raises(InputError, match="another base: the values of .*kernel differ"):
        attach(tmp_path / "adapter", model, merged)

    from jaxpeft import hf

    attach(tmp_path / "adapter", *hf.load_pretrained(base, jnp.bfloat16))
    (tmp_path / "adapter" / "jaxpeft.json").unlink()
    attach(tmp_path / "adapter", other, values)


def test_jaxpeft_json_of_another_version_or_without_a_field_is_refused(base, tmp_path):
    method = jp.lora(rank=2)
    model, params = reference.load(base)
    _, trainable, frozen = jp.setup(method, model, params, jax.random.key(0))
    export_adapter(tmp_path / "adapter", tree.combine(trainable, frozen), method, model.config, base)
    own = tmp_path / "adapter" / "jaxpeft.json"
    whole = json.loads(own.read_text())
    own.write_text(json.dumps({**whole, "format": 99}))
    with pytest.raises(InputError, match="has format 99; this version of jaxpeft reads 1"):
        import_adapter(tmp_path / "adapter", model.config)
    own.write_text(json.dumps({name: value for name, value in whole.items() if name not in ("base", "ranks")}))
    with pytest.raises(InputError, match="jaxpeft.json: lacks ranks, base; remove it"):
        import_adapter(tmp_path / "adapter", model.config)
    site = min(whole["ranks"])
    for change, said in (
        ({"ranks": {**whole["ranks"], site: 10**6}}, f"ranks: {site} has 1000000, above the smaller side"),
        ({"ranks": {site: -1}}, f"ranks.{site} -1 should be at least 1"),
        ({"method": [["lora", {"rank": "2"}]]}, "method lora: rank '2' should be a whole number"),
        ({"method": [["lora", {"ranks": 2}]]}, "method lora: .* unexpected keyword argument 'ranks'"),
        ({"method": "lora"}, 'method "lora" should be a list'),
        ({"method": []}, "method .. should be at least 1 long"),
        ({"base": {"sizes": {}}}, "lacks base.samples"),
        ({"spec": 7}, "spec 7 is none of its 1 methods, which are numbered from 0"),
    ):
        own.write_text(json.dumps({**whole, **change}))
        with pytest.raises(InputError, match=said) as error:
            import_adapter(tmp_path / "adapter", model.config)
        assert "\n" not in str(error.value)


def test_pissa_of_pefts_converted_for_the_original_base(base, tmp_path):
    config = peft.LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["q_proj"], init_lora_weights="pissa")
    theirs = peft.get_peft_model(reference.torch_base(base), config)
    theirs.peft_config["default"].init_lora_weights = True
    theirs.save_pretrained(tmp_path / "start")
    theirs.peft_config["default"].init_lora_weights = "pissa"
    for name, parameter in theirs.named_parameters():
        if "lora_B" in name:
            parameter.data += 0.1
    theirs.save_pretrained(tmp_path / "pissa", path_initial_model_for_weight_conversion=tmp_path / "start")
    model, params = reference.load(base)
    new, adapted, _ = attach(tmp_path / "pissa", model, params)
    reference.assert_close(reference.logits(new, adapted), reference.torch_logits(theirs.eval()))


def test_a_merged_model_is_what_transformers_computes(base, tmp_path):
    from jaxpeft import hf

    model, params = reference.load(base)
    method = jp.lora(rank=4, alpha=8, targets="all-linear")
    new, trainable, frozen = jp.setup(method, model, params, jax.random.key(0))
    adapted = tree.combine(reference.randomise(trainable), frozen)
    hf.save_pretrained(tmp_path / "merged", base, method.merge(adapted))
    merged = reference.torch_logits(reference.torch_base(tmp_path / "merged"))
    reference.assert_close(reference.logits(new, adapted), merged)


def test_an_alpha_of_zero_adds_nothing(copy, base):
    config = json.loads((copy / "adapter_config.json").read_text())
    (copy / "adapter_config.json").write_text(json.dumps({**config, "lora_alpha": 0}))
    model, params = reference.load(base)
    adapted, both, _ = attach(copy, model, params)
    batch = {"tokens": reference.TOKENS}
    np.testing.assert_array_equal(adapted.apply(both, batch), model.apply(params, batch))


def _narrower(array):
    """A matrix of a column less."""
    return np.ascontiguousarray(array[..., :-1])


@pytest.mark.parametrize(
    ("method", "name", "change", "reason"),
    [
        (
            jp.prompt(3),
            "prompt_embeddings",
            _narrower,
            r"prompt/embedding has shape \(3, 31\), where prompt .* has \(3, 32\)",
        ),
        (
            jp.speft(0.1),
            "layers/mlp/up_proj/speft/index",
            lambda x: x + 10**6,
            "index holds 10.*, where speft has 0 to",
        ),
        (
            jp.spiel(0.1),
            "layers/mlp/up_proj/spiel/candidates",
            lambda x: x - 1,
            "holds -1, where spiel has 0 to 1791 on",
        ),
        (
            jp.paca(2),
            "layers/mlp/up_proj/paca/index",
            lambda x: x * 0 + 32,
            "holds 32, where paca has 0 to 31 on such a",
        ),
        (
            jp.welore(0.5, 0.3),
            "layers/self_attn/q_proj/welore/u",
            None,
            r"q_proj has factors \(\) and \(\d, \d+, 32\), ",
        ),
        (
            jp.welore(0.5, 0.3),
            "layers/self_attn/q_proj/welore/u",
            lambda x: x.astype(np.int32),
            "u is int32, where welore",
        ),
    ],
    ids=["prompt", "speft", "spiel", "paca", "a factor less", "a factor of integers"],
)
def test_what_our_own_file_vouches_for_must_fit_too(method, name, change, reason, base, tmp_path):
    """Tensors of another shape, type or range, or fewer, whose hash jaxpeft.json has."""
    from safetensors.numpy import load_file, save_file

    model, params = reference.load(base)
    _, trainable, rest = jp.setup(method, model, params, jax.random.key(0), batches=lambda: ())
    export_adapter(tmp_path / "adapter", tree.combine(trainable, rest), method, model.config, base)
    tensors = load_file(tmp_path / "adapter" / TENSORS)
    changed = {key: array for key, array in tensors.items() if key != name}
    assert len(changed) < len(tensors)
    save_file(changed if change is None else {**changed, name: change(tensors[name])}, tmp_path / "adapter" / TENSORS)
    own = json.loads((tmp_path / "adapter" / "jaxpeft.json").read_text())
    own["sha256"] = hashlib.sha256((tmp_path / "adapter" / TENSORS).read_bytes()).hexdigest()
    (tmp_path / "adapter" / "jaxpeft.json").write_text(json.dumps(own))
    with pytest.raises(InputError, match=reason):
        import_adapter(tmp_path / "adapter", model.config)
