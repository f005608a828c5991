"""One operation, several implementations: which one runs is decided where the program is lowered, by its platform.

A Python `if` on the attached backend decides too early: a step that is compiled on a CPU host for a described TPU would
get the CPU's implementation. Here an operation is a primitive of its own; its lowering rules know the platform, the
shapes and the number of devices, and only the chosen implementation is ever traced for lowering.

A kernel sees one device's arrays. It runs where the program has one device, or inside a `shard_map` over all axes of
its mesh. An operation that is told how its dimensions lie on a mesh (`divided.Divided`) is lowered as such a
`shard_map`; under a mesh of which it knows nothing, the plain implementation runs, which the compiler partitions,
unless a kernel says that it can be partitioned.

`forced("xla")` chooses for all operations whose kernels are written here (attention's are libraries'): what is traced
inside uses the plain implementations ("mosaic_gpu" or "tpu": those kernels, or NotImplementedError where they cannot
run).
"""

from __future__ import annotations

import contextlib
import contextvars
import functools
import logging
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax._src import dispatch  # lowering rules see devices only where this says that they ask for them
from jax.extend.core import Primitive
from jax.interpreters import batching, mlir, partial_eval

from pallas_kernels import divided as on_mesh
from pallas_kernels.divided import Dims

# The platform that JAX calls so, and what its kernels are called here.
KERNELS = {"cuda": "mosaic_gpu", "tpu": "tpu"}
PLAIN = "xla"
HOPPER = "9."  # the beginning of the compute capability of GPUs that they run on


class Implementation(NamedTuple):
    """One way to compute an operation.

    function: (*args, **static) -> arrays, of the shapes and dtypes of the default implementation.
    supports: (*args as ShapeDtypeStructs, **static) -> bool.
    partitions: whether the compiler can partition it over the devices of a mesh.
    announces: whether a call that it does not take is said, once; such implementations are also those that can be
      asked for by name.
    kinds: whether `function` takes the device's kind (`jax.Device.device_kind`) as the keyword `device`.
    capability: the devices that it runs on, as the beginning of their `compute_capability`; "" for any.
    """

    function: Callable[..., Any]
    supports: Callable[..., bool]
    partitions: bool = False
    announces: bool = False
    kinds: bool = False
    capability: str = ""


class Part(NamedTuple):
    """What computes some of an operation's outputs alone, where the others are not used.

    outputs: their numbers.
    function: another operation, called with the arguments that are numbered in `args`.
    args: numbers of the operation's (flat) arguments; negative ones count from the last.
    static: names of the static arguments that it takes.
    """

    outputs: tuple[int, ...]
    function: Callable[..., Any]
    args: tuple[int, ...]
    static: tuple[str, ...]


class KernelFallback(UserWarning):
    """A kernel does not take these shapes; the plain implementation runs in its place, in calls like this one, too."""


# operation's name -> its FLOPs as a function of its (args as ShapeDtypeStructs, **static); see `operation`.
FLOPS: dict[str, Callable[..., float]] = {}
# operation's name -> its default implementation: plain JAX, of the same arguments.
DEFAULTS: dict[str, Callable[..., Any]] = {}
# operation's name -> the same of what is left of it when only the outputs with these numbers are used.
PARTS: dict[str, Part] = {}
# operation's name -> the operation that takes a `Stacked` last, and writes its first result there; see `operation`.
INTO: dict[str, Callable[..., Any]] = {}

_traced_for = jax.make_user_context(default_value=None)  # a part of what JAX knows kept traces by
_of_parts = jax.make_user_context(default_value=False)  # likewise
_forced: contextvars.ContextVar[str | None] = contextvars.ContextVar("forced", default=None)
_said: set[tuple[Any, ...]] = set()  # reasons for which a kernel did not run, of which users know
_log = logging.getLogger(__name__)


