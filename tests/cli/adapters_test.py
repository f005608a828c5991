"""generate, merge, import and export: what they print and leave, and that a mistake leaves nothing."""

import json
import shutil
from types import SimpleNamespace

import jax
import numpy as np
import peft
import pytest
import tokenizers
import torch
import transformers

import jaxpeft as jp
from jaxpeft import cli, files, tree
from jaxpeft.cli import export
from jaxpeft.gguf import read_header
from jaxpeft.peft import attach, import_adapter
from jaxpeft.train import begin, result
from tests import runs
from tests.peft import reference

WORDS = ["<s>", "</s>", "<unk>", *(f"w{i}" for i in range(94))]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A checkpoint with a tokenizer whose tokens are words."""
    folder = reference.write_base(tmp_path_factory.mktemp("base") / "llama", bos_token_id=0, eos_token_id=1)
    tokenizer = tokenizers.Tokenizer(
        tokenizers.models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>")
    )
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    special = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def adapter(base, tmp_path_factory):
    """An adapter that PEFT made."""
    folder = tmp_path_factory.mktemp("adapter")
    reference.make_peft(base, r=4, lora_alpha=16, target_modules=["q_proj", "up_proj"]).save_pretrained(folder)
    return folder


def succeeds(capsys, *argv) -> dict:
    assert cli.main([*map(str, argv), "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def fails(capsys, *argv) -> str:
    """The one line on stderr of a command that exits with status 2."""
    capsys.readouterr()
    assert cli.main([str(word) for word in argv]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("jaxpeft: error: ") and err.count("\n") == 1
    return err


def test_generate_continues_a_prompt_as_transformers_does(base, adapter, capsys):
    import peft

    flags = ["generate", "--model", base, "--prompt", "w5 w6", "--max-new-tokens", 9]
    plain, adapted = succeeds(capsys, *flags), succeeds(capsys, *flags, "--adapter", adapter)
    models = [reference.torch_base(base), peft.PeftModel.from_pretrained(reference.torch_base(base), adapter)]
    for document, model in zip((plain, adapted), models, strict=True):
        ids = model.generate(torch.tensor([[8, 9]]), max_new_tokens=9, do_sample=False, pad_token_id=1)[0, 2:].tolist()
        assert document["tokens"] == [token for token in ids if token != 1]
        assert document["continuation"].split() == [WORDS[token] for token in document["tokens"] if token > 2]
    assert plain["tokens"] != adapted["tokens"]

    assert cli.main([*map(str, flags)]) == 0
    assert capsys.readouterr().out == f"w5 w6{plain['continuation']}\n"


def test_generate_draws_by_its_seed(base, capsys):
    flags = ["generate", "--model", base, "--prompt", "w1", "--temperature", 3, "--top-k", 50, "--top-p", 0.99]
    first, other = (succeeds(capsys, *flags, "--seed", seed)["tokens"] for seed in (1, 2))
    assert first != other


def test_generate_begins_an_empty_prompt_with_the_token_that_begins_a_text(base, capsys):
    document = succeeds(capsys, "generate", "--model", base, "--prompt", "", "--max-new-tokens", 3)
    assert document["prompt"] == "" and len(document["tokens"]) <= 3


def test_merge_writes_what_the_adapted_model_computes(base, adapter, tmp_path, capsys):
    out = tmp_path / "merged"
    document = succeeds(capsys, "merge", "--model", base, "--adapter", adapter, "--out", out)
    assert document == {"out": str(out), "model": str(base), "adapter": str(adapter), "dtype": "float32"}
    reference.assert_close(reference.torch_logits(reference.torch_base(out)), reference.with_adapter(base, adapter))
    assert (out / "tokenizer.json").is_file()


@pytest.fixture(scope="module")
def mixed(base, tmp_path_factory):
    """(The checkpoint with tensors of every type in turn, {name: tensor}); float64 has digits beyond float32."""
    from safetensors.torch import load_file, save_file

    folder = shutil.copytree(base, tmp_path_factory.mktemp("mixed") / "llama")
    types = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
    tensors = load_file(folder / "model.safetensors")
    tensors = {name: tensors[name].to(types[i % 4]) for i, name in enumerate(sorted(tensors))}
    tensors = {name: x + 1e-9 if x.dtype == torch.float64 else x for name, x in tensors.items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder, tensors


def same_but(written, tensors, touched):
    """The tensors of a checkpoint have their types, and but for those whose names end so their bits."""
    from safetensors.torch import load_file

    found = load_file(written / "model.safetensors")
    assert {name: x.dtype for name, x in found.items()} == {name: x.dtype for name, x in tensors.items()}
    changed = {name for name in found if not torch.equal(found[name], tensors[name])}
    assert changed == {name for name in tensors if name.endswith(touched)}
    return found


def test_merge_keeps_the_types_that_tensors_are_stored_in(mixed, base, adapter, tmp_path, capsys):
    folder, tensors = mixed
    document = succeeds(capsys, "merge", "--model", folder, "--adapter", adapter, "--out", tmp_path / "merged")
    assert sorted(document["dtype"].split(", ")) == ["bfloat16", "float16", "float32", "float64"]
    found = same_but(tmp_path / "merged", tensors, ("q_proj.weight", "up_proj.weight"))
    import peft

    plain = reference.torch_base(folder)
    wide = peft.PeftModel.from_pretrained(plain, adapter).merge_and_unload().state_dict()
    for name, x in found.items():
        torch.testing.assert_close(x, wide[name].to(x.dtype), rtol=2**-8, atol=2**-8)
    assert json.loads((tmp_path / "merged" / "config.json").read_text())["dtype"] == "float32"  # as it said before


def test_a_whole_model_keeps_the_types_that_tensors_are_stored_in(mixed, tmp_path):
    folder, tensors = mixed
    model, params = jp.load_pretrained(folder)
    method = jp.full(which="v_proj")
    _, trainable, frozen = jp.setup(method, model, params, jax.random.key(0))
    changed = tree.combine({path: leaf + 1 for path, leaf in trainable.items()}, frozen)
    where = (tmp_path / "adapter", tmp_path / "model")
    result.write(where, method, changed, tree.flatten(params), model.config, folder)
    same_but(tmp_path / "model", tensors, ("v_proj.weight",))


def test_import_writes_an_adapter_of_ours(base, adapter, tmp_path, capsys):
    out = tmp_path / "ours"
    document = succeeds(capsys, "import", "--model", base, "--adapter", adapter, "--out", out)
    assert document["sites"] == ["layers/mlp/up_proj", "layers/self_attn/q_proj"]
    assert document["trainable_parameters"] == 2 * 4 * (32 + 32 + 32 + 56)
    assert [name for name, _ in document["method"]] == ["lora"]
    reference.assert_close(reference.with_adapter(base, out), reference.with_adapter(base, adapter))
    model, params = reference.load(base)
    for path, leaf in import_adapter(adapter, model.config)[1].items():
        np.testing.assert_array_equal(leaf, import_adapter(out, model.config, params)[1][path])


@pytest.fixture(scope="module", params=[{"name": "lora_fa", "store_a": False}, {"name": "lora", "init": "pissa"}])
def run(request, base, tmp_path_factory):
    out, settings = tmp_path_factory.mktemp("run"), dict(request.param)
    return write_run(out, getattr(jp, settings.pop("name"))(rank=3, targets="attention", **settings), base)


def write_run(out, method, base):
    """A run's folder as `jaxpeft train` leaves it, with checkpoints of steps 2 and 4, the first being better."""
    import optax

    from jaxpeft.checkpoint import Checkpoints, not_in_base
    from jaxpeft.train import config

    model, params = reference.load(base)
    new, trainable, frozen = jp.setup(method, model, params, jax.random.key(0))
    flat = tree.flatten(params)
    document = {
        "arguments": {"model": str(base), "dtype": "float32"},
        "method": [[spec.name, spec.config] for spec in method.specs],
        "content": {"model": config.digest(flat)},
    }
    files.write_json(out / config.FILE, document)
    expected = {}
    with Checkpoints(out / "checkpoints") as checkpoints:
        checkpoints.save_frozen(not_in_base(frozen, flat))
        for step, loss in ((2, 1.0), (4, 1.5)):
            leaves = reference.randomise(trainable, step)
            state = jp.init_state(method, optax.adam(1e-3), leaves, frozen, jax.random.key(0))
            checkpoints.save(state._replace(step=jax.numpy.asarray(step)), {"eval_loss": loss})
            expected[step] = tree.combine(leaves, frozen)
    return SimpleNamespace(out=out, model=new, params=expected)


