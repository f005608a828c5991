"""LQ-LoRA: each kernel becomes a packed one and a low-rank part that makes up for the packing and trains.

    W ~ Q + L1 L2                  Q (n, m) packed and frozen, L1 (n, r), L2 (r, m)
    y = x Q + s (x A) B            A = L1 / sqrt(s), B = L2 / sqrt(s) at the start, s = alpha / r

Q and L take turns at || sqrt(F) * (W - Q - L1 L2) ||, beginning with Q = 0,

    L1 L2 <- the first r singular values of W - Q, their roots on both sides
    Q     <- W - L1 L2, packed

until the error rises or `iterations` are done; the best pair is kept. F is 1, or with `fisher` the diagonal of the
empirical Fisher information, and L1 L2 then of D1 (W - Q) D2, between D1^-1 and D2^-1, with D1 the root of F's mean
along outputs and D2 along inputs. The decomposition is randomised: two power iterations on r + 10 directions.

With `bits`, a budget per number, each site has a format, group and coding of scales of its own, of `CANDIDATES`: those
of the least sum of squared errors (of the first pair of each) whose bytes are within the budget of all, an integer
program.

A step keeps what LoRA keeps. A0, B0, the start, stay beside A, B (4 r (n + m) bytes a kernel), so that with an adapter
that is read again the same Q is made of the original kernel; what was chosen for a site stays, too. Merging gives
Q + s A B, unpacked in the base's dtype. Q is made after the checkpoint has been read: the kernels are in memory once.

Paper: Guo et al. 2023, "LQ-LoRA", arXiv:2311.12023. Deviations: the layers of a site are stacked, and share one choice;
its 8 bits are int8, and scales are float32 or coded as QLoRA codes them, not in 2 to 8 bits of their own; the best pair
is kept, where the authors' code returns the last, which is worse. A plan knows no weights: it allots a budget as if all
were normal.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxpeft import sites, tree
from jaxpeft.about import About, Promises
from jaxpeft.errors import InputError
from jaxpeft.method import Method, Spec, trains
from jaxpeft.methods import lora as _lora
from jaxpeft.methods.lst import fisher_information
from jaxpeft.quant import by_layer, folded_as, is_packed, matrix
from jaxpeft.starts import probes
from jaxpeft.widths import check_format, left_out
from pallas_kernels import packed
from pallas_kernels.packed import ALIGNED, BITS, CODEBOOKS, FORMATS, Packed

OVERSAMPLE = 10  # directions beyond the rank
POWERS = 2  # iterations


class Choice(NamedTuple):
    """How a kernel is packed: arguments of `pallas_kernels.packed.quantize`."""

    format: str
    group: int | None
    double: bool | None = None

    def fits(self, n: int) -> bool:
        """Whether a kernel of n inputs can be packed so."""
        return n % ALIGNED[BITS[self.format]] == 0 and n % (self.group or 1) == 0


CANDIDATES = tuple(
    Choice(format, group, double)
    for format in ("nf2", "nf3", "nf4", "int8")
    for group in (16, 32, 64)
    for double in ((True, False) if format in CODEBOOKS else (False,))
)


# One kernel.


def principal(x: jax.Array, rank: int) -> tuple[jax.Array, jax.Array]:
    """(U sqrt(S) (n, r), sqrt(S) V^T (r, m)) of the first r singular values of x (n, m) float32.

    Of a matrix with no more directions than are tried, exactly.
    """
    dot = functools.partial(jnp.matmul, precision="highest")
    width = rank + OVERSAMPLE
    if width >= min(x.shape):
        u, s, vt = jnp.linalg.svd(x, full_matrices=False)
    else:
        q = dot(x, jax.random.normal(jax.random.key(0), (x.shape[1], width)))
        for _ in range(POWERS):
            q = jnp.linalg.qr(dot(x.T, jnp.linalg.qr(q)[0]))[0]
            q = dot(x, q)
        q = jnp.linalg.qr(q)[0]
        u, s, vt = jnp.linalg.svd(dot(q.T, x), full_matrices=False)
        u = dot(q, u)
    root = jnp.sqrt(s[:rank])
    return u[:, :rank] * root, root[:, None] * vt[:rank]


def weighted(x: jax.Array, f: jax.Array | None, rank: int) -> tuple[jax.Array, jax.Array]:
    """`principal` of x under weights f (n, m): of D1 x D2, whose rows and columns count at least 1e-3 of f's mean."""
    if f is None:
        return principal(x, rank)
    least = 1e-3 * jnp.mean(f) + jnp.finfo(jnp.float32).tiny
    d1, d2 = (jnp.sqrt(jnp.maximum(f.mean(axis, keepdims=True), least)) for axis in (1, 0))
    l1, l2 = principal(d1 * x * d2, rank)
    return l1 / d1, l2 / d2


