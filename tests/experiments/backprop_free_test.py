"""Steps in which a part of the layers trains: the page is drawn from the data, and the data is what is counted here."""

import pytest

from experiments.backprop_free import forward_passes, full_in_24_gb, one_table, sampled_layers
from experiments.backprop_free.__main__ import RESULTS, TOPICS
from experiments.memory import common

# Llama-2-7B's parameters: of a layer's kernels and of all its leaves; of embedding, head and the last norm.
D, F, LAYERS = 4096, 11008, 32
KERNELS = 4 * D**2 + 3 * D * F
BLOCK, OUTSIDE = KERNELS + 2 * D, 2 * 32000 * D + D


@pytest.fixture
def rows(no_compiler):
    """The committed figures, by method, batch and options; nothing is compiled."""
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


def test_the_state_is_on_the_device_or_in_the_hosts_memory():
    """Two float32 numbers of each matrix; of LISA's layers what is not drawn waits, beside what is."""
    found = full_in_24_gb.collect(common.Figures(full_in_24_gb.NAME, folder=RESULTS))
    rows = {(row["method"], row["update_in_backward"], row["optimizer_memory"], *row["options"]): row for row in found}
    names = {"full": ("full", True, "host"), "galore": ("galore", True, "host", "rank=1024")}
    for name, key in names.items():
        here, there = rows[(*key[:2], "device", *key[3:])], rows[key]
        assert there["host_bytes"] == pytest.approx(here["bytes"]["optimizer"], rel=0.01), name
        assert there["bytes"]["optimizer"] < 0.01 * here["bytes"]["optimizer"], name
    assert rows[names["full"]]["host_bytes"] == pytest.approx(8 * (LAYERS * KERNELS + OUTSIDE), rel=1e-4)
    lisa, kept = rows["lisa", False, "device", "count=2"], rows["lisa", False, "device", "count=2", "moments=host"]
    assert kept["host_bytes"] == pytest.approx(8 * LAYERS * KERNELS, rel=1e-4)
    assert kept["bytes"]["optimizer"] == pytest.approx(lisa["bytes"]["optimizer"], rel=1e-3)
    assert kept["bytes"]["total"] == pytest.approx(lisa["bytes"]["total"], rel=0.01)
    assert rows["galore", True, "device", "rank=1024"]["bytes"]["total"] > 24 * 2**30  # the paper's 22.8 GB


def test_a_step_without_a_backward_pass_needs_a_forward_pass():
    """Within 2 %, at 7B, 13B and 30B, and is far below full fine-tuning."""
    rows = forward_passes.collect(common.Figures(forward_passes.NAME, folder=RESULTS))
    steps = rows[: len(forward_passes.STEPS) * len(forward_passes.TARGETS)]
    of = {(row["geometry"], row["target"], row["method"], *row["options"]): row["total"] for row in steps}
    for geometry in ("llama2-7b", "opt-13b", "opt-30b"):
        for target in forward_passes.TARGETS:
            passes = of[geometry, target, forward_passes.FORWARD]
            assert passes <= of[geometry, target, "mezo"] <= 1.02 * passes


def test_one_table_is_drawn_from_the_data_as_far_as_it_is_there():
    """What is compiled; the runs are those of the comparison, too, whose data grows by itself."""
    rows = one_table.collect(common.Figures(one_table.NAME, folder=RESULTS))
    compiled = lambda text: [line.split("|")[1:7] for line in text.splitlines() if line.startswith("| ")]
    drawn = compiled(one_table.document(rows))
    assert drawn == compiled((RESULTS / "one_table.md").read_text())
    assert [cells[0].strip() for cells in drawn[2:]] == [entry.title for entry in one_table.ENTRIES]
    least = {entry.title: peak for entry, _, peak in one_table.found(rows)}
    assert least["mezo"] < least["lora"] < least["full"]
