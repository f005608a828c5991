"""What a compiled function moves through memory: bytes read and written by owner and by kind, and the time they take.

    found = traffic(program, owners, target=targets.target("h200"))
    print(text(found.to_json()))

The bytes are those of `movement`: every instruction of the optimised program reads its operands and writes its results
once, loops by their trips. Each access belongs to the array that it is of (weights, saved activations, ...) and to the
module that the instruction works for, by the attribution of the profile.

    seconds at the bandwidth   bytes of the device's memory / the target's bandwidth
    seconds at the rate        FLOPs of matrix products / the target's dense bf16 rate
    at least                   the larger of the two, by module: less than it no schedule can take that runs one module
                               after the other
    seconds at the link's      bytes to and from the host's memory / the bandwidth between; they may run beside, so the
                               bound of all is the larger of this and the one before

What can be avoided are copies and fills (`movement.AVOIDABLE`): instructions that compute nothing and only place in the
device's memory what is there already, or a constant. Their readers could read, their writers write, where the array is.
Moves to and from a TPU's on-chip memory are not among them: those bytes are read there in place of the device's memory.
"""

from __future__ import annotations

import io
from collections import defaultdict
from collections.abc import Mapping
from typing import Any, NamedTuple

from jaxpeft.memory import hlo
from jaxpeft.memory.attribution import Attribution
from jaxpeft.memory.dataflow import Dataflow
from jaxpeft.memory.movement import AVOIDABLE, KINDS, Move, moves
from jaxpeft.memory.owners import CATEGORIES, Owners
from jaxpeft.memory.targets import Target
from jaxpeft.train.report import human_bytes


class Row(NamedTuple):
    """Bytes of one module, category of arrays and kind of movement.

    module: its path; of what has none, "optimizer" or "loss" if that is what is written, else "".
    category: of the array that is read or written.  kind: one of `movement.KINDS`.
    read, written: in the device's memory; host: either, in the host's.
    """

    module: str
    category: str
    kind: str
    read: float
    written: float
    host: float


class Copy(NamedTuple):
    """An instruction that can be avoided. times: that it runs; bytes: that all of these move."""

    instruction: str
    op_name: str
    module: str
    kind: str
    times: int
    bytes: float


class Traffic(NamedTuple):
    """What a compiled function moves each time it is called.

    rows: everything; their sum is the total.
    times: {kind: how often such an instruction runs}.
    flops: {module: FLOPs of its matrix products}.
    copies: those that can be avoided, the largest first.
    unknown_loops: whose length nothing says; their bodies count once.
    bandwidth, rate: bytes and FLOPs per second of the target; None where they are not known.
    host_bandwidth: bytes per second between its memory and the host's, each way; None likewise.
    unknown_kernels: whose FLOPs nothing says; they count as none.
    """

    rows: tuple[Row, ...]
    times: dict[str, int]
    flops: dict[str, float]
    copies: tuple[Copy, ...]
    unknown_loops: int
    bandwidth: float | None = None
    rate: float | None = None
    host_bandwidth: float | None = None
    unknown_kernels: int = 0

    @property
    def read(self) -> float:
        """Bytes read in the device's memory."""
        return sum(row.read for row in self.rows)

    @property
    def written(self) -> float:
        """Bytes written there."""
        return sum(row.written for row in self.rows)

    @property
    def bytes(self) -> float:
        """Both."""
        return self.read + self.written

    @property
    def avoidable(self) -> float:
        """Of them, those of copies and fills."""
        return sum(row.read + row.written for row in self.rows if row.kind in AVOIDABLE)

    def seconds(self, size: float, flops: float) -> dict[str, float]:
        """{"bandwidth_s", "rate_s", "least_s"} of so many bytes and FLOPs; {} where the target's are not known."""
        if self.bandwidth is None or self.rate is None:
            return {}
        moving, computing = size / self.bandwidth, flops / self.rate
        return {"bandwidth_s": moving, "rate_s": computing, "least_s": max(moving, computing)}

    @property
    def host(self) -> float:
        """Bytes that go to the host's memory or come from there."""
        return sum(row.host for row in self.rows)

    @property
    def by_module(self) -> float:
        """Seconds that no schedule is faster than that runs one module after the other; 0 where that is not known."""
        sizes: dict[str, float] = dict.fromkeys(self.flops, 0.0)
        for row in self.rows:
            sizes[row.module] = sizes.get(row.module, 0.0) + row.read + row.written
        times = (self.seconds(size, self.flops.get(name, 0.0)) for name, size in sizes.items())
        return sum(time.get("least_s", 0.0) for time in times)

    @property
    def least(self) -> float:
        """The same with what goes to and from the host's memory, which may run beside."""
        return max(self.by_module, self.host / self.host_bandwidth if self.host_bandwidth else 0.0)

    def to_json(self, limit: int = 100) -> dict[str, Any]:
        """As JSON can hold it: totals, by kind, by category of arrays, by module, and the largest copies."""
        # What stays on a TPU's chip has products and no bytes.
        modules = dict.fromkeys(self.flops, dict.fromkeys(_SIZES, 0.0)) | self._by("module")
        owners = [
            {"owner": name, **sizes, "flops": self.flops.get(name, 0.0)}
            | self.seconds(sizes["read"] + sizes["written"], self.flops.get(name, 0.0))
            for name, sizes in sorted(modules.items(), key=lambda item: -item[1]["read"] - item[1]["written"])
        ]
        total, flops = self.bytes, sum(self.flops.values())
        times = self.seconds(total, flops)
        if times:
            times["least_by_module_s"], times["bound_s"] = self.by_module, self.least
            times |= {"host_s": self.host / self.host_bandwidth} if self.host_bandwidth else {}
        return {
            "bytes": total,
            "read": self.read,
            "written": self.written,
            "host_bytes": self.host,
            "avoidable_bytes": self.avoidable,
            "flops": flops,
            **times,
            "unknown_loops": self.unknown_loops,
            "unknown_kernels": self.unknown_kernels,
            "kinds": {
                kind: {"times": self.times.get(kind, 0), **sizes} for kind, sizes in self._by("kind", KINDS).items()
            },
            "categories": self._by("category", CATEGORIES),
            "owners": owners[:limit] + _joined(owners[limit:]),
            "copies": [copy._asdict() for copy in self.copies[:limit]],
        }

    def _by(self, field: str, order: tuple[str, ...] = ()) -> dict[str, dict[str, float]]:
        """{a field's value: {"read", "written", "avoidable"}}."""
        found: dict[str, dict[str, float]] = {}
        for row in self.rows:
            sizes = found.setdefault(getattr(row, field), dict.fromkeys(_SIZES, 0.0))
            sizes["read"] += row.read
            sizes["written"] += row.written
            sizes["avoidable"] += row.read + row.written if row.kind in AVOIDABLE else 0.0
        return {name: found[name] for name in (*order, *found) if name in found}