@contextlib.contextmanager
def forced(implementation: str | None) -> Iterator[None]:
    """What is traced inside uses this implementation: "xla", "mosaic_gpu", "tpu", or None for the platform's own.

    Raises:
      ValueError: for another name.
    """
    token = _forced.set(check(implementation))
    try:
        yield
    finally:
        _forced.reset(token)


@contextlib.contextmanager
def tracing_for(platform: str, device: Any = None) -> Iterator[None]:
    """What is traced inside is compiled for "cuda", "tpu" or "cpu", whatever is attached; see `traced_for`.

    Args:
      platform: its name.
      device: one of those that it is compiled for; None: one that the platform's kernels run on.
    """
    with _traced_for((platform, str(getattr(device, "compute_capability", HOPPER)))):
        yield


def traced_for() -> str:
    """The platform that what is traced now is for: "cuda", "tpu" or "cpu"; that of `tracing_for`, or what is attached.

    Unlike an implementation, what depends on it is chosen where a program is traced; lowered for another platform, it
    computes the same.
    """
    if _traced_for.value is not None:
        return _traced_for.value[0]
    return {"gpu": "cuda"}.get(jax.default_backend(), jax.default_backend())


def traced_for_hopper() -> bool:
    """Whether what is traced now is for a GPU that our kernels run on; as `traced_for`."""
    if _traced_for.value is not None:
        platform, capability = _traced_for.value
        return platform == "cuda" and capability.startswith(HOPPER)
    return traced_for() == "cuda" and str(getattr(jax.devices()[0], "compute_capability", HOPPER)).startswith(HOPPER)


@contextlib.contextmanager
def tracing_parts() -> Iterator[None]:
    """What is traced inside reads its input as a part of a larger array, if it can (`reads_parts`)."""
    with _of_parts(True):
        yield


def reads_parts() -> bool:
    """Whether what is traced is given a part of an array, which XLA's Triton kernels would have copied: on Hopper."""
    return _of_parts.value and traced_for_hopper()


def writes_in_place() -> bool:
    """Whether what is traced may write results into stacks (`INTO`): for GPUs.

    On a v5p XLA keeps more beside a stack that a kernel has written than is spared: 1.16 GiB in place of 0.87 in a
    small step.
    """
    return traced_for() == "cuda"


def check(implementation: str | None) -> str | None:
    """An implementation's name as it was given, if it is one."""
    known = (PLAIN, *KERNELS.values())
    if implementation is not None and implementation not in known:
        raise ValueError(f"implementation {implementation!r} is not one of {', '.join(known)}")
    return implementation


