"""What a compiled program needs in memory, in the compilers' own figures."""

from __future__ import annotations

import re
from typing import Any, NamedTuple

_ALLOCATION = re.compile(r"^allocation \d+: size (\d+)(.*)$", re.MULTILINE)
_DEVICE, _HOST = 0, 5  # XLA's numbers ("colors") of the memory spaces


class Memory(NamedTuple):
    """Bytes of ONE device that a compiled function needs, from the compiler's buffer assignment.

    Attributes:
      arguments, outputs: with the device's padding, donated ones in both.
      aliases: outputs in the buffers of donated arguments.
      temporaries: everything else that lives while it runs; on a TPU without its on-chip memories.
      code: the program itself (0 where the platform doesn't say).
      host_arguments, host_outputs, host_temporaries: in the host's memory, in none of the others.
    """

    arguments: int
    outputs: int
    aliases: int
    temporaries: int
    code: int = 0
    host_arguments: int = 0
    host_outputs: int = 0
    host_temporaries: int = 0

    @property
    def total(self) -> int:
        """What must be there at the peak, the code apart."""
        return self.arguments + self.outputs - self.aliases + self.temporaries

    @property
    def host(self) -> int:
        """What must be there in the host's memory."""
        return self.host_arguments + self.host_outputs + self.host_temporaries


def assigned(text: str) -> Memory:
    """The Memory of XLA's `*buffer-assignment.txt`, as a TPU's compiler writes it."""
    sums: dict[tuple[int, str], int] = {}
    for size, flags in _ALLOCATION.findall(text):
        color = re.search(r"\bcolor (\d+)", flags)
        space = int(color[1]) if color else _DEVICE
        argument, output = re.search(r"\bparameter \d+", flags), "maybe-live-out" in flags
        owner = ("alias" if output else "argument") if argument else "output" if output else "temporary"
        sums[space, owner] = sums.get((space, owner), 0) + int(size)

    def of(space: int, *owners: str) -> int:
        return sum(sums.get((space, owner), 0) for owner in owners)

    return Memory(
        arguments=of(_DEVICE, "argument", "alias"),
        outputs=of(_DEVICE, "output", "alias"),
        aliases=of(_DEVICE, "alias"),
        temporaries=of(_DEVICE, "temporary"),
        host_arguments=of(_HOST, "argument", "alias"),
        host_outputs=of(_HOST, "output"),
        host_temporaries=of(_HOST, "temporary"),
    )


def analysed(platform: str, analysis: Any, written: Memory | None = None) -> Memory:
    """`executable.memory_analysis()` as a Memory; a TPU's from the assignment, `written`, where there is one."""
    code = int(analysis.generated_code_size_in_bytes)
    if written is not None:
        return written._replace(code=code)
    memory = Memory(
        arguments=int(analysis.argument_size_in_bytes),
        outputs=int(analysis.output_size_in_bytes),
        aliases=int(analysis.alias_size_in_bytes),
        temporaries=int(analysis.temp_size_in_bytes),
        code=code,
        host_arguments=int(analysis.host_argument_size_in_bytes),
        host_outputs=int(analysis.host_output_size_in_bytes) - int(analysis.host_alias_size_in_bytes),
        host_temporaries=int(analysis.host_temp_size_in_bytes),
    )
    if platform == "tpu":
        return memory._replace(temporaries=int(analysis.peak_memory_in_bytes) - memory.total + memory.temporaries)
    return memory
