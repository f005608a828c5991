"""What the Mosaic GPU kernels share: how they are launched, their pipeline, and the versions of JAX.

Every kernel is a persistent grid of blocks, one per streaming multiprocessor, and every block is a few warpgroups (128
threads each): COMPUTE of them multiply, and one more, the last, only moves memory. They meet at a `Ring`: a number of
slots in shared memory that the memory warpgroup fills by TMA and the others empty.

    memory     wait empty[slot]      start the copies into the slot       (each arrives at full[slot] when it is there)
    compute    wait full[slot]       use it, then arrive at empty[slot]

Steps are numbered through all the tiles of a block, so that the memory warpgroup fetches the next tile's operands while
the others are still at the last one's epilogue.

Operands in shared memory are stored in tiles of 8 rows by 128 bytes, swizzled: the one layout that TMA writes and wgmma
reads, along either axis, without bank conflicts. So every extent that wgmma sees is a multiple of TILE = 64 elements of
16 bits. What lies beyond the end of an array reads as zeros and is not written: that is how TMA pads ranks and rows.
An array in global memory is seen in the same tiles, so its last axis is a multiple of 64 elements (or shorter, but a
multiple of 8), and the one before it a multiple of 8: `padded` adds zeros where that is not so.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

TILE = 64  # elements of 16 bits in a row of the swizzle; rows of a wgmma
COMPUTE = 2  # warpgroups that multiply
BLOCKS = 132  # streaming multiprocessors of an H100 or H200
SHARED_BYTES = 232_448  # that a block may have
RESERVED_BYTES = 3072  # of them, for barriers and the compiler's own use
ALIGNMENT = 8  # rows of a tile of the swizzle; elements of 16 bits to which TMA aligns rows
REGISTERS = 504  # of the three warpgroups per thread: 168 each, which they may share otherwise, in eights
BLOCK_AXIS, WARPGROUP_AXIS = "block", "warpgroup"
DTYPES = (jnp.dtype(jnp.bfloat16), jnp.dtype(jnp.float16))


def ceil_div(a: int, b: int) -> int:
    """a / b, rounded up."""
    return -(-a // b)


def round_up(a: int, b: int) -> int:
    """a, rounded up to a multiple of b."""
    return ceil_div(a, b) * b


def short_or_whole(extent: int) -> int:
    """The least extent of a last axis that TMA can read in tiles, from `extent` on."""
    return round_up(extent, ALIGNMENT if extent <= TILE else TILE)


def padded(x: jax.Array, rows: int, columns: int) -> jax.Array:
    """x (..., rows, columns), with zeros up to the extents; x itself where it has them."""
    extents = [(0, 0)] * (x.ndim - 2) + [(0, rows - x.shape[-2]), (0, columns - x.shape[-1])]
    return x if not any(high for _, high in extents) else jnp.pad(x, extents)


def swizzled(*shape: int, dtype: Any) -> Any:
    """Shared memory as wgmma wants it; the last axis is a multiple of 128 bytes, the one before of 8."""
    width = 128 // jnp.dtype(dtype).itemsize
    return plgpu.SMEM(shape, dtype, transforms=(plgpu.TilingTransform((8, width)), plgpu.SwizzleTransform(128)))


def transposed(ref: Any) -> Any:
    """The last two axes of a reference exchanged; nothing moves."""
    return ref.transpose((1, 0)) if hasattr(ref, "transpose") else plgpu.transpose_ref(ref, (1, 0))


def interpreter(**options: Any) -> Any:
    """What `interpret` of a kernel is to be, for it to run on a CPU; options as of InterpretGPUParams."""
    if hasattr(plgpu, "InterpretGPUParams"):
        return plgpu.InterpretGPUParams(**options)
    from jax._src.pallas.mosaic_gpu.interpret.params import InterpretGPUParams

    return InterpretGPUParams(**options)


def launch(
    body: Callable[..., None], *args: Any, name: str, out: Any, blocks: int, interpret: Any = None, **scratch: Any
) -> Any:
    """Runs body(*args, *out, **scratch) as references, in `blocks` blocks of COMPUTE + 1 warpgroups.

    Args:
      body: the kernel.
      *args: arrays, or dictionaries of them.
      name: of the kernel, in profiles.
      out: ShapeDtypeStruct, or a tuple of them; or an array, which is written in its own place.
      blocks: size of the grid.
      interpret: None for the device, or `interpreter(...)`.
      **scratch: shared memory and barriers of a block.
    """
    body.__name__ = name
    if isinstance(out, jax.Array):
        return _launch_into(body, args, out, name, blocks, interpret, scratch)
    return plgpu.kernel(
        body,
        out_type=out,
        scratch_types=scratch,
        grid=(blocks,),
        grid_names=(BLOCK_AXIS,),
        num_threads=COMPUTE + 1,
        thread_name=WARPGROUP_AXIS,
        compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Warpgroup),
        interpret=interpret,
    )(*args)


def _launch_into(body, args, out, name: str, blocks: int, interpret: Any, scratch) -> jax.Array:
    """`launch` with a reference of an array in place of results; JAX 0.10's `plgpu.kernel` takes none."""
    mesh = plgpu.Mesh(grid=(blocks,), grid_names=(BLOCK_AXIS,), num_threads=COMPUTE + 1, thread_name=WARPGROUP_AXIS)

    def scoped(*refs):
        pl.run_scoped(functools.partial(body, *refs), collective_axes=WARPGROUP_AXIS, **scratch)

    def run(ref):
        pl.kernel(
            scoped,
            out_type=(),
            mesh=mesh,
            compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Warpgroup),
            interpret=interpret,
            name=name,
        )(*args, ref)

    return pl.run_state(run)(out)


