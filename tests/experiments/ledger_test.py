"""The ledger of what steps move: its floor by hand and on compiled programs, its tables on the committed figures."""

import json

import pytest

from experiments.memory import common
from experiments.traffic import causes, floor, ledger
from jaxpeft.errors import InputError
from jaxpeft.memory import targets

D, F, V, LAYERS, HEADS = 64, 192, 128, 3, 4
CONFIG = {
    "model_type": "llama",
    "vocab_size": V,
    "hidden_size": D,
    "intermediate_size": F,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5,
}
TOKENS, GROUP, RANK = 1024, 256, 4
KEPT = {"block_input", "q_rotary", "k_rotary", "v_proj", "attention", "o_proj", "gate_proj", "up_proj"}
MAPS = 4 * D * D + 3 * D * F  # elements of a layer's kernels
FACTORS = RANK * (8 * D + 3 * (D + F))  # of its A and B


def counted(kept, **changes):
    return floor.floor(CONFIG, floor.Work(TOKENS, GROUP, RANK, kept, **changes))


def test_the_floor_of_a_plan_that_keeps_all_is_the_count_by_hand():
    found = counted(KEPT)
    forward = 17 * D + 4 * F  # q, k, v: 2 D each; attention 4; o 3; gate and up D + F each; down 2 F + 2 D
    backward = 26 * D + 6 * F
    factors = 11 * D + 4 * F  # inputs 6 D + 2 F, gradients of outputs 5 D + 2 F
    assert found["activations"] == LAYERS * TOKENS * (2 * (forward + backward + factors) + 2 * 4 * HEADS)
    assert found["weights"] == 2 * (2 * LAYERS * (TOKENS // GROUP) * MAPS + 2 * V * D)  # logits of all tokens at once
    low = 7 * 4 * RANK * TOKENS  # z and e of seven maps, written and read
    assert found["adapters"] == 2 * LAYERS * (2 * (TOKENS // GROUP) * FACTORS + low) + 2 * LAYERS * FACTORS
    assert found["loss"] == TOKENS * (2 * (4 * D + 2 * V) + 12)
    assert found["optimizer"] == found["offload"] == 0
    assert found["total"] == sum(size for part, size in found.items() if part != "total")


def test_what_is_not_kept_is_made_again_but_for_the_last_product():
    most, least = counted(KEPT), counted({"block_input"})
    again = 15 * D + 2 * F
    assert least["activations"] - most["activations"] == LAYERS * TOKENS * (2 * again + 4 * HEADS)
    assert least["weights"] - most["weights"] == 2 * LAYERS * (TOKENS // GROUP) * (MAPS - D * F)


def test_adam_and_the_host_are_counted_where_they_are():
    plain, more = counted(KEPT), counted(KEPT, optimizer=True, offloaded=1000)
    assert (
        more["optimizer"] - plain["optimizer"] == 7 * 4 * LAYERS * FACTORS
    )  # m, v, weights read and written; gradient
    assert more["offload"] - plain["offload"] == 2 * 1000


def test_the_heads_kernel_is_read_once_for_as_many_logits_as_there_may_be():
    work = floor.Work(4 * floor.LOGITS // (4 * V), GROUP, RANK, KEPT)
    layers = 2 * 2 * LAYERS * (work.tokens // GROUP) * MAPS
    assert floor.floor(CONFIG, work)["weights"] - layers == 2 * 4 * 2 * V * D


@pytest.mark.slow
@pytest.mark.parametrize(
    ("target", "dtype", "save", "optimizer"),
    [
        ("cpu", "float32", "blocks", 1),
        pytest.param("cpu", "float32", "matmuls", 0, marks=pytest.mark.slow),
        pytest.param("h200", "bfloat16", "matmuls", 1, marks=pytest.mark.slow),
    ],
)
def test_no_compiled_step_moves_less_than_its_floor(tmp_path, optimised, target, dtype, save, optimizer):
    try:
        targets.devices(targets.target(target))
    except InputError as error:
        pytest.skip(str(error))
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    key = {"geometry": str(tmp_path), "batch_size": 4, "seq_len": 256, "rank": RANK, "dtype": dtype, "method": "lora"}
    row = ledger.measure({**key, "save": save, "optimizer": optimizer, "target": target})
    assert row["floor"]["total"] <= row["bytes"]
    if target != "cpu":  # there each kernel is copied out of its stack, and what reads the copy reads no weights
        assert row["floor"]["weights"] <= row["categories"]["weights"]


@pytest.fixture(scope="module")
def rows():
    figures = common.Figures(ledger.NAME, folder=ledger.RESULTS)
    return ledger.collect(figures, ledger.states(figures.rows), ledger.TARGETS.split(","))


def test_tables_are_drawn_from_the_data(rows):
    assert ledger.document(rows) == (ledger.RESULTS / f"{ledger.NAME}.md").read_text()
    text = ledger.PAGE.read_text()
    assert ledger.BEGIN in text and ledger.page(text, rows) == text


def test_docstring_says_what_the_data_says(rows):
    text = " ".join(ledger.__doc__.split())
    for sentence in ledger.verdicts(rows):
        assert sentence in text


def test_figures_add_up(rows):
    for row in rows:
        assert row["floor"]["total"] == pytest.approx(sum(x for part, x in row["floor"].items() if part != "total"))
        assert row["fits"] <= (row["peak"] <= targets.target(row["target"]).usable_bytes)
        if "refused" in row:
            continue
        for field in ("kinds", "categories", "owners"):
            assert sum(row[field].values()) - row["host_bytes"] <= row["bytes"] * (1 + 1e-9)
        assert row["bytes"] == pytest.approx(row["read"] + row["written"])
        assert row["bound_s"] >= max(row["bandwidth_s"], row["rate_s"])


def test_causes_add_up_to_the_step_and_to_its_floor(rows):
    found = json.loads((ledger.RESULTS / f"{causes.NAME}.json").read_text())
    row = next(r for r in reversed(rows) if (r["case"], r["target"]) == (causes.CASE, causes.TARGET))
    assert sum(found["moved"].values()) == pytest.approx(row["bytes"], rel=1e-3)
    assert sum(found["floor"].values()) == pytest.approx(row["floor"]["total"], rel=1e-9)
    text = causes.table(found)
    assert text in ledger.PAGE.read_text() and text in (ledger.RESULTS / f"{causes.NAME}.md").read_text()


def test_what_rides_along_costs_more_by_modules():
    work = floor.Work(TOKENS, GROUP, RANK, KEPT)
    least, modules = causes.least(CONFIG, work), causes.by_modules(CONFIG, work)
    assert sum(least.values()) == pytest.approx(floor.floor(CONFIG, work)["total"])
    each = LAYERS * TOKENS * work.dtype
    assert modules["rotations of q and k"] == 12 * D * each  # three times q and k, read and written
    assert modules["SwiGLU"] - least["SwiGLU"] == 4 * F * each  # its product and that's gradient, written and read
    assert all(least[name] <= size for name, size in modules.items())
