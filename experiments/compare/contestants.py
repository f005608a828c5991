"""Who is compared: every method of jaxpeft/methods with its own defaults, and some chains that people run."""

from __future__ import annotations

from jaxpeft import method as contract
from jaxpeft import recipe
from jaxpeft.method import Method
from jaxpeft.models.labels import SCOPE

CHAINS = ("lora+lisa", "mezo+lora", "wta_crs+lora", "quantize+dora", "quantize+mezo+lora")
BASE = "base"  # the model as it was, which nothing trains
ICL = "icl"  # the model as it was, with examples in context
PROBE = "probe"  # linear probing: of a model that classifies rows the new classifier alone
# What a method needs to be told on a model, as its kernels are smaller than the defaults, or there are none (of
# PockEngine's scheme, here the last layers): {model: {recipe: options}}.
OPTIONS = {
    "llama3.2-3b": {"pockengine": ('scheme={"layers/2[3-7]/": 1.0}',)},
    "llama2-7b": {"pockengine": ('scheme={"layers/(27|28|29|30|31)/": 1.0}',)},
    "MiniLM": {"pockengine": ('scheme={"layers/5/": 1.0}',)},
    "stories260K": {
        "pockengine": ('scheme={"layers/4/": 1.0}',),
        "galore": ("rank=16",),
        "lq_lora": ("rank=8",),
        "lst": ("reduction=4",),
        "natural_galore": ("rank=16",),
        "oft": ("block_size=4",),
        "owlore": ("rank=16",),
        "shira": ("rank=16",),
        "spt": ("blocks=4",),
        "vblora": ("length=4",),
    },
}


def names() -> list[str]:
    """A recipe for each: a method's name, or the chain in which one that trains nothing by itself is tried."""
    return [contract.about(name).within or name for name in contract.names()] + list(CHAINS)


def everybody() -> list[str]:
    """All of them, and what they are compared with on data."""
    return [*names(), BASE, ICL, PROBE]


def is_for(words: str, classifies: bool) -> bool:
    """Whether a recipe is for models that classify rows, or for those that continue texts."""
    if words in (BASE, ICL, PROBE):
        return classifies == (words == PROBE)
    abouts = [contract.about(name) for name in words.split("+")]
    return classifies or not any(about.promises.classifies for about in abouts)


def options(words: str, model: str) -> tuple[str, ...]:
    """Those that the method needs on this model."""
    return OPTIONS.get(model, {}).get(words, ())


def make(words: str, model: str = "") -> Method:
    """The method with its defaults, and with what it needs on this model."""
    if words in (BASE, ICL):  # of no steps
        return recipe.parse("ln_tuning")
    if words == PROBE:
        return recipe.parse("full", {"which": f"^{SCOPE}"})
    return recipe.parse(words, options(words, model))


def default_rate(words: str, model: str = "") -> float | None:
    """Where a run begins that says nothing: the first member's opinion."""
    from jaxpeft.train.optimizer import defaults

    return defaults(make(words, model).specs).lr
