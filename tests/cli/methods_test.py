"""`jaxpeft methods`: what each method file says of itself, as JSON and as a table; and what a file must say."""

import functools
import json
from types import SimpleNamespace

import jax
import pytest

import jaxpeft as jp
from jaxpeft import aliases, cli, method, starts, tree
from jaxpeft.about import About, Promises, check
from jaxpeft.cli import methods
from jaxpeft.cli.train import Train
from jaxpeft.errors import InputError
from jaxpeft.peft.export import adapter_of
from tests import tiny

ABOUT = About(
    summary="does [x]",
    level="site",
    trains="two numbers",
    saves="nothing more",
    reference="z",
    example={"rank": 2},
    promises=Promises(site_bytes=lambda **_: 0),
)


def file(about):
    return SimpleNamespace(ABOUT=about, alpha=lambda rank=1: rank)


def test_a_whole_description_passes():
    assert check("alpha", file(ABOUT)) is ABOUT


@pytest.mark.parametrize(
    ("about", "said"),
    [
        (None, "has no ABOUT of type"),
        (ABOUT._replace(summary=" "), r"ABOUT\.summary says nothing"),
        (ABOUT._replace(trains=3), r"ABOUT\.trains says nothing"),
        (ABOUT._replace(level="somewhere"), r"ABOUT\.level 'somewhere' is not one of"),
        (ABOUT._replace(example={"width": 2}), "alpha takes no width"),
        (ABOUT._replace(promises=Promises()), "give one of site_bytes, block_bytes, layer_bytes"),
    ],
)
def test_a_file_that_does_not_say_what_it_is_fails(about, said):
    with pytest.raises(TypeError, match=rf"^jaxpeft/methods/alpha\.py: .*{said}"):
        check("alpha", file(about))


def test_the_real_methods_say_what_they_are(capsys, monkeypatch):
    assert cli.main(["methods", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)["methods"]
    assert {"full", "lora", "lora_fa"} <= {row["name"] for row in rows}
    monkeypatch.setenv("COLUMNS", "250")
    methods.show({"methods": rows})
    shown = capsys.readouterr().out
    for row in rows:
        for name in ("summary", "trains", "saves", "reference", "level"):
            assert row[name] and "\n" not in row[name]
        assert row["name"] in shown and row["reference"].split(",")[-1].strip() in shown


def test_what_a_run_leaves_is_what_the_exporter_makes():
    """Of methods that change how others train, or train the base; all others have leaves of their own."""
    base = tiny.model()[0]
    params = jax.eval_shape(lambda key: base.init(key, {}), jax.random.key(0))
    seen = set()
    for row in methods.run(methods.Methods())["methods"]:
        if row["level"] not in ("step", "parameters") and row["stored"] == "own":
            continue
        chained = [
            method.make(name, dict(method.about(name).example)) for name in (row["within"] or row["name"]).split("+")
        ]
        chosen = method.chain(*chained)
        leaves = functools.partial(jp.setup, chosen, base, batches=lambda: ())
        _, trainable, rest = jax.eval_shape(
            lambda params, key, leaves=leaves: (0, *leaves(params, key)[1:]), params, jax.random.key(0)
        )
        try:
            found = adapter_of(chosen, tree.combine(trainable, rest), base.config)
            left = found[1].type if found else "own"
        except InputError:
            left = "base"
        assert left == (row["peft"] or row["stored"]), row["name"]
        seen.add(left)
    assert seen == {"LORA", "base", "own"}


def test_a_method_that_is_named_says_its_options(capsys):
    assert cli.main(["methods", "quantize+lora", "--json"]) == 0
    quantize, lora = json.loads(capsys.readouterr().out)["methods"]
    assert [option["name"] for option in quantize["options"]] == ["format", "group", "double", "targets"]
    rank = next(option for option in lora["options"] if option["name"] == "rank")
    assert rank == {"name": "rank", "default": 8, "help": "r, at most the smaller side of each kernel."}
    assert cli.main(["methods", "galore"]) == 0
    shown = capsys.readouterr().out
    assert "galore.every=200" in shown and 'galore.projection="sketch"' in shown and "lora.alpha" not in shown


def test_every_option_is_explained():
    unexplained = [
        (name, option["name"]) for name in method.names() for option in methods.options(name) if not option["help"]
    ]
    assert unexplained == []


def test_a_method_that_nobody_knows_is_refused(capsys):
    assert cli.main(["methods", "galor"]) == 2
    assert capsys.readouterr().err.startswith("jaxpeft: error: unknown method 'galor'; nearest: galore")


@pytest.mark.parametrize("name", aliases.FLAGS)
def test_what_others_call_otherwise_is_told_as_flags_of_a_run(name, capsys):
    """Which the command takes, with values that the method has."""
    assert cli.main(["methods", name]) == 2
    said = capsys.readouterr().err
    flags = said.partition("here it is ")[2].removesuffix(" (see `jaxpeft methods`)\n")
    assert flags == aliases.FLAGS[name]
    cli.parse(Train, "train", flags.split()).check()
    assert cli.main(["train", "--method", f"meft+{name.upper()}"]) == 2
    assert flags in capsys.readouterr().err


def test_each_start_of_loras_and_no_method_has_such_a_name():
    spelt = {"".join(filter(str.isalnum, word)) for word in starts.STARTS}
    assert spelt <= aliases.FLAGS.keys()
    assert not aliases.FLAGS.keys() & {"".join(filter(str.isalnum, word)) for word in method.names()}


def test_capitals_are_near():
    with pytest.raises(InputError, match="unknown method 'LoRA'; nearest: lora,"):
        method.module("LoRA")
