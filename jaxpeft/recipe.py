"""A method in words: names joined by "+", in the order in which they apply, and options for them.

    parse("meft+lora", ["meft.width=16", "lora.rank=4"])    words, their values in YAML
    parse("meft+lora", {"meft": {"width": 16}, "lora.rank": 4})    the same as values
    parse("meft+lora", {"width": 16}, rank=4)    without a name: to the one member that takes it

An option without a name must have exactly one taker. The keyword arguments (rank, alpha, targets) go to every member
that takes them.
"""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from jaxpeft import method as contract
from jaxpeft.errors import InputError, did_you_mean
from jaxpeft.files import from_yaml
from jaxpeft.method import Method, Spec

Options = Mapping[str, Any] | Iterable[str]


def parse(text: str, options: Options = (), **common: Any) -> Method:
    """The method of a name or a chain of names.

    Args:
      text: "lora", or "meft+lora".
      options: "NAME=VALUE" and "METHOD.NAME=VALUE", or a mapping of these names, or of a method's to a mapping of its
        own; dashes may stand for underscores.
      **common: arguments for every member that takes them; None where there is none.

    Raises:
      InputError: for an unknown or empty name or one that stands twice, an option that no member takes, several take,
        or that comes twice, and what a factory refuses.
    """
    if "," in text:
        raise InputError(f"method {text!r}: give one, or a chain joined by +")
    return several(text, options, **common)[0][1]


def several(text: str, options: Options = (), **common: Any) -> list[tuple[str, Method]]:
    """(words, method) of each of several chains, separated by commas.

    Each gets the options that it takes; what none takes is refused.

    Raises:
      InputError: see `parse`; also if there is no chain.
    """
    chains = [members(part) for part in text.split(",") if part.strip()]
    if not chains:
        raise InputError(f"method {text!r}: name at least one; `jaxpeft methods` lists them")
    given = [_Option(name, None, name, value, True) for name, value in common.items() if value is not None]
    given += _prefixed(read(options), {name for chain in chains for name in chain})
    arguments: list[dict[str, dict[str, Any]]] = [{name: {} for name in chain} for chain in chains]
    for option in given:
        for of_member, member in _takers(option, chains, arguments):
            if option.name in of_member[member]:
                raise InputError(f"method option {option.words}: {member}'s {option.name} is given twice")
            of_member[member][option.name] = option.value
    made = []
    for of_member in arguments:
        methods = [contract.make(name, settings) for name, settings in of_member.items()]
        made.append(("+".join(of_member), methods[0] if len(methods) == 1 else contract.chain(*methods)))
    return made


def spell(specs: Iterable[Spec], plus: str = "+") -> str:
    """The names of a method's specs as `parse` reads them: meft+lora."""
    return plus.join(spec.name for spec in specs)


def members(text: str) -> list[str]:
    """The names in a chain.

    Raises:
      InputError: for an empty or unknown one, or one that stands twice.
    """
    names = [name.strip() for name in text.split("+")]
    if not all(names):
        raise InputError(f"method {text.strip()!r}: a name is missing beside +; write NAME or NAME+NAME")
    for name in names:
        contract.module(name)
    contract.check_once(names)
    if len(set(names)) < len(names):
        raise InputError(f"method {text.strip()!r}: a name stands twice; options could not tell the two apart")
    return names


def read(options: Options) -> dict[str, Any]:
    """Options by their names as given, with underscores; the values of words are YAML.

    Raises:
      InputError: for a word that is not NAME=VALUE or METHOD.NAME=VALUE, or a name that comes twice.
    """
    found: dict[str, Any] = {}
    pairs = options.items() if isinstance(options, Mapping) else map(_split, options)
    for spelt, value in pairs:
        name = _name(spelt)
        if name in found:
            raise InputError(f"method option {spelt}: {name} is given twice")
        found[name] = value
    return found


class _Option(NamedTuple):
    """words: as it was given.  member: to which it goes, None where none is named.  every: goes to all that take it."""

    words: str
    member: str | None
    name: str
    value: Any
    every: bool = False


