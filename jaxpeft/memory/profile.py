"""Who owns the peak: the buffers of a compiled function, each with its owner, from the compiler's own dumps.

    profile = read(folder, step_owners(state, batch, base))      # a train step, compiled with xla_dump_to=folder
    for row in table(profile): ...

Arguments and results are exact: the caller says what each is. A temporary belongs to whatever computed it, by the name
stack that JAX hands to XLA (`op_name`), and to a category by where it is written and read:

    saved activations   written in the forward pass, read in the backward pass
    gradients           of a trainable leaf's shape, written in the backward pass
    loss                in the head or the loss
    optimizer           of a trainable leaf's shape, written after the backward pass
    workspace           everything else

Scopes in the name stack take precedence, so that a memory plan can say what it stores:
`jax.named_scope("save:NAME")` around the storing of activation NAME, `"read:NAME"` around its reading, `"grad:PATH"`
around a gradient's accumulation. Without such a scope an activation is named only if a linear map yields it (by the
map's name); any other is *unnamed*: its module path, its shape and its op_name say where it comes from.

What the peak is: every allocation in device memory, of arguments, results and constants, and the block that holds all
temporaries. That block is as large as the compiler made it; what it holds beyond the temporaries live at the fullest
moment is "alignment" and "fragmentation" (layout.py), so that the categories add up to the compiler's total exactly.
"""

from __future__ import annotations

import io
import os
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from jaxpeft.memory import hlo, layout
from jaxpeft.memory.attribution import Attribution
from jaxpeft.memory.dataflow import Dataflow
from jaxpeft.memory.owners import CATEGORIES, KINDS, Buffer, Owner, Owners, step_owners
from jaxpeft.memory.traffic import Traffic
from jaxpeft.memory.traffic import text as traffic_text
from jaxpeft.train.report import human_bytes

__all__ = ["CATEGORIES", "Buffer", "Owner", "Owners", "Profile", "profile", "read", "step_owners", "table", "text"]
__all__ += ["to_json"]


class Profile(NamedTuple):
    """The memory of a compiled function over its schedule.

    platform: "tpu", "gpu" or "cpu".
    total_bytes: of all allocations in device memory; the sum over `buffers`.
    peak_position: where in the schedule the most temporaries are live, of `positions`.
    live_bytes: live there; less than `total_bytes` by alignment and fragmentation.
    buffers: at the peak, largest first, alignment and fragmentation included.
    timeline: (position, {category: live bytes}) at every position where something changes; these two excluded.
    unattributed_bytes: of the buffers that have no owner.
    host_bytes: in the host's memory (what is offloaded); in none of the above.
    title: what it is of, as pictures and pages say it; "" leaves that to them.
    devices: (device, bytes) of what is in use on several; () for a program, whose figures are of one.
    traffic: what the function moves; None where nobody asked.
    """

    platform: str
    total_bytes: int
    peak_position: int
    positions: int
    live_bytes: int
    buffers: tuple[Buffer, ...]
    timeline: tuple[tuple[int, dict[str, int]], ...]
    unattributed_bytes: int
    host_bytes: int
    title: str = ""
    devices: tuple[tuple[str, int], ...] = ()
    traffic: Traffic | None = None

    def __str__(self) -> str:
        lines = [self.title] if self.title else []
        lines.append(f"peak {human_bytes(self.total_bytes)}, {self.platform}")
        if self.host_bytes:
            lines.append(f"in the host's memory {human_bytes(self.host_bytes)}")
        lines += ["", text(self.to_json(20))]
        return "\n".join([*lines, "", traffic_text(self.traffic.to_json(20))] if self.traffic else lines)

    def table(self, limit: int = 20) -> list[dict[str, Any]]:
        """The largest owners; see `table`."""
        return table(self, limit)

    def to_json(self, limit: int = 100) -> dict[str, Any]:
        """As JSON can hold it; see `to_json`."""
        return to_json(self, limit)

    def write_html(self, path: str | os.PathLike[str], title: str = "") -> None:
        """Writes a page that needs nothing else: the timeline, the treemap of the peak, the owners."""
        from jaxpeft.memory import draw

        draw.write_html(self, Path(path), title)

    def write_png(self, path: str | os.PathLike[str], title: str = "") -> None:
        """Writes the timeline, the treemap and what moves as a picture."""
        from jaxpeft.memory import draw

        draw.write_png(self, Path(path), title)

    @property
    def categories(self) -> dict[str, int]:
        """Bytes at the peak by category, in the order of `CATEGORIES`; their sum is `total_bytes`."""
        total = dict.fromkeys((*CATEGORIES, *KINDS), 0)
        for buffer in self.buffers:
            total[buffer.category] += buffer.bytes
        return {category: size for category, size in total.items() if size}