def rest(w: jax.Array, a: jax.Array, b: jax.Array, choice: Choice) -> Packed:
    """Q of W (n, m) and its low-rank part A (n, r), B (r, m), all float32."""
    return packed.quantize(w - jnp.matmul(a, b, precision="highest"), *choice)


def distance(w: jax.Array, q: Packed, a: jax.Array, b: jax.Array, f: jax.Array | None) -> jax.Array:
    """The sum of f (W - Q - A B)^2."""
    squares = jnp.square(w - packed.dequantize(q) - jnp.matmul(a, b, precision="highest"))
    return jnp.sum(squares if f is None else f * squares)


@functools.partial(jax.jit, static_argnames=("rank", "choice", "iterations"))
def decompose(
    w: jax.Array, f: jax.Array | None, *, rank: int, choice: Choice, iterations: int
) -> tuple[jax.Array, jax.Array]:
    """L1 (n, r), L2 (r, m) of W (n, m), float32, under weights f (n, m) or None: the best of the alternation."""
    w = w.astype(jnp.float32)

    def again(state):
        step, rises, _, _ = state
        return (step < iterations) & ~rises

    def one(state):
        step, _, q, (least, *best) = state
        a, b = weighted(w - q, f, rank)
        own = rest(w, a, b, choice)
        error = distance(w, own, a, b, f)
        kept = [jnp.where(error < least, new, old) for new, old in zip((error, a, b), (least, *best), strict=True)]
        return step + 1, error >= least, packed.dequantize(own), kept

    n, m = w.shape
    first = [jnp.float32(jnp.inf), jnp.zeros((n, rank)), jnp.zeros((rank, m))]
    *_, (_, a, b) = jax.lax.while_loop(again, one, (jnp.int32(0), jnp.bool_(False), jnp.zeros_like(w), first))
    return a, b


@functools.partial(jax.jit, static_argnames=("rank", "choices"))
def errors(w: jax.Array, f: jax.Array | None, *, rank: int, choices: tuple[Choice, ...]) -> jax.Array:
    """The squared errors (choices,) of the first pair of each."""
    w = w.astype(jnp.float32)
    a, b = weighted(w, f, rank)
    return jnp.stack([distance(w, rest(w, a, b, choice), a, b, f) for choice in choices])


# All of them.


def num_bytes(shape: Sequence[int], choice: Choice) -> int:
    """Of kernels (..., n, m), packed."""
    *lead, n, m = shape
    one = jax.eval_shape(lambda w: packed.quantize(w, *choice), jax.ShapeDtypeStruct((n, m), jnp.float32))
    return one.nbytes * int(np.prod(lead))


def allot(error: np.ndarray, size: np.ndarray, budget: float) -> list[int]:
    """The column of each row with the least sum of errors whose sum of sizes is within the budget.

    Args:
      error: (rows, columns), infinite where a column is none.  size, budget: of one unit.

    Raises:
      InputError: if there is none.
    """
    from scipy.optimize import Bounds, LinearConstraint, milp

    rows, columns = error.shape
    can = np.isfinite(error)
    cost = np.where(can, error, 0) / max(np.where(can, error, 0).max(), 1e-30)
    once = np.kron(np.eye(rows), np.ones(columns))
    constraints = [LinearConstraint(once, 1, 1), LinearConstraint(size.reshape(1, -1) / budget, -np.inf, 1)]
    solved = milp(cost.ravel(), constraints=constraints, integrality=1, bounds=Bounds(0, can.ravel()), options=_SOLVER)
    if solved.x is None:
        least = np.where(can, size, np.inf).min(1).sum()
        raise InputError(f"the least that fits these kernels is {least / budget:.3f} times of it")
    return [int(i) for i in solved.x.reshape(rows, columns).argmax(1)]


_SOLVER = {"time_limit": 60.0, "mip_rel_gap": 1e-6}


