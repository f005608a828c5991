"""Checkpoints: what is in them, which are kept, other devices, and a disk that is full."""

import contextlib
import os
import resource
import shutil
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxpeft import checksums
from jaxpeft.checkpoint import Checkpoints, faults, foreign, not_in_base, on_disk
from jaxpeft.errors import RunError
from jaxpeft.train.state import TrainState
from tests import virtual

OPTIMIZER = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-2))


def make(step=0, size=4, seed=0):
    """A state whose every leaf tells seed and size apart."""
    rng = np.random.default_rng(seed)
    trainable = {
        "layers/q_proj/lora/b": jnp.asarray(rng.normal(size=(2, size, 8)), jnp.float32),
        "norm/scale": jnp.asarray(rng.normal(size=8), jnp.float32),
    }
    frozen = {"embed/embedding": jnp.ones((3, 2), jnp.bfloat16), "layers/q_proj/lora/a": jnp.full((2, 3), 7.0)}
    opt_state = OPTIMIZER.init(trainable)
    _, opt_state = OPTIMIZER.update(trainable, opt_state, trainable)
    return TrainState(jnp.int32(step), trainable, frozen, opt_state, jax.random.key(seed))


def as_bytes(state):
    state = state._replace(key=jax.random.key_data(state.key))
    return {
        jax.tree_util.keystr(path): np.asarray(x).tobytes() for path, x in jax.tree_util.tree_leaves_with_path(state)
    }


def test_a_state_comes_back_bit_for_bit_with_its_meta(tmp_path):
    state = make(step=3, seed=1)
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(state, {"data": {"next": [1, 2]}, "eval_loss": None})
    with Checkpoints(tmp_path) as checkpoints:
        restored, meta = checkpoints.restore(make(seed=2)._replace(frozen=state.frozen))
    assert as_bytes(restored) == as_bytes(state)
    assert jax.tree.structure(restored) == jax.tree.structure(state)
    assert meta == {"data": {"next": [1, 2]}, "eval_loss": None}


def test_a_donated_state_is_saved_as_it_was(tmp_path):
    advance = jax.jit(
        lambda s: s._replace(step=s.step + 1, trainable=jax.tree.map(lambda x: x + 1, s.trainable)), donate_argnums=0
    )
    state, expected = make(size=20_000), {}
    with Checkpoints(tmp_path, keep=3) as checkpoints:
        for step in (1, 2, 3):
            state = advance(state)
            expected[step] = as_bytes(jax.tree.map(jnp.copy, state))
            checkpoints.save(state, {})
        state = advance(advance(state))
    with Checkpoints(tmp_path) as checkpoints:
        for step in (1, 2, 3):
            assert as_bytes(checkpoints.restore(make(size=20_000), step)[0]) == expected[step]


def test_the_newest_and_the_best_are_kept_also_after_reopening(tmp_path):
    losses = {1: 3.0, 2: 1.0, 3: None, 4: 2.0, 5: None}
    for step, loss in losses.items():
        with Checkpoints(tmp_path, keep=2) as checkpoints:
            checkpoints.save(make(step), {"eval_loss": loss})
    assert on_disk(tmp_path) == [2, 4, 5]
    with Checkpoints(tmp_path) as checkpoints:
        assert (checkpoints.best(), checkpoints.latest(), checkpoints.loss(2)) == (2, 5, 1.0)


def test_frozen_leaves_of_a_run_are_written_once_and_come_back(tmp_path):
    state = make(step=1)
    own = {"layers/q_proj/lora/a": state.frozen["layers/q_proj/lora/a"]}
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save_frozen(own)
        checkpoints.save(state, {})
    other = make()._replace(frozen={"embed/embedding": jnp.zeros((3, 2)), "layers/q_proj/lora/a": jnp.zeros((2, 3))})
    with Checkpoints(tmp_path) as checkpoints:
        restored, _ = checkpoints.restore(other)
    np.testing.assert_array_equal(restored.frozen["layers/q_proj/lora/a"], 7.0)
    np.testing.assert_array_equal(restored.frozen["embed/embedding"], 0.0)


def test_not_in_base_finds_changes_and_sees_through_a_cut_stack():
    kernel = jnp.arange(12.0).reshape(3, 2, 2)
    base = {"layers/kernel": kernel, "norm/scale": jnp.ones(2), "head": jnp.ones(2)}
    frozen = {
        "layers_0_2/kernel": kernel[:2],
        "layers_2_3/kernel": kernel[2:] + 1,
        "norm/scale": base["norm/scale"],
        "head": base["head"].astype(jnp.bfloat16),
        "layers_0_2/lora/a": jnp.ones((2, 2)),
    }
    assert sorted(not_in_base(frozen, base)) == ["head", "layers_0_2/lora/a", "layers_2_3/kernel"]


