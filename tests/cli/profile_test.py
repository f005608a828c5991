"""`jaxpeft profile` in process, on the CPU target."""

import json

import jax
import pytest

from jaxpeft import cli
from tests import tiny

STEP = ["--batch-size", "2", "--seq-len", "64", "--rank", "4", "--targets", "all-linear"]


@pytest.fixture
def model(tmp_path):
    """A folder with nothing but a config.json: the weights are not needed."""
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(tiny.CONFIG))
    return str(folder)


def weights():
    """Bytes of the model's weights in float32, as on a CPU, counted on its own initialisation."""
    return 4 * sum(leaf.size for leaf in jax.tree.leaves(tiny.model()[1]))


def test_one_document_and_the_files(model, tmp_path, capsys):
    out, dump = tmp_path / "out", tmp_path / "xla"
    assert cli.main(["profile", "--model", model, *STEP, "--out", str(out), "--dump", str(dump), "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert (document["method"], document["target"], document["save"]) == ("lora", "cpu", "matmuls")
    found = document["profile"]
    assert found["categories"]["weights"] == document["bytes"]["weights"] == weights()
    assert found["categories"]["adapters"] == document["bytes"]["adapters"]
    assert found["categories"]["optimizer"] >= document["bytes"]["optimizer"]
    assert found["unattributed_bytes"] <= 0.02 * found["live_bytes"]
    # The compiler's total has no constants, which the executable holds.
    assert found["total_bytes"] - found["categories"].get("constants", 0) == document["bytes"]["total"]
    owners = found["owners"]
    assert sum(row["bytes"] for row in owners) == sum(found["categories"].values()) == found["total_bytes"]
    assert len(owners) == 21 and owners[-1]["owner"].endswith("further owners")

    assert sorted(path.name for path in out.iterdir()) == ["profile.html", "profile.json", "profile.png"]
    assert json.loads((out / "profile.json").read_text()) == document
    assert (out / "profile.png").read_bytes().startswith(b"\x89PNG")
    page = (out / "profile.html").read_text()
    assert page.startswith("<!DOCTYPE html>") and "lora, batch 2 x 64, float32, cpu, matmuls" in page
    for kind in ("hlo.pb", "txt", "buffer-assignment.txt", "live-range.txt"):
        assert list(dump.glob(f"*after_optimizations*{kind}")), kind


@pytest.mark.parametrize(("method", "moments"), [("mezo", 0), ("galore", None)])
def test_weights_that_a_method_moves_are_weights(method, moments, model, capsys):
    """As `plan` counts them; where nothing has a gradient, the state is the step's number and key."""
    rank = ["--rank", "4"] if method == "galore" else []
    step = ["--batch-size", "2", "--seq-len", "16", "--method", method, *rank]
    assert cli.main(["profile", "--model", model, *step, "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    found, planned = document["profile"]["categories"], document["bytes"]
    assert found["weights"] == planned["weights"] == weights()
    assert found.get("adapters", 0) == planned["adapters"]
    assert planned["optimizer"] if moments is None else planned["optimizer"] == moments
    assert 0 < found["optimizer"] - planned["optimizer"] <= 16


@pytest.mark.slow
def test_a_chain(model, capsys):
    chain = ["--method", "meft+lora", "--method-options", "meft.width=4", "lora.targets=mlp"]
    step = ["--batch-size", "2", "--seq-len", "64", "--rank", "4", "--limit", "200"]
    assert cli.main(["profile", "--model", model, *step, *chain, "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["method"] == "meft+lora"
    owners = " ".join(row["owner"] for row in document["profile"]["owners"])
    assert "meft" in owners


def test_what_a_reader_sees(model, capsys):
    assert cli.main(["profile", "--model", model, *STEP, "--save", "blocks", "--limit", "3"]) == 0
    out = capsys.readouterr().out
    assert "batch 2 x 64 tokens, float32, cpu, --save blocks" in out
    for word in ("category", "weights", "adapters", "owner", "further owners"):
        assert word in out


@pytest.mark.parametrize(
    ("flags", "parts"),
    [
        (["--target", "h2000"], ["target 'h2000'", "did you mean h200"]),
        (["--target", "h200:2x2"], ["only a TPU has a slice shape"]),
        (["--model", "llama2-8b"], ["llama2-8b", "llama2-7b"]),
        (["--method", "lora,lora_fa"], ["--method lora,lora_fa", "one at a time"]),
        (["--method", "lorra"], ["unknown method 'lorra'", "lora"]),
        (["--save", "some"], ["'some'"]),
        (["--save", "gate=save"], ["no activation is called 'gate'", "gate_proj"]),
        (["--limit", "0"], ["--limit 0"]),
        (["--batch-size", "0"], ["--batch-size 0"]),
    ],
)
def test_a_mistake_is_one_line(flags, parts, capsys):
    assert cli.main(["profile", *flags]) == 2
    assert_one_line(capsys, parts)


@pytest.mark.parametrize("flag", ["--out", "--dump"])
def test_nothing_is_overwritten(flag, tmp_path, capsys):
    (tmp_path / "kept.txt").write_text("mine")
    assert cli.main(["profile", flag, str(tmp_path)]) == 2
    assert_one_line(capsys, [f"{flag} {tmp_path}", "already exists"])
    assert cli.main(["profile", flag, str(tmp_path / "kept.txt")]) == 2
    assert_one_line(capsys, ["already exists"])
    assert (tmp_path / "kept.txt").read_text() == "mine"


def assert_one_line(capsys, parts):
    out, err = capsys.readouterr()
    lines = [line for line in err.splitlines() if not line.startswith("compiling ")]
    assert out == "" and len(lines) == 1 and lines[0].startswith("jaxpeft: error: ")
    for part in parts:
        assert part in lines[0]
