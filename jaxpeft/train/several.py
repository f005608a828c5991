"""Several adapters in one run, `--adapters`: what they are begun as or go on from, and what the run leaves of them.

    tidy           begun anew, by the run's method, options and rank
    tidy=FOLDER    goes on from an adapter of LoRA's kind

A method option whose first part is an adapter's name is that one's alone: `tidy.rank=4`, `tidy.method=lora_fa`, in YAML
`tidy: {rank: 4}`. Each is a pair of factors (`jaxpeft.adapters`); `quantize` in front of it is for the base of all.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from jaxpeft import method as contract
from jaxpeft import recipe
from jaxpeft.errors import InputError
from jaxpeft.files import from_yaml
from jaxpeft.method import Method, Spec, chain, from_specs

_BASE = ("quantize",)  # members of a chain that prepare the base of all


class Adapters(NamedTuple):
    """Adapters by name, and what prepares their base.

    methods: {name: method}, a pair of factors each.
    base: specs of what comes before it.
    """

    methods: dict[str, Method]
    base: tuple[Spec, ...] = ()

    @property
    def method(self) -> Method:
        """Of the run."""
        from jaxpeft.adapters import several

        whole = several(self.methods)
        return chain(from_specs(self.base), whole) if self.base else whole

    def of(self, name: str) -> Method:
        """An adapter's method in a run of its own."""
        return from_specs([*self.base, *self.methods[name].specs])

    @property
    def specs(self) -> tuple[Spec, ...]:
        """Of all of them, one after the other."""
        return tuple(spec for name in self.methods for spec in self.of(name).specs)

    def spelled(self) -> str:
        """For the report: tidy (lora), wide (quantize + lora)."""
        return ", ".join(f"{name} ({recipe.spell(self.of(name).specs, ' + ')})" for name in self.methods)

    def document(self) -> dict[str, Any]:
        """For config.json: {name: [[a method's name, its arguments], ...]}."""
        return {name: [[spec.name, spec.config] for spec in self.of(name).specs] for name in self.methods}


def from_document(document: Mapping[str, Any]) -> Adapters:
    """Those of `Adapters.document`."""
    return _together({name: from_specs(specs) for name, specs in document.items()})


def read(words: Sequence[str]) -> dict[str, Path | None]:
    """{name: folder} of NAME=FOLDER; None of a NAME alone. Names may be joined by commas.

    >>> read(["tidy,wide", "old=run/adapter"])
    {'tidy': None, 'wide': None, 'old': PosixPath('run/adapter')}

    Raises:
      InputError: for a name that stands twice, or is none.
    """
    found: dict[str, Path | None] = {}
    for word in words:
        for part in [word] if "=" in word else word.split(","):
            name, equals, folder = part.partition("=")
            name = name.strip()
            if not name or (equals and not folder):
                raise InputError(f"--adapters {word!r}: must be NAME or NAME=FOLDER")
            if name in found:
                raise InputError(f"--adapters {word}: the name {name!r} stands twice")
            found[name] = Path(folder) if equals else None
    return found


def check(run: Any) -> None:
    """Raises InputError for what a run with several adapters cannot have; `run` is a `Run`."""
    folders = read(run.adapters)
    if run.adapter is not None:
        raise InputError(f"--adapter {run.adapter}: has no name beside --adapters; give --adapters NAME={run.adapter}")
    if run.rounds is not None:
        raise InputError(f"--rounds {run.rounds}: has no effect with --adapters; leave one of them out")
    for name, folder in folders.items():
        if folder is not None and not folder.is_dir():
            raise InputError(f"--adapters {name}={folder}: no such directory")
    check_step(run)


def check_step(run: Any) -> None:
    """Raises InputError for a step that is none of several adapters; `run` is a `Run`, or what is planned."""
    if run.task == "classify":
        raise InputError("--adapters: rows that are classified have one classifier, and one adapter; leave it out")
    folders = read(run.adapters)
    if run.batch_size < len(folders):
        raise InputError(
            f"--batch-size {run.batch_size}: each of {len(folders)} adapters has a row in each step; give at least as "
            "many"
        )


