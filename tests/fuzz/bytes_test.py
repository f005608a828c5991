"""Binary files, damaged: weights, adapters, GGUF, and every file of a checkpoint."""

import hashlib
import json
import shutil
import struct

import jax
import numpy as np
import pytest
from hypothesis import strategies as st
from safetensors.numpy import load_file, save

import jaxpeft as jp
from jaxpeft import checkpoint, hf, tree
from jaxpeft.checkpoint import Checkpoints, faults
from jaxpeft.errors import InputError, RunError
from jaxpeft.peft import attach, export_adapter
from tests import gguf_test, runs, tiny
from tests.checkpoint_test import make
from tests.fuzz.damage import amounts, broken, documents, holds, untouched


def with_header(header: bytes, data: bytes) -> bytes:
    """A safetensors file of this header."""
    return struct.pack("<Q", len(header)) + header + data


def safetensors(good: bytes) -> st.SearchStrategy[bytes]:
    """Of a safetensors file: its header damaged as a document, or its bytes anywhere in the header."""
    (length,) = struct.unpack("<Q", good[:8])
    header, data = json.loads(good[8 : 8 + length]), good[8 + length :]
    odd = (None, -1, 0, 2**40, 2**63, 1.5, "F32", "I64", "F8_E4M3", "", [], [2**31, 2**31], [-1], {}, {"x": 1})
    return st.one_of(
        documents(header, odd).map(lambda text: with_header(text, data)),
        broken(good, 8 + length),
        st.sampled_from((b"", b"\0" * 8, struct.pack("<Q", 2**63), with_header(b"{" * 10**6, b""))),
    )


@amounts
def test_a_checkpoints_weights(amount, tmp_path):
    folder = runs.make_files(tmp_path) / "model"
    file = folder / "model.safetensors"

    def read(data):
        file.write_bytes(data)
        with untouched(tmp_path):
            hf.load_pretrained(folder)

    holds(safetensors(file.read_bytes()), amount, read)


@amounts
@pytest.mark.parametrize("form", ["peft", "own"])
def test_an_adapters_tensors(form, amount, tmp_path):
    """With a jaxpeft.json that speaks of the damaged tensors, as one would write it to be believed."""
    method = jp.lora(2, targets="q_proj") if form == "peft" else jp.lst(reduction=2)
    model, params = tiny.model()
    _, trainable, frozen = jp.setup(method, model, params, jax.random.key(1))
    folder = tmp_path / "adapter"
    export_adapter(folder, tree.combine(trainable, frozen), method, model.config)
    file, own = folder / "adapter_model.safetensors", folder / "jaxpeft.json"
    before, document = tree.flatten(params), json.loads(own.read_text())
    tensors = load_file(file)
    odd = (
        lambda x: x[..., :1].copy(),
        lambda x: x.astype(np.int32),
        lambda x: x.astype(np.float16),
        lambda x: x * np.float32("nan"),
        lambda x: x[None],
        lambda x: np.zeros((), np.float32),
    )

    @st.composite
    def changed(draw):
        found = dict(tensors)
        name = draw(st.sampled_from(sorted(found)))
        action = draw(st.sampled_from(("change", "drop", "rename", "add")))
        if action == "change":
            found[name] = draw(st.sampled_from(odd))(found[name])
        elif action == "add":
            found[draw(st.sampled_from(("norm/scale", "layers/mlp/up_proj/kernel", "x")))] = found[name]
        else:
            array = found.pop(name)
            found |= {draw(st.sampled_from(("norm/scale", "x", name + ".x"))): array} if action == "rename" else {}
        return save(found)

    def read(data):
        file.write_bytes(data)
        own.write_text(json.dumps({**document, "sha256": hashlib.sha256(data).hexdigest()}))
        with untouched(tmp_path):
            adapted, both, _ = attach(folder, model, params)
            jax.eval_shape(adapted.apply, both, tiny.batch(rows=1, length=4))
            after = tree.flatten(both)
            assert all(after[path] is leaf for path, leaf in before.items())  # the base is the base's own

    holds(st.one_of(safetensors(save(tensors)), changed()), amount, read)


@amounts
def test_a_gguf_file(amount, tmp_path):
    file = tmp_path / "model.gguf"
    gguf_test.make(file, kinds="Q4_0 Q8_0")
    data = file.read_bytes()
    fields, tensors = data.index(b"tokenizer.ggml.tokens"), data.rindex(b"output_norm.weight")

    def read(damaged):
        file.write_bytes(damaged)
        with untouched(tmp_path):
            hf.load_config(file)
            hf.load_pretrained(file)
            hf.load_tokenizer(file)

    in_front = broken(data, fields)  # numbers of things, and the fields before the vocabulary
    among_tensors = broken(data[: tensors + 64], None).map(lambda head: head + data[tensors + 64 :])
    holds(st.one_of(in_front, in_front, among_tensors), amount, read)


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    """A folder with two whole checkpoints."""
    folder = tmp_path_factory.mktemp("good")
    with Checkpoints(folder) as checkpoints:
        for step in (5, 10):
            checkpoints.save(make(step, seed=step), {"eval_loss": 1.0})
    return folder


@amounts
def test_a_changed_byte_of_a_checkpoint_is_found(amount, good, tmp_path):
    """Any byte of any file; what is read of it is a whole one, or nothing."""
    names = sorted(
        path.relative_to(good) for path in (good / "10").rglob("*") if path.is_file() and path.stat().st_size
    )

    @st.composite
    def places(draw):
        name = draw(st.sampled_from(names))
        return name, draw(st.integers(0, (good / name).stat().st_size - 1)), draw(st.integers(1, 255))

    def read(place):
        name, at, by = place
        folder = tmp_path / "checkpoints"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(good, folder)
        data = bytearray((folder / name).read_bytes())
        data[at] ^= by
        (folder / name).write_bytes(data)
        assert list(faults(folder)) == [10]

    holds(places(), amount, read)


@amounts
def test_files_that_a_checkpoint_lacks_or_has_besides(amount, good, tmp_path):
    names = sorted(path.relative_to(good) for path in (good / "10").rglob("*") if path.is_file())

    def read(change):
        name, what = change
        folder = tmp_path / "checkpoints"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(good, folder)
        if what == "remove":
            (folder / name).unlink()
        elif what == "empty":
            (folder / name).write_bytes(b"" if (folder / name).stat().st_size else b"x")
        elif what == "folder":
            (folder / name).unlink()
            (folder / name).mkdir()
        else:
            (folder / name).with_name("more").write_bytes(b"x")
        with Checkpoints(folder) as checkpoints:
            assert list(checkpoints.damaged) == [10]
            try:
                state, _ = checkpoints.restore(make(seed=1))
            except RunError as error:
                raise InputError(str(error)) from None
            assert int(state.step) == 5
        assert checkpoint.on_disk(folder) == [5]

    holds(st.tuples(st.sampled_from(names), st.sampled_from(("remove", "empty", "folder", "more"))), amount, read)