def _split(word: str) -> tuple[str, Any]:
    name, equals, text = word.partition("=")
    if not equals or not _is_name(name):
        raise InputError(f"method option {word!r}: must be NAME=VALUE or METHOD.NAME=VALUE")
    return name, from_yaml(f"method option {word!r}", text)


def _name(spelt: Any) -> str:
    if not isinstance(spelt, str) or not _is_name(spelt):
        raise InputError(f"method option {spelt!r}: must be named NAME or METHOD.NAME")
    return spelt.strip().replace("-", "_")


def _is_name(spelt: str) -> bool:
    parts = spelt.strip().replace("-", "_").split(".")
    return len(parts) <= 2 and all(part.isidentifier() for part in parts)


def _prefixed(options: Mapping[str, Any], chained: set[str]) -> list[_Option]:
    """Each option with the member that it names, if any; a member's mapping is its options."""
    known = set(contract.names())
    found = []
    for words, value in options.items():
        member, dot, name = words.rpartition(".")
        if dot:
            _check_member(words, member, chained)
            found.append(_Option(words, member, name, value))
        elif words in chained or (words in known and isinstance(value, Mapping)):
            _check_member(words, words, chained)
            if not isinstance(value, Mapping):
                raise InputError(
                    f"method option {words}: should be a mapping of {words}'s options, such as NAME: VALUE"
                )
            for key, item in value.items():
                if not _is_name(str(key)) or "." in str(key):
                    raise InputError(f"method option {words}: {key!r} is no option's name")
                name = _name(key)
                found.append(_Option(f"{words}.{name}", words, name, item))
        else:
            found.append(_Option(words, None, words, value))
    return found


def _check_member(words: str, member: str, chained: set[str]) -> None:
    if member not in chained:
        where = "the method is" if len(chained) == 1 else "the methods are"
        unknown = "" if member in contract.names() else did_you_mean(member, [*chained, *contract.names()])
        raise InputError(f"method option {words}: {where} {', '.join(sorted(chained))}, not {member}{unknown}")


def _takers(
    option: _Option, chains: Sequence[Sequence[str]], arguments: Sequence[dict[str, dict[str, Any]]]
) -> list[tuple[dict[str, dict[str, Any]], str]]:
    """(a chain's arguments, member) of all that get the option.

    Raises:
      InputError: if there is none, or if there are several in a chain and not every one should get it.
    """
    found = []
    for chain, of_member in zip(chains, arguments, strict=True):
        takers = [name for name in chain if option.member in (None, name) and option.name in _takes(name)]
        if len(takers) > 1 and not option.every:
            spelt = " or ".join(f"{name}.{option.name}" for name in takers)
            raise InputError(f"method option {option.words}: {' and '.join(takers)} take it; write {spelt}")
        found += [(of_member, name) for name in takers]
    if not found:
        asked = [[option.member]] if option.member else chains
        raise InputError(_nobody_takes(option.name, asked))
    return found


def _nobody_takes(name: str, chains: Sequence[Sequence[str]]) -> str:
    """One line for an option that no member takes: what they take, those nearest to it first of all."""
    what = ", ".join("+".join(chain) for chain in chains)
    asked = list(dict.fromkeys(member for chain in chains for member in chain))
    near = difflib.get_close_matches(name, {option for member in asked for option in _takes(member)})
    alone = len(asked) == 1
    spelt = {option: [option if alone else f"{m}.{option}" for m in asked if option in _takes(m)] for option in near}
    line = f"method {what} takes no {name}"
    if alone or not near:
        every = [option if alone else f"{member}.{option}" for member in asked for option in _takes(member)]
        line += f"; it takes {', '.join(every)}" if alone else f"; known: {', '.join(every)}"
    if near:
        line += f"; did you mean {' or '.join(words for option in near for words in spelt[option])}?"
    others = [other for other in contract.names() if other not in asked and name in _takes(other)]
    return line + (f" ({', '.join(others)} {'takes' if len(others) == 1 else 'take'} it)" if others else "")


def _takes(name: str) -> list[str]:
    """The arguments of a method's factory."""
    return list(inspect.signature(getattr(contract.module(name), name)).parameters)
