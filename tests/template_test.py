"""Which template makes text of rows, on which day, and where that is kept."""

import threading

import pytest
import tokenizers
import transformers

from jaxpeft import limits, template
from jaxpeft.errors import InputError
from jaxpeft.template import FILE, Template, choose, prompt_ids, read, render
from tests import runs

OWN = "{% for m in messages %}{{ m.content }}.{% endfor %}{% if add_generation_prompt %}={% endif %}"
DATED = "{{ strftime_now('%d') }}" + OWN
ASKED = [{"role": "user", "content": "ab"}]


def letters(own=None):
    made = tokenizers.Tokenizer(
        tokenizers.models.WordLevel({token: i for i, token in enumerate(("<s>", *runs.LETTERS))}, unk_token="?")
    )
    made.pre_tokenizer = tokenizers.pre_tokenizers.Split("", "isolated")
    return transformers.PreTrainedTokenizerFast(tokenizer_object=made, bos_token="<s>", chat_template=own)


@pytest.mark.parametrize(
    ("choice", "own", "kind"),
    [("auto", OWN, "chat"), ("auto", None, "alpaca"), ("chat", OWN, "chat"), ("alpaca", OWN, "alpaca")],
)
def test_a_choice(choice, own, kind):
    assert choose(choice, letters(own), "2026-03-01") == Template(kind, "2026-03-01")


def test_a_file_is_the_template_of_all(tmp_path):
    (tmp_path / "mine.jinja").write_text(DATED)
    tokenizer = letters(OWN)
    chosen = choose(str(tmp_path / "mine.jinja"), tokenizer, "2026-03-01")
    assert chosen == Template("chat", "2026-03-01", DATED)
    assert render(ASKED, tokenizer, chosen, add_generation_prompt=True) == "01ab.="


@pytest.mark.parametrize(
    ("choice", "date", "text", "says"),
    [
        ("chat", None, "", "--template chat: the tokenizer has no chat template"),
        ("none.jinja", None, "", "--template none.jinja: must be auto, chat, alpaca or a file; no such file"),
        ("FILE", None, "{% for m in messages %}", "FILE: line 1: no chat template"),
        ("FILE", None, "{{ prompt }}", "FILE: no chat template: it never names messages"),
        ("auto", "yesterday", "", "--template-date yesterday: must be a day, YYYY-MM-DD"),
    ],
)
def test_a_choice_that_is_refused(tmp_path, choice, date, text, says):
    file = tmp_path / "FILE"
    file.write_text(text)
    with pytest.raises(InputError, match=says):
        choose(str(file) if choice == "FILE" else choice, letters(), date)


def test_the_clock_stands_still():
    source = (
        "{% macro day() %}{{ strftime_now('%A') }}{% endmacro %}{% if strftime_now is defined %}"
        "{% set now = strftime_now(format='%d %b %Y, %H:%M, %-d %%d') %}{% endif %}{{ day() }} {{ now }}{{ messages }}"
    )
    written = render([], letters(source), Template("chat", "2026-03-01"))
    assert written == "Sunday 01 Mar 2026, 00:00, 1 %d[]"


def test_a_prompt_has_the_ids_that_training_shows():
    tokenizer = letters(OWN)
    asked = prompt_ids(ASKED, tokenizer, Template("chat", "2026-03-01"))
    assert tokenizer.decode(asked).replace(" ", "") == "ab.="
    alpaca = Template("alpaca", "2026-03-01")
    assert len(prompt_ids(ASKED, tokenizer, alpaca)) == len("### Instruction:\nab\n\n### Response:\n")
    with pytest.raises(InputError, match="single instructions .* turns given: user, user"):
        prompt_ids([*ASKED, *ASKED], tokenizer, alpaca)


