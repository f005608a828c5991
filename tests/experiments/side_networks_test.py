"""The experiments on networks beside a frozen backbone: documents and docstrings say what the data says."""

import re

import pytest

from experiments.memory import common
from experiments.side_networks import memory

GIB = common.GIB


@pytest.fixture
def rows(no_compiler):
    """The committed figures; nothing is compiled."""
    figures = common.Figures(memory.NAME)
    return memory.collect(figures, list(dict.fromkeys(row["target"] for row in figures.rows)))


def test_document_is_drawn_from_the_data(rows):
    assert memory.document(rows) == (common.RESULTS / f"{memory.NAME}.md").read_text()


def test_docstring_says_what_the_data_says(rows):
    text = " ".join(memory.__doc__.split())
    for sentence in memory.verdicts(rows):
        assert sentence in text


def test_figures_add_up(rows):
    for row in rows:
        assert re.fullmatch(r"\d+\.\d+\.\d+", row["jax"])
        size = row["bytes"]
        assert size["temporaries"] == size["gradients"] + size["activations"] + size["workspace"]
        assert size["total"] >= size["arguments"] + size["temporaries"]


def test_side_networks_keep_what_the_equations_say(rows):
    """llama2-7b, 16 x 1024 tokens: d per token and layer, LST with d / 8 more.

    Beside the layers: the gradient of the stream, which the loss takes with its value, in float32, so two arrays of d;
    with LST and SHERL the last stream, one, and with LST its own stream before and behind its norm, d / 8 each. All
    else (rotations, one number per token, a kernel of d x d / 8) is less than an eighth of an array.
    """
    array = 2 * 16 * 1024 * 4096
    for row in rows:
        if row["geometry"] == "llama2-7b" and row["method"] in memory.BESIDE:
            layers, beside = {"lst": (9 / 8, 3 + 2 / 8), "unipt": (1, 2), "sherl": (1, 3)}[row["method"]]
            assert 0 <= row["kept"] - (32 * layers + beside) * array <= array / 8, row["method"]
