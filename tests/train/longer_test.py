"""Runs that go further than they began: texts longer than the model's positions, steps beyond the last."""

import json

import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers

from jaxpeft import cli, hf, peft
from jaxpeft.errors import InputError
from jaxpeft.train import begin
from tests import runs

SHORT = {"eval_data": None, "samples": 0, "batch_size": 2, "warmup": 1}


def test_a_scaling_goes_from_training_into_the_adapter_and_the_merged_checkpoint(files, cache, tmp_path, capsys):
    """Commands read it there, and so does transformers, with the same logits beyond the model's 64 positions."""
    args = runs.arguments(files, tmp_path / "run", steps=1, seq_len=100, rope_scaling="yarn=2", **SHORT)
    begin.train(args)
    adapter, model = tmp_path / "run" / "adapter", files / "model"
    assert json.loads((adapter / "jaxpeft.json").read_text())["rope_scaling"] == "yarn=2"

    flags = ["--model", str(model), "--adapter", str(adapter)]
    assert cli.main(["generate", *flags, "--prompt", "a", "--rope-scaling", "yarn=3"]) == 2
    assert "was trained with yarn=2" in capsys.readouterr().err
    assert cli.main(["merge", *flags, "--out", str(tmp_path / "merged")]) == 0
    written = json.loads((tmp_path / "merged" / "config.json").read_text())
    assert written["max_position_embeddings"] == 128
    assert written["rope_scaling"] == {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 64}

    tokens = np.random.default_rng(0).integers(2, 40, (1, 100)).astype(np.int32)
    ours, params, _ = peft.attach(adapter, *hf.load_pretrained(model, jnp.float32, rope_scaling="yarn=2"))
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    with torch.no_grad():
        expected = theirs(torch.tensor(tokens).long()).logits.numpy()
    np.testing.assert_allclose(ours.apply(params, {"tokens": tokens}), expected, atol=1e-4 * np.abs(expected).max())


def test_a_finished_run_goes_on_where_the_rate_is_constant(files, cache, tmp_path):
    settings = {**SHORT, "schedule": "constant", "checkpoint_every": 0, "out": tmp_path}
    for steps, resume in ((1, False), (3, True)):
        report = begin.train(runs.arguments(files, steps=steps, resume=resume, **settings))
    assert (report["steps"], report["resumed_from"], report["dtype"]) == (3, 1, "float32")
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2, 3] and rows[1]["lr"] == rows[2]["lr"]
    assert json.loads((tmp_path / "config.json").read_text())["arguments"]["steps"] == 3
    with pytest.raises(InputError, match="--steps 3 -> 1"):
        begin.train(runs.arguments(files, steps=1, resume=True, **settings))
