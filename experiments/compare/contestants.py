"""Who is compared: every method of jaxpeft/methods with its own defaults, and some chains that people run."""

from __future__ import annotations

from jaxpeft import method as contract
from jaxpeft import recipe
from jaxpeft.method import Method

CHAINS = ("lora+lisa", "mezo+lora", "quantize+dora", "quantize+mezo+lora")


def names() -> list[str]:
    """A recipe for each: a method's name, or the chain in which one that trains nothing by itself is tried."""
    return [contract.about(name).within or name for name in contract.names()] + list(CHAINS)


def is_for(words: str, classifies: bool) -> bool:
    """Whether a recipe is for models that classify rows, or for those that continue texts."""
    abouts = [contract.about(name) for name in words.split("+")]
    return classifies or not any(about.promises.classifies for about in abouts)


def make(words: str) -> Method:
    """The method with its defaults; of a module that any rank fits, 8."""
    return recipe.parse(words)


def default_rate(words: str) -> float | None:
    """Where a run begins that says nothing: the first member's opinion."""
    from jaxpeft.train.optimizer import defaults

    return defaults(make(words).specs).lr
