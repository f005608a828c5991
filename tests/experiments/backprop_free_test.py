"""Steps in which a part of the layers trains: the page is drawn from the data, and the data is what is counted here."""

import pytest

from experiments.backprop_free import sampled_layers
from experiments.backprop_free.__main__ import RESULTS, TOPICS
from experiments.memory import common
from jaxpeft.memory import targets

# Llama-2-7B's parameters: of a layer's kernels and of all its leaves; of embedding, head and the last norm.
D, F, LAYERS = 4096, 11008, 32
KERNELS = 4 * D**2 + 3 * D * F
BLOCK, OUTSIDE = KERNELS + 2 * D, 2 * 32000 * D + D


@pytest.fixture
def rows(monkeypatch):
    """The committed figures, by method, batch and options; nothing is compiled."""

    def refuse(*args, **kwargs):
        raise AssertionError("nothing should be compiled")

    monkeypatch.setattr(targets, "compile", refuse)
    found = sampled_layers.collect(common.Figures(sampled_layers.NAME, folder=RESULTS))
    return {(row["method"], row["batch_size"], *row["options"]): row for row in found}


@pytest.mark.parametrize("topic", TOPICS, ids=[topic.NAME for topic in TOPICS])
def test_document_is_drawn_from_the_data(topic):
    rows = topic.collect(common.Figures(topic.NAME, folder=RESULTS))
    assert topic.document(rows) == (RESULTS / f"{topic.NAME}.md").read_text()


def test_the_optimizers_state_is_that_of_what_trains(rows):
    """Two float32 numbers for each that trains; IST keeps those of all layers' adapters."""
    projected, adapters = 256 * (4 * D + 3 * F), 64 * (4 * 2 * D + 3 * (D + F))
    numbers = {
        ("full", 16): LAYERS * BLOCK + OUTSIDE,
        ("half", 16): LAYERS * (KERNELS // 2 + 2 * D) + OUTSIDE,
        ("lisa", 16, "count=2"): 2 * BLOCK + OUTSIDE,
        ("owlore", 16): 5 * (projected + 2 * D) + OUTSIDE,
        ("owlore", 1, "which=layers"): 5 * (projected + 2 * D),
        ("lora", 16, "rank=64"): LAYERS * adapters,
        ("lora+ist", 16, "rank=64"): LAYERS * adapters,
    }
    for key, number in numbers.items():
        assert rows[key]["bytes"]["optimizer"] == pytest.approx(8 * number, rel=1e-5), key  # counters beside them


def test_what_the_papers_say(rows):
    """LISA is above LoRA, most of it by embeddings and head; OwLore is within its 21 GB with one row at a time."""
    total = {key: row["bytes"]["total"] for key, row in rows.items()}
    more = total["lisa", 16, "count=2"] - total["lora", 16, "rank=64"]
    assert 0 < 0.5 * more < 16 * OUTSIDE  # their masters, moments and gradients
    assert total["owlore", 1] < 21e9 < total["owlore", 16] < total["lisa", 16, "count=2"]
    assert total["owlore", 1, "which=layers"] < total["owlore", 1]
    gradients = {key: row["bytes"]["gradients"] for key, row in rows.items()}
    assert gradients["lora+ist", 16, "rank=64"] == pytest.approx(gradients["lora", 16, "rank=64"] / 4, rel=1e-3)
