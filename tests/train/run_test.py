"""A run's configuration: its types, defaults and checks, from Python."""

import dataclasses
import sys
import types
from pathlib import Path

import jax
import numpy as np
import pytest

import jaxpeft as jp
from jaxpeft import sites
from jaxpeft.errors import InputError
from jaxpeft.method import Spec
from jaxpeft.targets import chooses
from jaxpeft.train import run
from jaxpeft.train.run import Run
from tests import tiny


def test_no_arguments_are_a_whole_run():
    Run().check()
    settled = Run().settled().rated()
    assert (settled.seq_len, settled.lr, settled.dtype) == (256, 2e-3, None)
    other = Run(model="other", lr=1.0).settled().rated()
    assert (other.seq_len, other.lr, other.dtype) == (512, 1.0, None)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"steps": 0}, "--steps 0: must be at least 1"),
        ({"batch_size": -1}, "--batch-size -1"),
        ({"seq_len": 1}, "--seq-len 1"),
        ({"lr": 0.0}, "--lr 0.0"),
        ({"lr": float("nan")}, "--lr nan"),
        ({"clip": float("inf")}, "--clip inf"),
        ({"weight_decay": float("nan")}, "--weight-decay NaN"),
        ({"rank": 0}, "--rank 0: must be at least 1"),
        ({"seed": -1}, "--seed -1: must be from 0 to 4294967295"),
        ({"seed": 2**70}, f"--seed {2**70}: must be from 0 to 4294967295"),
        ({"accumulate": 3}, "--accumulate 3: must divide --batch-size 8"),
        ({"buckets": (64,)}, "--no-pack"),
        ({"buckets": (1024,), "pack": False}, "--buckets 1024"),
        ({"resume": True}, "--resume: needs --out"),
        ({"method_options": ("dropout",)}, "'dropout': must be NAME=VALUE"),
        ({"method_options": ("a=1", "a=2")}, "a is given twice"),
        ({"method_options": ("rank=1",), "rank": 2}, "rank is given twice"),
        ({"method_options": ("a=[",)}, "not YAML"),
        ({"method": "lora,full"}, "'lora,full': give one, or a chain joined by +"),
        # What the command line's parser does not let through, but Python does.
        ({"steps": "many"}, "--steps 'many': must be a whole number"),
        ({"steps": True}, "--steps True: must be a whole number"),
        ({"schedule": "stairs"}, "--schedule 'stairs': must be one of constant, linear, cosine"),
        ({"dtype": "int8"}, "--dtype 'int8': must be one of bfloat16, float32 or None"),
        ({"buckets": [16, "x"], "pack": False}, "must be a list, each a whole number"),
        ({"lr": "high"}, "--lr 'high': must be a number or None"),
        ({"pack": 1}, "--pack 1: must be true or false"),
        ({"data": 3}, "--data 3: must be text or None"),
        ({"out": 3}, "--out 3: must be a path or None"),
        ({"targets": ["q_proj", 3]}, "--targets ['q_proj', 3]: must be a list of names, or text or None"),
        ({"targets": ["q(.*)"]}, "--targets ['q(.*)']: must be a list of names, or text or None"),
    ],
)
def test_a_value_that_makes_no_sense_is_refused(changes, message):
    with pytest.raises(InputError) as caught:
        dataclasses.replace(Run(), **changes).check()
    assert message in str(caught.value)


def test_values_take_their_fields_types():
    made = Run(out="a/b", model=Path("m"), data=Path("d"), buckets=[4, 8], adapter="x")
    assert made == Run(out=Path("a/b"), model="m", data="d", buckets=(4, 8), adapter=Path("x"))


@pytest.mark.parametrize("names", [["q_proj", "v_proj"], ["self_attn.q_proj"], ("k_proj",)])
def test_a_list_of_targets_chooses_what_it_does_in_the_methods_factory(names):
    params = tiny.model()[1]
    targets = Run(targets=names).targets
    assert isinstance(targets, str)
    assert sites.find(params, targets) == sites.find(params, names)
    assert [site for site in sites.find(params) if chooses(targets, site)] == sites.find(params, names)


def test_a_list_of_one_name_is_no_expression():
    """Which would be found in every site; no site ends with it."""
    params = tiny.model()[1]
    assert len(sites.find(params, "proj")) > 1
    with pytest.raises(InputError, match="targets 'proj': matches no linear site"):
        sites.find(params, Run(targets=["proj"]).targets)


def test_options_may_be_a_mapping():
    options = {"meft": {"lam": "1/8"}, "lora.rank_pattern": {"v_proj": 2, "q_proj": 1}, "targets": ("q_proj", "1e3")}
    made = Run(method="meft+lora", method_options=options)
    assert all(isinstance(word, str) for word in made.method_options)
    meft, lora = made.make_method().specs
    assert meft.config["lam"] == "1/8"
    assert lora.config["targets"] == ["q_proj", "1e3"]
    assert list(lora.config["rank_pattern"].items()) == [("v_proj", 2), ("q_proj", 1)]
    with pytest.raises(InputError, match="method option alpha: YAML cannot hold"):
        Run(method_options={"alpha": object()})


