"""Floating-point operations of the matrix products in a compiled program, from their shapes."""

from __future__ import annotations

import json
import math

from jaxpeft.memory.hlo import Instruction, Program
from jaxpeft.memory.wire import Message

_CONVOLUTION, _WINDOW, _DOT, _CONFIG, _GROUPS = 16, 15, 30, 43, 50  # fields of HloInstructionProto


def flops(program: Program, instruction: Instruction) -> float:
    """2 per multiply-add of a product, or of those in a fusion; 0 of anything else, kernels of Pallas included."""
    if instruction.opcode == "fusion":
        inside = program.computations[instruction.called[0]][0]
        return sum(flops(program, program.instructions[i]) for i in inside)
    shapes = [program.instructions[operand].shape()[1] for operand in instruction.operands[:2]]
    if len(shapes) < 2:
        return 0.0
    if instruction.opcode == "dot":
        numbers = Message(instruction.proto).message(_DOT)
        return 2.0 * math.prod(instruction.shape()[1]) * math.prod(shapes[0][axis] for axis in numbers.numbers(1))
    if instruction.opcode == "convolution":
        return _convolution(instruction, *shapes)
    if instruction.target.startswith("__cublas"):
        return _gemm(instruction, *shapes)
    return 0.0


def of_kernel(call: Instruction) -> float | None:
    """Of a kernel, what its author has told the compiler (`cost_estimate` of a Pallas call for a TPU); None: nothing.

    A GPU's compiler is not told: neither Mosaic's nor cuDNN's calls carry a count.
    """
    try:
        told = json.loads(Message(call.proto).raw(_CONFIG))["custom_call_config"]["cost_estimate"]["flops"]
        return float(told)
    except (ValueError, KeyError, TypeError):
        return None


def _gemm(call: Instruction, a: tuple[int, ...], b: tuple[int, ...]) -> float:
    """Of cuBLAS's calls, whose settings name the axes as a dot's do."""
    out = call.shape((0,))[1] if call.shape()[0] == "tuple" else call.shape()[1]
    try:
        settings = json.loads(Message(call.proto).raw(_CONFIG))
        axes = settings["gemm_backend_config"]["dot_dimension_numbers"]["lhs_contracting_dimensions"]
        return 2.0 * math.prod(out) * math.prod(a[int(axis)] for axis in axes)
    except (ValueError, KeyError, IndexError, TypeError):
        return 2.0 * math.sqrt(math.prod(a) * math.prod(b) * math.prod(out))


def _convolution(instruction: Instruction, x: tuple[int, ...], kernel: tuple[int, ...]) -> float:
    """A TPU's products are convolutions, too; axes of a batch are spatial there, and mostly padding."""
    message = Message(instruction.proto)
    numbers, windows = message.message(_CONVOLUTION), list(message.message(_WINDOW).messages(1))
    out = instruction.shape()[1]
    spatial = zip(windows, numbers.numbers(11), numbers.numbers(6), numbers.numbers(12), strict=True)
    positions = math.prod(_positions(window, x[i], kernel[k], out[o]) for window, i, k, o in spatial)
    batch, features = out[numbers.number(9)], out[numbers.number(10)]
    groups = max(message.number(61), 1)  # of the batch
    return 2.0 * batch * features * kernel[numbers.number(3)] * positions / groups


def _positions(window: Message, size: int, kernel: int, out: int) -> int:
    """Pairs of a kernel's and an output's position that meet an element, not padding or a gap of a dilation."""
    stride, low = max(window.number(2), 1), window.signed(3)
    across, within = max(window.number(5), 1), max(window.number(6), 1)  # dilations of the kernel, of the input
    last = (size - 1) * within
    found = 0
    for k in range(kernel):
        at = k * across - low  # out position o meets input (at + o * stride) / within
        first = max(0, -(at // stride))
        end = min(out, (last - at) // stride + 1)
        if within == 1:
            found += max(0, end - first)
        else:
            found += sum(not (at + o * stride) % within for o in range(first, end))
    return found
