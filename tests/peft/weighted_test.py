"""Weighted merging of adapters: what peft's add_weighted_adapter computes, for each of its types."""

import json
import shutil
import typing

import jax
import numpy as np
import peft
import pytest
import torch

import jaxpeft as jp
from jaxpeft import cli, template, tree
from jaxpeft.cli.combine import Combine
from jaxpeft.errors import InputError
from jaxpeft.peft import attach, twister, weighted
from tests.peft import reference

WEIGHTS = (0.7, -0.4, 1.3)
NAMES = ("a", "b", "c")
SAME = {"r": 3, "target_modules": ["q_proj", "up_proj"]}
SETTINGS = {  # of the same ranks, and of different ranks and sites
    "same": [{**SAME, "lora_alpha": 6}, {**SAME, "lora_alpha": 3}, {**SAME, "use_rslora": True}],
    "differ": [
        {"r": 4, "lora_alpha": 6, "target_modules": ["q_proj", "down_proj"]},
        {"r": 2, "target_modules": ["q_proj"], "use_rslora": True},
        {"r": 3, "rank_pattern": {"up_proj": 5}, "target_modules": ["up_proj", "down_proj"]},
    ],
    "square": [{"r": 3, "target_modules": ["q_proj"]}, {"r": 2, "lora_alpha": 9, "target_modules": ["q_proj"]}],
    "rslora": [
        {"r": 3, "use_rslora": True, "target_modules": ["q_proj"]},
        {"r": 2, "lora_alpha": 5, "use_rslora": True, "target_modules": ["q_proj"]},
    ],
    "one": [{"r": 3, "target_modules": ["up_proj"]}, {"r": 3, "lora_alpha": 9, "target_modules": ["up_proj"]}],
}
CASES = [
    ("same", {"combination_type": "linear"}),
    ("same", {"combination_type": "ties", "density": 0.4}),
    ("same", {"combination_type": "ties", "density": 0.6, "majority_sign_method": "frequency"}),
    ("same", {"combination_type": "magnitude_prune", "density": 0.5}),
    ("differ", {"combination_type": "cat"}),
    ("differ", {"combination_type": "svd"}),
    ("differ", {"combination_type": "svd", "svd_rank": 7}),
    ("square", {"combination_type": "svd", "svd_rank": 2, "svd_clamp": 0.9}),
    ("differ", {"combination_type": "ties_svd", "density": 0.3}),
    ("differ", {"combination_type": "magnitude_prune_svd", "density": 0.7, "svd_rank": 6}),
    ("one", {"combination_type": "dare_linear", "density": 0.6}),
    ("one", {"combination_type": "dare_ties", "density": 0.8, "majority_sign_method": "frequency"}),
    ("one", {"combination_type": "dare_linear_svd", "density": 0.5}),
    ("one", {"combination_type": "dare_ties_svd", "density": 0.7}),
    ("same", {"combination_type": "dare_linear", "density": 1.0}),
]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return reference.write_base(tmp_path_factory.mktemp("base") / "llama")


@pytest.fixture(scope="module")
def made(base, tmp_path_factory):
    """settings -> (folders, peft's model with all of them)."""
    folder, found = tmp_path_factory.mktemp("adapters"), {}
    for kind, settings in SETTINGS.items():
        names = NAMES[: len(settings)]
        for seed, (name, own) in enumerate(zip(names, settings, strict=True)):
            model = reference.make_peft(base, **own)
            generator = torch.Generator().manual_seed(seed)
            for path, parameter in model.named_parameters():
                if ".lora_" in path:
                    parameter.data = 0.2 * torch.randn(parameter.shape, generator=generator)
            model.save_pretrained(folder / kind / name)
        folders = [folder / kind / name for name in names]
        theirs = peft.PeftModel.from_pretrained(reference.torch_base(base), folders[0], adapter_name=names[0])
        for name, own in zip(names[1:], folders[1:], strict=True):
            theirs.load_adapter(own, adapter_name=name)
        found[kind] = folders, theirs
    return found