def operation(
    name: str,
    default: Callable[..., Any],
    flops: Callable[..., float] | None = None,
    part: Part | None = None,
    into: Callable[..., Any] | None = None,
    dims: Dims | None = None,
    **platforms: Implementation,
) -> Callable[..., Any]:
    """A function whose implementation is chosen by the platform that it is lowered for.

    Args:
      name: of the primitive.
      default: (*args, **static) -> arrays; plain JAX, any shapes. It also says what comes out.
      flops: what the operation costs, by the same arguments as shapes.
      part: what computes some of the outputs for less.
      into: the operation that takes the same arguments and, last, a layer of a stack (`stacked.Stacked`), which it
        writes; it gives the stack before the outputs, of which the first has two axes.
      dims: the dimensions of its arguments and results, if it can be divided over a mesh.
      **platforms: "tpu" or "cuda" -> Implementation, used where it supports the arguments.

    Returns:
      function(*args, implementation=None, divided=None, **static): args are pytrees of arrays, static arguments
      hashable; implementation as in `forced`; divided: how its dimensions lie on the mesh of the program. It has no
      derivative: wrap it in a `custom_vjp`. When lowered it raises NotImplementedError if the implementation that is
      asked for is not the platform's, or does not take the arguments.
    """
    primitive = Primitive(name)
    primitive.multiple_results = True
    DEFAULTS[name] = default
    if flops is not None:
        FLOPS[name] = flops
    if into is not None:
        INTO[name] = into
    if part is not None:
        PARTS[name] = part
        partial_eval.dce_rules[primitive] = functools.partial(_dce, part)
    announces = any(implementation.announces for implementation in platforms.values())

    def shapes(leaves, treedef):
        return treedef.unflatten([jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for leaf in leaves])

    def outputs(leaves, treedef, static):
        return jax.eval_shape(functools.partial(default, **dict(static)), *shapes(leaves, treedef))

    def call(*args, implementation=None, divided=None, **static):
        leaves, treedef = jax.tree.flatten(args)
        items = tuple(sorted(static.items()))
        wanted = check(implementation)
        if wanted is None and announces:
            wanted = _forced.get()
        params = {"treedef": treedef, "static": items, "implementation": wanted, "divided": divided}
        found = primitive.bind(*leaves, **params)
        return jax.tree.unflatten(jax.tree.structure(outputs(leaves, treedef, items)), found)

    def lowering(platform: str | None, chosen: Implementation | None):
        def rule(ctx, *operands, treedef, static, implementation, divided):
            args, static = shapes(ctx.avals_in, treedef), dict(static)
            if dims is not None and divided is not None and on_mesh.fits(dims, divided, args):
                on_one = functools.partial(call, implementation=implementation)

                def parts(*leaves):
                    return jax.tree.leaves(on_mesh.run(on_one, dims, divided, treedef.unflatten(leaves), **static))

                return mlir.lower_fun(parts, multiple_results=True)(ctx, *operands)
            function = default
            if _chooses(name, platform, chosen, ctx.module_context.axis_context, implementation, args, static):
                assert chosen is not None
                function = chosen.function
                if chosen.kinds:
                    device = _device(ctx.module_context.axis_context, platform)
                    function = functools.partial(function, device=getattr(device, "device_kind", ""))

            def flat(*leaves):
                return jax.tree.leaves(function(*treedef.unflatten(leaves), **static))

            return mlir.lower_fun(flat, multiple_results=True)(ctx, *operands)

        return rule

    def mapped(args, axes, **params):
        """vmap: one after the other."""
        size = next(x.shape[axis] for x, axis in zip(args, axes, strict=True) if axis is not None)

        def one(i):
            taken = [
                x if axis is None else jax.lax.dynamic_index_in_dim(x, i, axis, keepdims=False)
                for x, axis in zip(args, axes, strict=True)
            ]
            return primitive.bind(*taken, **params)

        found = jax.lax.map(one, np.arange(size))
        return found, [0] * len(found)

    @primitive.def_abstract_eval
    def _(*avals, treedef, static, **params):
        del params
        kind = type(avals[0])
        return [kind(out.shape, out.dtype) for out in jax.tree.leaves(outputs(avals, treedef, static))]

    @primitive.def_impl
    def _(*leaves, **params):
        return jax.jit(functools.partial(primitive.bind, **params))(*leaves)

    if any(implementation.kinds or implementation.capability for implementation in platforms.values()):
        dispatch.prim_requires_devices_during_lowering.add(primitive)
    batching.primitive_batchers[primitive] = mapped
    mlir.register_lowering(primitive, lowering(None, None))
    for platform, implementation in platforms.items():
        mlir.register_lowering(primitive, lowering(platform, implementation), platform=platform)
    call.primitive = primitive  # type: ignore[attr-defined]
    return call


