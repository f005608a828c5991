"""Which of several processes this is, by flags or by what launched it; without a look at JAX, or at any device."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import NamedTuple

from jaxpeft.errors import InputError

# Environment of a process that was started as one of several: their number, which it is, and which on its machine.
_LAUNCHERS = (
    ("JAX_NUM_PROCESSES", "JAX_PROCESS_ID", None),
    ("SLURM_STEP_NUM_TASKS", "SLURM_PROCID", "SLURM_LOCALID"),
    ("OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_LOCAL_RANK"),
)
FLAGS = ("processes", "process_id", "coordinator")
_ADDRESS = "JAX_COORDINATOR_ADDRESS"


class Place(NamedTuple):
    """Which process this is; None is for `jax.distributed` to find out.

    device: the GPU that it takes, by its number on the machine; None: all that it sees.
    """

    processes: int | None
    process_id: int | None
    coordinator: str | None
    device: int | None = None


def place(
    processes: int | str | None, process_id: int | None, coordinator: str | None, environment: Mapping[str, str]
) -> Place | None:
    """Which of several processes this is, by the flags, else by the environment; None: there is only this one.

    Args:
      processes: their number; "auto": what JAX finds, which asks a TPU's or a cluster's services; None: as the
        environment says, of JAX_NUM_PROCESSES, SLURM's `srun`, Open MPI's `mpirun`, or a TPU slice's hosts on GKE.
      process_id: from 0.
      coordinator: HOST:PORT of process 0.
      environment: of the process.

    Raises:
      InputError: for flags or variables that make no sense.
    """
    if processes == "auto":
        return Place(None, None, coordinator)
    address = coordinator or environment.get(_ADDRESS)
    if processes is not None:
        if processes == 1 and process_id in (None, 0):
            return None
        own = process_id if process_id is not None else _number(environment, "JAX_PROCESS_ID")
        return _checked(int(processes), own, address)
    if process_id is not None or coordinator is not None:
        given = "--process-id" if process_id is not None else "--coordinator"
        raise InputError(f"{given}: needs --processes, the number of processes (or auto)")
    for counted, numbered, local in _LAUNCHERS:
        count = _number(environment, counted)
        if count is not None and count > 1:
            if local and not address:  # JAX finds where process 0 is
                return Place(None, None, None)
            found = _checked(count, _number(environment, numbered), address)
            return found._replace(device=_number(environment, local) if local else None)
    hosts = environment.get("TPU_WORKER_HOSTNAMES", "").split(",")  # libtpu may put a sentence there
    several = len(hosts) > 1 and all(re.fullmatch(r"[\w.:-]+", name) for name in hosts)
    return Place(None, None, environment.get(_ADDRESS)) if several else None


def _number(environment: Mapping[str, str], name: str) -> int | None:
    text = environment.get(name, "").strip()
    if not text:
        return None
    if not text.isdecimal() or len(text) > 9:
        raise InputError(f"the environment's {name}={text}: should be a whole number")
    return int(text)


def _checked(count: int, own: int | None, address: str | None) -> Place:
    if own is None:
        raise InputError(f"--processes {count}: needs --process-id, from 0 to {count - 1}, other in each process")
    if not 0 <= own < count:
        raise InputError(f"--process-id {own}: must be from 0 to {count - 1}, with --processes {count}")
    host, _, port = (address or "").rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 2**16:
        wrong = f"--coordinator {address}: should be" if address else f"--processes {count}: needs --coordinator,"
        raise InputError(f"{wrong} HOST:PORT of process 0, the same in each process")
    return Place(count, own, address)