def begun(run: Any) -> dict[str, Method | None]:
    """The adapters of a run; None for one that goes on, whose method is in its folder.

    Raises:
      InputError: for no method, one that is more than a pair of factors, or options for one that has its own.
    """
    folders = read(run.adapters)
    common, own = _options(run.method_options, list(folders))
    given = {"rank": run.rank, "alpha": run.alpha, "targets": run.targets}
    found: dict[str, Method | None] = {}
    for name, folder in folders.items():
        if folder is not None:
            if own[name]:
                raise InputError(f"--adapters {name}={folder}: brings its own {', '.join(own[name])}; leave these out")
            found[name] = None
            continue
        words, options = own[name].pop("method", run.method), own[name]
        said = {option.rpartition(".")[2] for option in options}
        rest = {option: value for option, value in common.items() if option.rpartition(".")[2] not in said}
        shared = {option: value for option, value in given.items() if option not in said}
        try:
            found[name] = recipe.parse(words, {**rest, **options}, **shared)
        except InputError as error:
            raise InputError(f"adapter {name!r}: {error}" if options else str(error)) from None
    if all(method is None for method in found.values()):
        if common or any(value is not None for value in given.values()):
            words = [*(option for option, value in given.items() if value is not None), *common]
            raise InputError(f"--adapters: each brings its own {', '.join(words)}; leave these out")
    else:
        _together({name: method for name, method in found.items() if method is not None})
    return found


def specs(run: Any) -> tuple[Spec, ...]:
    """Members of the first adapter's method, for the run's defaults.

    Raises:
      InputError: where another one has other defaults and the run does not say what it takes.
    """
    from jaxpeft.peft.read import specs_of
    from jaxpeft.train.optimizer import defaults

    folders = read(run.adapters)
    found = {
        name: specs_of(folders[name]) if method is None else method.specs  # type: ignore[arg-type]
        for name, method in begun(run).items()
    }
    first = next(iter(found))
    for name, members in found.items():
        if run.lr is None and defaults(members).lr != defaults(found[first]).lr:
            raise InputError(
                f"--adapters: {first} ({recipe.spell(found[first])}) and {name} ({recipe.spell(members)}) have other "
                "default rates; give --lr"
            )
    return found[first]


def made(run: Any) -> Adapters | None:
    """The adapters of a run in which none goes on; None where one does, which is read with the base (`going_on`)."""
    found = begun(run)
    known = {name: method for name, method in found.items() if method is not None}
    return _together(known) if len(known) == len(found) else None


def planned(step: Any) -> Adapters:
    """The adapters of a step that is planned, which has no files; `step` are its arguments (`StepArguments`).

    Raises:
      InputError: as `begun` does, and for one that would go on from a folder.
    """
    check_step(step)
    if of_folder := next((f"{name}={folder}" for name, folder in read(step.adapters).items() if folder), None):
        name = of_folder.partition("=")[0]
        raise InputError(f"--adapters {of_folder}: a plan reads no adapter; give {name}, and {name}.rank=... of it")
    found = made(step)
    assert found is not None
    return found


def going_on(run: Any, base: Any, params: Any) -> tuple[Adapters, dict[str, Any]]:
    """(adapters, leaves of those that go on), of a run in which some do.

    Args:
      run: the `Run`.
      base: the base's model.
      params: its nested parameters.

    Raises:
      InputError: as `read_pair` does; for bases that are prepared differently.
    """
    from jaxpeft.adapters import beside
    from jaxpeft.peft.several import read_pair

    folders, methods, leaves = read(run.adapters), {}, {}
    for name, method in begun(run).items():
        if method is not None:
            methods[name] = method
            continue
        folder = folders[name]
        assert folder is not None
        own, leaves[name], rest = read_pair(name, folder, base, params)
        methods[name] = from_specs([*rest, *own.specs])
    adapters = _together(methods)
    return adapters, beside(adapters.methods, leaves)


