"""Checks of arguments, of runs and of the commands beside them: each raises for the first value that makes no sense.

They look at values alone; files are looked at where they are read.
"""

from collections.abc import Mapping
from typing import Any

from jaxpeft.errors import InputError, shown
from jaxpeft.train.hints import fits, wanted

MOST = 2**31 - 1  # of steps, tokens and whatever is counted
MOST_SEED = 2**32 - 1  # JAX's keys hold 32 bits, and grain shuffles by as many


def flag(name: str) -> str:
    """A field as the command line spells it: batch_size -> --batch-size."""
    return "--" + name.replace("_", "-")


def check_least(args: Any, least: Mapping[str, float]) -> None:
    """Raises InputError for the first of some fields that is below its least value or above MOST; None passes."""
    for name, bound in least.items():
        value = getattr(args, name)
        if isinstance(value, str):  # "auto"
            continue
        if value is not None and not value >= bound:
            raise InputError(f"{flag(name)} {shown(value)}: must be at least {bound}")
        if value is not None and value > MOST:
            raise InputError(f"{flag(name)} {shown(value)}: must be at most {MOST}")


def check_seed(seed: int) -> None:
    """Raises InputError for a seed that is none."""
    if not 0 <= seed <= MOST_SEED:
        raise InputError(f"--seed {seed}: must be from 0 to {MOST_SEED}")


def check_parts(args: Any) -> None:
    """Raises InputError if a step's batch cannot be cut into its parts."""
    if args.batch_size % args.accumulate:
        raise InputError(f"--accumulate {args.accumulate}: must divide --batch-size {args.batch_size}")


def check_profile(args: Any) -> None:
    """Raises InputError for steps to record that are none of the run's."""
    if args.profile_steps is not None:
        from jaxpeft.train.trace import parse

        if parse(args.profile_steps)[1] > args.steps:
            raise InputError(f"--profile-steps {args.profile_steps}: the run has {args.steps} steps")


def check_rounds(args: Any) -> None:
    """Raises InputError for rounds that a run cannot have."""
    for name in ("round_size", "uncertainty"):
        if args.rounds is None and getattr(args, name) is not None:
            raise InputError(f"{flag(name)} {getattr(args, name)}: has no effect without --rounds")
    if args.rounds is None:
        return
    if args.task == "classify":
        raise InputError(f"--rounds {args.rounds}: has no effect with --task classify")
    if args.rounds > args.steps:
        raise InputError(f"--rounds {args.rounds}: the run has {args.steps} steps; give at most as many")


def check_shots(args: Any) -> None:
    """Raises InputError for examples in context where there is nothing that they could stand before."""
    if not args.shots:
        return
    if args.task == "classify":
        raise InputError(f"--shots {args.shots}: has no effect with --task classify, whose rows have no context")
    if args.adapters:
        raise InputError(f"--shots {args.shots}: of a run with one adapter; --adapters has its own rows for each")
    if args.data is not None and args.eval_data is None:
        raise InputError(f"--shots {args.shots}: needs --eval-data, the examples to show them with")


def check_rope_scaling(args: Any) -> None:
    """Raises InputError if --rope-scaling is given and is not KIND=FACTOR."""
    if args.rope_scaling is not None:
        from jaxpeft.models import rotary

        rotary.parse(args.rope_scaling)


def check_kind(name: str, value: Any, hint: Any) -> None:
    """Refuses a value that is not of its field's type, which the command line's parser never makes."""
    if not fits(value, hint):
        raise InputError(f"{flag(name)} {value!r}: must be {wanted(name, hint)}")
