"""What tests of TPU kernels share: how they are interpreted, and what a compiled one may consist of."""

import functools
import itertools
import math

import jax
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from jaxpeft.memory import aot, targets
from pallas_kernels import mosaic_tpu

# Memory that nothing has written holds NaN, outputs and what lies beyond a ragged tile included.
INTERPRETED = pltpu.InterpretParams(detect_races=True, uninitialized_memory="nan")


def relative(ours, exact):
    """The error by norm; NaN if anything of ours is."""
    ours = np.asarray(ours, np.float64)
    assert ours.shape == exact.shape
    return np.linalg.norm(ours - exact) / np.linalg.norm(exact)


def compiled(device, function, *args, **static):
    """A function compiled for a described TPU, and its bytes counted by hand: arguments and results once each."""
    pytest.importorskip("libtpu")
    function = functools.partial(function, **static)
    arrays = jax.tree.leaves((args, jax.eval_shape(function, *args)))
    counted = sum(math.prod(x.shape) * x.dtype.itemsize for x in arrays)
    return aot.compile(targets.target(device), function, *args), counted


def check_alone(device, function, *args, **static):
    """One kernel and nothing else: no copy of an operand, no temporary, and its cost estimate is the count by hand.

    XLA believes that estimate, and adds what it does besides. What the tiles' pipeline really copies: `traffic`.
    """
    made, counted = compiled(device, function, *args, **static)
    assert made.memory.temporaries == 0
    assert operations(made.executable) == ["custom-call"]
    assert 0.9 * counted < made.executable.cost_analysis()["bytes accessed"] < 1.1 * counted


def operations(executable):
    """What runs, but for views and copies of small tables to scalar memory (space 6)."""
    found = []
    for line in executable.as_text().splitlines():
        name, equals, right = line.strip().removeprefix("ROOT ").partition(" = ")
        if equals and name.startswith("%") and "S(6)} copy(" not in right:
            _, _, rest = right[1:].partition(") ") if right.startswith("(") else right.partition(" ")
            found.append(rest.partition("(")[0])
    return [name for name in found if name not in ("parameter", "bitcast", "tuple", "get-tuple-element")]


def traffic(monkeypatch, function, *args, tables=(), **static):
    """Elements that a kernel's pipeline copies: {operand's number, "out 0", ..: count}, and the grid.

    A block is copied when its index is not that of the step before; ragged ones count whole.

    tables: the values of what is prefetched, for index maps that look there.
    """
    calls = []

    def call(kernel, operands, specs, outputs, out_specs, *, grid, **options):
        calls.append((specs, out_specs, grid))
        return outputs

    with monkeypatch.context() as patch:
        patch.setattr(mosaic_tpu, "call", call)
        jax.eval_shape(lambda *args: (function(*args, **static), 0)[1], *args)
    ((specs, out_specs, grid),) = calls
    out_specs = out_specs if isinstance(out_specs, tuple) else (out_specs,)
    named = dict(enumerate(specs)) | {f"out {i}": spec for i, spec in enumerate(out_specs)}
    found = {}
    for name, spec in named.items():
        places = [tuple(int(at) for at in spec.index_map(*step, *tables)) for step in np.ndindex(*grid)]
        changes = 1 + sum(now != before for before, now in itertools.pairwise(places))
        found[name] = changes * math.prod(size for size in spec.block_shape if size is not None)
    return found, grid