@functools.cache
def of_normal(choice: Choice) -> float:
    """The mean squared error of normal numbers, packed: what is taken for a kernel's where there is none."""
    w = np.random.default_rng(0).normal(size=(256, choice.group or 64))
    scaled = w / np.abs(w).max(1, keepdims=True)
    if (book := CODEBOOKS.get(choice.format)) is None:
        levels = 2 ** (BITS[choice.format] - 1) - 1
        near = np.round(scaled * levels) / levels
    else:
        near = np.array(book)[np.abs(scaled[..., None] - np.array(book)).argmin(-1)]
    error = np.square((near - scaled) * np.abs(w).max(1, keepdims=True)).mean()
    return float(error) * (1.001 if choice.double else 1.0)


# The method.


def lq_lora(
    rank: int = 64,
    alpha: float | None = None,
    format: str = "nf4",
    group: int | None = None,
    bits: float | None = None,
    fisher: bool = False,
    iterations: int = 100,
    targets: _lora.Targets = "all-linear",
) -> Method:
    """LQ-LoRA on the sites that `targets` chooses.

    Args:
      rank: r, at most the smaller side of each kernel.
      alpha: numerator of the scale; None: the rank (a scale of 1).
      format: of Q, where there is no budget: one of `quantize`'s.
      group: inputs that share a scale there; None: as `quantize` has them.
      bits: a budget of the packed kernels, of all their numbers together, each: each site's format follows from it.
      fisher: whether errors are weighted by the Fisher information, calculated from batches of the training data.
      iterations: of the alternation, at most.
      targets: "all-linear", "attention", "mlp", a regular expression, or a list of names (see `sites.find`).

    Returns:
      The method; it trains `<site>/lq_lora/a` (L, n, r) and `<site>/lq_lora/b` (L, r, m).

    Raises:
      InputError: for a rank below 1 or above a kernel's smaller side, an unknown format, a group or a number of inputs
        that does not fit, a budget that is too small, a kernel that is packed already, weights without data, or targets
        that match nothing or, where layers are visible, are not in them.
    """
    config = dict(locals())
    _lora.check_rank("lq_lora", rank)
    _lora.check_alpha("lq_lora", alpha)
    if format not in FORMATS:
        raise InputError(f"lq_lora: format {format!r} is not one of {', '.join(FORMATS)}")
    if group is not None and group < 1:
        raise InputError(f"lq_lora: group {group} must be at least 1")
    if iterations < 1:
        raise InputError(f"lq_lora: iterations {iterations} must be at least 1")
    if bits is not None and not bits > 0:
        raise InputError(f"lq_lora: bits {bits} must be above 0")
    scale = _lora.scale_of(rank if alpha is None else alpha, rank, False)
    every = Choice(format, group)
    choose = _lora.chosen_sites("lq_lora", targets, lambda site: rank)

    def check(site, kernel, layered):
        if layered and (kernel.ndim != 3 or not tree.stacked(site)):
            raise InputError(f"lq_lora: {site} is not in the layers, whose kernels alone can be packed")
        if is_packed(kernel):
            raise InputError(f"lq_lora: {site} is packed already; lq_lora packs kernels itself")

    def choices_of(kernels, weights, flat):
        """How each site's kernel is packed."""
        known = {site: flat.get(f"{site}/lq_lora/choice") for site in kernels}
        if bits is None:
            return dict.fromkeys(kernels, every)
        if all(_is_known(choice) for choice in known.values()):
            return {site: CANDIDATES[int(np.ravel(choice)[0])] for site, choice in known.items()}
        return _allotted(kernels, weights, rank, bits)

    def prepare(params, view):
        flat = tree.flatten(params)
        found = choose(params)
        for site in found:
            check(site, flat[f"{site}/kernel"], bool(tree.segments(params)))
        if bits is None:
            check_format("lq_lora", format, group, {site: flat[f"{site}/kernel"].shape[-2] for site in found})
        kernels = {site: matrix(flat[f"{site}/kernel"]) for site in found}
        started = {site for site in kernels if f"{site}/lq_lora/a0" in flat}
        weights = _weights(params, view) if fisher and started != set(kernels) else {}
        choices = choices_of(kernels, weights, flat)
        for site, kernel in kernels.items():
            if site not in started:
                of_layer = functools.partial(decompose, rank=rank, choice=choices[site], iterations=iterations)
                factors = by_layer(of_layer, kernel, weights.get(f"{site}/kernel"))
                for name, factor in zip("ab", factors, strict=True):
                    flat[f"{site}/lq_lora/{name}"] = flat[f"{site}/lq_lora/{name}0"] = factor / scale**0.5
            start = scale * flat[f"{site}/lq_lora/a0"], flat[f"{site}/lq_lora/b0"]
            pack = functools.partial(_packed, choices[site], start)
            flat[f"{site}/kernel"] = folded_as(flat[f"{site}/kernel"], pack)
            if bits is not None:
                number = CANDIDATES.index(choices[site])
                flat[f"{site}/lq_lora/choice"] = jnp.full(kernel.shape[:-2], number, jnp.int32)
        return tree.unflatten(flat)

    return Method(
        prepare=prepare,
        forward=lambda model, view: sites.attach(model, "lq_lora", lambda site: _lora.LoRA(rank, scale), choose),
        roles=trains(lambda path: path.endswith(("/lq_lora/a", "/lq_lora/b"))),
        merge=lambda params: _lora.fold(
            params, "lq_lora", lambda _: scale, lambda own, _: (own["a"], own["b"]), lambda site: rank
        ),
        specs=(Spec("lq_lora", config),),
    )