def specialise(compute: Callable[[jax.Array], None], memory: Callable[[], None], memory_registers: int = 40) -> None:
    """Runs compute(i) in warpgroup i < COMPUTE and memory() in the last one.

    memory_registers: per thread of the last one, 40 or 24. The others have 232 or 240. More than they give up at the
    beginning they would wait for, for ever.
    """
    i = lax.axis_index(WARPGROUP_AXIS)

    def multiply():
        plgpu.set_max_registers((REGISTERS - memory_registers) // COMPUTE, action="increase")
        compute(i)

    def move():
        plgpu.set_max_registers(memory_registers, action="decrease")
        memory()

    lax.cond(i < COMPUTE, multiply, move)


def each_tile(tiles: int, blocks: int, body: Callable[[jax.Array, jax.Array], jax.Array]) -> jax.Array:
    """body(step, tile) for each tile of this block: block, block + blocks, ... below `tiles`.

    `step` is the number of the tile's first step; body returns that of the next one's. So does this function.
    """
    block = lax.axis_index(BLOCK_AXIS)
    count = (tiles - block + (blocks - 1)) // blocks
    return lax.fori_loop(0, count, lambda i, step: body(step, block + i * blocks), jnp.int32(0))


def snake(tile: jax.Array, rows: int, columns: int, width: int) -> tuple[jax.Array, jax.Array]:
    """(row, column) of a tile in an order where neighbours in time share operands in the L2 cache.

    Rows run fastest, in bands of `width`: what the blocks work on at one time is about `width` tiles high.
    """
    return plgpu.planar_snake(tile, (rows, columns), 0, width)


class Ring(NamedTuple):
    """The slots between the memory warpgroup and the others.

    full, empty: barriers, one per slot.
    slots: their number.
    """

    full: Any
    empty: Any
    slots: int

    @staticmethod
    def barriers(slots: int, copies: int, users: int = COMPUTE) -> dict[str, Any]:
        """Scratch for a ring whose slots are filled by `copies` copies and used by `users` warpgroups each."""
        return {
            "full": plgpu.Barrier(num_arrivals=copies, num_barriers=slots),
            "empty": plgpu.Barrier(num_arrivals=users, num_barriers=slots),
        }

    def slot(self, step: jax.Array) -> jax.Array:
        return lax.rem(step, jnp.int32(self.slots))

    def fill(self, step: jax.Array, *copies: tuple[Any, Callable[[jax.Array], Any]]) -> None:
        """Memory: starts the copies (source, slot -> target) of a step, once its slot is empty."""
        slot = self.slot(step)

        @pl.when(step >= self.slots)
        def _():
            plgpu.barrier_wait(self.empty.at[slot])

        for source, target in copies:
            plgpu.copy_gmem_to_smem(source, target(slot), self.full.at[slot])

    def drain(self, steps: jax.Array) -> None:
        """Memory: waits until the last of all its steps have been used, so that no barrier is left half-way."""

        def wait(step, _):
            plgpu.barrier_wait(self.empty.at[self.slot(step)])

        lax.fori_loop(jnp.maximum(steps - self.slots, 0), steps, wait, None)

    def wait(self, step: jax.Array) -> None:
        """Compute: until a step's slot is full."""
        plgpu.barrier_wait(self.full.at[self.slot(step)])

    def release(self, step: jax.Array) -> None:
        """Compute: a step's slot is no longer read."""
        plgpu.barrier_arrive(self.empty.at[self.slot(step)])


def multiply_steps(
    ring: Ring,
    first: jax.Array,
    steps: int,
    multiply: Callable[[jax.Array, jax.Array], None],
    stride: int = 1,
    follows: bool = False,
) -> None:
    """multiply(i, slot) for steps first + stride i, 0 <= i < steps; one wgmma group each.

    One group stays in flight while the next is issued; a slot is released when its group is known to be done. The last
    slot is not: the caller reads the accumulator, which waits, and releases it; or multiplies further steps, which do.

    follows: whether the step before `first` is one of such an earlier call, and its slot is still to be released.
    """

    def body(i, _):
        ring.wait(first + stride * i)
        multiply(i, ring.slot(first + stride * i))
        plgpu.wgmma_wait(1)

        @pl.when((i > 0) | follows)
        def release_last():
            ring.release(first + stride * (i - 1))

    lax.fori_loop(0, steps, body, None)


def store(values: jax.Array, staging: Any, target: Any, in_flight: int = 0) -> None:
    """Writes registers to global memory through `staging` in shared memory; returns before the copy is done.

    in_flight: earlier stores of this warpgroup that may still read their staging.
    """
    plgpu.wait_smem_to_gmem(in_flight, wait_read_only=True)
    staging[...] = values.astype(staging.dtype)
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(staging, target)


def beyond(start: jax.Array | int, size: int, traced: jax.Array) -> Any:
    """A slice that may reach beyond the end of its axis, which JAX refuses where it can see it.

    traced: any traced int32 scalar; its value does not matter.
    """
    return pl.ds(start + traced * 0, size)


def slots_that_fit(wanted: int, slot_bytes: int, other_bytes: int) -> int:
    """The number of slots of a ring, at most `wanted`."""
    return min(wanted, (SHARED_BYTES - RESERVED_BYTES - other_bytes) // slot_bytes)


def iota(shape: tuple[int, int], axis: int, start: jax.Array) -> jax.Array:
    """start + the index along `axis`, int32."""
    return start + lax.broadcasted_iota(jnp.int32, shape, axis)
