"""generate and chat with several adapters by name: each row as with its adapter alone, and as peft computes it."""

import io
import json

import jax
import numpy as np
import pytest

import jaxpeft as jp
from jaxpeft import adapters, cli, hf, tree
from jaxpeft import generate as decoding
from jaxpeft.errors import InputError
from tests import runs
from tests.peft import reference

CHAT = (
    "{{ bos_token }}{% for m in messages %}{{ m.role[0] + '=' + m.content }}</s>{% endfor %}"
    "{% if add_generation_prompt %}a={% endif %}"
)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return reference.write_base(tmp_path_factory.mktemp("base") / "llama")


@pytest.fixture(scope="module")
def of_peft(base, tmp_path_factory):
    """{name: folder} of adapters that peft made: LoRA, rsLoRA with patterns, PiSSA converted for the original base."""
    folder = tmp_path_factory.mktemp("of_peft")
    settings = {
        "plain": {"r": 4, "lora_alpha": 16, "target_modules": ["q_proj", "up_proj"]},
        "rs": {"r": 2, "use_rslora": True, "rank_pattern": {"v_proj": 9}, "target_modules": ["v_proj", "down_proj"]},
        "some": {"r": 3, "target_modules": ["o_proj"], "layers_to_transform": [1]},
    }
    for name, own in settings.items():
        reference.make_peft(base, **own).save_pretrained(folder / name)
    return {name: folder / name for name in settings}


def test_rows_of_adapters_that_peft_made(base, of_peft):
    model, params = reference.load(base)
    adapted, whole, found = jp.attach_several(of_peft, model, params)
    names = ["rs", "plain", None, "some"]
    tokens = reference.TOKENS[[0, 0, 0, 0]]
    ours = np.asarray(adapted.apply(whole, {"tokens": tokens, "adapter": adapters.rows(found, names)}))
    for row, name in enumerate(names):
        theirs = reference.torch_logits(reference.torch_base(base), tokens[:1])
        theirs = theirs if name is None else reference.with_adapter(base, of_peft[name])[:1]
        reference.assert_close(ours[row : row + 1], theirs)
    shapes = {path: leaf.shape for path, leaf in tree.flatten(whole).items() if "/several/rs/" in path}
    assert shapes["layers/self_attn/v_proj/several/rs/a"] == (2, 32, 9)
    assert shapes["layers/mlp/down_proj/several/rs/a"] == (2, 56, 2)


@pytest.mark.slow
def test_adapters_of_our_own_kinds(base, tmp_path):
    """PiSSA and a LoRA-FA that keeps a seed are pairs for the original base; LoRA stays what it was, in any company."""
    model, params = reference.load(base)
    methods = {
        "pissa": jp.lora(rank=3, init="pissa", targets="attention"),
        "fa": jp.lora_fa(rank=2, store_a=False),
        "lora": jp.lora(rank=5, dropout=0.1, lr_ratio=16),
        "near": jp.chain(jp.lora(rank=2), jp.ba_lora()),
        "forward": jp.chain(jp.mezo(), jp.lora(rank=2)),
    }
    expected = {}
    for seed, (name, method) in enumerate(methods.items()):
        own, trainable, rest = jp.setup(method, model, params, jax.random.key(0))
        whole = tree.combine(reference.randomise(trainable, seed), rest)
        expected[name] = reference.logits(own, whole)
        jp.export_adapter(tmp_path / name, whole, method, model.config, base)
    adapted, whole, found = jp.attach_several({name: tmp_path / name for name in methods}, model, params)
    assert found["lora"].specs == methods["lora"].specs and found["pissa"].specs[0].config["rank"] == 6
    for name, logits in expected.items():
        batch = {"tokens": reference.TOKENS, "adapter": adapters.rows(found, [name] * 2)}
        reference.assert_close(np.asarray(adapted.apply(whole, batch)), logits)


