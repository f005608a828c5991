"""A profile as one self-contained HTML page and as a PNG: memory over the schedule, and a treemap of the peak.

What is in use at a moment has no schedule: then it is the treemap alone.

Both pictures come from the same two layouts: `steps`, a timeline that fits the width, and `squarify`, the treemap of
Bruls, Huizing & van Wijk 2000 ("Squarified Treemaps"): rows of rectangles that are as square as can be.
"""

from __future__ import annotations

import html
import json
import re
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from jaxpeft.memory import draw_traffic
from jaxpeft.memory.owners import CATEGORIES
from jaxpeft.memory.profile import Profile, table
from jaxpeft.train.report import human_bytes

# Tableau's ten, and greys for what nobody owns.
COLORS = {
    "weights": "#4e79a7",
    "adapters": "#f28e2b",
    "optimizer": "#b07aa1",
    "gradients": "#e15759",
    "saved activations": "#59a14f",
    "loss": "#edc948",
    "workspace": "#76b7b2",
    "cache": "#d37295",
    "batch": "#9c755f",
    "arguments": "#a0cbe8",
    "outputs": "#ffbe7d",
    "constants": "#ff9da7",
    "alignment": "#bab0ac",
    "fragmentation": "#d3d3d3",
    "unattributed": "#4d4d4d",
    "buffers": "#4e79a7",
    "executables": "#f28e2b",
    "other": "#4d4d4d",
}
_LIGHT = (
    "loss",
    "alignment",
    "fragmentation",
    "constants",
    "workspace",
    "adapters",
    "arguments",
    "outputs",
    "executables",
)


class Tile(NamedTuple):
    """A rectangle of the treemap, in the unit of its layout."""

    x: float
    y: float
    width: float
    height: float
    category: str
    owner: str
    bytes: int


def squarify(
    sizes: Sequence[float], x: float, y: float, width: float, height: float
) -> list[tuple[float, float, float, float]]:
    """Rectangles (x, y, width, height) with areas in proportion to `sizes`, which fill the given one.

    Sizes are positive; the largest come first in the picture when they come first in the list.
    """
    scale = width * height / sum(sizes) if sizes else 0.0
    areas = [size * scale for size in sizes]
    found: list[tuple[float, float, float, float]] = []
    while areas:
        side = min(width, height)
        count, worst = 1, _worst(areas[:1], side)
        while count < len(areas) and (ratio := _worst(areas[: count + 1], side)) <= worst:
            count, worst = count + 1, ratio
        row, areas = areas[:count], areas[count:]
        depth, at = sum(row) / side if side else 0.0, 0.0
        for area in row:
            length = area / depth if depth else 0.0
            found.append((x, y + at, depth, length) if width >= height else (x + at, y, length, depth))
            at += length
        if width >= height:
            x, width = x + depth, max(width - depth, 0.0)
        else:
            y, height = y + depth, max(height - depth, 0.0)
    return found


def _worst(row: Sequence[float], side: float) -> float:
    """The largest ratio of sides in a row of these areas along a side."""
    total = sum(row)
    if not total or not side:
        return float("inf")
    return max(side * side * max(row) / total**2, total**2 / (side * side * min(row)))


def tiles(profile: Profile, width: float, height: float, gap: float = 0.0) -> list[Tile]:
    """The treemap of the peak: a rectangle per category, in it one per owner; what is under 1/2000 joins in one."""
    owners: dict[str, dict[str, int]] = defaultdict(lambda: defaultdict(int))
    for buffer in profile.buffers:
        small = buffer.bytes * 2000 < profile.total_bytes
        owners[buffer.category]["further owners" if small else buffer.owner] += buffer.bytes
    order = sorted(owners, key=lambda category: -sum(owners[category].values()))
    found = []
    areas = squarify([sum(owners[category].values()) for category in order], 0, 0, width, height)
    for category, (x, y, w, h) in zip(order, areas, strict=True):
        own = sorted(owners[category].items(), key=lambda item: -item[1])
        inner = squarify([size for _, size in own], x, y, max(w - gap, 0.0), max(h - gap, 0.0))
        found += [Tile(*place, category, owner, size) for place, (owner, size) in zip(inner, own, strict=True)]
    return found