def template_of(run: Any) -> Path | None:
    """The folder whose template the rows go through: that of the first adapter that goes on and stores one.

    Raises:
      InputError: where another one's is another, and the run names none.
    """
    from jaxpeft.template import find

    stored = {name: (folder, find(folder)) for name, folder in read(run.adapters).items() if folder is not None}
    known = {name: (folder, own) for name, (folder, own) in stored.items() if own is not None}
    first = next(iter(known), None)
    for name, (_, own) in known.items():
        if run.template == "auto" and own.digest() != known[first][1].digest():  # type: ignore[index, union-attr]
            raise InputError(f"--adapters: {first} and {name} were trained through other templates; give --template")
    return None if first is None else known[first][0]


def scaling_of(run: Any) -> str | None:
    """How rotary positions are scaled: as the run says, or as all adapters that go on have them.

    Raises:
      InputError: where they differ.
    """
    from jaxpeft.peft.base import adapter_rope_scaling

    scaling = run.rope_scaling
    for folder in read(run.adapters).values():
        if folder is not None:
            scaling = adapter_rope_scaling(folder, scaling)
    return scaling


def named(adapters: Adapters, scores: Mapping[str, Any]) -> dict[str, Any]:
    """Scores of which those of an adapter, `loss/0`, have its name, `loss/tidy`."""
    names = {f"loss/{g}": f"loss/{name}" for g, name in enumerate(adapters.methods)}
    return {names.get(name, name): x for name, x in scores.items()}


def write(folder: Path, adapters: Adapters, params: Any, config: Any, source: str, **how: Any) -> Path:
    """Writes each of a run's adapters into FOLDER/NAME, in PEFT's form, and returns FOLDER.

    Args:
      folder: where to.
      adapters: of the run.
      params: nested parameters of the model with all of them.
      config: the model's configuration.
      source: the base's folder or hub id.
      **how: further arguments of `export_adapter`.
    """
    from jaxpeft.adapters import alone
    from jaxpeft.peft import export_adapter

    for name in adapters.methods:
        own = alone(params, adapters.methods, name)
        export_adapter(folder / name, own, adapters.of(name), config, source, replace=True, **how)
    return folder


def _together(methods: Mapping[str, Method]) -> Adapters:
    """Adapters of chains: what prepares their base has to be alike.

    Raises:
      InputError: where it is not, or one is more than a pair.
    """
    from jaxpeft.adapters import several

    pairs, bases = {}, {}
    for name, method in methods.items():
        bases[name] = tuple(spec for spec in method.specs if spec.name in _BASE)
        own = [spec for spec in method.specs if spec.name not in _BASE]
        if len(own) != 1:
            raise InputError(
                f"adapter {name!r}: is of {recipe.spell(method.specs)}; several at once are lora and lora_fa, with or "
                "without quantize"
            )
        pairs[name] = from_specs(own)
    several(pairs)  # refuses what is no pair, or no name
    first = next(iter(bases))
    for name, base in bases.items():
        if base != bases[first]:
            told = [recipe.spell(found) or "nothing" for found in (bases[first], base)]
            raise InputError(
                f"adapters {first!r} and {name!r} are for one base prepared differently: by {told[0]} and by {told[1]}"
            )
    return Adapters(pairs, bases[first])


def _options(words: recipe.Options, names: Sequence[str]) -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
    """({option: value} of all that begin, {name: {option: value}} of each alone)."""
    common: list[str] = []
    own: dict[str, dict[str, Any]] = {name: {} for name in names}
    for word in words:
        head, _, text = word.partition("=")
        whose = max((name for name in names if head == name or head.startswith(f"{name}.")), key=len, default=None)
        if whose is None:
            common.append(word)
        elif whose in contract.names():
            raise InputError(
                f"--adapters {whose}: {word} could be of the method {whose} or of the adapter; call that otherwise"
            )
        elif head == whose:
            value = from_yaml(f"method option {word!r}", text)
            if not isinstance(value, Mapping):
                raise InputError(f"method option {whose}: should be a mapping of its options, such as rank: 4")
            own[whose] |= recipe.read(value)
        else:
            own[whose] |= recipe.read([word.removeprefix(f"{whose}.")])
    return recipe.read(common), own