def test_settings_are_those_given_with_their_types():
    options = ("dropout=0.1", "init=pissa", "lr_ratio=1e1", "rslora=true", "rank-pattern={q_proj: 4}")
    (spec,) = Run(rank=8, targets=".*q_proj", method_options=options).make_method().specs
    assert spec == Spec(
        "lora",
        {
            "rank": 8,
            "alpha": None,
            "targets": ".*q_proj",
            "init": "pissa",
            "dropout": 0.1,
            "rslora": True,
            "lr_ratio": 10.0,
            "rank_pattern": {"q_proj": 4},
            "alpha_pattern": None,
            "init_options": None,
        },
    )
    assert Run().make_method().specs == jp.lora().specs


def test_fresh_directories_are_the_free_ones(tmp_path):
    assert next(run.fresh_directories(tmp_path / "out")) == tmp_path / "out" / "run-1"
    for name in ("run-1", "run-2", "run-4"):
        (tmp_path / name).mkdir()
    (tmp_path / "run-4" / ".lock").write_text("")  # of a process that was killed in its start, or is in it
    free = run.fresh_directories(tmp_path)
    assert [next(free).name for _ in range(3)] == ["run-3", "run-4", "run-5"]
    assert not (tmp_path / "run-3").exists()


def test_jp_run_takes_a_run_or_its_fields(monkeypatch, tmp_path):
    begin = types.ModuleType("jaxpeft.train.begin")
    begin.train = lambda run: {"run": run}
    monkeypatch.setitem(sys.modules, "jaxpeft.train.begin", begin)
    monkeypatch.chdir(tmp_path)
    by_fields = jp.run(method="meft+lora", rank=4, steps=3)
    assert by_fields == jp.run(jp.Run(method="meft+lora", rank=4, steps=3))
    assert by_fields == jp.run(jp.Run(method="meft+lora", rank=4), steps=3)
    assert by_fields["run"].out == Path("out/run-1")
    with pytest.raises(InputError, match="a run has no 'batch_sise'; did you mean batch_size?"):
        jp.run(batch_sise=3)
    with pytest.raises(InputError, match="--steps 0"):
        jp.run(steps=0)


@pytest.mark.slow
def test_a_whole_run_of_a_chain_from_python(files, cache, tmp_path):
    """The report is that of the folder, under the chain's names; the adapter is read again as the same chain."""
    report = jp.run(
        model=files / "model",
        data=files / "train.jsonl",
        eval_data=files / "eval.jsonl",
        out=tmp_path / "run",
        method="meft+lora",
        method_options={"meft": {"width": 2}},
        rank=2,
        steps=2,
        batch_size=4,
        seq_len=16,
        dtype="float32",
        samples=0,
    )
    assert report["method"] == "meft + lora" and report["steps"] == 2
    assert np.isfinite(report["eval_loss_after"])
    assert (tmp_path / "run" / "report.json").exists()
    method, leaves = jp.import_adapter(tmp_path / "run" / "adapter", jp.load_pretrained(files / "model")[0].config)
    assert method.specs == jp.chain(jp.meft(width=2), jp.lora(rank=2)).specs
    assert {path.split("/")[-2] for path in leaves} == {"meft", "lora"}


def test_a_clip_that_nothing_would_obey_is_refused():
    with pytest.raises(InputError, match="--clip 0.5: has no effect with mezo\\+lora"):
        Run(method="mezo+lora", clip=0.5).settled().rated()
    assert Run(method="mezo+lora").settled().rated().lr == 5e-5


def test_an_adapter_brings_its_methods_rate_and_direction(tmp_path):
    """Of one of ours by jaxpeft.json, of one of PEFT's by its peft_type; another --method is refused."""
    base, params = tiny.model()
    mezo = jp.chain(jp.lora(2), jp.mezo())
    for name, method in (("prompt", jp.prompt(2)), ("mezo", mezo)):
        _, trainable, rest = jp.setup(method, base, params, jax.random.key(0))
        jp.export_adapter(tmp_path / name, jp.combine(trainable, rest), method, base.config)
    assert Run(adapter=tmp_path / "prompt").rated().lr == 1e-2
    assert Run(adapter=tmp_path / "prompt", lr=0.5, method="prompt").rated().lr == 0.5
    assert Run(adapter=tmp_path / "mezo").rated().lr == 5e-5
    with pytest.raises(InputError, match=r"--clip 0.5: has no effect with lora\+mezo"):
        Run(adapter=tmp_path / "mezo", clip=0.5).rated()
    with pytest.raises(InputError, match="--optimizer lion: lora.mezo steps along the gradients themselves"):
        Run(adapter=tmp_path / "mezo", optimizer="lion").rated()
    with pytest.raises(InputError, match=r"mezo: is of lora\+mezo, not of --method vera; leave that out"):
        Run(adapter=tmp_path / "mezo", method="vera").check()
    for name in ("prompt", "mezo"):
        (tmp_path / name / "jaxpeft.json").unlink()
    assert Run(adapter=tmp_path / "prompt").rated().lr == 1e-2
    assert Run(adapter=tmp_path / "mezo", model="other").rated().lr == 2e-4  # LoRA's, as PEFT knows it
    (tmp_path / "mezo" / "adapter_model.safetensors").unlink()
    with pytest.raises(InputError, match="mezo: has no adapter_model.safetensors"):
        Run(adapter=tmp_path / "mezo").rated()
