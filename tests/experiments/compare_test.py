"""The comparison: drawn from its data, what readings say, how a rate is found, which hours and files are counted."""

import functools
import re
from pathlib import Path

import jax
import numpy as np
import pytest
from matplotlib.figure import Figure
from peft.optimizers import create_lorafa_optimizer

import jaxpeft as jp
from experiments.compare import __main__ as command
from experiments.compare import contestants, memory, quality, table
from experiments.memory import common
from jaxpeft import assets, recipe
from jaxpeft import method as contract
from jaxpeft.hf import load_tokenizer
from jaxpeft.memory import planner
from tests import tiny
from tests.peft import reference

README = Path(__file__).parents[2] / "README.md"
DATA = {name: common.load(name, command.RESULTS) for name in ("memory", "quality")}


def test_document_is_drawn_from_the_data():
    drawn = table.document(DATA["memory"], DATA["quality"])
    assert drawn == (command.RESULTS / "compare.md").read_text()


def test_every_method_is_compared():
    members = {name for words in contestants.names() for name in words.split("+")}
    assert members == set(contract.names())


def bytes_of(trained=0, **figures):
    names = ("weights", "adapters", "optimizer", "gradients", "activations")
    return {"bytes": dict.fromkeys(names, 0) | figures, "backward": True, "trained": trained}


FULL = bytes_of(50, weights=200, gradients=200, optimizer=400, activations=1000)


@pytest.mark.parametrize(
    ("row", "said"),
    [
        (  # an adapter
            bytes_of(0.5, weights=100, adapters=2, gradients=2, optimizer=4, activations=1000),
            "saves 98.9% of gradients, masters and optimizer state; no activations",
        ),
        (  # over a packed base
            bytes_of(0.5, weights=25, adapters=2, gradients=2, optimizer=2, activations=700),
            "saves 99.1% of gradients, masters and optimizer state; 30% of the activations; "
            "holds the base in 25% of its bytes",
        ),
        (  # all weights, whose masters stand in the base's place
            bytes_of(50, weights=200, gradients=200, optimizer=400, activations=550),
            "saves no gradients, masters or optimizer state; 45% of the activations",
        ),
        (  # some of the base's own, in float32, and masters of others beside it
            bytes_of(22.5, weights=112, adapters=66, gradients=90, optimizer=180, activations=1100),
            "saves 50.3% of gradients, masters and optimizer state; keeps 10% more activations",
        ),
        (  # an adapter with frozen matrices of its own
            bytes_of(0.5, weights=100, adapters=132, gradients=2, optimizer=4, activations=1000),
            "saves 98.9% of gradients, masters and optimizer state; no activations; holds 130% more frozen weights",
        ),
        (
            {**bytes_of(weights=100), "backward": False},
            "no backward pass: saves gradients, masters, optimizer state and all activations",
        ),
    ],
)
def test_a_reading_says_what_the_bytes_say(row, said):
    """Beside full fine-tuning of a base of 100 bytes: 200 of gradients, 400 of moments, 100 of masters beyond it."""
    assert table.reading(row, FULL, 100) == said


def test_a_method_without_figures_says_why():
    refused = {**memory.key_of("llama3.2-3b", "bitfit", "matmuls"), "refused": "bitfit: the model has no biases"}
    said = {w: table.unmeasured([refused], "llama3.2-3b", w) for w in ("bitfit", "vqt", "base", "lora")}
    assert said == {
        "bitfit": "bitfit: the model has no biases",
        "vqt": "for models that classify rows",
        "base": "the model as it was",
        "lora": "",
    }


def test_what_nothing_beats_is_joined(monkeypatch, tmp_path):
    """In the picture, over axes of numbers."""
    points = [(1.0, 5.0, "small"), (2.0, 3.0, "middle"), (2.5, 4.0, "beaten"), (4.0, 2.0, "large")]
    assert table.front_of(points, 1) == [points[0], points[1], points[3]]
    assert table.front_of(points, -1) == [points[0]]
    drawn = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, path: drawn.append(figure))
    table.pareto(DATA["memory"], DATA["quality"], tmp_path / "pareto.png")
    first = drawn[0].axes[0]
    (line,) = first.lines
    assert first.get_ylabel() == "e2e_nlg: nats per token"
    assert list(line.get_xdata()) == sorted(line.get_xdata())
    assert list(line.get_ydata()) == sorted(line.get_ydata(), reverse=True)
    full = quality.at_best(DATA["quality"], "e2e_nlg", "full")
    assert line.get_ydata()[-1] == pytest.approx(np.mean([row["loss"] for row in full]))