def read(dump: Path, owners: Owners) -> Profile:
    """The profile of the function whose compilation wrote the folder `dump` (see `hlo.DUMP_OPTIONS`).

    Raises:
      InputError: if the folder lacks the dumps, or `owners` does not fit the function.
    """
    return profile(hlo.read(Path(dump)), owners)


def profile(program: hlo.Program, owners: Owners, attribution: type[Attribution] = Attribution) -> Profile:
    """The profile of a program, whose owners `attribution` finds."""
    flow = Dataflow(program)
    placed = _placed(program, flow)
    attribute = attribution(program, flow, owners)
    spans: list[tuple[Buffer, int, int]] = []  # buffers of the block of temporaries, and when they are live
    fixed: list[Buffer] = []
    owners_of: dict[hlo.Key, str] = {}
    end = max(len(program.order), 1)
    for allocation in program.allocations.values():
        if allocation.kind == "temporary":
            for group, pieces in placed.get(allocation.number, {}).items():
                buffer = attribute.temporary(group, pieces)
                owners_of[group] = buffer.owner
                spans += [(buffer, first, last) for _, first, last in pieces]
        elif allocation.bytes:
            fixed.append(attribute.allocation(allocation, end))
    changes: dict[int, dict[str, int]] = defaultdict(lambda: defaultdict(int))
    for buffer in fixed:
        changes[0][buffer.category] += buffer.bytes
    for buffer, first, last in spans:
        changes[first][buffer.category] += buffer.bytes
        changes[last + 1][buffer.category] -= buffer.bytes
    timeline, now = [], dict.fromkeys(CATEGORIES, 0)
    for position in sorted(changes):
        for category, change in changes[position].items():
            now[category] += change
        timeline.append((min(position, end), {category: size for category, size in now.items() if size}))
    peak, live = max(timeline, key=lambda point: sum(point[1].values()))
    total = sum(allocation.bytes for allocation in program.allocations.values())
    buffers = fixed + [buffer for buffer, first, last in spans if first <= peak <= last]
    waste = total - sum(buffer.bytes for buffer in buffers)
    for block in placed:
        for row in layout.unused(program, block, peak, lambda key: owners_of.get(flow.group(key), "")):
            # Arrays in one place, as in an update's, are counted once there and twice in the ranges.
            if (size := min(row.bytes, waste)) > 0:
                buffers.append(row._replace(bytes=size))
                waste -= size
    if waste:
        buffers.append(Buffer(waste, "", "", "", 0, end, "fragmentation"))
    buffers.sort(key=lambda buffer: -buffer.bytes)
    return Profile(
        platform=program.platform,
        host_bytes=program.host_bytes,
        total_bytes=total,
        peak_position=peak,
        positions=end,
        live_bytes=sum(live.values()),
        buffers=tuple(buffers),
        timeline=tuple(timeline),
        unattributed_bytes=sum(buffer.bytes for buffer in buffers if buffer.category == "unattributed"),
    )


def table(profile: Profile, limit: int = 20) -> list[dict[str, Any]]:
    """The largest owners at the peak: rows of category, owner, arrays (their number), bytes, share of the total.

    Buffers of one category and owner are one row; saved activations without a name never share a row across shapes.
    Rows beyond `limit` are joined in one.
    """
    total: dict[tuple[str, str], list[int]] = defaultdict(lambda: [0, 0])
    for buffer in profile.buffers:
        row = total[buffer.category, buffer.owner]
        row[0] += buffer.arrays
        row[1] += buffer.bytes
    ordered = sorted(total.items(), key=lambda item: -item[1][1])
    rows = [(category, owner, count, size) for (category, owner), (count, size) in ordered[:limit]]
    if rest := ordered[limit:]:
        count, size = (sum(column) for column in zip(*(numbers for _, numbers in rest), strict=True))
        rows.append(("", f"{len(rest)} further owners", count, size))
    names = ("category", "owner", "arrays", "bytes")
    return [dict(zip(names, row, strict=True)) | {"share": row[3] / max(profile.total_bytes, 1)} for row in rows]


