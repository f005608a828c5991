"""Every document that is read, damaged: success, or one line; nothing else changes."""

import contextlib
import json
import shutil
import warnings

import jax
import pytest

import jaxpeft as jp
from jaxpeft import checksums, data, hf, models, special, template, tree
from jaxpeft.checksums import LATER
from jaxpeft.cli import train
from jaxpeft.cli.export import chosen_step
from jaxpeft.method import from_specs
from jaxpeft.models.labels import names
from jaxpeft.peft import adapter_labels, adapter_rope_scaling, attach, export_adapter
from jaxpeft.train import config, metrics
from jaxpeft.train.report import print_report
from tests import runs, tiny
from tests.fuzz.damage import amounts, documents, holds, untouched


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    return runs.make_files(tmp_path_factory.mktemp("files"))


ADAPTERS = {"peft": jp.lora(2, targets="q_proj"), "own": jp.lst(reduction=2)}


@pytest.fixture(scope="module")
def adapters(tmp_path_factory):
    """{name: folder} of an adapter in PEFT's form and one in ours."""
    folder, (model, params) = tmp_path_factory.mktemp("adapters"), tiny.model()
    for name, method in ADAPTERS.items():
        _, trainable, frozen = jp.setup(method, model, params, jax.random.key(1))
        export_adapter(folder / name, tree.combine(trainable, frozen), method, model.config)
    return folder


@amounts
@pytest.mark.parametrize("form", ADAPTERS)
@pytest.mark.parametrize("name", ["adapter_config.json", "jaxpeft.json"])
def test_an_adapters(name, form, amount, adapters, tmp_path):
    model, params = tiny.model()
    folder = tmp_path / "adapter"
    shutil.copytree(adapters / form, folder)
    batch = tiny.batch(rows=1, length=4)

    def read(text):
        (folder / name).write_bytes(text)
        with untouched(tmp_path):
            adapter_labels(folder)
            adapter_rope_scaling(folder)
            adapted, both, _ = attach(folder, model, params)
            jax.eval_shape(adapted.apply, both, batch)  # what is read can be computed with

    holds(documents(json.loads((adapters / form / name).read_text())), amount, read)


@amounts
def test_a_checkpoints_configuration(amount, files, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(files / "model", folder)
    good = json.loads((folder / "config.json").read_text())
    rope = {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 32}
    good |= {"rope_scaling": rope, "id2label": {"0": "a"}, "hidden_act": "silu", "head_dim": 8}

    def read(text):
        (folder / "config.json").write_bytes(text)
        with untouched(tmp_path):
            raw = hf.load_config(folder)
            models.compute_dtype(raw)
            names(raw)
            hf.load_tokenizer(folder)
            model, params = hf.load_pretrained(folder)
            jax.eval_shape(model.apply, params, {**tiny.batch(rows=1, length=4, vocab=40)})

    holds(documents(good), amount, read)


@amounts
@pytest.mark.parametrize("name", ["generation_config.json", "tokenizer_config.json", "special_tokens_map.json"])
def test_a_checkpoints_small_files(name, amount, files, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(files / "model", folder)
    good = {
        "generation_config.json": {"eos_token_id": [1, 2], "bos_token_id": 0, "temperature": 0.5},
        "special_tokens_map.json": {"bos_token": "<s>", "eos_token": {"content": "</s>", "lstrip": False}},
    }.get(name) or json.loads((folder / name).read_text()) | {"chat_template": "{{ messages[0].content }}"}

    def read(text):
        (folder / name).write_bytes(text)
        with untouched(tmp_path):
            special.special_tokens(folder, hf.load_tokenizer(folder))

    holds(documents(good), amount, read)


@amounts
def test_a_tokenizer(amount, files, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(files / "model", folder)
    good = json.loads((folder / "tokenizer.json").read_text())
    replace = {"type": "Replace", "pattern": {"String": "a"}, "content": "b"}
    good["normalizer"] = {"type": "Sequence", "normalizers": [{"type": "NFC"}, replace]}

    def read(text):
        (folder / "tokenizer.json").write_bytes(text)
        with untouched(tmp_path):
            tokenizer = hf.load_tokenizer(folder)
            special.special_tokens(folder, tokenizer)
            data.encode_prompt("a ab " * 20, tokenizer)

    holds(documents(good), amount, read)


@amounts
def test_an_index_of_shards(amount, tmp_path):
    _, params = tiny.model()
    folder = hf.save_pretrained(tmp_path / "model", tiny.CONFIG, params, max_shard_gb=2e-5)
    file = folder / "model.safetensors.index.json"

    def read(text):
        file.write_bytes(text)
        with untouched(tmp_path):
            hf.load_pretrained(folder)

    holds(documents(json.loads(file.read_text())), amount, read)


@amounts
def test_what_text_was_made_by(amount, tmp_path):
    file = tmp_path / template.FILE

    def read(text):
        file.write_bytes(text)
        template.find(tmp_path)

    holds(documents({"template": "chat", "date": "2026-03-01", "source": "{{ messages }}"}), amount, read)


@pytest.fixture(scope="module")
def begun(files, tmp_path_factory):
    """A run of two steps."""
    out = tmp_path_factory.mktemp("begun") / "run"
    train.run(runs.arguments(files, out, steps=2, checkpoint_every=1, eval_every=1, samples=0))
    return out


@amounts
@pytest.mark.parametrize("name", ["config.json", "report.json"])
def test_a_runs(name, amount, begun, tmp_path, capsys):
    good = json.loads((begun / name).read_text())

    def read(text):
        (tmp_path / name).write_bytes(text)
        if name == "report.json":
            print_report(config.read_report(tmp_path))
            return
        document = config.read(tmp_path)
        from_specs(document["method"])
        config.check_same(tmp_path, document, json.loads((begun / name).read_text()))
        if document.get("text"):
            template.from_document(document["text"], str(tmp_path))

    holds(documents(good), amount, read)


@amounts
def test_a_runs_metrics(amount, begun, tmp_path):
    rows = [json.loads(line) for line in (begun / "metrics.jsonl").read_text().splitlines()]

    def read(text):
        (tmp_path / "metrics.jsonl").write_bytes(text.replace(b"}, {", b"}\n{").strip(b"[]") + b"\n")
        metrics.read(tmp_path / "metrics.jsonl")

    holds(documents(rows), amount, read)


@amounts
@pytest.mark.parametrize("name", ["meta/metadata", "sha256.json"])
def test_a_checkpoint_of_a_run(name, amount, begun, tmp_path):
    folder = tmp_path / "checkpoints"
    shutil.copytree(begun / "checkpoints", folder)
    newest = folder / "2"
    before = (newest / name).read_bytes()

    def same(text):
        """Whether it says as much; a process may die before the sums of LATER are added."""
        if name != checksums.NAME:
            return text == before
        with contextlib.suppress(ValueError, RecursionError):
            now, then = json.loads(text), json.loads(before)
            return isinstance(now, dict) and now == {x: y for x, y in then.items() if x in now or x not in LATER}
        return False

    def read(text):
        (newest / name).write_bytes(text)
        with untouched(tmp_path), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            assert chosen_step(folder, None, True) == (2 if same(text) else 1)

    holds(documents(json.loads(before)), amount, read)