def steps(profile: Profile, columns: int = 800) -> tuple[list[int], dict[str, list[int]]]:
    """(positions, {category: live bytes}) of at most `columns` columns; each shows its fullest moment."""
    width = max(1, -(-profile.positions // columns))
    columns = -(-profile.positions // width)
    fullest: list[dict[str, int]] = [{} for _ in range(columns)]
    ends = [position for position, _ in profile.timeline[1:]] + [profile.positions]
    for (position, live), until in zip(profile.timeline, ends, strict=True):
        for column in range(position // width, min(columns, -(-until // width))):
            if sum(live.values()) > sum(fullest[column].values()):
                fullest[column] = live
    shown = [category for category in CATEGORIES if any(category in live for live in fullest)]
    positions = [column * width for column in range(columns)]
    return positions, {category: [live.get(category, 0) for live in fullest] for category in shown}


def write_png(profile: Profile, path: Path, title: str = "") -> None:
    """Writes the pictures of the page as a PNG: memory over the schedule, the treemap, what moves."""
    from matplotlib.figure import Figure  # without pyplot: no display and no global state
    from matplotlib.patches import Patch, Rectangle

    # Inches of each picture that there is.
    heights = {"over time": 4.0 if profile.timeline else 0.0, "at peak": 6.0, "moved": 4.0 if profile.traffic else 0.0}
    heights = {name: height for name, height in heights.items() if height}
    figure = Figure(figsize=(11, sum(heights.values()) + 0.5), dpi=130, layout="constrained")
    rows = figure.subplots(len(heights), 1, squeeze=False, height_ratios=list(heights.values())).flat
    places = dict(zip(heights, rows, strict=True))
    figure.suptitle(title or _title(profile), fontsize=12, fontweight="bold")
    if profile.timeline:
        _draw_timeline(places["over time"], profile)
    if profile.traffic is not None:
        draw_traffic.draw(places["moved"], profile.traffic)
    at_peak = places["at peak"]

    for tile in tiles(profile, 1100, 560, gap=3):
        place = ((tile.x, tile.y), tile.width, tile.height)
        at_peak.add_patch(Rectangle(*place, facecolor=COLORS[tile.category], edgecolor="white", linewidth=0.7))
        if lines := _label(tile, 6.6, 13):
            x, y = tile.x + 4, tile.y + 4
            ink = _ink(tile.category)
            at_peak.text(x, y, "\n".join(lines), va="top", fontsize=7.5, color=ink, linespacing=1.25)
    at_peak.set_xlim(0, 1100)
    at_peak.set_ylim(560, 0)
    at_peak.set_axis_off()
    sizes = profile.categories
    handles = [Patch(color=COLORS[c], label=f"{c}  {human_bytes(size)}") for c, size in sizes.items()]
    figure.legend(handles=handles, loc="outside lower center", ncols=4, frameon=False, fontsize=9)
    figure.savefig(path, format="png")


def _draw_timeline(over_time: Any, profile: Profile) -> None:
    """Live bytes over the schedule, by category."""
    unit, scale = _unit(profile.total_bytes)
    positions, live = steps(profile)
    columns = [[size / scale for size in live[category]] for category in live]
    over_time.stackplot(positions, columns, colors=[COLORS[c] for c in live], step="post", linewidth=0)
    over_time.axhline(profile.total_bytes / scale, color="black", linewidth=0.8, linestyle="--")
    over_time.axvline(profile.peak_position, color="black", linewidth=0.8, linestyle=":")
    over_time.set_xlim(0, max(positions[-1], 1))
    over_time.set_ylim(0, profile.total_bytes / scale * 1.08)
    over_time.set_xlabel("position in the schedule (a loop's body counts once)")
    over_time.set_ylabel(f"live bytes ({unit})")
    over_time.set_title(f"allocated {human_bytes(profile.total_bytes)} (dashed), peak dotted", fontsize=9, loc="right")
    over_time.spines[["top", "right"]].set_visible(False)


def write_html(profile: Profile, path: Path, title: str = "") -> None:
    """Writes one page that needs nothing else: the timeline, the treemap, what moves, the table of owners."""
    heading = html.escape(title or _title(profile))
    legend = "".join(
        f'<span><i style="background:{COLORS[c]}"></i>{c} <b>{human_bytes(size)}</b></span>'
        for c, size in profile.categories.items()
    )
    rows = "".join(
        f'<tr><td><i style="background:{COLORS.get(row["category"], "#fff")}"></i>{html.escape(row["category"])}</td>'
        f"<td>{html.escape(row['owner'])}</td><td>{row['arrays']}</td><td>{row['bytes']:,}</td>"
        f"<td>{human_bytes(row['bytes'])}</td><td>{row['share']:.1%}</td></tr>"
        for row in table(profile, 100)
    )
    positions, live = steps(profile) if profile.timeline else ([0], {})
    data = json.dumps({"at": positions, "live": live, "colors": COLORS}).replace("</", "<\\/")
    page = _PAGE
    for name, text in {
        "TITLE": heading,
        "LEGEND": legend,
        "TIMELINE": f"<h2>Live memory over the schedule</h2>{_timeline_svg(profile, positions, live)}"
        if profile.timeline
        else "",
        "TREEMAP": _treemap_svg(profile),
        "TRAFFIC": "" if profile.traffic is None else draw_traffic.section(profile.traffic),
        "ROWS": rows,
        "DATA": data,
        "SUMMARY": html.escape(_summary(profile)),
        "HEADING": "Who owns the peak" if profile.timeline else "Who owns what is in use",
    }.items():
        page = page.replace(f"@{name}@", text)
    Path(path).write_text(page, encoding="utf-8")


def _title(profile: Profile) -> str:
    return (
        profile.title
        or f"Memory of the compiled step on {profile.platform.upper()}: {human_bytes(profile.total_bytes)}"
    )


def _summary(profile: Profile) -> str:
    own = f"{profile.unattributed_bytes:,} without an owner"
    if not profile.timeline:
        devices = "".join(f"; {name}: {size:,}" for name, size in profile.devices)
        return f"{profile.total_bytes:,} bytes in use, {own}{devices}"
    return (
        f"{profile.total_bytes:,} bytes allocated, {profile.live_bytes:,} live at position "
        f"{profile.peak_position} of {profile.positions}; {own}"
    )


def _unit(total: int) -> tuple[str, int]:
    unit = human_bytes(total).rsplit(" ", 1)[1]
    return unit, 1024 ** ("B", "KiB", "MiB", "GiB", "TiB").index(unit)


def _ink(category: str) -> str:
    return "#222" if category in _LIGHT else "#fff"


def _label(tile: Tile, character: float, line: float) -> list[str]:
    """The lines that fit a tile, owner and bytes; empty for a tile too small to read."""
    room = int((tile.width - 8) / character)
    if room < 6 or tile.height < line + 6:
        return []
    owner = tile.owner or tile.category
    lines = [""]
    for word in re.findall(r"[^/: ,]+[/: ,]*|[/: ,]+", owner):
        fits = len((lines[-1] + word).rstrip()) <= room
        lines = [*lines[:-1], lines[-1] + word] if fits or not lines[-1] else [*lines, word]
    lines = [_cut(line.rstrip(), room) for line in lines]
    if len(lines) > 3:
        lines = [*lines[:2], lines[2][: room - 1] + "…"]
    lines = [*lines, _cut(human_bytes(tile.bytes), room)]
    if tile.height >= len(lines) * line + 6:
        return lines
    while len(owner) > room and owner.count("/") > 1:  # the end of a path says most
        owner = owner.partition("/")[2]
    return [_cut(owner, room)]


def _cut(text: str, room: int) -> str:
    return text if len(text) <= room else text[: room - 1] + "…"


_WIDTH, _HEIGHT, _LEFT, _BOTTOM = 1100, 300, 62, 26


def _timeline_svg(profile: Profile, positions: list[int], live: dict[str, list[int]]) -> str:
    wide, high = _WIDTH - _LEFT, _HEIGHT - _BOTTOM - 14
    unit, scale = _unit(profile.total_bytes)
    top = profile.total_bytes * 1.05
    ends = [*positions[1:], profile.positions]

    def x(position: float) -> float:
        return _LEFT + wide * position / profile.positions

    def y(size: float) -> float:
        return 14 + high * (1 - size / top)

    parts = [
        f'<svg id="timeline" viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="live bytes over the schedule">'
    ]
    below = [0] * len(positions)
    for category, sizes in live.items():
        above = [a + b for a, b in zip(below, sizes, strict=True)]
        edge = [f"{x(p):.1f},{y(s):.1f} {x(e):.1f},{y(s):.1f}" for p, e, s in zip(positions, ends, above, strict=True)]
        back = [f"{x(e):.1f},{y(s):.1f} {x(p):.1f},{y(s):.1f}" for p, e, s in zip(positions, ends, below, strict=True)]
        parts.append(f'<polygon fill="{COLORS[category]}" points="{" ".join(edge + back[::-1])}"/>')
        below = above
    for tick in _ticks(profile.total_bytes / scale):
        at = y(tick * scale)
        parts.append(f'<line x1="{_LEFT}" x2="{_WIDTH}" y1="{at:.1f}" y2="{at:.1f}" class="grid"/>')
        parts.append(f'<text x="{_LEFT - 6}" y="{at + 4:.1f}" text-anchor="end">{tick:g} {unit}</text>')
    at, peak = y(profile.total_bytes), x(profile.peak_position)
    parts.append(f'<line x1="{_LEFT}" x2="{_WIDTH}" y1="{at:.1f}" y2="{at:.1f}" class="total"/>')
    parts.append(f'<line x1="{peak:.1f}" x2="{peak:.1f}" y1="14" y2="{_HEIGHT - _BOTTOM}" class="peak"/>')
    parts.append(f'<text x="{_WIDTH}" y="10" text-anchor="end">allocated {human_bytes(profile.total_bytes)}</text>')
    parts.append(
        f'<text x="{(_LEFT + _WIDTH) / 2:.0f}" y="{_HEIGHT - 6}" text-anchor="middle">'
        f"position in the schedule, 0 to {profile.positions} (a loop's body counts once)</text>"
    )
    parts.append(f'<line id="cursor" y1="14" y2="{_HEIGHT - _BOTTOM}" class="peak" visibility="hidden"/></svg>')
    return "".join(parts)


def _ticks(most: float) -> list[float]:
    """Four to eight round numbers from 0 to `most`."""
    step = 10.0 ** (len(str(int(most))) - 1)
    while most / step < 4:
        step /= 2
    return [step * i for i in range(int(most / step) + 1)]


def _treemap_svg(profile: Profile) -> str:
    parts = [f'<svg viewBox="0 0 {_WIDTH} 560" role="img" aria-label="bytes at the peak by owner">']
    for number, tile in enumerate(tiles(profile, _WIDTH, 560, gap=3)):
        tip = html.escape(
            f"{tile.category}\n{tile.owner}\n{tile.bytes:,} bytes ({human_bytes(tile.bytes)}), "
            f"{tile.bytes / max(profile.total_bytes, 1):.2%}"
        )
        box = f'x="{tile.x:.1f}" y="{tile.y:.1f}" width="{tile.width:.1f}" height="{tile.height:.1f}"'
        text = "".join(
            f'<tspan x="{tile.x + 5:.1f}" dy="{14 if i else 0}">{html.escape(line)}</tspan>'
            for i, line in enumerate(_label(tile, 6.4, 14))
        )
        ink = _ink(tile.category)
        parts.append(
            f'<g><title>{tip}</title><clipPath id="c{number}"><rect {box}/></clipPath>'
            f'<rect {box} fill="{COLORS[tile.category]}" class="tile"/>'
            f'<text clip-path="url(#c{number})" y="{tile.y + 15:.1f}" fill="{ink}">{text}</text></g>'
        )
    return "".join(parts) + "</svg>"


_PAGE = """<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><title>@TITLE@</title>
<meta name="viewport" content="width=device-width, initial-scale=1">
<style>
body { font: 14px/1.45 system-ui, sans-serif; color: #222; max-width: 1140px; margin: 24px auto; padding: 0 16px; }
h1 { font-size: 20px; margin: 0 0 4px; } h2 { font-size: 15px; margin: 26px 0 6px; }
p { margin: 0 0 12px; color: #555; }
svg { width: 100%; height: auto; display: block; } svg text { font: 11px system-ui, sans-serif; }
.legend span { display: inline-block; margin: 0 16px 4px 0; white-space: nowrap; }
i { display: inline-block; width: 11px; height: 11px; margin-right: 6px; border-radius: 2px; }
.grid { stroke: #000; stroke-opacity: .12; } .total { stroke: #000; stroke-dasharray: 5 3; }
.peak { stroke: #000; stroke-dasharray: 1 3; }
.tile { stroke: #fff; stroke-width: .8; } g:hover > .tile { filter: brightness(1.12); stroke: #000; }
table { border-collapse: collapse; width: 100%; }
th, td { text-align: left; padding: 3px 8px; border-bottom: 1px solid #eee; }
td:nth-child(n+3), th:nth-child(n+3) { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
#tip { position: fixed; display: none; pointer-events: none; background: #fff; border: 1px solid #bbb; padding: 6px 9px;
  box-shadow: 0 2px 6px #0003; font: 12px/1.4 ui-monospace, monospace; white-space: pre; }
</style></head><body>
<h1>@TITLE@</h1><p>@SUMMARY@</p>
<div class="legend">@LEGEND@</div>
@TIMELINE@
<h2>@HEADING@</h2>@TREEMAP@
@TRAFFIC@
<h2>Owners</h2>
<table><thead><tr><th>category</th><th>owner</th><th>arrays</th><th>bytes</th><th></th><th>share</th></tr></thead>
<tbody>@ROWS@</tbody></table>
<div id="tip"></div>
<script>
const data = @DATA@, svg = document.getElementById("timeline"), tip = document.getElementById("tip");
const cursor = document.getElementById("cursor"), left = 62, wide = 1100;
svg?.addEventListener("mousemove", event => {
  const box = svg.getBoundingClientRect(), x = (event.clientX - box.left) / box.width * wide;
  const column = Math.floor((x - left) / (wide - left) * data.at.length);
  if (column < 0 || column >= data.at.length) return;
  cursor.setAttribute("x1", x); cursor.setAttribute("x2", x); cursor.setAttribute("visibility", "visible");
  let total = 0, lines = [];
  for (const [name, sizes] of Object.entries(data.live)) {
    total += sizes[column];
    if (sizes[column]) lines.unshift(sizes[column].toLocaleString("en").padStart(18) + "  " + name);
  }
  tip.textContent = "position " + data.at[column] + ": " + total.toLocaleString("en") + " bytes\\n" + lines.join("\\n");
  tip.style.display = "block";
  tip.style.left = Math.min(event.clientX + 14, innerWidth - 260) + "px"; tip.style.top = event.clientY + 14 + "px";
});
svg?.addEventListener("mouseleave", () => { tip.style.display = "none"; cursor.setAttribute("visibility", "hidden"); });
</script></body></html>
"""