@pytest.mark.parametrize(("flags", "step"), [([], 4), (["--best"], 2), (["--step", 2], 2)])
def test_export_writes_the_adapter_of_a_checkpoint(flags, step, run, base, tmp_path, capsys):
    before = sorted(run.out.rglob("*"))
    document = succeeds(capsys, "export", "--run", run.out, "--out", tmp_path / "adapter", *flags)
    assert document["step"] == step and document["form"] == "peft"
    _, restored, _ = attach(tmp_path / "adapter", *reference.load(base))
    for path, leaf in tree.flatten(run.params[step]).items():
        np.testing.assert_array_equal(leaf, tree.flatten(restored)[path], err_msg=path)
    theirs = reference.with_adapter(base, tmp_path / "adapter")
    reference.assert_close(reference.logits(run.model, run.params[step]), theirs)
    assert sorted(run.out.rglob("*")) == before


@pytest.mark.parametrize(
    ("method", "form", "why"),
    [
        (jp.miss(2), "", "not peft_type MISS; `jaxpeft merge --out NAME.gguf` instead"),
        (jp.houlsby(2), " in jaxpeft's own form, which PEFT does not read", "not peft_type JAXPEFT"),
    ],
    ids=["miss", "houlsby"],
)
def test_export_says_which_form_it_wrote_and_why_not_gguf(method, form, why, base, tmp_path, capsys):
    (out := tmp_path / "run").mkdir()
    model, params = reference.load(base)
    write_run(out, method, base)
    assert cli.main(["export", "--run", str(out), "--out", str(tmp_path / "x")]) == 0
    assert capsys.readouterr().out == f"{tmp_path / 'x'}: {out} at step 4{form}\n"
    attach(tmp_path / "x", model, params)
    gguf = tmp_path / "x.gguf"
    said = fails(capsys, "export", "--run", out, "--out", gguf)
    assert said == f"jaxpeft: error: --out {gguf}: llama.cpp applies LoRA alone, {why}\n"


