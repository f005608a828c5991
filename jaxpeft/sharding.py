"""Where a run's arrays lie on a mesh of devices: one table of rules, path -> axes of the mesh.

    mesh = make_mesh("data=2,fsdp=2,tensor=2")
    state, batch = jax.device_put((state, batch), (of_state(mesh, state), of_batch(mesh, batch)))
    with jax.set_mesh(mesh):
        state, metrics = step(state, batch)

    axis     what is divided over its devices
    data     rows of the batch; weights are whole on each
    fsdp     rows of the batch, and an axis of every matrix (ZeRO's stage 3; Rajbhandari et al. 2020, arXiv:1910.02054)
    tensor   heads and features: matrices by columns where they open a module, by rows where they close it (Megatron;
             Shoeybi et al. 2019, arXiv:1909.08053)
    seq      tokens of each row (Liu et al. 2023, arXiv:2310.01889); weights are whole on each

No engine of our own: XLA's partitioner inserts the communication that the placements ask for, and what a program says
of itself where it is traced (`jaxpeft.constraints`).

An adapter's factor follows its kernel: an axis of the kernel's inputs or outputs lies as it does there, its rank is
never divided. The optimizer's and the method's state follow the leaf of the same path. An axis that its devices do not
divide stays whole.
"""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Callable, Container, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxpeft import host, tree
from jaxpeft.errors import InputError

AXES = ("data", "fsdp", "tensor", "seq")
ROWS = ("data", "fsdp")  # the axes over which the rows of a batch are divided
TOKENS = "seq"  # and that over which the tokens of a row are

Spec = tuple[str | tuple[str, ...] | None, ...]

# Our paths of a base's parameters -> axes of one layer's leaf, the first match; our families call alike what is alike.
RULES: tuple[tuple[str, Spec], ...] = (
    (r"layers/self_attn/[qkv]_proj/kernel", ("fsdp", "tensor")),
    (r"layers/self_attn/o_proj/kernel", ("tensor", "fsdp")),
    (r"layers/mlp/(gate|up)_proj/kernel", ("fsdp", "tensor")),
    (r"layers/mlp/down_proj/kernel", ("tensor", "fsdp")),
    (r"layers/(self_attn/[qkv]_proj|mlp/(gate|up)_proj)/(bitfit/)?bias", ("tensor",)),
    (r"lm_head/kernel", ("fsdp", "tensor")),
    (r"embed_\w+/embedding", (None, ("fsdp", "tensor"))),
    (r"(patch_embed|classifier|(classifier|lm_head)/\w+)/kernel", ("fsdp", None)),
    (r"(.*/)?(bias|scale)|cls_token|embed_positions", ()),
)


# A table lies by columns, so that a device looks all words up in its own; as a head it is divided by words: exchanged
# over tensor, then gathered over fsdp. Asked for at once, XLA would make all of the table on each device.
TIED, AS_HEAD = "embed_tokens/embedding", ("tensor", "fsdp")


# A mesh.


def parse(text: str) -> dict[str, int]:
    """{axis: devices} of "data=2,fsdp=4"; an axis that is not named has one device.

    Raises:
      InputError: for text that is none, an unknown axis or one that is named twice.
    """
    found: dict[str, int] = {}
    for part in text.split(","):
        name, equals, count = part.strip().partition("=")
        if name not in AXES or not equals:
            raise InputError(f"--mesh {text}: {part.strip()!r} should be AXIS=DEVICES with one of {', '.join(AXES)}")
        if name in found:
            raise InputError(f"--mesh {text}: {name} stands twice")
        if not re.fullmatch(r"[1-9]\d{0,6}", count):
            raise InputError(f"--mesh {text}: {part.strip()} should have a number of devices, at least 1")
        found[name] = int(count)
    return {axis: found.get(axis, 1) for axis in AXES}


def make_mesh(text: str, devices: Any = None) -> Mesh:
    """A mesh of all devices (`jax.devices()`, or those given).

    Raises:
      InputError: for text that `parse` refuses, or a mesh of another number of devices.
    """
    sizes = parse(text)
    devices = jax.devices() if devices is None else devices
    if math.prod(sizes.values()) != len(devices):
        several = [size for size in sizes.values() if size > 1]
        product = f"{' x '.join(map(str, several))} = " if len(several) > 1 else ""
        count = math.prod(several)
        there = f"there {'is' if len(devices) == 1 else 'are'} {len(devices)}"
        raise InputError(f"--mesh {text}: {product}{count} devices, {there}")
    auto = (jax.sharding.AxisType.Auto,) * len(AXES)
    # An axis may be a part of a dimension of a slice, such as fsdp=2 of 4 x 4 x 4 chips.
    placed = mesh_utils.create_device_mesh(
        tuple(sizes.values()), list(np.ravel(devices)), allow_split_physical_axes=True
    )
    return Mesh(placed, AXES, axis_types=auto)