def _chooses(name, platform, chosen: Implementation | None, where, wanted: str | None, args, static) -> bool:
    """Whether the platform's implementation runs, not the default one."""
    kernel = KERNELS.get(platform)
    if wanted == PLAIN and kernel:
        return False
    if wanted not in (None, PLAIN, kernel):
        raise NotImplementedError(f"{name}: implementation {wanted!r} does not run on {platform or 'this platform'}")
    if chosen is None:
        return False
    capability = getattr(_device(where, platform), "compute_capability", chosen.capability)
    if not str(capability).startswith(chosen.capability):
        needed = f"compute capability {chosen.capability}x, not {capability}"
        _refuse(chosen, wanted, (kernel, "device", capability), f"the {kernel} kernels run on {needed}")
        return False
    if not chosen.supports(*args, **static):
        why = f"{name}: the {kernel} kernel does not take {_described(args, static)}"
        _refuse(chosen, wanted, (kernel, "arguments", _kinds(args)), why)
        return False
    if not chosen.partitions and not _whole(where):
        why = f"{name}: the {kernel} kernel runs on one device, or in a shard_map over all axes"
        _refuse(chosen, wanted, (kernel, "mesh"), why)
        return False
    return True


def _refuse(chosen: Implementation, wanted: str | None, reason: tuple[Any, ...], why: str) -> None:
    """Raises where the kernel was asked for, else warns of the first call of each reason, and logs the others."""
    if wanted not in (None, PLAIN):
        raise NotImplementedError(why)
    if not chosen.announces:
        return
    _log.info("%s; plain JAX runs instead", why)
    if reason not in _said:
        _said.add(reason)
        warnings.warn(f"{why}; plain JAX runs instead", KernelFallback, stacklevel=2)


def _kinds(args: Sequence[Any]) -> tuple[str, ...]:
    """The floating-point types among arguments: of calls that are not taken those with the same are one reason."""
    return tuple(sorted({x.dtype.name for x in jax.tree.leaves(args) if jnp.issubdtype(x.dtype, jnp.floating)}))


def _described(args: Sequence[Any], static: dict[str, Any]) -> str:
    leaves = [f"{leaf.dtype.name}{list(leaf.shape)}" for leaf in jax.tree.leaves(args)]
    return ", ".join((*leaves, *(f"{key}={value}" for key, value in static.items())))


def _whole(where: Any) -> bool:
    """Whether a kernel sees all of what it is given: on one device, or where all axes of the mesh are manual."""
    if hasattr(where, "manual_axes"):
        return set(where.mesh.axis_names) == set(where.manual_axes)
    return getattr(where, "num_devices", 1) == 1


def _device(where: Any, platform: str | None) -> Any:
    """A device of those that the program is for, None where they are not known."""
    devices = getattr(where, "device_assignment", None)
    if devices is None and isinstance(getattr(where, "mesh", None), jax.sharding.Mesh):
        devices = where.mesh.devices
    if devices is not None and np.size(devices):
        return np.ravel(np.asarray(devices, dtype=object))[0]
    attached = jax.devices()[0]
    return attached if {"cuda": "gpu"}.get(platform or "", platform) == attached.platform else None


def part_of(eqn: Any) -> Any:
    """The equation that computes some of an equation's outputs for less, if its operation has such a part."""
    part = PARTS.get(eqn.primitive.name)
    if part is None:
        return None
    static = dict(eqn.params["static"])
    kept = [eqn.invars[i] for i in part.args]
    params = {
        "treedef": jax.tree.structure(tuple(kept)),
        "static": tuple(sorted((key, static[key]) for key in part.static)),
        "implementation": eqn.params["implementation"],
        "divided": eqn.params["divided"],
    }
    primitive = part.function.primitive  # type: ignore[attr-defined]
    return eqn.replace(invars=kept, outvars=[eqn.outvars[i] for i in part.outputs], primitive=primitive, params=params)


def _dce(part: Part, used: list[bool], *rest: Any) -> tuple[list[bool], Any]:
    """Dead code elimination: where `part` has all outputs that are used, it takes the operation's place.

    rest: the equation last; JAX 0.12 has the live inputs before it.
    """
    eqn = rest[-1]
    if not any(used):
        return [False] * len(eqn.invars), None
    if any(use and i not in part.outputs for i, use in enumerate(used)):
        return [True] * len(eqn.invars), eqn
    numbers = [i % len(eqn.invars) for i in part.args]
    return [i in numbers for i in range(len(eqn.invars))], part_of(eqn)
