"""generate and chat: what is asked and how, through which template, from where, and what stays unsaid."""

import io
import json
from types import SimpleNamespace

import jax
import pytest

import jaxpeft as jp
from jaxpeft import cli, hf, template
from jaxpeft.cli.decoding import Base
from jaxpeft.cli.prompts import read_prompts
from jaxpeft.errors import InputError
from jaxpeft.generate import generate
from tests import runs

CHAT = (
    "{{ bos_token }}{% for m in messages %}{{ m.role[0] + '=' + m.content }}</s>{% endfor %}"
    "{% if add_generation_prompt %}a={% endif %}"
)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """model: a tiny one with a chat template; adapter: of a run on conversations; params: of the model, loaded."""
    folder = runs.make_files(tmp_path_factory.mktemp("files"))
    name = folder / "model"
    (name / "chat_template.jinja").write_text(CHAT)
    model, params = hf.load_pretrained(name, "float32")
    method = jp.lora(rank=2, targets="attention")
    _, trainable, frozen = jp.setup(method, model, params, jax.random.key(0))
    trainable = {path: leaf + 0.3 for path, leaf in trainable.items()}
    jp.export_adapter(folder / "adapter", jp.combine(trainable, frozen), method, model.config)
    written = template.Template("chat", "2026-01-31").beside()
    for file, text in written.items():
        (folder / "adapter" / file).write_text(text)
    (folder / "prompts.jsonl").write_text(
        '{"prompt": "abc"}\n'
        '{"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "what it should say"}]}\n'
        '{"prompt": [{"role": "system", "content": "s"}, {"role": "user", "content": "hi"}]}\n'
        '{"instruction": "add", "input": "1+2", "output": "3"}\n\n'
    )
    return SimpleNamespace(folder=folder, model=str(name), adapter=str(folder / "adapter"), loaded=(model, params))


def said(capsys, *argv):
    """(document, stderr) of a command."""
    assert cli.main([*map(str, argv), "--json"]) == 0
    out, err = capsys.readouterr()
    return json.loads(out), err


def ids(tokenizer, text):
    return tokenizer(text, add_special_tokens=False).input_ids


def test_prompts_of_a_file_are_answered_in_its_order(files, capsys):
    flags = ["generate", "--model", files.model, "--max-new-tokens", 9]
    document, _ = said(capsys, *flags, "--prompts", files.folder / "prompts.jsonl")
    tokenizer = hf.load_tokenizer(files.model)
    asked = ["abc", "<s>u=hi</s>a=", "<s>s=s</s>u=hi</s>a=", "<s>u=add\n\n1+2</s>a="]
    expected = generate(*files.loaded, [ids(tokenizer, text) for text in asked], 9)
    assert [row["tokens"] for row in document["results"]] == expected
    assert [row["chat"] for row in document["results"]] == [False, True, True, True]
    assert document["results"][1]["messages"] == [{"role": "user", "content": "hi"}]  # without the answer


def test_what_is_shown_while_it_comes_is_what_json_holds(files, capsys):
    flags = ["generate", "--model", files.model, "--max-new-tokens", 9, "--prompt", "hi"]
    plain, _ = said(capsys, *flags)
    chat, _ = said(capsys, *flags, "--chat")
    assert plain["tokens"] != chat["tokens"] and (plain["chat"], chat["chat"]) == (False, True)
    assert cli.main([*map(str, flags)]) == cli.main([*map(str, flags), "--chat"]) == 0
    assert capsys.readouterr().out == f"hi{plain['continuation']}\n{chat['continuation']}\n"


def test_text_is_asked_as_the_adapter_was_trained(files, tmp_path):
    base = Base(files.model, None, hf.load_tokenizer(files.model))
    assert not base.words(None).trained and base.words(files.folder / "adapter").trained
    own = template.Template("chat", "2026-01-31", "{% for m in messages %}{{ m.content }}?{% endfor %}")
    headings = template.Template("alpaca", "2026-01-31")
    for number, (made, expected) in enumerate([(own, "hi?"), (headings, "### Instruction:\nhi\n\n### Response:\n")]):
        adapter = tmp_path / str(number)
        adapter.mkdir()
        (adapter / "adapter_config.json").write_text("{}")
        (adapter / template.FILE).write_text(json.dumps(made.document()))
        words = base.words(adapter)
        assert words.chat_ids([{"role": "user", "content": "hi"}]) == ids(words.tokenizer, expected)
    assert base.tokenizer.chat_template == CHAT  # another adapter's template stays its own


