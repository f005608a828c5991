"""Expressions that a user or a file gives: found as `re` finds them, and none holds up a command."""

import re

import pytest

from jaxpeft import limits, patterns, sites
from jaxpeft.errors import InputError
from jaxpeft.methods.full import full
from jaxpeft.methods.lisa import lisa
from jaxpeft.peft.form.lora import scale_of

SITE = "layers/self_attn/q_proj"
ENDLESS = r"(?:\w|\w\w|/|\.)+[XZ]"


@pytest.mark.parametrize(
    "pattern", ["q_proj$", r"^layers.*/[^/]+$", r"layers/(?!mlp)\w+/[qk]", "mlp|norm", "", r"_\d+"]
)
def test_an_expression_is_found_as_re_finds_it(pattern):
    ours = patterns.compiled(pattern, "targets")
    for text in (SITE, "layers_0_12/mlp/up_proj", "lm_head"):
        assert ours.found(text) == bool(re.search(pattern, text))
        assert ours.begins(text) == bool(re.match(pattern, text))


@pytest.mark.parametrize(
    "pattern",
    [
        "(",
        "(?R)",
        "a{99999999999}",
        "a{" + "9" * 5000 + "}",
        "((((a{1000}){1000}){1000}){1000})",
        "(?:a{65535}){65535}",
        "a{65535}" * 1000,
        "(" * 5000 + ")" * 5000,
        "x" * 10_001,
    ],
)
def test_an_expression_that_is_none_or_too_much(pattern):
    with pytest.raises(InputError, match=r"^targets .*(not a regular expression|has 10001 characters)") as caught:
        patterns.compiled(pattern, "targets")
    assert len(str(caught.value)) < 300


@pytest.mark.parametrize(
    "match",
    [
        lambda: patterns.found(ENDLESS, SITE * 2, "targets"),
        lambda: sites.first_match({ENDLESS: 3}, SITE * 2, 0),
        lambda: sites.chooses(ENDLESS, SITE * 2),
        lambda: sites.find({SITE * 2: {"kernel": 0}}, ENDLESS),
        lambda: full(ENDLESS).roles(lambda path: None)(SITE * 2),
        lambda: lisa(which=ENDLESS).alone(SITE * 2),
        lambda: scale_of({"alpha_pattern": {ENDLESS: 4}}, (SITE * 2).replace("/", "."), 2),
    ],
)
def test_one_that_would_be_looked_for_for_ever_is_given_up(monkeypatch, match):
    monkeypatch.setattr(patterns, "SECONDS", 0.05)
    with pytest.raises(InputError, match=r"\[XZ\]': takes longer than 0.05 s to look for in 'layers"):
        match()


def test_many_that_are_slow_are_given_up_together(monkeypatch):
    monkeypatch.setattr(patterns, "SECONDS_IN_ALL", 0.0)
    monkeypatch.setattr(patterns, "_SLOW", 0.0)
    with pytest.raises(InputError, match="'q_proj': takes .* and is one of many"):
        patterns.found("q_proj", SITE, "targets")


def test_one_that_takes_long_to_compile_is_given_up(monkeypatch):
    monkeypatch.setattr(patterns, "SECONDS", 0.01)
    with pytest.raises(InputError, match="takes longer than 0.01 s to compile"):
        patterns.compiled("(?x)(?:a{#}\n 1000}){#}\n 400}", "targets")  # which is out of sight of the count


def test_limits_leave_no_trace():
    import resource
    import signal

    before = resource.getrlimit(resource.RLIMIT_AS), signal.getsignal(signal.SIGALRM), signal.getitimer(0)
    with pytest.raises(limits.OutOfTime), limits.bounded(0.01):
        while True:
            pass
    with pytest.raises(MemoryError), limits.bounded(1):
        b"0" * 2**35
    assert before == (resource.getrlimit(resource.RLIMIT_AS), signal.getsignal(signal.SIGALRM), signal.getitimer(0))
