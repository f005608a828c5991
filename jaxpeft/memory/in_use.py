"""What is in use on a program's devices: the file that `jax.profiler.save_device_memory_profile` writes.

It is a profile of pprof's, gzipped (github.com/google/pprof, proto/profile.proto; the field numbers below are those):
samples of arrays and of executables, each with its bytes, its device and the Python stack that allocated it.
"""

from __future__ import annotations

import re
import zlib
from pathlib import Path

from jaxpeft import files
from jaxpeft.errors import InputError
from jaxpeft.memory.owners import KINDS, Buffer
from jaxpeft.memory.profile import Profile
from jaxpeft.memory.wire import Damaged, Message
from jaxpeft.source import Frame, nearest

_MOST = 2**26  # bytes, unpacked; a sample has about 100
_WRITER = "jax.profiler.save_device_memory_profile"


def read(file: Path) -> Profile:
    """What is in use, by kind (`KINDS`) and by the nearest line of the user's code in the stack that allocated it.

    Raises:
      InputError: if there is no such file, it is too large, or it is not what JAX writes.
    """
    data = files.read_bytes(file, f"{file}: no such file; give one that {_WRITER} wrote", _MOST)
    try:
        buffers, devices = _samples(Message(_unpacked(file, data)))
    except (Damaged, LookupError, zlib.error):
        raise InputError(f"{file}: damaged, cut short, or not written by {_WRITER}") from None
    if not buffers:
        raise InputError(f"{file}: nothing is in use; call {_WRITER} while arrays are there")
    total = sum(buffer.bytes for buffer in buffers)
    return Profile(
        platform=re.match(r"[A-Za-z]*", min(devices, default=""))[0].lower(),  # type: ignore[index]
        total_bytes=total,
        peak_position=0,
        positions=0,
        live_bytes=total,
        buffers=tuple(sorted(buffers, key=lambda buffer: -buffer.bytes)),
        timeline=(),
        unattributed_bytes=sum(buffer.bytes for buffer in buffers if not buffer.module),
        host_bytes=0,
        title=f"In use, {file.name}",
        devices=tuple(sorted(devices.items(), key=lambda item: (-item[1], item[0]))),
    )


def _unpacked(file: Path, data: bytes) -> bytes:
    gzip = zlib.decompressobj(wbits=31)
    unpacked = gzip.decompress(data, _MOST + 1)
    if len(unpacked) > _MOST:
        raise InputError(f"{file}: has more than {_MOST} bytes, unpacked; such a profile has fewer")
    if not gzip.eof:
        raise Damaged("cut short")
    return unpacked


def _samples(profile: Message) -> tuple[list[Buffer], dict[str, int]]:
    """(what is in use, {device: bytes}). The profile says which of a sample's values are bytes."""
    texts = profile.texts(6)
    units = [texts[value.number(2)] for value in profile.messages(1)]
    if sorted(units) != ["bytes", "count"]:
        raise Damaged("a profile of something else")
    functions = {one.number(1): (texts[one.number(4)], texts[one.number(2)]) for one in profile.messages(5)}
    stacks = {
        place.number(1): [Frame(*functions[line.number(1)], line.number(2)) for line in place.messages(4)]
        for place in profile.messages(4)
    }
    found, devices = [], dict[str, int]()
    for sample in profile.messages(2):
        values = dict(zip(units, sample.numbers(2), strict=False))
        count, size = values["count"], values["bytes"]
        if max(count, size) >= 2**62:  # or negative
            raise Damaged(f"{size} bytes")
        labels = {texts[label.number(1)]: texts[label.number(2)] for label in sample.messages(3)}
        kind = next((kind for kind in KINDS if kind.startswith(labels.get("kind", "?"))), "other")
        if device := labels.get("device"):
            devices[device] = devices.get(device, 0) + size
        if size:
            site = _site([frame for place in sample.numbers(1) for frame in stacks[place]])
            found.append(Buffer(size, "", "", "", 0, 0, kind, site, arrays=count))
    return found, devices


def _site(frames: list[Frame]) -> str:
    """Where something was allocated: the nearest line of the user's code, else the innermost; "" without a stack."""
    frame = nearest(frames) or next(iter(frames), None)
    return str(frame) if frame else ""