_SIZES = ("read", "written", "avoidable")


def _joined(owners: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Further owners as one row."""
    if not owners:
        return []
    sums = {key: sum(row.get(key, 0.0) for row in owners) for key in owners[0] if key != "owner"}
    return [{"owner": f"{len(owners)} further owners", **sums}]


def traffic(
    program: hlo.Program,
    owners: Owners,
    attribution: type[Attribution] = Attribution,
    target: Target | None = None,
    flops: Mapping[str, float] | None = None,
) -> Traffic:
    """What a program moves.

    Args:
      program: compiled for the target.
      owners: of its arguments and results.
      attribution: what finds the other owners.
      target: whose bandwidth and rate make seconds of it; None: there are none.
      flops: {name stack: FLOPs} of the function (`backward.flops.flops_by_name`), kernels included; None: of the
        products that the compiled program has left, and of kernels that say their own.

    Raises:
      InputError: if `owners` does not fit the program.
    """
    flow = Dataflow(program)
    attribute = attribution(program, flow, owners)
    whose = _Whose(flow, attribute)
    found, unknown = moves(flow)
    total: dict[tuple[str, str, str], list[float]] = defaultdict(lambda: [0.0, 0.0, 0.0])
    times: dict[str, int] = defaultdict(int)
    products: dict[str, float] = defaultdict(float)
    copies, unknown_kernels = [], 0
    for move in found:
        times[move.kind] += move.times
        shares = whose.modules(move)
        for column, accesses in enumerate((move.reads, move.writes)):
            for access in accesses:
                place = {"device": column, "host": 2}.get(access.space)
                if place is None:
                    continue
                own = {whose.module(move.instruction, access.key): 1.0} if column else shares
                for module, share in own.items():
                    category = whose.category(access.key)
                    total[module, category, move.kind][place] += share * move.times * access.bytes
        if flops is None:
            unknown_kernels += move.flops is None
            for module, share in shares.items() if move.flops else ():
                products[module] += share * move.times * (move.flops or 0.0)
        if move.kind in AVOIDABLE:
            size = move.times * sum(a.bytes for a in (*move.reads, *move.writes) if a.space == "device")
            made = move.instruction
            copies.append(
                Copy(made.name, made.op_name, max(shares, key=shares.__getitem__), move.kind, move.times, size)
            )
    for name, count in (flops or {}).items():
        products[attribute.module(name)] += count
    return Traffic(
        rows=tuple(Row(*names, *sizes) for names, sizes in total.items()),
        times=dict(times),
        flops=dict(products),
        copies=tuple(sorted(copies, key=lambda copy: -copy.bytes)),
        unknown_loops=unknown,
        bandwidth=None if target is None else target.bandwidth,
        rate=None if target is None else target.flops,
        host_bandwidth=None if target is None else target.host_bandwidth,
        unknown_kernels=unknown_kernels,
    )


class _Whose:
    """The owners of accesses, each array asked about once."""

    def __init__(self, flow: Dataflow, attribute: Attribution):
        self._flow, self._attribute = flow, attribute
        self._categories: dict[hlo.Key, str] = {}
        self._modules: dict[tuple[int, hlo.Key | None], str] = {}

    def category(self, key: hlo.Key | None) -> str:
        """Of an array."""
        if key is None:
            return "unattributed"
        group = self._flow.group(key)
        if group not in self._categories:
            self._categories[group] = self._attribute.array(group)
        return self._categories[group]

    def module(self, instruction: hlo.Instruction, key: hlo.Key | None) -> str:
        """That an instruction works for where it writes an array; the optimizer and the loss where there is none."""
        if (known := self._modules.get((instruction.id, key))) is not None:
            return known
        found = self._attribute.site(instruction, key)
        if not found and (category := self.category(key)) in ("optimizer", "loss"):
            found = category
        self._modules[instruction.id, key] = found
        return found

    def modules(self, move: Move) -> dict[str, float]:
        """{module: its part of the bytes written}: one instruction may work for several."""
        shares: dict[str, float] = defaultdict(float)
        for access in move.writes:
            shares[self.module(move.instruction, access.key)] += access.bytes
        total = sum(shares.values())
        return {name: size / total for name, size in shares.items()} or {self.module(move.instruction, None): 1.0}


def text(found: Mapping[str, Any], width: int = 140) -> str:
    """The kinds, the arrays and the modules of a document (`Traffic.to_json`), as tables of so many columns."""
    import rich.console
    import rich.table

    total = max(found["bytes"], 1)
    timed = "bandwidth_s" in found
    unit, scale = _unit(found) if timed else ("", 0.0)

    def table(first: str, *columns: str) -> rich.table.Table:
        made = rich.table.Table(box=None, pad_edge=False, padding=(0, 3, 0, 0))
        for column in (first, *columns):
            made.add_column(column, justify="left" if column == first else "right")
        return made

    def sizes(row: Mapping[str, Any]) -> list[str]:
        both = row["read"] + row["written"]
        cells = [human_bytes(row["read"]), human_bytes(row["written"]), f"{both / total:.1%}"]
        return [*cells, f"{scale * both * found['bandwidth_s'] / total:.2f}"] if timed else cells

    columns = ["read", "written", "share", *([unit] if timed else [])]
    kinds = table("moved by", "times", *columns)
    for name, row in found["kinds"].items():
        kinds.add_row(name, f"{row['times']:,}", *sizes(row))
    arrays = table("arrays", *columns)
    for name, row in found["categories"].items():
        arrays.add_row(name, *sizes(row))
    modules = table("module", *columns, *([f"{unit} at the rate"] if timed else []), "avoidable")
    for row in found["owners"]:
        rate = [f"{scale * row['rate_s']:.2f}"] if timed else []
        modules.add_row(row["owner"] or "no module", *sizes(row), *rate, human_bytes(row["avoidable"]))
    console = rich.console.Console(file=io.StringIO(), markup=False, highlight=False, width=width)
    console.print(summary(found), "", kinds, "", arrays, "", modules, soft_wrap=False)
    return "\n".join(line.rstrip() for line in console.file.getvalue().splitlines())  # type: ignore[attr-defined]


def _unit(found: Mapping[str, Any]) -> tuple[str, float]:
    """The unit of a document's times, and how many of it make a second."""
    return ("ms", 1e3) if found["bandwidth_s"] + found["rate_s"] >= 1e-3 else ("µs", 1e6)


def summary(found: Mapping[str, Any]) -> str:
    """The totals of a document, in a line or three."""
    part = found["avoidable_bytes"] / max(found["bytes"], 1)
    lines = [f"moved {human_bytes(found['bytes'])}, of which copies and fills {part:.1%}"]
    unit, scale = _unit(found) if "bandwidth_s" in found else ("", 0.0)
    if unit:
        times = (f"{scale * found[name]:.2f} {unit}" for name in ("bandwidth_s", "rate_s", "least_by_module_s"))
        lines.append("at the target's bandwidth {}, products at its rate {}; the larger by module {}".format(*times))
    if found["host_bytes"]:
        at = f", at the link's bandwidth {scale * found['host_s']:.2f} {unit}" if "host_s" in found else ""
        lines.append(f"to and from the host's memory {human_bytes(found['host_bytes'])}{at}")
    if found["unknown_loops"]:
        lines.append(f"loops of unknown length, counted once: {found['unknown_loops']}")
    if found["unknown_kernels"]:
        lines.append(f"FLOPs of {found['unknown_kernels']} kernels unknown, counted as none")
    return "\n".join(lines)