def text(found: Mapping[str, Any], width: int = 140) -> str:
    """The categories and the largest owners of a profile's document (`to_json`), as two tables of so many columns."""
    import rich.console
    import rich.table

    def table(*columns: str) -> rich.table.Table:
        made = rich.table.Table(box=None, pad_edge=False, padding=(0, 3, 0, 0))
        for column in columns:
            made.add_column(column, justify="right" if column in ("bytes", "share", "arrays") else "left")
        return made

    categories = table("category", "bytes", "share")
    for name, size in found["categories"].items():
        categories.add_row(name, human_bytes(size), f"{size / found['total_bytes']:.1%}")
    devices = table("device", "bytes", "share")
    for name, size in found.get("devices", {}).items():
        devices.add_row(name, human_bytes(size), f"{size / max(found['total_bytes'], 1):.1%}")
    owners = table("owner", "category", "arrays", "bytes", "share")
    for row in found["owners"]:
        owners.add_row(
            row["owner"], row["category"], str(row["arrays"]), human_bytes(row["bytes"]), f"{row['share']:.1%}"
        )
    console = rich.console.Console(file=io.StringIO(), markup=False, highlight=False, width=width)
    console.print(categories, "", *([devices, ""] if devices.row_count else []), owners)
    if found["unattributed_bytes"]:
        console.print(f"\nwithout an owner: {human_bytes(found['unattributed_bytes'])}")
    return "\n".join(line.rstrip() for line in console.file.getvalue().splitlines())  # type: ignore[attr-defined]


def to_json(profile: Profile, limit: int = 100) -> dict[str, Any]:
    """The profile as JSON can hold it: totals, categories, owners, every unnamed activation, and what moves."""
    unnamed = [b for b in profile.buffers if b.category == "saved activations" and not b.activation]
    more = {"devices": dict(profile.devices)} if profile.devices else {}
    more |= {} if profile.traffic is None else {"traffic": profile.traffic.to_json(limit)}
    return {
        "platform": profile.platform,
        "total_bytes": profile.total_bytes,
        "live_bytes": profile.live_bytes,
        "host_bytes": profile.host_bytes,
        "peak_position": profile.peak_position,
        "positions": profile.positions,
        "categories": profile.categories,
        "owners": table(profile, limit),
        "unnamed_activations": [
            {"module": b.module, "shape": b.shape, "bytes": b.bytes, "op_name": b.op_name} for b in unnamed
        ],
        "unattributed_bytes": profile.unattributed_bytes,
        **more,
    }


def _placed(program: hlo.Program, flow: Dataflow) -> dict[int, dict[hlo.Key, list[tuple[int, int, int]]]]:
    """{allocation: {group: [(bytes, first, last)]}}: when the groups are live, without overlaps in space.

    One array can take another's place in the very instruction that reads the other last; both are live there by the
    compiler's ranges, and the bytes are counted for the new one. Values that share memory for longer are one array.
    """
    by_allocation: dict[int, list[hlo.Value]] = defaultdict(list)
    for value in program.values:
        if value.last >= value.first and program.allocations[value.allocation].kind == "temporary":
            by_allocation[value.allocation].append(value)
    placed: dict[int, dict[hlo.Key, list[tuple[int, int, int]]]] = {}
    for index, values in by_allocation.items():
        values.sort(key=lambda value: (value.first, -value.last))
        last = {value.key: value.last for value in values}
        active: list[hlo.Value] = []
        for value in values:
            active = [other for other in active if last[other.key] >= value.first]
            for other in active:
                if other.offset < value.offset + value.bytes and value.offset < other.offset + other.bytes:
                    if flow.group(other.key) == flow.group(value.key):
                        continue
                    if last[other.key] > value.first:
                        flow.unite(other.key, value.key)
                    else:
                        last[other.key] = value.first - 1
            active.append(value)
        groups: dict[hlo.Key, list[tuple[int, int, int]]] = defaultdict(list)
        for value in values:
            groups[flow.group(value.key)].append((value.bytes, value.first, last[value.key]))
        placed[index] = {group: _joined(pieces) for group, pieces in groups.items()}
    return placed


def _joined(pieces: list[tuple[int, int, int]]) -> list[tuple[int, int, int]]:
    """Overlapping and adjacent intervals as one, of the largest size."""
    joined: list[tuple[int, int, int]] = []
    for size, first, last in sorted(pieces, key=lambda piece: piece[1:]):
        if last < first:
            continue
        if joined and first <= joined[-1][2] + 1:
            before = joined[-1]
            joined[-1] = max(size, before[0]), before[1], max(last, before[2])
        else:
            joined.append((size, first, last))
    return joined