def test_export_writes_a_lora_for_llama_cpp(run, base, tmp_path, capsys):
    """alpha / rank B A is what PEFT adds to the kernel of v, whose rows have the same order in both."""
    for out in ("peft", "lora.gguf"):
        succeeds(capsys, "export", "--run", run.out, "--out", tmp_path / out)
    header = read_header(tmp_path / "lora.gguf")
    a, b = (header.tensors[f"blk.1.attn_v.weight.lora_{x}"].read() for x in "ab")
    added = header.fields["adapter.lora.alpha"] / a.shape[0] * b @ a
    name = "model.layers.1.self_attn.v_proj.weight"
    theirs = peft.PeftModel.from_pretrained(reference.torch_base(base), tmp_path / "peft").merge_and_unload()
    before, after = (model.state_dict()[name].numpy() for model in (reference.torch_base(base), theirs))
    np.testing.assert_allclose(before + added, after, atol=1e-5)


def test_mistakes_in_writing_gguf(base, adapter, capsys, tmp_path):
    flags = ["merge", "--model", base, "--adapter", adapter]
    assert "'WordLevel' has no GGUF form" in fails(capsys, *flags, "--out", tmp_path / "x.gguf")
    assert "should end in .gguf" in fails(capsys, *flags, "--out", tmp_path / "x", "--format", "gguf")
    assert "belongs to --format gguf" in fails(capsys, *flags, "--out", tmp_path / "x", "--gguf-type", "q8_0")
    (tmp_path / "there.gguf").write_text("work")
    assert "there.gguf: exists" in fails(capsys, *flags, "--out", tmp_path / "there.gguf")
    assert [path.name for path in tmp_path.iterdir()] == ["there.gguf"]


def test_mistakes_in_generate(base, adapter, capsys, tmp_path):
    flags = ["generate", "--model", base, "--prompt", "w1"]
    assert "no such directory" in fails(capsys, "generate", "--model", tmp_path / "no", "--prompt", "w1")
    assert "--adapter" in fails(capsys, *flags, "--adapter", tmp_path / "no")
    assert "no adapter_config.json" in fails(capsys, *flags, "--adapter", base)
    assert "--prompt" in fails(capsys, "generate", "--model", base)
    assert "max_new_tokens 0" in fails(capsys, *flags, "--max-new-tokens", 0)
    assert "--top-k 3" in fails(capsys, *flags, "--top-k", 3)
    assert "top_p 2.0" in fails(capsys, *flags, "--temperature", 1, "--top-p", 2)
    assert "--seed -1" in fails(capsys, *flags, "--seed", -1)
    long = " ".join(["w1"] * 64)
    assert "has 64 tokens; the model has room for 64" in fails(capsys, "generate", "--model", base, "--prompt", long)
    other = reference.write_base(tmp_path / "other", hidden_size=64)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (other / name).write_bytes((base / name).read_bytes())
    assert "another base" in fails(capsys, "generate", "--model", other, "--prompt", "w1", "--adapter", adapter)