def test_a_model_that_adds_nothing_to_a_bare_prompt_names_its_template(files, capsys, tmp_path):
    first = generate(*files.loaded, [ids(hf.load_tokenizer(files.model), "hi")], 1)[0][0]
    silent = tmp_path / "model"
    silent.mkdir()
    for file in (files.folder / "model").iterdir():
        (silent / file.name).symlink_to(file)
    (silent / "generation_config.json").write_text(json.dumps({"eos_token_id": [first]}))
    document, err = said(capsys, "generate", "--model", silent, "--prompt", "hi")
    assert document["continuation"] == "" and "--chat" in err and err.count("\n") == 1


def test_a_conversation_on_the_terminal(files, capsys, monkeypatch):
    lines = [
        "hi",
        f"/adapter {files.adapter}",
        "hi",
        "/adapter none",
        "/reset",
        "/system s",
        "hi",
        "/adapter nowhere",
        "/rest",
        "b" * 80,
        "",
        "/quit",
        "never",
    ]
    monkeypatch.setattr("sys.stdin", io.StringIO("\n".join(lines)))
    document, err = said(capsys, "chat", "--model", files.model, "--max-new-tokens", 4)
    system, user, answer = document["messages"]
    assert (system["content"], user["content"], document["adapter"]) == ("s", "hi", None)
    tokenizer, (model, params) = hf.load_tokenizer(files.model), files.loaded

    def continued(text):
        return tokenizer.decode(generate(model, params, [ids(tokenizer, text)], 4)[0], skip_special_tokens=True)

    first, third = continued("<s>u=hi</s>a="), continued("<s>s=s</s>u=hi</s>a=")
    second = err.splitlines()[2]  # of the adapter
    assert second != continued(f"<s>u=hi</s>a={first}</s>u=hi</s>a=")
    assert answer["content"] == third
    expected = [
        first,
        f"jaxpeft: adapter: {files.adapter}",
        second,
        "jaxpeft: adapter: none",
        "jaxpeft: what was said is forgotten",
        "jaxpeft: system turn: s",
        third,
        "jaxpeft: error: --adapter nowhere: no such directory",
        "jaxpeft: error: unknown command /rest; did you mean /reset?",
    ]
    assert err.startswith("\n".join(expected) + "\n")
    (refused,) = err.removeprefix("\n".join(expected) + "\n").splitlines()
    assert "the model has room for 64" in refused and refused.endswith("/reset forgets what was said")


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("\n\n", "holds no prompt"),
        ("a\n\nb\n", ":2: empty line"),
        ("a\n\udcff\n", ":2: not UTF-8"),
        ('{"text": "a"}', r".jsonl:1: fields must be prompt \| messages"),
        ('{"messages": [{"role": "assistant", "content": "a"}]}', "messages holds no turn to answer"),
        ('{"messages": [{"role": "user"}]}', r"messages\[0\].content is missing"),
        ('{"prompt": 3}', "field prompt must be a string"),
    ],
)
def test_files_that_are_no_prompts(text, reason, tmp_path):
    file = tmp_path / ("prompts.jsonl" if text.startswith("{") else "prompts.txt")
    file.write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(InputError, match=reason):
        read_prompts(file)


@pytest.mark.parametrize(
    ("flags", "reason"),
    [
        ([], "give either --prompt TEXT or --prompts FILE"),
        (["--prompt", "a", "--prompts", "b"], "give either --prompt TEXT or --prompts FILE"),
        (["--prompt", "a", "--chat", "--plain"], "contradict each other"),
        (["--prompt", "a", "--system", "s"], "add --chat"),
        (["--prompts", "prompts.jsonl", "--plain"], "prompts.jsonl:2: is a conversation"),
        (["--prompt", "a\udcff"], "is not UTF-8"),
        (["--prompt", "a", "--batch-size", "0"], "--batch-size 0"),
    ],
)
def test_flags_that_make_no_sense(files, flags, reason, capsys, monkeypatch):
    monkeypatch.chdir(files.folder)
    assert cli.main(["generate", "--model", files.model, *flags]) == 2
    out, err = capsys.readouterr()
    assert out == "" and reason in err and err.count("\n") == 1