def test_what_was_half_written_is_ignored_and_removed(tmp_path):
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(make(1), {})
    (tmp_path / "2.orbax-checkpoint-tmp" / "state").mkdir(parents=True)
    with Checkpoints(tmp_path) as checkpoints:
        assert checkpoints.steps() == [1]
    assert [path.name for path in tmp_path.iterdir()] == ["1"]


def damages(folder):
    """(name, a function that damages that file) for every file of a checkpoint, in every way."""

    def changed(file):
        data = bytearray(file.read_bytes())
        data[len(data) // 2] ^= 1
        file.write_bytes(data)

    ways = {
        "changed": changed,
        "cut": lambda file: os.truncate(file, file.stat().st_size // 2),
        "emptied": lambda file: os.truncate(file, 0),
        "gone": lambda file: file.unlink(),
        "a folder": lambda file: (file.unlink(), file.mkdir()),
    }
    names = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    return [(name, way) for name in names for way in ways.values()]


def test_whatever_is_damaged_is_put_aside_and_the_older_one_used(tmp_path):
    whole = tmp_path / "whole"
    with Checkpoints(whole) as checkpoints:
        checkpoints.save_frozen({"layers/q_proj/lora/a": make().frozen["layers/q_proj/lora/a"]})
        for step in (5, 10):
            checkpoints.save(make(step, seed=step), {"eval_loss": 1.0})
    assert faults(whole) == {}
    cases = damages(whole / "10")
    assert {name for name, _ in cases} >= {"sha256.json", "meta/metadata", "state/manifest.ocdbt"}
    for number, (name, damage) in enumerate(cases):
        folder = tmp_path / str(number)
        shutil.copytree(whole, folder)
        damage(folder / "10" / name)
        found = faults(folder)
        assert list(found) == [10] and (name in found[10] or name == checksums.NAME)
        if number % 7:  # opening takes longer than finding
            continue
        with Checkpoints(folder) as checkpoints:
            assert list(checkpoints.damaged) == [10] and checkpoints.latest() == checkpoints.best() == 5
            assert as_bytes(checkpoints.restore(make())[0]) == as_bytes(make(5, seed=5))
            checkpoints.save(make(10, seed=10), {})
        assert faults(folder) == {} and on_disk(folder) == [5, 10] and on_disk(folder / "damaged") == [10]


def test_a_file_that_was_not_written_with_a_checkpoint_is_damage(tmp_path):
    with Checkpoints(tmp_path) as checkpoints:
        for step in (5, 10):
            checkpoints.save(make(step), {})
    (tmp_path / "10" / f"{checksums.NAME}.tmp").write_text("{")  # of a process that ended writing its sums
    assert faults(tmp_path) == {}
    (tmp_path / "10" / "state" / "more").write_text("")
    assert faults(tmp_path) == {10: "state/more was not written with it"}
    (tmp_path / "5" / "meta" / "metadata").write_text('{"n": 1}')
    assert list(faults(tmp_path)) == [10, 5]


def test_damaged_frozen_leaves_are_refused(tmp_path):
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save_frozen({"layers/lora/a": jnp.arange(3.0)})
        checkpoints.save(make(5), {})
    for file in (tmp_path / "frozen").rglob("*"):
        if file.is_file() and file.name != checksums.NAME:
            file.write_bytes(file.read_bytes()[:-1])
    with Checkpoints(tmp_path) as checkpoints, pytest.raises(RunError, match=r"frozen: damaged \(.*begin the run anew"):
        checkpoints.restore(make()._replace(frozen={"layers/lora/a": jnp.zeros(3)}))


def test_a_state_of_another_shape_is_refused_in_one_line(tmp_path):
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(make(1, size=4), {})
        checkpoints.wait()
        with pytest.raises(RunError, match="cannot be restored") as caught:
            checkpoints.restore(make(size=6))
        assert "\n" not in str(caught.value)
        with pytest.raises(RunError, match=r"no checkpoint of step 9; there are \[1\]"):
            checkpoints.restore(make(), 9)


SHARDED = """
import sys, jax, numpy as np
from pathlib import Path
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxpeft.checkpoint import Checkpoints
from tests.checkpoint_test import make
mesh = Mesh(np.array(jax.devices()), ("data",))
def abstract(x):
    spec = PartitionSpec(None, "data") if x.ndim == 3 else PartitionSpec()
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, spec))
state = make(seed=5)
with Checkpoints(Path(sys.argv[1])) as checkpoints:
    restored, _ = checkpoints.restore(jax.tree.map(abstract, make()))
leaf = restored.trainable["layers/q_proj/lora/b"]
assert len(leaf.addressable_shards) == 4 and leaf.addressable_shards[0].data.shape == (2, 1, 8)
np.testing.assert_array_equal(leaf, state.trainable["layers/q_proj/lora/b"])
np.testing.assert_array_equal(jax.random.key_data(restored.key), jax.random.key_data(state.key))
print(len(jax.devices()))
"""


def test_a_checkpoint_of_one_device_is_restored_onto_four(tmp_path):
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(make(1, seed=5), {})
    command = [sys.executable, "-c", SHARDED, str(tmp_path)]
    done = subprocess.run(command, env=virtual.devices(4), cwd=virtual.ROOT, capture_output=True, text=True)
    assert done.stdout == "4\n", done.stderr


@contextlib.contextmanager
def file_size_limit(size):
    """A kernel limit on files written by this process: a real write error in the middle of a file."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


# tensorstore's other writes end after the one that failed, when nobody waits for them.
LATE = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


@LATE
def test_a_write_that_fails_leaves_the_last_good_checkpoint(tmp_path):
    small, large = make(1, size=4), make(2, size=40_000, seed=3)
    with pytest.raises(RunError) as caught, Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(small, {"n": 1})
        checkpoints.wait()
        with file_size_limit(100_000):
            checkpoints.save(large, {})
            checkpoints.wait()
    assert "/2: not written: File too large; last good checkpoint: step 1" in str(caught.value)
    assert caught.value.status == 2
    assert on_disk(tmp_path) == [1]
    with Checkpoints(tmp_path) as checkpoints:
        restored, meta = checkpoints.restore(make(size=4))
    assert as_bytes(restored) == as_bytes(small)
    assert meta == {"n": 1}


SPEC = """ [tensorstore_spec='{"driver":"zarr","dtype":"int32","path":"step/"}']"""
CODES = [(13, "Permission denied"), (27, "File too large"), (28, "No space left on device")]


@pytest.mark.parametrize("spec", ["", SPEC])
@pytest.mark.parametrize("code, said", CODES)
def test_the_reason_is_the_system_s_whatever_else_the_message_holds(tmp_path, monkeypatch, spec, code, said):
    """The first of many concurrent writes to fail may be one that opens an array, which adds what it opens."""
    text = f"""OUT_OF_RANGE: Error writing "step/.zarray" in OCDBT database: {said}{spec} [os_error_code='{code}']"""

    def failing(*_, **__):
        raise ValueError(text)

    with pytest.raises(RunError) as caught, Checkpoints(tmp_path) as checkpoints:
        monkeypatch.setattr(checkpoints._manager, "save", failing)
        checkpoints.save(make(1), {})
    assert str(caught.value) == f"{tmp_path / '1'}: not written: {said}; no checkpoint has been written yet"


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 6 MB, where the system lets us mount one."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=6m", "tmpfs", str(folder)], capture_output=True)
    if mounted.returncode:
        pytest.skip("no permission to mount a file system")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


@LATE
def test_a_full_disk_leaves_the_last_good_checkpoint(small_disk):
    folder = small_disk / "checkpoints"
    full = pytest.raises(RunError, match="No space left on device; last good checkpoint: step 1")
    with full, Checkpoints(folder, keep=9) as checkpoints:
        for step in (1, 2, 3):
            checkpoints.save(make(step, size=50_000 if step == 2 else 10_000, seed=step), {})
    with Checkpoints(folder) as checkpoints:
        assert as_bytes(checkpoints.restore(make(size=10_000))[0]) == as_bytes(make(1, size=10_000, seed=1))


def test_a_checkpoint_under_another_name_is_damage(tmp_path):
    with Checkpoints(tmp_path) as checkpoints:
        for step in (5, 10):
            checkpoints.save(make(step, seed=step), {})
    (tmp_path / "10").rename(tmp_path / "q")
    (tmp_path / "5").rename(tmp_path / "10")
    (tmp_path / "q").rename(tmp_path / "5")
    assert faults(tmp_path) == {10: 'was written as "5"', 5: 'was written as "10"'}


def test_folders_that_only_look_like_steps_are_put_aside(tmp_path):
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(make(5, seed=5), {})
    for name in ("9" * 40, "06", "\u0663"):
        shutil.copytree(tmp_path / "5", tmp_path / name)
    with Checkpoints(tmp_path) as checkpoints:
        assert checkpoints.steps() == [5] and checkpoints.damaged == {}
        assert int(checkpoints.restore(make())[0].step) == 5
    assert sorted(path.name for path in (tmp_path / "damaged").iterdir()) == sorted(("9" * 40, "06", "\u0663"))


def test_a_checkpoint_of_another_run_or_without_its_frozen_leaves(tmp_path):
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save_frozen({"a": jnp.arange(3.0)})
        checkpoints.save(make(5), {"run": "one", "frozen": True})
    assert foreign(tmp_path, 5, "one") is None
    assert foreign(tmp_path, 5, "another") == "is a checkpoint of another run"
    shutil.rmtree(tmp_path / "frozen")
    assert foreign(tmp_path, 5, "one") == f"needs {tmp_path / 'frozen'}, which is missing"