def test_adapters_that_cannot_share_a_base(base, of_peft, tmp_path):
    model, params = reference.load(base)
    cases = {
        "dora": (jp.dora(rank=2), "'x': .*dora: is of dora; several at once are LoRA's kind"),
        "ia3": (jp.ia3(), "'x': .*is of ia3"),
        "prefix": (jp.prefix(length=2), "'x': .*is of prefix"),
        "quantized": (jp.chain(jp.quantize(), jp.lora(rank=2)), "for one base prepared differently: none and quantize"),
    }
    for name, (method, reason) in cases.items():
        _, trainable, rest = jp.setup(method, model, params, jax.random.key(0))
        whole = tree.combine(reference.randomise(trainable), rest)
        jp.export_adapter(tmp_path / name, whole, method, model.config, base)
        with pytest.raises(InputError, match=reason):
            jp.attach_several({"plain": of_peft["plain"], "x": tmp_path / name}, model, params)
    other = reference.write_base(tmp_path / "other", hidden_size=64)
    with pytest.raises(InputError, match="another base"):
        jp.attach_several(of_peft, *reference.load(other))


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A model that talks, adapters `a` and `b`, and prompts that ask for them."""
    folder = runs.make_files(tmp_path_factory.mktemp("files"))
    (folder / "model" / "chat_template.jinja").write_text(CHAT)
    model, params = hf.load_pretrained(folder / "model", "float32")
    for seed, name, method in ((1, "a", jp.lora(rank=2, alpha=16)), (2, "b", jp.lora(rank=3, targets="mlp", alpha=24))):
        _, trainable, frozen = jp.setup(method, model, params, jax.random.key(0))
        moved = reference.randomise(trainable, seed)
        jp.export_adapter(folder / name, jp.combine(moved, frozen), method, model.config)
    rows = [
        {"prompt": "abc", "adapter": "b"},
        {"prompt": "abc"},
        {"messages": [{"role": "user", "content": "hi"}], "adapter": "none"},
        {"prompt": "abc", "adapter": None},
        {"messages": [{"role": "user", "content": "hi"}], "adapter": "a"},
    ]
    (folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def said(capsys, *argv):
    assert cli.main([*map(str, argv), "--json"]) == 0
    out, err = capsys.readouterr()
    return json.loads(out), err


def several(files):
    return ["--model", files / "model", "--adapter", f"a={files / 'a'}", "--adapter", f"b={files / 'b'}"]


@pytest.mark.slow
def test_prompts_of_a_file_have_their_adapters(files, capsys):
    flags = ["generate", "--max-new-tokens", 6]
    document, _ = said(capsys, *flags, *several(files), "--prompts", files / "prompts.jsonl")
    names = ["b", "a", "none", "none", "a"]
    assert [row["adapter"] for row in document["results"]] == names
    assert document["adapters"] == {"a": str(files / "a"), "b": str(files / "b")}
    alone = ["generate", "--max-new-tokens", 6, "--model", files / "model", "--prompts", files / "prompts.jsonl"]
    for name in ("a", "b", "none"):
        own = [] if name == "none" else ["--adapter", files / name]
        expected, _ = said(capsys, *alone, *own)
        for i in (i for i, other in enumerate(names) if other == name):
            assert document["results"][i]["tokens"] == expected["results"][i]["tokens"]
    assert len({tuple(row["tokens"]) for row in document["results"]}) > 3

    one, _ = said(capsys, *flags, *several(files), "--prompt", "abc", "--use", "b")
    assert (one["tokens"], one["adapter"]) == (document["results"][0]["tokens"], "b")
    assert cli.main([*map(str, [*flags, *several(files), "--prompt", "abc"])]) == 0
    assert capsys.readouterr().out == f"abc{document['results'][1]['continuation']}\n"


def test_a_conversation_switches_by_name_without_compiling(files, capsys, monkeypatch):
    lines = [
        "hi",
        "/reset",
        "/adapter b",
        "hi",
        "/reset",
        "/adapter none",
        "hi",
        "/reset",
        "/adapter bb",
        "/adapter a",
        "hi",
    ]
    monkeypatch.setattr("sys.stdin", io.StringIO("\n".join(lines)))
    before = decoding._read._cache_size(), decoding._steps._cache_size()
    document, err = said(capsys, "chat", *several(files), "--max-new-tokens", 4)
    after = decoding._read._cache_size(), decoding._steps._cache_size()
    assert (after[0] - before[0], after[1] - before[1]) == (1, 1)
    answers = [line for line in err.splitlines() if not line.startswith("jaxpeft: ")]
    assert answers[0] == answers[3] and len(set(answers)) == 3 and document["adapter"] == "a"
    assert "jaxpeft: error: /adapter: no adapter is called 'bb'; did you mean" in err


@pytest.mark.parametrize(
    ("flags", "reason"),
    [
        (["--adapter", "a={a}", "--adapter", "{b}"], "of several adapters each has a name"),
        (["--adapter", "a={a}", "--adapter", "a={b}"], "the name stands twice"),
        (["--adapter", "none={a}"], "means no adapter"),
        (["--adapter", "a={a}/nowhere"], "nowhere: no such directory"),
        (["--adapter", "a={a}", "--use", "c"], "--use c: no adapter is called 'c'; known: a, none"),
        (["--adapter", "{a}", "--use", "c"], "--use c: no adapter has a name"),
        (["--adapter", "a={a}", "--prompts", "prompts.jsonl"], "prompts.jsonl:1: no adapter is called 'b'"),
        (["--adapter", "a={a}", "--prompts", "bad.jsonl"], "bad.jsonl:1: field adapter must be a name"),
        (
            ["--adapter", "a={a}", "--prompts", "empty.jsonl"],
            "empty.jsonl:1: field adapter is empty; give a name, or null",
        ),
    ],
)
def test_mistakes(files, flags, reason, capsys, monkeypatch):
    monkeypatch.chdir(files)
    (files / "bad.jsonl").write_text('{"prompt": "a", "adapter": 3}\n')
    (files / "empty.jsonl").write_text('{"prompt": "a", "adapter": ""}\n')
    flags = [word.format(a=files / "a", b=files / "b") for word in flags]
    prompt = [] if "--prompts" in flags else ["--prompt", "abc"]
    assert cli.main(["generate", "--model", str(files / "model"), *prompt, *flags]) == 2
    out, err = capsys.readouterr()
    assert out == "" and reason in err and err.count("\n") == 1