def of_peft(theirs, names, weights, settings):
    """{module: what the combined adapter adds to its kernel, (m, n)}, drawn from seed 11."""
    inject = theirs.base_model.inject_adapter

    def then_seed(*args, **kwargs):
        inject(*args, **kwargs)
        torch.manual_seed(11)

    theirs.base_model.inject_adapter = then_seed
    try:
        theirs.add_weighted_adapter(list(names), list(weights), "mixed", **settings)
    finally:
        del theirs.base_model.inject_adapter
    found = {}
    for name, module in theirs.base_model.model.named_modules():
        if isinstance(module, peft.tuners.lora.LoraLayer) and "mixed" in module.lora_A:
            found[name] = module.get_delta_weight("mixed").detach().numpy()
    theirs.delete_adapter("mixed")
    return found


def of_folder(folder):
    """The same of an adapter in PEFT's form."""
    from safetensors.numpy import load_file

    tensors = load_file(folder / "adapter_model.safetensors")
    fields = json.loads((folder / "adapter_config.json").read_text())
    found = {}
    for key, a in tensors.items():
        if ".lora_A." in key:
            name = key.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
            alphas = [x for pattern, x in fields["alpha_pattern"].items() if name.endswith(pattern)]
            scale = (alphas[0] if alphas else fields["lora_alpha"]) / len(a)
            found[name] = scale * tensors[key.replace("lora_A", "lora_B")] @ a
    return found


@pytest.mark.parametrize(("kind", "settings"), CASES, ids=["-".join(map(str, x.values())) for _, x in CASES])
def test_what_peft_computes(kind, settings, base, made, tmp_path):
    folders, theirs = made[kind]
    names, weights = NAMES[: len(folders)], WEIGHTS[: len(folders)]
    expected = of_peft(theirs, names, weights, settings)
    model, params = reference.load(base)
    method, leaves = jp.weighted_adapter(folders, weights, model, params, **settings, seed=11)
    whole = tree.unflatten({**tree.flatten(params), **leaves})
    jp.export_adapter(tmp_path / "mixed", whole, method, model.config, base)
    found = of_folder(tmp_path / "mixed")
    assert found.keys() == expected.keys()
    for name, delta in expected.items():
        np.testing.assert_allclose(found[name], delta, rtol=1e-3, atol=1e-4 * np.abs(delta).max(), err_msg=name)


def test_a_sum_of_rslora_is_exact_and_pefts_is_not(base, made):
    """PEFT's combined adapter is of rsLoRA's too, with alpha = r: of a scale of sqrt(r), which the sum has not."""
    folders, theirs = made["rslora"]
    model, params = reference.load(base)
    method, leaves = jp.weighted_adapter(folders, WEIGHTS[:2], model, params, combination_type="cat")
    merged = tree.flatten(method.merge(tree.unflatten({**tree.flatten(params), **leaves})))
    site = "layers/self_attn/q_proj/kernel"
    mixed = of_peft(theirs, NAMES[:2], WEIGHTS[:2], {"combination_type": "cat"})
    for layer in range(2):
        name = f"model.layers.{layer}.self_attn.q_proj"
        module = theirs.base_model.model.get_submodule(name)
        deltas = [module.get_delta_weight(own).detach().numpy() for own in NAMES[:2]]
        expected = sum(weight * delta for weight, delta in zip(WEIGHTS[:2], deltas, strict=True))
        found = (merged[site] - tree.flatten(params)[site])[layer].T
        np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-5)
        np.testing.assert_allclose(mixed[name], np.sqrt(3 + 2) * expected, rtol=1e-3, atol=1e-5)


def test_a_sum_is_exact_and_of_true_ranks(base, made):
    """`cat` adds what the adapters add, and has at each module the sum of the ranks there."""
    folders, _ = made["differ"]
    model, params = reference.load(base)
    method, leaves = jp.weighted_adapter(folders, WEIGHTS, model, params, combination_type="cat")
    shapes = {path: leaf.shape for path, leaf in leaves.items()}
    assert shapes["layers/self_attn/q_proj/lora/a"] == (2, 32, 4 + 2)
    assert shapes["layers/mlp/up_proj/lora/a"] == (2, 32, 5) and shapes["layers/mlp/down_proj/lora/b"] == (2, 7, 32)
    merged = method.merge(tree.unflatten({**tree.flatten(params), **leaves}))
    summed = tree.flatten(params)
    for folder, weight in zip(folders, WEIGHTS, strict=True):
        _, adapted, of = attach(folder, model, params)
        for path, leaf in tree.flatten(of.merge(adapted)).items():
            summed = {**summed, path: summed[path] + weight * (leaf - tree.flatten(params)[path])}
    for path, leaf in tree.flatten(merged).items():
        np.testing.assert_allclose(leaf, summed[path], rtol=1e-4, atol=1e-5)