@pytest.mark.parametrize("command", ["merge", "import"])
def test_mistakes_in_merge_and_import(command, base, adapter, capsys, tmp_path):
    flags = [command, "--model", base, "--adapter", adapter]
    assert "--out" in fails(capsys, *flags)
    assert "--adapter" in fails(capsys, command, "--model", base, "--out", tmp_path / "out")
    out = tmp_path / "kept"
    out.mkdir()
    (out / "earlier.txt").write_text("work")
    assert "is not an empty directory" in fails(capsys, *flags, "--out", out)
    assert "is a file" in fails(capsys, *flags, "--out", out / "earlier.txt")
    assert "no such directory" in fails(
        capsys, command, "--adapter", tmp_path / "no", "--model", base, "--out", tmp_path / "x"
    )
    other = reference.write_base(tmp_path / "other", hidden_size=64)
    assert "another base" in fails(capsys, command, "--model", other, "--adapter", adapter, "--out", tmp_path / "x")
    assert [path.name for path in out.iterdir()] == ["earlier.txt"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["kept", "other"]


def test_mistakes_in_export(run, base, capsys, tmp_path):
    flags = ["export", "--run", run.out, "--out", tmp_path / "x"]
    assert "holds no run" in fails(capsys, "export", "--run", tmp_path, "--out", tmp_path / "x")
    assert "--step 3" in fails(capsys, *flags, "--step", 3)
    assert "give one of them" in fails(capsys, *flags, "--step", 2, "--best")
    other = reference.write_base(tmp_path / "other", seed=4)
    assert "is not the base of the run" in fails(capsys, *flags, "--model", other)
    (tmp_path / "young").mkdir()
    (tmp_path / "young" / "config.json").write_text((run.out / "config.json").read_text())
    assert "no checkpoint yet" in fails(capsys, "export", "--run", tmp_path / "young", "--out", tmp_path / "x")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["other", "young"]


@pytest.mark.parametrize(
    ("method", "options"), [("full", ("which=last:1",)), ("lisa", ("count=1",))], ids=["last:1", "lisa"]
)
def test_export_of_a_run_that_trained_the_base_itself(method, options, capsys, tmp_path):
    """The last checkpoint comes out as the whole model that the run has written."""
    made = runs.make_files(tmp_path / "files")
    settings = {"rank": None, "method_options": options, "steps": 2, "samples": 0, "eval_every": 0}
    args = runs.arguments(made, tmp_path / "run", method=method, **settings)
    begin.train(args)
    assert succeeds(capsys, "export", "--run", args.out, "--out", tmp_path / "x")["form"] == "model"
    name = "model.safetensors"
    assert (tmp_path / "x" / name).read_bytes() == (args.out / "model" / name).read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("mezo", ("seeds=2",)),
        pytest.param("sparse_mezo", (), marks=pytest.mark.slow),
        pytest.param("quantize+qzo", ("format=int8", "group=8"), marks=pytest.mark.slow),
        pytest.param("zo2", (), marks=pytest.mark.slow),
    ],
    ids=["mezo", "sparse_mezo", "qzo", "zo2"],
)
def test_export_takes_the_steps_again_without_a_checkpoint(method, options, capsys, tmp_path):
    """From the base, config.json and metrics.jsonl alone: the run's own result, bit for bit."""
    made = runs.make_files(tmp_path / "files")
    settings = {"rank": None, "method_options": options, "steps": 3, "samples": 0, "eval_every": 0, "lr": 1e-3}
    args = runs.arguments(made, tmp_path / "run", method=method, **settings)
    begin.train(args)
    shutil.rmtree(args.out / "checkpoints")
    assert cli.main(["export", "--run", str(args.out), "--out", str(tmp_path / "x"), "--replay"]) == 0
    capsys.readouterr()
    (name,) = {path.name for path in (tmp_path / "x").iterdir() if path.suffix == ".safetensors"}
    result = args.out / ("adapter" if name.startswith("adapter") else "model") / name
    assert (tmp_path / "x" / name).read_bytes() == result.read_bytes()
    replay = ("export", "--run", args.out, "--out", tmp_path / "y", "--replay")
    assert "has no row of step 4; it has 3 steps" in fails(capsys, *replay, "--step", 4)
    assert "--best: chooses a checkpoint" in fails(capsys, *replay, "--best")


def test_a_log_that_was_cut_is_not_taken_for_the_whole_run(tmp_path):
    """Of the run's steps those that the newest checkpoint or the report know of."""
    rows = [{"step": step, "split": "train", "loss": 1.0, "lr": 0.1, "slope": 2.0} for step in (1, 2, 3)]
    told = lambda step=None: [row["step"] for row in export.told_steps(tmp_path, step, False)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert told() == [1, 2, 3] and told(2) == [1, 2]
    (tmp_path / "checkpoints" / "3").mkdir(parents=True)
    assert told() == [1, 2, 3]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows[:2]))
    with pytest.raises(jp.InputError, match=r"metrics.jsonl tells of 2 of the run's 3 steps; name one of them with"):
        told()
    assert told(2) == [1, 2]