def run(lr, seed, tune, task="qnli", method="lora", seconds=3600.0):
    own = {"task": task, "method": method, "lr": lr, "seed": seed}
    return {**own, "tune_loss": tune, "loss": tune + 1, "accuracy": 50.0, "cpu_seconds": seconds}


def test_the_best_rate_is_that_of_the_held_out_rows_and_counts_with_all_seeds():
    rows = [run(1e-3, 0, 0.7), run(2e-3, 0, 0.5), run(3e-3, 0, float("nan"))]
    assert quality.at_best(rows, "qnli", "lora") == []
    rows += [run(2e-3, 1, 0.6), run(2e-3, 2, 0.7), run(1e-3, 1, 0.1)]
    assert [(row["lr"], row["seed"]) for row in quality.at_best(rows, "qnli", "lora")] == [(2e-3, s) for s in (0, 1, 2)]


def test_a_rate_is_searched_from_the_method_s_default():
    """Downhill by two grid points and then by one; each run is asked for once by name, with seed 0."""
    asked = []

    def figures(task, method, lr, seed):
        asked.append(lr)
        return run(lr, seed, abs(np.log10(lr) + 3), task, method)

    assert quality.tune(figures, "banking77", "ia3") == 1e-3
    assert asked[0] == contract.about("ia3").defaults.lr and {6e-4, 1e-3, 2e-3} <= set(asked)
    asked.clear()
    quality.tune(figures, "qnli", "full")
    quality.tune(figures, "qnli", "lora")
    assert asked[0] == 3e-4 and 3e-3 in asked  # of full fine-tuning less, which learns nothing at an adapter's rate


def test_a_search_that_stays_at_chance_begins_elsewhere_too():
    """DoRA's rate lies beside a dent in a plateau, the valley at 0.01; full fine-tuning begins at its own alone."""
    losses = {2e-4: 1.09, 3e-3: 1.05, 1e-2: 0.9}

    def figures(task, method, lr, seed):
        return run(lr, seed, losses.get(lr, 1.1), task, method)

    assert contract.about("dora").defaults.lr == 2e-4
    assert quality.tune(figures, "mnli", "dora") == 1e-2
    assert quality.tune(figures, "mnli", "full") == 3e-4
    losses = {2e-4: 1.0, 3e-3: 1.05, 1e-2: float("nan")}
    assert quality.tune(figures, "mnli", "dora") == 2e-4


def test_a_rate_that_is_worse_than_one_before_it_is_not_tested(monkeypatch):
    """Other seeds than that which tunes are; what was the best so far is, and what is as good."""

    class Learned(quality.Runner):
        def __init__(self, task, words):
            self.protocol, self.rows, self.least = quality.DATA[task], quality.Rows([], [], []), np.inf
            self.trains = self.shows = False

        def setup(self, seed):
            return None, {}, {}

        def train(self, lr, seed, trainable, frozen, steps):
            return lr

        def scores(self, state, rows):
            return {"loss": state, "accuracy": 0.5}

    monkeypatch.setattr(quality, "runner", functools.cache(Learned))
    key = {"task": "qnli", "method": "lora"}
    runs = [(2e-3, 0), (3e-3, 0), (2e-3, 1), (2e-3, 0), (1e-3, 0), (2e-3, 0), (3e-3, 1)]
    rows = [quality.measure({**key, "lr": lr, "seed": seed}) for lr, seed in runs]
    assert all("tune_accuracy" in row for row in rows)
    assert ["accuracy" in row for row in rows] == [True, False, True, True, True, False, True]


def test_a_method_that_the_model_refuses_is_not_tuned():
    assert quality.tune(lambda **key: {**key, "refused": "no"}, "qnli", "prefix") is None


