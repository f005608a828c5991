"""`jaxpeft plan` as its user meets it."""

import json
import subprocess
import sys

import pytest

from jaxpeft import cli
from jaxpeft.backward import residuals
from jaxpeft.memory import planner, search
from tests import tiny

SMALL = ["--batch-size", "2", "--seq-len", "32", "--dtype", "float32"]


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    path = tmp_path_factory.mktemp("model") / "config.json"
    path.write_text(json.dumps(tiny.CONFIG))
    return str(path)


def document(capsys, *flags):
    assert cli.main(["plan", *SMALL, "--json", *flags]) == 0
    return json.loads(capsys.readouterr().out)


@pytest.mark.slow
def test_a_kernel_that_does_not_serve_is_one_line(config):
    """On stderr, once, without a place in our code."""
    pytest.importorskip("jax_plugins.xla_cuda13")
    command = [sys.executable, "-m", "jaxpeft", "plan", *SMALL, "--model", config, "--rank", "2", "--target", "a100"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    lines = [line for line in done.stderr.splitlines() if "kernel" in line]
    assert lines == ["jaxpeft: the mosaic_gpu kernels run on compute capability 9.x, not 8.0; plain JAX runs instead"]


def test_rows_for_methods_and_plans(config, capsys, tmp_path):
    picture = tmp_path / "bars.png"
    flags = ["--model", config, "--method", "full,lora", "--rank", "2", "--save", "matmuls;blocks"]
    found = document(capsys, *flags, "--picture", str(picture))
    rows = found["rows"]
    assert [(row["method"], row["save"]) for row in rows] == [
        (method, save) for method in ("full", "lora") for save in ("matmuls", "blocks")
    ]
    named = "weights adapters optimizer gradients activations workspace arguments temporaries total".split()
    assert all(set(row["bytes"]) == set(named) for row in rows)
    full, lora = rows[0]["bytes"], rows[2]["bytes"]
    assert full["adapters"] == 0 and full["optimizer"] > 2 * full["weights"] - 1
    assert 0 < lora["gradients"] == lora["adapters"] < full["gradients"]
    assert picture.read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_chains_are_rows_of_their_own(config, capsys):
    flags = ["--model", config, "--method", "lora,meft + lora,meft", "--rank", "2", "--method-options", "meft.width=4"]
    rows = document(capsys, *flags)["rows"]
    assert [row["method"] for row in rows] == ["lora", "meft+lora", "meft"]
    lora, both, meft = (row["bytes"]["adapters"] for row in rows)
    assert both == lora + meft and min(lora, meft) > 0


@pytest.mark.parametrize("budget", [(), ("--budget", "1GiB")], ids=["plan", "budget"])
def test_a_method_that_is_refused_is_said_before_the_first_compilation(config, capsys, budget):
    step = ["--model", config, *SMALL, "--method", "ln_tuning,bitfit", "--target", "cpu"]
    assert cli.main(["plan", *step, *budget]) == 2
    out, err = capsys.readouterr()
    assert out == "" and "bitfit: the model has no biases" in err and err.count("\n") == 1


def test_the_table(config, capsys):
    assert cli.main(["plan", "--model", config, *SMALL]) == 0
    printed = capsys.readouterr().out
    assert "activations" in printed and "--save matmuls" in printed and "batch 2 x 32" in printed


@pytest.mark.parametrize("form", residuals.FORMS)
def test_the_largest_is_searched_under_the_form_that_was_asked_for(form, config, capsys, monkeypatch):
    """By a compiler in whose figures 2 x 32 tokens are a hundredth of the room."""
    whole, rows, forms = planner.row, [], set()

    def row(step, device):
        if not rows:
            rows.append(whole(step, device))
        forms.add(step.form)
        total = device.usable_bytes * step.rows * step.length // (100 * 2 * 32)
        return {**rows[0], "bytes": {**rows[0]["bytes"], "total": total}}

    for module in (planner, search):  # which has its own name for it, and must not keep this one
        monkeypatch.setattr(module, "row", row)
    flags = ["--model", config, "--rank", "2", "--save", "blocks", "--remat", form, "--largest"]
    (found,) = document(capsys, *flags)["rows"]
    assert forms == {form} and found["remat"] == form
    assert (found["largest_batch"], found["longest_sequence"]) == (200, 128)  # of the model's 128 positions


@pytest.mark.slow
def test_a_budget_prints_a_plan_that_it_takes_back(config, capsys):
    plain = document(capsys, "--model", config, "--save", "blocks;matmuls")["rows"]
    budget = (plain[0]["bytes"]["total"] + plain[1]["bytes"]["total"]) // 2
    (row,) = document(capsys, "--model", config, "--budget", str(budget))["rows"]
    assert row["bytes"]["total"] <= budget == row["budget_bytes"]
    assert plain[1]["recompute_flops"] < row["recompute_flops"] < plain[0]["recompute_flops"]
    (again,) = document(capsys, "--model", config, "--save", row["save"])["rows"]
    assert again["bytes"] == row["bytes"]


@pytest.mark.parametrize(
    "flags, said",
    [
        (["--target", "h2000"], "target 'h2000' is not known; did you mean h200"),
        (["--target", "v5p:3x3"], "a slice of v5p has 3 dimensions"),
        (["--model", "llama2-7"], "llama2-7b"),
        (["--method", "lorra"], "unknown method 'lorra'"),
        (["--method", "lora,meft+"], "method 'meft+': a name is missing beside +"),
        (["--method", "meft,full", "--rank", "2"], "method meft, full takes no rank"),
        (["--method", "lora,meft", "--method-options", "vqt.queries=1"], "the methods are lora, meft, not vqt"),
        (["--method", "meft+lora", "--method-options", "dropout=0.1"], "write meft.dropout or lora.dropout"),
        (["--save", "matmul"], "unknown preset 'matmul'"),
        (["--save", "matmuls,gate=save"], "no activation is called 'gate'"),
        (["--save", "blocks,gate_proj=keep"], "should be NAME=ACTION"),
        (["--budget", "24 gigs"], '--budget "24 gigs": should be a size such as 24GiB'),
        (["--budget", "1KiB"], "the arguments alone"),
        (["--budget", "1GiB", "--actions", "save,zip"], "unknown action 'zip'"),
        (["--actions", "save"], "--actions save: says what --budget may do; add --budget"),
        (["--budget", "1GiB", "--save", "blocks"], "--save blocks: --budget searches the plan"),
        (["--budget", "1GiB", "--remat", "policy"], "--remat policy: --budget searches plans of the loops"),
        (["--by", "time"], "--by time: says what --budget finds the least of; add --budget"),
        (["--by", "time", "--budget", "1GiB"], "--by time: bandwidth and rate of cpu are not known; use --by flops"),
        (
            ["--by", "time", "--budget", "1GiB", "--target", "tpu7x", "--actions", "save,offload"],
            "--by time: the bandwidth between tpu7x and its host is not known; leave offload out",
        ),
        (["--by", "luck", "--budget", "1GiB"], '--by "luck": must be one of'),
        (["--save", "compressed", "--remat", "policy"], "compressed cannot be: a policy says where a value lies"),
        (["--picture", "bars.txt"], "--picture bars.txt: must end with .png, .svg or .pdf"),
        (["--picture", "absent/bars.png"], "--picture absent/bars.png: there is no folder absent"),
        (["--batch-size", "0"], "--batch-size 0: must be at least 1"),
        (["--accumulate", "3"], "--accumulate 3: must divide --batch-size 2"),
        (["--check", "--target", "h200"], "--check: the target is h200, attached is cpu"),
    ],
)
def test_one_line_for_a_mistake(config, capsys, flags, said):
    assert cli.main(["plan", "--model", config, *SMALL, *flags]) == 2
    out, err = capsys.readouterr()
    line = err.strip().splitlines()[-1]
    assert out == "" and line.startswith("jaxpeft: error: ") and said in line
