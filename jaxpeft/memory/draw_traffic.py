"""What a step moves as a part of its page and picture: a bar for each module, its bytes by kind, its products' time."""

from __future__ import annotations

import html
from collections import defaultdict
from typing import Any

from jaxpeft.memory.movement import AVOIDABLE
from jaxpeft.memory.traffic import Traffic, summary
from jaxpeft.train.report import human_bytes

COLORS = {
    "products": "#4e79a7",
    "attention": "#b07aa1",
    "elementwise": "#76b7b2",
    "copies": "#e15759",
    "fills": "#ff9da7",
    "collectives": "#9c755f",
}
_GROUPS = {"product": "products", "kernel": "products", "attention": "attention", "elementwise": "elementwise"}
_WIDTH, _LEFT, _ROOM, _BAR, _GAP = 1100, 270, 110, 15, 7


def bars(traffic: Traffic, limit: int = 24) -> list[tuple[str, dict[str, float], float]]:
    """(module, {group of kinds: bytes}, FLOPs), those that move most first; what is beyond `limit` joined in one."""
    found: dict[str, dict[str, float]] = defaultdict(lambda: dict.fromkeys(COLORS, 0.0))
    for row in traffic.rows:
        copied = "fills" if row.kind == "fill" else "copies" if row.kind in AVOIDABLE else ""
        group = copied or _GROUPS.get(row.kind, "collectives" if row.kind == "collective" else "elementwise")
        found[row.module][group] += row.read + row.written
    order = sorted(found.items(), key=lambda item: -sum(item[1].values()))
    made = [(name or "no module", sizes, traffic.flops.get(name, 0.0)) for name, sizes in order]
    if rest := made[limit:]:
        sizes = {group: sum(sizes[group] for _, sizes, _ in rest) for group in COLORS}
        made = [*made[:limit], (f"{len(rest)} further modules", sizes, sum(flops for *_, flops in rest))]
    return made


def section(traffic: Traffic) -> str:
    """The heading, the summary, the legend and the picture."""
    made = bars(traffic)
    groups = {group: sum(sizes[group] for _, sizes, _ in made) for group in COLORS}
    legend = "".join(
        f'<span><i style="background:{COLORS[group]}"></i>{group} <b>{human_bytes(size)}</b></span>'
        for group, size in groups.items()
        if size
    )
    line = "<span>│ the time of its products</span>" if traffic.seconds(0, 0) else ""
    text = html.escape(summary(traffic.to_json())).replace("\n", "<br>")
    return f'<h2>What moves</h2><p>{text}</p><div class="legend">{legend}{line}</div>{_svg(traffic, made)}'


def draw(axes: Any, traffic: Traffic, limit: int = 12) -> None:
    """The same bars on matplotlib's axes."""
    made = bars(traffic, limit)
    times = [traffic.seconds(sum(sizes.values()), flops) for _, sizes, flops in made]
    timed = bool(times and times[0])
    per_byte = 1e3 / traffic.bandwidth if timed and traffic.bandwidth else 1 / 2**30
    places = range(len(made))
    left = [0.0] * len(made)
    for group, color in COLORS.items():
        widths = [sizes[group] * per_byte for _, sizes, _ in made]
        if any(widths):
            axes.barh(places, widths, left=left, color=color, height=0.7, label=group)
            left = [a + b for a, b in zip(left, widths, strict=True)]
    if timed:
        marks = [1e3 * time["rate_s"] for time in times]
        axes.vlines(marks, [y - 0.45 for y in places], [y + 0.45 for y in places], color="#222", linewidth=1.2)
        left = [max(pair) for pair in zip(left, marks, strict=True)]
    for y, (_, sizes, _) in enumerate(made):
        axes.text(left[y], y, f" {human_bytes(sum(sizes.values()))}", va="center", fontsize=7)
    names = [name if len(name) <= 40 else f"…{name[-39:]}" for name, *_ in made]
    axes.set_yticks(places, names, fontsize=7.5)
    axes.invert_yaxis()
    axes.set_xlim(0, 1.1 * max([*left, 1e-30]))
    axes.set_xlabel("ms at the target's bandwidth; | its products at the rate" if timed else "GiB read and written")
    axes.set_title(summary(traffic.to_json(0)).split("\n")[0], fontsize=9, loc="right")
    axes.legend(frameon=False, fontsize=8, loc="center right")
    axes.spines[["top", "right"]].set_visible(False)


def _svg(traffic: Traffic, made: list[tuple[str, dict[str, float], float]]) -> str:
    """Bars as long as the time at the bandwidth, a line at the time of the products; without times, bytes alone."""
    times = [traffic.seconds(sum(sizes.values()), flops) for _, sizes, flops in made]
    timed = bool(times and times[0])
    ends = [time["least_s"] if timed else sum(sizes.values()) for time, (_, sizes, _) in zip(times, made, strict=True)]
    scale = (_WIDTH - _LEFT - _ROOM) / max([*ends, 1e-30])
    per_byte = scale / traffic.bandwidth if timed and traffic.bandwidth else scale
    height = len(made) * (_BAR + _GAP) + _GAP
    parts = [f'<svg id="traffic" viewBox="0 0 {_WIDTH} {height}" role="img" aria-label="bytes moved by module">']
    for number, ((name, sizes, _), time, end) in enumerate(zip(made, times, ends, strict=True)):
        y, x = _GAP + number * (_BAR + _GAP), float(_LEFT)
        total = sum(sizes.values())
        short = name if len(name) <= 40 else f"…{name[-39:]}"
        parts.append(f'<text x="{_LEFT - 8}" y="{y + 12}" text-anchor="end">{html.escape(short)}</text>')
        for group, size in sizes.items():
            if size:
                tip = html.escape(f"{name}\n{group}: {size:,.0f} bytes ({human_bytes(size)})")
                box = f'x="{x:.1f}" y="{y}" width="{size * per_byte:.1f}" height="{_BAR}" fill="{COLORS[group]}"'
                parts.append(f'<g><title>{tip}</title><rect class="tile" {box}/></g>')
                x += size * per_byte
        says = human_bytes(total)
        if timed:
            at = _LEFT + time["rate_s"] * scale
            parts.append(f'<path d="M{at:.1f} {y - 2}V{y + _BAR + 2}" stroke="#222" stroke-width="1.5"/>')
            says += f", {1e3 * time['least_s']:.1f} ms"
        parts.append(f'<text x="{_LEFT + end * scale + 6:.1f}" y="{y + 12}">{says}</text>')
    return "".join(parts) + "</svg>"