def test_a_method_has_the_options_that_fit_the_model():
    """Each of them, and its key on data tells them."""
    for model, of_model in contestants.OPTIONS.items():
        for words, options in of_model.items():
            for spec in contestants.make(words, model).specs:
                named = recipe.read(options)
                assert {name: spec.config[name] for name in named} == named
            if words != "pockengine":  # which has no defaults
                assert contestants.make(words).specs != contestants.make(words, model).specs
    assert quality.asked("e2e_nlg", "oft", lr=1.0) == {
        "task": "e2e_nlg", "method": "oft", "options": ["block_size=4"], "lr": 1.0
    }  # fmt: skip
    assert quality.asked("qnli", "oft") == {"task": "qnli", "method": "oft"}


@pytest.mark.parametrize("model", [*memory.MODELS, "stories260K", "MiniLM"])
def test_every_method_is_one_on_every_model(model):
    """So that no row's options, or the lack of them, end the filling of the table."""
    for words in contestants.names():
        assert contestants.make(words, model).specs
        assert memory.key_of(model, words, "blocks")["options"] == list(contestants.options(words, model))


def test_who_is_asked_where():
    assert quality.is_for("qnli", "probe") and not quality.is_for("e2e_nlg", "probe")
    assert all(quality.is_for("sentiment", words) for words in ("probe", "icl", "base", "mezo+lora"))
    assert not quality.is_for("induction", "probe") and not quality.is_for("qnli", "icl")
    assert quality.is_for("induction", "base") and not quality.is_for("qnli", "base")
    assert not quality.is_for("induction", "vera")
    assert quality.is_for("mnli", "vqt") and not quality.is_for("e2e_nlg", "vqt")
    assert all(quality.is_for("e2e_nlg", words) for words in contestants.names() if words != "vqt")
    assert all(set(few) <= set(contestants.everybody()) for few in quality.FEW.values())


def test_the_model_as_it_was_is_one_run_of_no_steps():
    asked = []
    figures = lambda **key: asked.append(key) or {**run(key["lr"], key["seed"], 3.0), **key, "exact": 1.0}
    quality.collect(figures, ["base"], ["induction"])
    assert asked == [{"task": "induction", "method": "base", "lr": 0.0, "seed": 0}]
    rows = [{**run(0.0, 0, 3.0), **asked[0], "exact": 1.25}]
    runs = quality.at_best(rows, "induction", "base")
    assert [table.plus_minus(runs, score, table.FORM[score]) for score in ("loss", "exact")] == ["4.000", "1.2"]


@pytest.mark.slow
def test_a_rate_is_the_same_after_layers_are_drawn_anew(shared_data, monkeypatch):
    """Steps of a tiny rate leave the base's loss where it was, beyond LISA's first draw after 20 of them."""
    monkeypatch.setenv("JAXPEFT_DATA", str(shared_data))
    monkeypatch.setitem(quality.DATA, "e2e_nlg", quality.DATA["e2e_nlg"]._replace(steps=24))
    whole = quality.rows_of("e2e_nlg")
    few = whole._replace(tune=whole.tune[:8], test=whole.test[:8])
    monkeypatch.setattr(quality, "rows_of", lambda task: few)
    key = {"task": "e2e_nlg", "seed": 0}
    base = quality.measure({**key, "method": "base", "lr": 0.0})
    lisa = quality.measure({**key, "method": "lisa", "lr": 1e-9})
    assert lisa["loss"] == pytest.approx(base["loss"], abs=1e-3)


def test_hours_are_those_of_the_methods_that_lack_runs():
    rows = [run(2e-3, seed, 0.5) for seed in quality.DATA["qnli"].seeds] + [
        {**run(1e-3, 0, 0.5, method="ia3"), "refused": "no"}
    ]
    assert quality.hours(rows, ["lora", "ia3", "full", "dora"], ["qnli"], runs=7) == {"qnli": 10.0}