def test_draws_are_torchs():
    torch.manual_seed(3)
    theirs = torch.bernoulli(torch.full((70, 300), 0.37)).numpy()
    np.testing.assert_array_equal(twister.uniform(twister.seeded(3), (70, 300)) < np.float32(0.37), theirs)


def test_a_combination_on_the_command_line(base, made, tmp_path, capsys):
    """Two adapters become one folder that peft reads, and `merge` folds in."""
    folders, theirs = made["one"]
    flags = ["combine", "--model", base, *(word for folder in folders for word in ("--adapter", folder))]
    flags += ["--weights=-0.5,2", "--combination", "dare_ties_svd", "--density", 0.7, "--seed", 11]
    assert cli.main([*map(str, flags), "--out", str(tmp_path / "mixed"), "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["weights"] == [-0.5, 2] and document["out"] == str(tmp_path / "mixed")
    settings = {"combination_type": "dare_ties_svd", "density": 0.7}
    expected = of_peft(theirs, NAMES[:2], (-0.5, 2), settings)
    for name, delta in of_folder(tmp_path / "mixed").items():
        np.testing.assert_allclose(delta, expected[name], rtol=1e-3, atol=1e-4)
    ours = reference.logits(*attach(tmp_path / "mixed", *reference.load(base))[:2])
    reference.assert_close(ours, reference.with_adapter(base, tmp_path / "mixed"))


@pytest.mark.parametrize(
    ("kind", "flags", "reason"),
    [
        ("same", ["--weights", "1,1"], "2 weights for 3 adapters"),
        ("same", ["--weights", "1,x,1"], "--weights 1,x,1: 'x' should be a number"),
        ("same", ["--weights", "1,1,nan"], "the weight nan should be a finite number"),
        ("same", ["--weights", "1e39,1,1"], "up_proj: becomes infinite or no number with weights 1e+39"),
        ("same", ["--combination", "linear", "--weights", "1e300,1,1"], "becomes infinite or no number"),
        ("same", ["--combination", "ties"], "ties: needs a density"),
        ("same", ["--combination", "ties", "--density", "1.5"], "density 1.5 should be above 0 and at most 1"),
        ("same", ["--density", "0.5"], "svd: has no density"),
        ("same", ["--combination", "linear", "--svd-rank", "2"], "svd_rank 2: belongs to the types with an SVD"),
        ("same", ["--svd-rank", "0"], "svd_rank 0 should be at least 1"),
        ("same", ["--svd-clamp", "2"], "svd_clamp 2.0 should be a quantile"),
        ("same", ["--combination", "mean"], "mean"),
        ("differ", ["--combination", "linear"], "down_proj has ranks 4 and 3, which must be the same; use cat or svd"),
        ("none", [], "--adapter"),
    ],
)
def test_mistakes(kind, flags, reason, base, made, tmp_path, capsys):
    folders = made[kind][0] if kind in made else []
    given = [word for folder in folders for word in ("--adapter", str(folder))]
    assert cli.main(["combine", "--model", str(base), *given, *flags, "--out", str(tmp_path / "out")]) == 2
    out, err = capsys.readouterr()
    assert out == "" and reason in err and err.count("\n") == 1 and not (tmp_path / "out").exists()


def test_a_result_keeps_the_first_template(base, made, tmp_path, capsys):
    """Which is said where the others were trained through another one; the day alone is no difference."""
    folders = []
    for number, (kind, day) in enumerate([("chat", "2026-01-31"), ("chat", "2026-02-01"), ("alpaca", "2026-02-01")]):
        folder = shutil.copytree(made["one"][0][0], tmp_path / str(number))
        for name, text in template.Template(kind, day).beside().items():
            (folder / name).write_text(text)
        folders.append(str(folder))
    for chosen, notes in ((folders[:2], 0), (folders[1:], 1)):
        given = [word for folder in chosen for word in ("--adapter", folder)]
        assert cli.main(["combine", "--model", str(base), *given, "--out", str(tmp_path / f"out{notes}")]) == 0
        assert capsys.readouterr().err.count("was trained through another template") == notes
        assert template.find(tmp_path / f"out{notes}").kind == "chat"


@pytest.mark.parametrize("first", [True, False])
def test_of_an_adapter_without_a_template_nothing_is_claimed(first, base, made, tmp_path, capsys):
    """One of PEFT's own may have been trained through the same; where it is the first, the result has none."""
    plain = made["one"][0][1]
    named = shutil.copytree(made["one"][0][0], tmp_path / "named")
    for name, text in template.Template("chat", "2026-01-31").beside().items():
        (named / name).write_text(text)
    chosen = (named, plain) if first else (plain, named)
    given = [word for folder in chosen for word in ("--adapter", str(folder))]
    assert cli.main(["combine", "--model", str(base), *given, "--out", str(tmp_path / "out")]) == 0
    said = f"{named} was trained through a template; {plain} names none, and so the result has none"
    err = capsys.readouterr().err
    assert "another template" not in err and (said in err) != first
    assert (template.find(tmp_path / "out") is not None) == first


def test_bases_in_other_codes_are_said(base, tmp_path, capsys):
    """The result is exact for the base as it was, and the adapters were trained beside another."""
    model, params = reference.load(base)
    methods = {
        "plain": jp.lora(rank=2),
        "nf4": jp.chain(jp.quantize("nf4", group=8), jp.lora(rank=2)),
        "nf4 too": jp.chain(jp.quantize("nf4", group=8), jp.lora(rank=3)),
        "nf4 of 4": jp.chain(jp.quantize("nf4", group=4), jp.lora(rank=2)),
    }
    for name, method in methods.items():
        _, trainable, rest = jp.setup(method, model, params, jax.random.key(0))
        whole = tree.combine(reference.randomise(trainable), rest)
        jp.export_adapter(tmp_path / name, whole, method, model.config, base)
    for names, said in (
        (("nf4", "nf4 too"), ""),
        (("nf4", "plain"), "plain names no codes, and {0} a base in codes of nf4, as"),
        (("plain", "nf4"), "nf4 names a base in codes of nf4, and {0} no codes, as"),
        (("nf4", "nf4 of 4"), "nf4 of 4 names a base in codes of nf4 of another kind, and {0} a base in codes of nf4"),
    ):
        given = [word for name in names for word in ("--adapter", str(tmp_path / name))]
        out = ["--out", str(tmp_path / "out" / "-".join(names))]
        assert cli.main(["combine", "--model", str(base), *given, *out]) == 0
        err = capsys.readouterr().err
        assert said.format(tmp_path / names[0]) in err and ("trained beside" in err) == bool(said)


def test_adapters_that_are_not_combined(base, made, tmp_path):
    model, params = reference.load(base)
    method = jp.dora(rank=2)
    _, trainable, rest = jp.setup(method, model, params, jax.random.key(0))
    whole = tree.combine(reference.randomise(trainable), rest)
    jp.export_adapter(tmp_path / "dora", whole, method, model.config, base)
    with pytest.raises(InputError, match="is of dora; several at once are LoRA's kind"):
        jp.weighted_adapter([tmp_path / "dora"], [1], model, params)
    other = reference.load(reference.write_base(tmp_path / "other", hidden_size=64))
    with pytest.raises(InputError, match="another base"):
        jp.weighted_adapter(made["same"][0], WEIGHTS, *other)


def test_the_command_takes_what_the_function_takes():
    """It names them itself, as its help must not wait for JAX."""
    fields = typing.get_type_hints(Combine)
    assert set(typing.get_args(fields["combination"])) == set(typing.get_args(weighted.Combination))
    assert fields["majority_sign"] == weighted.MajoritySign
