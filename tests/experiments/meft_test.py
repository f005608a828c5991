"""The experiments on reversible models: documents are drawn from the data, and the data says what is claimed of it."""

import pytest

from experiments.meft import inversion, memory, quality
from experiments.memory import common

SCRIPTS = {"memory": memory, "inversion": inversion}


@pytest.mark.parametrize("name", SCRIPTS)
def test_document_is_drawn_from_the_data(name):
    script = SCRIPTS[name]
    rows = common.load(script.NAME)
    assert rows and script.document(rows) == (common.RESULTS / f"{script.NAME}.md").read_text()


def test_exact_streams_come_back_bit_for_bit():
    """Every model, variant and type; and no other form does where it divides."""
    for row in common.load(inversion.NAME):
        if row["form"].startswith("exact"):
            assert max(row["errors"]) == max(row["differ"]) == 0, row
        elif "1/8" in row["form"] or "0.1" in row["form"]:
            assert max(row["differ"]) > 0, row


def test_24_layers_need_at_most_a_twentieth_of_full_fine_tuning():
    rows = {(row["geometry"], row["form"]): row for row in common.load(memory.NAME)}
    for geometry in ("roberta-large", "opt-1.3b"):
        full = memory.extra(rows[geometry, "full"])
        for variant in (1, 2, 3):
            assert memory.extra(rows[geometry, f"meft {variant}, exact 1/8"]) <= 0.05 * full


def test_quality_holds_out_every_tenth_row(shared_data, monkeypatch):
    monkeypatch.setenv("JAXPEFT_DATA", str(shared_data))
    train, tune, test, labels = quality.rows_of("qnli", 64)
    assert (len(train), len(tune), len(test), len(labels)) == (2250, 250, 1192, 2)
    assert not {row.line for row in train} & {row.line for row in tune}
