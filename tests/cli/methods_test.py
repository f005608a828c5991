"""`jaxpeft methods`: what each method file says of itself, as JSON and as a table; and what a file must say."""

import json
from types import SimpleNamespace

import pytest

from jaxpeft import cli
from jaxpeft.about import About, Promises, check
from jaxpeft.cli import methods

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
