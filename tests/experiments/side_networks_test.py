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
    """llama2-7b, 16 x 1024 tokens: d per token and layer, LST with d / 8 more; beside the layers a few arrays of d.

    The loss's gradient of the stream, which is taken with the loss, in float32, is two of them; the last stream is one.
    """
    array = 2 * 16 * 1024 * 4096
    for row in rows:
        if row["geometry"] == "llama2-7b" and row["method"] in memory.BESIDE:
            layers = 32 * array * {"lst": 9 / 8, "unipt": 1, "sherl": 1}[row["method"]]
            assert layers <= row["kept"] <= layers + 4 * array, row["method"]
