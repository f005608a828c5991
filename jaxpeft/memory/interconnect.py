"""How long devices of a slice or of hosts need at least to send each other what a program says.

    TPU     a group of devices sends along the dimensions of the slice in which they differ. The chip that has the
            fewest links in them, one at the end of a line, two in a ring, sends no faster than these. The two devices
            of a tpu7x share their chip's links.
    GPU     within a host NVLink joins all with all. Between h hosts, S (h - 1) / h bytes come to each (twice that for
            an all-reduce), through the network of all GPUs there that take part; the rest is then NVLink's.

Nothing is faster than that, and everything here is one collective after the other. What a schedule hides behind
computation is in `pods`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from jaxpeft.memory import slices
from jaxpeft.memory.collectives import Collective
from jaxpeft.memory.kinds import TARGETS
from jaxpeft.memory.targets import Target

_WITHIN = 6  # a tpu7x's halves are joined by as much as six links (Cloud TPU documentation)


def seconds(found: Sequence[Collective], target: Target, devices: Sequence[Any]) -> float | None:
    """Of all collectives of a program, one after the other; None where the target's links are not known.

    Args:
      found: the collectives.
      target: a slice, or hosts.
      devices: in the order of the program's mesh (`mesh.devices.flat`).
    """
    kind = TARGETS[target.kind]
    if kind.link is None:
        return None
    of_one = _of_slice if target.platform == "tpu" else _of_hosts
    return sum(of_one(one, target, [devices[n] for n in one.group]) for one in found)


def _of_slice(one: Collective, target: Target, group: Sequence[Any]) -> float:
    kind = TARGETS[target.kind]
    assert kind.link is not None
    wraps = slices.wraps(target.shape)
    places = list(zip(*(device.coords for device in group), strict=True))  # by dimension
    links = 0
    for size, ring, at in zip(target.shape, wraps, places, strict=False):
        here = len(set(at))
        links += 0 if here == 1 else 2 if ring and here == size else 1
    if not links:
        return one.sent / (_WITHIN * kind.link)
    return one.sent / (links * kind.link / kind.devices_per_chip)


def _of_hosts(one: Collective, target: Target, group: Sequence[Any]) -> float:
    kind = TARGETS[target.kind]
    assert kind.link is not None and kind.network is not None
    hosts = len({device.process_index for device in group})
    if one.kind == "collective-permute":
        return one.sent / (kind.link if hosts == 1 else kind.network)
    n = len(group)
    whole = one.sent * n / (n - 1)
    each = math.ceil(n / hosts)
    if one.kind == "all-to-all":
        apart = one.sent * (n - each) / (n - 1) / kind.network
        return max(apart, (one.sent * (each - 1) / (n - 1)) / kind.link)
    return max(whole * (hosts - 1) / hosts / (each * kind.network), whole * (each - 1) / each / kind.link)