def auto(devices: int, rows: int, length: int, accumulate: int = 1) -> str:
    """A mesh of so many devices: `fsdp` over as many as divide a micro-batch's rows, `tensor` over up to 8, then `seq`.

    >>> auto(8, 16, 1024), auto(8, 4, 1024), auto(64, 2, 4096)
    ('fsdp=8', 'fsdp=4,tensor=2', 'fsdp=2,tensor=8,seq=4')

    Raises:
      InputError: for rows that it does not divide.
    """
    fsdp = math.gcd(devices, rows // accumulate)
    tensor = math.gcd(devices // fsdp, 8)
    seq = devices // fsdp // tensor
    if length % seq:
        raise InputError(
            f"--mesh auto: of {devices} devices {fsdp * tensor} share --batch-size {rows}, and the {seq} parts of a "
            f"row that are left for each do not divide --seq-len {length}"
        )
    sizes = {"fsdp": fsdp, "tensor": tensor, "seq": seq}
    return ",".join(f"{axis}={size}" for axis, size in sizes.items() if size > 1) or "data=1"


# Where arrays lie.


def spec_of(path: str, shapes: Mapping[str, Sequence[int]], base: Container[str] = ()) -> Spec:
    """The axes of the leaf at a path, of one layer where it is stacked; () is whole on every device.

    Args:
      path: of a leaf.
      shapes: of all of the model's leaves by path, of one layer where they are stacked.
      base: paths of the base's parameters, every one of which a rule has to cover.

    Raises:
      InputError: for a parameter of the base that none does.
    """
    name = tree.canonical(path)
    if (known := spec_of_name(name)) is not None:
        return known
    if path in base or name in base:
        rules = ", ".join(pattern for pattern, _ in RULES)
        raise InputError(f"--mesh: no rule says where {path} lies; there are rules for {rules}")
    parts = path.split("/")
    above = ["/".join([*parts[:n], "kernel"]) for n in range(len(parts) - 1, 0, -1)]
    kernel = next((other for other in above if other in shapes and other != path), None)
    if kernel is None or not (spec := spec_of(kernel, shapes, base)):
        return ()
    (n, m), own = shapes[kernel][-2:], shapes[path]
    if len(own) == 1:
        return spec[1:] if own[0] == m else spec[:1] if own[0] == n else ()
    inner = (None,) * (len(own) - 2)
    return (spec[0] if own[0] == n else None, *inner, spec[1] if own[-1] == m else None) if own else ()


@functools.cache
def spec_of_name(name: str) -> Spec | None:
    """The axes of one layer's leaf whose path a rule knows."""
    return next((spec for pattern, spec in RULES if re.fullmatch(pattern, name)), None)


def of_leaves(mesh: Mesh, leaves: Mapping[str, Any], base: Container[str] = ()) -> dict[str, Any]:
    """{path: shardings} of leaves by path, or of their shapes; of a packed kernel those of its arrays.

    Raises:
      InputError: as `spec_of` does.
    """
    shapes = {path: leaf.shape[tree.stacked(path) :] for path, leaf in leaves.items()}
    place = functools.partial(_named, mesh)
    return {
        path: each(mesh, leaf, spec_of(path, shapes, base), tree.stacked(path), place) for path, leaf in leaves.items()
    }


def _named(mesh, x, spec):
    del x
    return NamedSharding(mesh, PartitionSpec(*spec))


def each(mesh: Any, leaf: Any, spec: Spec, lead: int, place: Callable[[Any, Spec], Any]) -> Any:
    """place(array, its axes) of each array of a leaf with `lead` axes before those of the specification.

    An axis that its devices do not divide is none, in all arrays of a packed kernel alike: they are cut between tiles
    of codes and groups of scales (`unit`).
    """

    def put(array):
        if array.ndim != lead + len(spec):  # the few numbers of double quantization
            return place(array, ())
        own = (axes if size > 1 else None for axes, size in zip(spec, array.shape[lead:], strict=True))
        return place(array, (*(None,) * lead, *own))

    sizes = list(leaf.shape[lead:])
    if (unit := getattr(leaf, "unit", None)) and sizes:
        sizes[0] = sizes[0] // unit if sizes[0] % unit == 0 else 1
    if len(sizes) == len(spec):
        spec = tuple(_dividing(mesh, size, axes) for axes, size in zip(spec, sizes, strict=True))
    return jax.tree.map(put, leaf)


def divisible(mesh: Any, size: int, axes: Any) -> bool:
    """Whether an axis of an array can be divided over these axes of the mesh."""
    names = (axes,) if isinstance(axes, str) else axes or ()
    return bool(names) and size > 0 and size % math.prod(mesh.shape[name] for name in names) == 0


def _dividing(mesh: Any, size: int, axes: Any) -> Any:
    """The axes, or the first of several, that divide a size."""
    several = () if isinstance(axes, str) or axes is None else axes
    tried = [axes, *(several[:count] for count in range(len(several) - 1, 0, -1))]
    return next((axes for axes in tried if divisible(mesh, size, axes)), None)


def of_state(mesh: Mesh, state: Any, base: Container[str] = ()) -> Any:
    """The shardings of a `TrainState`, of arrays or shapes: what has a leaf's path and its axes lies as the leaf does.

    So do sums over some of its axes, blocks of them, and several of its kind (`_axes_like`).

    Raises:
      InputError: as `spec_of` does.
    """
    leaves, shapes = of_leaves(mesh, state.leaves, base), state.leaves
    whole = NamedSharding(mesh, PartitionSpec())

    def like(path, x):
        names = [key.key for key in path if isinstance(getattr(key, "key", None), str)]
        leaf = next((name for name in reversed(names) if name in leaves), None)
        if leaf is None or not isinstance(leaves[leaf], NamedSharding):
            return host.of(whole) if host.holds(x) else whole
        axes = _axes_like(x.shape, shapes[leaf].shape, leaves[leaf].spec)
        there = NamedSharding(mesh, PartitionSpec(*map(functools.partial(_dividing, mesh), x.shape, axes)))
        return host.of(there) if host.holds(x) else there

    only = lambda flat: {path: leaves[path] for path in flat}
    return state._replace(
        step=whole,
        key=whole,
        trainable=only(state.trainable),
        frozen=only(state.frozen),
        moved={path: host.of(leaves[path]) if host.holds(leaf) else leaves[path] for path, leaf in state.moved.items()},
        opt_state=jax.tree.map_with_path(like, state.opt_state),
    )


def _axes_like(shape: Sequence[int], leaf: Sequence[int], spec: Spec) -> list[Any]:
    """The axes of an array that belongs to a leaf: of one with as many axes, which may be blocks of the leaf's, those.

    Else one of the two has the other's axes, in order, and further ones: an axis lies as the first of its size.
    """
    axes = [*spec, *[None] * (len(leaf) - len(spec))]
    if len(shape) == len(leaf):
        return [axis if size and n % size == 0 else None for size, n, axis in zip(shape, leaf, axes, strict=True)]
    found, left = [], list(zip(leaf, axes, strict=True))
    for size in shape:
        if len(shape) < len(leaf):
            while left and left[0][0] != size:
                left.pop(0)
        found.append(left.pop(0)[1] if left and left[0][0] == size else None)
    return found


def of_batch(mesh: Mesh, batch: Mapping[str, Any]) -> dict[str, NamedSharding]:
    """The shardings of a batch, by rows, and by tokens what is (B, S).

    Raises:
      InputError: for rows or tokens that the devices do not divide.
    """
    check_rows(mesh, next(iter(batch.values())).shape[0])
    parts = mesh.shape[TOKENS]
    for name, x in batch.items():
        if x.ndim == 2 and x.shape[1] % parts:
            raise InputError(f"--mesh: rows of {x.shape[1]} tokens ({name}) are no multiple of seq = {parts} devices")
    spec = lambda x: PartitionSpec(ROWS, TOKENS) if x.ndim == 2 else PartitionSpec(ROWS)
    return {name: NamedSharding(mesh, spec(x)) for name, x in batch.items()}


def num_shards(mesh: Any) -> int:
    """Devices over which the rows of a batch are divided; 1 without a mesh."""
    return 1 if mesh is None else math.prod(mesh.shape[axis] for axis in ROWS)


def check_rows(mesh: Mesh | None, rows: int, accumulate: int = 1, length: int | None = None) -> None:
    """Raises InputError for a batch, or a micro-batch of it, whose rows or their tokens the devices do not divide."""
    parts = 1 if mesh is None else mesh.shape[TOKENS]
    if length is not None and length % parts:
        raise InputError(f"--seq-len {length}: must be a multiple of the mesh's seq = {parts} devices")
    count = num_shards(mesh)
    if rows % (count * accumulate):
        parts = f", times --accumulate {accumulate}: {count * accumulate}" if accumulate > 1 else ""
        raise InputError(f"--batch-size {rows}: must be a multiple of the mesh's data x fsdp = {count} devices{parts}")