def test_the_first_folder_that_stores_one_counts(tmp_path):
    stored = Template("chat", "2026-03-01", DATED)
    (tmp_path / FILE).write_text(stored.beside()[FILE])
    tokenizer = letters()
    assert read(tokenizer, None, tmp_path / "none", tmp_path) == stored
    assert tokenizer.chat_template == DATED
    assert choose("auto", letters(), "2026-04-01", stored) == Template("chat", "2026-04-01", DATED)
    (tmp_path / FILE).write_text('{"template": "chat"}')
    with pytest.raises(InputError, match=f"{FILE}: lacks date"):
        read(tokenizer, tmp_path)


LOOP = "{% for i in range(100000) %}"
HOSTILE = {
    "loops": (LOOP * 3 + "{% endfor %}" * 3 + "{{ messages }}", "has not written them after 0.2 s"),
    "writes on and on": (LOOP * 2 + "{{ messages }}" + "{% endfor %}" * 2, "has not written them after 0.2 s"),
    "counts": ("{{ messages }}{% set x = 7 ** (10 ** 8) %}{{ x % 2 }}", "has not written them after 0.2 s"),
    "calls itself": ("{% macro f(x) %}{{ f(x) }}{% endmacro %}{{ f(messages) }}", "maximum recursion depth exceeded"),
    "divides": ("{{ messages|length // 0 }}", "integer division or modulo by zero"),
    "multiplies": ("{% set n = 10 ** 10 %}{{ 'a' * (n * messages|length) }}", "needs more memory than a template gets"),
    "multiplies a constant": ("{{ 'a' * 10 ** 10 }}{{ messages }}", "needs more memory than a template gets"),
    "pads": ("{{ 'a'.ljust(10 ** 10) }}{{ messages }}", "needs more memory than a template gets"),
    "writes much": ("{{ 'a' * 2 ** 21 }}{{ messages }}", "writes 20.* characters; at most 1048576 are taken"),
    "says much": ("{{ raise_exception('a\n' * 10000 ~ messages) }}", "refuses the messages: (a ){100}"),
    "asks for what is not there": ("{{ messages.x.y.z }}", "has no attribute 'x'"),
    "is nested": ("{{ " + "(" * 5000 + "messages" + ")" * 5000 + " }}", "the chat template refuses the messages: "),
    "is long": ("{# " + "x" * 2**20 + " #}{{ messages }}", "has 104.* characters; at most 1048576"),
}


@pytest.fixture
def short(monkeypatch):
    monkeypatch.setattr(template, "SECONDS", 0.2)
    monkeypatch.setattr(template, "MOST_CHARACTERS", 2**20)
    monkeypatch.setattr(limits, "MOST_BYTES", 2**28)


@pytest.mark.parametrize("name", HOSTILE)
def test_a_template_that_does_harm_is_refused_in_a_line(short, name):
    source, says = HOSTILE[name]
    with pytest.raises(InputError, match=says) as caught:
        render(ASKED, letters(source), Template("chat", "2026-03-01"))
    assert len(str(caught.value)) < 400 and "\n" not in str(caught.value)
    assert render(ASKED, letters(OWN), Template("chat", "2026-03-01")) == "ab."


def test_a_template_is_stopped_in_another_thread_too(short):
    told = []

    def run():
        with pytest.raises(InputError, match="has not written them after 0.2 s") as caught:
            render(ASKED, letters(HOSTILE["loops"][0]), Template("chat", "2026-03-01"))
        told.append(caught)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert told


def test_a_file_may_mark_the_assistants_words_and_leave_a_loop(tmp_path):
    file = tmp_path / "marked.jinja"
    file.write_text("{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}{% break %}{% endfor %}")
    tokenizer = letters()
    assert render([*ASKED, *ASKED], tokenizer, choose(str(file), tokenizer, "2026-03-01")) == "ab"


@pytest.mark.parametrize(
    ("text", "says"),
    [("{{ messages }}" + " " * 2**20, "has more than 1048576 characters"), ("{{ " + "(" * 5000, "RecursionError")],
)
def test_a_file_that_is_too_much_for_a_template(tmp_path, text, says):
    (tmp_path / "mine.jinja").write_text(text)
    with pytest.raises(InputError, match=says):
        choose(str(tmp_path / "mine.jinja"), letters())