@pytest.mark.parametrize("name", ["lora", "prefix", "houlsby", "svfit"])
def test_a_file_is_as_large_as_the_one_that_is_written(name, tmp_path):
    """In PEFT's form to the byte; in ours but for the header, which names the tensors."""
    method = contestants.make(name)
    step = planner.make_step(tiny.CONFIG, method, 2, 8, dtype="float32")
    base, params = tiny.model()
    _, trainable, rest = jp.setup(method, base, params, jax.random.key(0))
    adapted = jp.combine({path: leaf + 1 for path, leaf in trainable.items()}, rest)
    folder = jp.export_adapter(tmp_path / "adapter", adapted, method, base)
    written = (folder / memory.WEIGHTS).stat().st_size
    header = (
        0 if contract.about(name).peft else 8 + int.from_bytes((folder / memory.WEIGHTS).read_bytes()[:8], "little")
    )
    assert memory.file_bytes(step, method) == written - header


def test_pefts_flag_on_a_is_undone_and_ours_is_no_flag(tmp_path):
    """What the table says of LoRA-FA in PEFT's benchmark."""
    theirs = reference.make_peft(reference.write_base(tmp_path / "base"), r=2, target_modules=["q_proj"])
    create_lorafa_optimizer(theirs, r=2, lora_alpha=4, lr=1e-3)
    flags = lambda: {leaf.requires_grad for name, leaf in theirs.named_parameters() if "lora_A" in name}
    assert flags() == {False}
    with theirs.disable_adapter():
        pass
    assert flags() == {True}
    base, params = tiny.model()
    _, trainable, _ = jp.setup(jp.lora_fa(rank=2), base, params, jax.random.key(0))
    assert trainable and all(path.endswith("/b") for path in trainable)


def test_rows_that_tune_are_not_trained_on(shared_data, monkeypatch):
    monkeypatch.setenv("JAXPEFT_DATA", str(shared_data))
    rows = quality.rows_of.__wrapped__("banking77")
    assert (len(rows.train), len(rows.tune), len(rows.test), len(rows.labels)) == (693, 77, 3080, 77)
    assert not {row.line for row in rows.train} & {row.line for row in rows.tune}


def test_what_is_probed_is_the_prompt_and_its_answer(shared_data, monkeypatch):
    """All rows of sentiment, without the answer that they end with."""
    monkeypatch.setenv("JAXPEFT_DATA", str(shared_data))
    rows, probed = quality.rows_of("sentiment"), quality.prompts("sentiment")
    assert probed.labels == ("negative", "positive")
    tokenizer = load_tokenizer(assets.smollm2())
    for whole, asked in ((rows.train, probed.train), (rows.tune, probed.tune), (rows.test, probed.test)):
        assert {row.label for row in asked} == {0, 1} and len(asked) == len(whole) > 0
        for row, example in zip(asked, whole, strict=True):
            np.testing.assert_array_equal(row.ids, example.ids[: len(row.ids)])
            answer = tokenizer.decode(example.ids[len(row.ids) :], skip_special_tokens=True)
            assert answer.strip() == probed.labels[row.label]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--methods", "lora;nonsense"], "--methods: 'nonsense' is none of"),
        (["--tasks", "sst2"], "--tasks: 'sst2' is none of e2e_nlg"),
        (["--models", "gpt2"], "--models: 'gpt2' is none of llama3.2-3b"),
    ],
)
def test_unknown_names_are_refused(arguments, message, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["compare", *arguments])
    with pytest.raises(SystemExit, match="2"):
        command.main()
    assert message in capsys.readouterr().err


def test_the_readme_s_summary_is_the_data_s():
    """Totals under `matmuls` (of a stack that runs in its own way, its one plan), in brackets under `blocks`."""
    lines = re.findall(r"^\| (`\w[^|]*`) \| (\d[^|]*) \|", README.read_text(), re.MULTILINE)
    assert len(lines) >= 10
    for members, said in lines:
        totals, blocks = re.fullmatch(r"([\d. to]+?)(?: \(([\d. to]+)\))?", said.strip()).groups()
        for words in re.findall(r"`([^`]+)`", members):
            check = [(table.shown(DATA["memory"], memory.MODELS[0], words), totals)]
            if blocks:
                check.append((table.find(DATA["memory"], memory.MODELS[0], words, "blocks"), blocks))
            for row, text in check:
                low, *high = map(float, text.split(" to "))
                assert low <= round(row["bytes"]["total"] / 2**30, 1) <= (high or [low])[0], (words, text)
