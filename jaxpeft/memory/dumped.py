"""The profile of a program that XLA has described in a folder, `--xla_dump_to=DIR`, whoever compiled it."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from jaxpeft.errors import InputError
from jaxpeft.memory import foreign, hlo
from jaxpeft.memory.profile import Profile, profile
from jaxpeft.memory.targets import Target
from jaxpeft.memory.traffic import traffic

PLATFORMS = {"cuda": "gpu", "tpu": "tpu", "cpu": "cpu"}  # a target's, as XLA calls it


class Dumped(NamedTuple):
    """A program of a folder. module: which one; modules: all that are there, the one with the largest buffers first."""

    profile: Profile
    module: hlo.Module
    modules: list[hlo.Module]


def read(folder: Path, module: str | None = None, moved: bool = False, target: Target | None = None) -> Dumped:
    """The profile of the largest program of a folder, or of the largest that `module` names.

    Owners are what the program alone tells: see `foreign`. moved: whether to say what it moves, too;
    target: whose bandwidth and rate make seconds of that.

    Raises:
      InputError: if the folder lacks the dumps, they are damaged, or none has such a name; for a target of another
        platform than the program's.
    """
    found = hlo.modules(folder)
    chosen = hlo.choose(found, folder, module)
    program = hlo.read_module(chosen)
    if target is not None and PLATFORMS[target.platform] != program.platform:
        raise InputError(f"--target {target.name}: {chosen.function} was compiled for {program.platform}")
    try:
        owners = foreign.owners_of(program)
        made = profile(program, owners, foreign.ForeignAttribution)
        if moved:
            made = made._replace(traffic=traffic(program, owners, foreign.ForeignAttribution, target))
    except InputError:
        raise
    except (ValueError, LookupError, RecursionError):  # a file that is whole, and tells of no program
        raise InputError(hlo.damaged(chosen.path)) from None
    return Dumped(made._replace(title=f"{chosen.function} on {program.platform}"), chosen, found)
