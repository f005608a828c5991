"""The memory experiments on their committed data: tables and docstrings say what the data says; nothing is compiled."""

import json
import re

import pytest

from experiments.coresets import memory as coresets
from experiments.memory import (
    budgets_7b,
    code_errors,
    common,
    does_lora_reduce_memory,
    long_rows,
    lora_fa_tables,
    loraprune_7b,
    peqa_65b,
    remat_forms,
    residuals_7b,
    slimfit_bert,
)
from experiments.memory.common import GIB

SCRIPTS = (
    lora_fa_tables,
    does_lora_reduce_memory,
    residuals_7b,
    budgets_7b,
    remat_forms,
    long_rows,
    slimfit_bert,
    loraprune_7b,
    peqa_65b,
)
pytestmark = pytest.mark.usefixtures("no_compiler")
NAMES = [script.NAME for script in SCRIPTS]
# Llama-2-7B's parameters: embedding and head 2 V d, per layer 4 d d + 3 d f + 2 d, a norm d.
PARAMETERS_7B = 2 * 32000 * 4096 + 32 * (4 * 4096**2 + 3 * 4096 * 11008 + 2 * 4096) + 4096


def drawn(script):
    """What a script draws from: its figures, as its document and verdicts take them."""
    figures = common.Figures(script.NAME)
    if script is lora_fa_tables:
        return lora_fa_tables.Sizes(figures, "h200")
    if script is does_lora_reduce_memory:
        return script.collect(figures)
    names = list(dict.fromkeys(row["target"] for row in figures.rows))
    if script is remat_forms:
        return script.collect(figures, names, script.measured(figures))
    return script.collect(figures, names)


@pytest.mark.parametrize("script", SCRIPTS, ids=NAMES)
def test_document_is_drawn_from_the_data(script) -> None:
    assert script.document(drawn(script)) == (common.RESULTS / f"{script.NAME}.md").read_text()


def test_the_errors_of_codes_are_drawn_from_the_data() -> None:
    """And fewer bits move the gradient more, but for layers' inputs in 8, which share a scale with one large number."""
    found = code_errors.collect(common.Figures(code_errors.NAME))
    assert code_errors.document(found) == (common.RESULTS / f"{code_errors.NAME}.md").read_text()
    for actions in found.values():
        assert all(actions["compress4"][name] > actions["compress"][name] for name in code_errors.NAMES[1:])
        assert all(0 < actions["prune"][name] < 100 for name in code_errors.NORMS)
    large = found["SmolLM2-135M"]
    assert large["compress"]["block_input"] > large["compress4"]["block_input"] > large["compress12"]["block_input"]


def test_the_memory_of_a_coreset_is_drawn_from_the_data() -> None:
    """And is that of a batch of as many rows, to a thousandth."""
    found = coresets.collect(common.Figures(coresets.NAME, folder=coresets.FOLDER), ["h200"])
    assert coresets.document(found) == (coresets.FOLDER / "memory.md").read_text()
    totals = [coresets.total(row) for row in found]
    for whole, chosen, half in zip(totals[::3], totals[1::3], totals[2::3], strict=True):
        assert chosen == pytest.approx(half, rel=1e-3)
        assert half < whole


@pytest.mark.parametrize("script", SCRIPTS, ids=NAMES)
def test_docstring_says_what_the_data_says(script) -> None:
    text = " ".join(script.__doc__.split())
    for sentence in script.verdicts(drawn(script)):
        assert sentence in text


@pytest.mark.parametrize("name", NAMES)
def test_figures_say_what_they_are_of(name: str) -> None:
    rows = common.load(name)
    assert rows
    keys = set()
    for row in rows:
        assert re.fullmatch(r"\d+\.\d+\.\d+(\.\d+)?", row["jax"])
        for field in ("geometry", "batch_size", "seq_len", "dtype", "method", "target"):
            assert row[field], (field, row)
        assert row.get("save") or row.get("refused")
        found = {k: v for k, v in row.items() if k not in ("bytes", "kept", "memory", "flops", "recompute_flops")}
        keys.add(json.dumps(found, sort_keys=True))
    assert len(keys) == len(rows)


@pytest.mark.parametrize("script", [lora_fa_tables, does_lora_reduce_memory], ids=lambda s: s.NAME)
def test_picture_is_drawn(script, tmp_path) -> None:
    script.picture(drawn(script)).savefig(tmp_path / "picture.png")
    assert (tmp_path / "picture.png").read_bytes()[:4] == b"\x89PNG"


def test_bytes_of_a_figure_add_up() -> None:
    for name in ("lora_fa_tables", "does_lora_reduce_memory"):
        for row in common.load(name):
            size = row["bytes"]
            assert size["temporaries"] == size["gradients"] + size["activations"] + size["workspace"]
            assert size["total"] >= size["arguments"] + size["temporaries"]
            assert size["arguments"] >= size["weights"] + size["adapters"] + size["optimizer"]
            if row["geometry"] == "llama2-7b":
                assert size["weights"] == 2 * PARAMETERS_7B


def test_7b_keeps_what_the_arithmetic_says() -> None:
    """No matrix product twice: block input and q, k, v, attention, o (2 d each), gate, up (2 f each), low rank."""
    of = drawn(lora_fa_tables)
    tokens, d, f, heads = 16 * 1024, 4096, 11008, 32
    own = 12 * d + 4 * f + 7 * 2 * 64 + 4 * heads
    assert {of(method, "matmuls")["kept"] for method in ("lora", "lora_fa")} == {32 * tokens * own}
    for row in residuals_7b.collect(common.Figures("residuals_7b"), ["h200"]):
        if row["save"] == "matmuls":
            assert residuals_7b.device_bytes(row) == 32 * tokens * own
    # Adam's two float32 moments of seven maps, rank 64; LoRA-FA trains B alone.
    a, b = (64 * 32 * sizes for sizes in (4 * d + 2 * d + f, 4 * d + 2 * f + d))
    for method, trained in (("lora", a + b), ("lora_fa", b)):
        assert abs(of(method, "matmuls")["bytes"]["optimizer"] - 8 * trained) < 1024
        assert of(method, "matmuls")["bytes"]["gradients"] == 4 * trained


def test_budgets_hold() -> None:
    for name in {row["target"] for row in common.load("budgets_7b")}:
        rows = budgets_7b.collect(common.Figures("budgets_7b"), [name])
        found = [row for row in rows if "refused" not in row]
        assert [row["budget_gib"] for row in rows] == sorted(budgets_7b.BUDGETS, reverse=True)
        assert all(row["bytes"]["total"] <= row["budget_gib"] * GIB and row["fits"] for row in found)
        assert [row["recompute_flops"] for row in found] == sorted(row["recompute_flops"] for row in found)
        most = max(row["bytes"]["total"] for row in found)
        for row in found:
            assert row["bytes"]["total"] >= min(0.85 * row["budget_gib"] * GIB, most)


def test_a_figure_that_is_missing_is_named() -> None:
    with pytest.raises(KeyError, match=r"lora_fa_tables\.json has no figure with target abacus"):
        common.Figures("lora_fa_tables")(target="abacus")


def test_figures_are_measured_once(tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.setattr(common, "RESULTS", tmp_path)
    asked = []

    def measure(key):
        asked.append(key)
        return {"size": 10 * key["x"]}

    figures = common.Figures("made_up", measure)
    assert [figures(x=x)["size"] for x in (1, 2, 1)] == [10, 20, 10]
    assert common.Figures("made_up")(x=2)["size"] == 20
    assert asked == [{"x": 1}, {"x": 2}]