def _is_known(choice: Any) -> bool:
    return choice is not None and not isinstance(choice, jax.core.Tracer)


_rest = jax.jit(rest, static_argnames="choice")


def _packed(choice: Choice, start: tuple[jax.Array, jax.Array], w: jax.Array) -> Packed:
    """Q of kernels W (..., n, m) and their low-rank parts."""
    of_layer = lambda w, a, b: _rest(w.astype(jnp.float32), a, b, choice=choice)
    return dataclasses.replace(by_layer(of_layer, w, *start), dtype=w.dtype)


def _allotted(kernels: Mapping[str, Any], weights: Mapping[str, Any], rank: int, bits: float) -> dict[str, Choice]:
    """The choice of each site, within the budget of all."""
    error = np.full((len(kernels), len(CANDIDATES)), np.inf)
    size = np.zeros(error.shape)
    of_width = lambda n: [i for i, choice in enumerate(CANDIDATES) if choice.fits(n)]
    inputs = {site: kernel.shape[-2] for site, kernel in kernels.items()}
    for row, (site, kernel) in enumerate(kernels.items()):
        if not (fitting := of_width(inputs[site])):
            left = left_out(inputs, lambda n: bool(of_width(n)))
            said = f"lq_lora: {site} has {inputs[site]} inputs, which no format of a budget packs"
            raise InputError(f"{said}; {left or 'give no bits'}")
        choices = tuple(CANDIDATES[i] for i in fitting)
        size[row, fitting] = [num_bytes(kernel.shape, choice) for choice in choices]
        if isinstance(kernel, jax.core.Tracer):
            error[row, fitting] = [kernel.size * of_normal(choice) for choice in choices]
        else:
            of_layer = functools.partial(errors, rank=rank, choices=choices)
            found = np.asarray(by_layer(of_layer, kernel, weights.get(f"{site}/kernel")), np.float64)
            error[row, fitting] = found.reshape(-1, len(fitting)).sum(0)
    budget = bits / 8 * sum(kernel.size for kernel in kernels.values())
    try:
        columns = allot(error, size, budget)
    except InputError as none:
        raise InputError(f"lq_lora: bits {bits}: {none}") from None
    return {site: CANDIDATES[column] for site, column in zip(kernels, columns, strict=True)}


def _weights(params: tree.Params, view: Any) -> dict[str, jax.Array]:
    """{path: F} of the layers' leaves; {} where a run is planned."""
    if view.batches is None:
        raise InputError("lq_lora: fisher needs data: setup(..., batches=...)")
    of_base = {path: leaf for path, leaf in tree.flatten(params).items() if path in view.shapes}
    loss = view.loss or probes.by_content
    return tree.flatten(fisher_information(view.base, tree.unflatten(of_base), view.batches(), loss))


ABOUT = About(
    summary="packed kernels and low-rank parts that make up for the packing, found in turn; the latter train",
    level="site",
    trains="A and B, r(n+m) numbers per kernel",
    saves="as LoRA, and the kernels' bytes but 2 to 8 bits per number; the start, r(n+m) numbers more",
    reference="Guo et al. 2023, arXiv:2311.12023",
    example={"rank": 4, "format": "nf3", "iterations": 4},
    promises=Promises(site_bytes=_lora.saved_bytes, starts_at_base=False),
    changes_kernels=lambda config: True,
)
