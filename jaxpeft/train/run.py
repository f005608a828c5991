"""A fine-tuning run: all that decides it in one dataclass, and the function that does it.

    jp.run(model="path/to/llama", data="rows.jsonl", out="run", method="meft+lora", rank=4)
    jp.run(Run(data="rows.jsonl", steps=1000))

The command line builds its flags from the same fields, `--batch-size` from `batch_size`, and errors spell them so. (It
is `jp.run`, as `jaxpeft.train` is this package: an attribute cannot be both.)
"""

import contextlib
import dataclasses
import itertools
import os
import typing
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

from jaxpeft import launched
from jaxpeft.errors import InputError, did_you_mean
from jaxpeft.launched import Place
from jaxpeft.train.checks import (
    check_kind,
    check_least,
    check_parts,
    check_profile,
    check_rope_scaling,
    check_rounds,
    check_seed,
    check_shots,
    flag,
)
from jaxpeft.train.hints import one_word

# The least value of a field that is a number.
_LEAST = {
    "steps": 1,
    "batch_size": 1,
    "seq_len": 2,
    "accumulate": 1,
    "warmup": 0,
    "weight_decay": 0,
    "eval_every": 0,
    "checkpoint_every": 0,
    "keep": 1,
    "samples": 0,
    "shots": 0,
    "rounds": 1,
    "round_size": 1,
    "rank": 1,
    "processes": 1,
    "process_id": 0,
    "profile_process": 0,
}


@dataclasses.dataclass(frozen=True)
class Run:
    """Everything that decides a run. Without arguments, the embedded model and examples.

    Paths may be text, sequences lists, `targets` a list of names, and `method_options` a mapping (see
    `jaxpeft.recipe`): each is kept in the type of its field.
    """

    task: Literal["lm", "classify"] = "lm"
    """lm: continue texts. classify: rows with text, text2 (optional) and label or label_name; trains a classifier in
    place of the model's head, besides the method's own parameters. A label with a decimal point is a regression."""
    model: str | None = None
    """Directory or hub id of a Hugging Face checkpoint, or GGUF file. Default: the embedded model."""
    data: str | None = None
    """Training examples: .jsonl, .json, .csv, .tsv (or .gz, .zst of these), .parquet, .arrow, a folder of these, or a
    dataset of the hub, owner/name, owner/name:split or owner/name:config:split. Default: the embedded examples."""
    eval_data: str | None = None
    """Validation examples, in any of these forms. Default: none, or the embedded ones with embedded data."""
    out: Path | None = None
    """Folder for adapter/, checkpoints/, metrics.jsonl and plots. Default: out/run-1, -2, ..."""
    resume: bool = False
    """Continue the run in --out bit-identically from its newest checkpoint."""

    method: str = "lora"
    """Fine-tuning method, or a chain of several, applied in order: meft+lora; `jaxpeft methods` lists them."""
    rank: int | None = None
    """Rank of the adapters. Default: the method's own."""
    alpha: float | None = None
    """Scale of the adapters: their output is multiplied by alpha / rank. Default: the method's own."""
    targets: str | None = None
    """Sites: all-linear, attention, qv, mlp, names (q_proj,v_proj) or a regular expression. Default: the method's."""
    method_options: tuple[str, ...] = ()
    """Further arguments of the method's factory, as NAME=VALUE with a YAML value; in a chain METHOD.NAME=VALUE, where
    more than one method takes the name; `jaxpeft methods METHOD` lists them."""
    adapter: Path | None = None
    """PEFT adapter to train on; it brings its method with it: rank, targets, default rate."""
    adapters: tuple[str, ...] = ()
    """Several adapters on one base, each for the rows whose field `adapter` names it: NAME is begun, NAME=FOLDER goes
    on. An option of --method-options for one alone is NAME.rank=4; the run leaves OUT/adapters/NAME."""

    steps: int = 120
    """Optimizer steps to take. With --resume it may grow if --schedule is constant."""
    batch_size: int = 8
    """Sequences in one step, over all of its accumulated parts."""
    seq_len: int | None = None
    """Tokens in one sequence. Default: 512, or 256 with the embedded model."""
    accumulate: int = 1
    """Parts that a step's batch is cut into, their gradients added up; divides --batch-size."""
    lr: float | None = None
    """Peak learning rate. Default: the method's own (`jaxpeft methods`), else 2e-4, or 2e-3 with the embedded model; a
    fifth with lion."""
    schedule: Literal["constant", "linear", "cosine"] = "cosine"
    """Learning rate after the warm-up: constant, or falling to zero linearly or as a cosine."""
    warmup: int = 10
    """Steps over which the learning rate rises from zero."""
    weight_decay: float | None = None
    """Decoupled weight decay of matrices. Default: the method's own, else 0."""
    optimizer: Literal["adam", "sgd", "adam8bit", "adafactor", "sm3", "lion"] | None = None
    """What makes steps of gradients: adam, adam8bit (moments in 8 bits), adafactor, sm3, lion, or sgd, the gradients
    themselves, unclipped. Default: the method's own, else adam."""
    optimizer_memory: Literal["device", "host"] = "device"
    """Where the optimizer's state of matrices lies: on the device, or in the host's pinned memory, from where a step
    takes it layer by layer."""
    clip: float | None = 1.0
    """Largest global norm of the gradients; None leaves them as they are."""
    dtype: Literal["bfloat16", "float32"] | None = None
    """Type of the frozen weights and of the computation; what trains is float32. Default: float32 on a CPU, which it
    computes faster, else the checkpoint's, bfloat16 for one in float16."""
    rope_scaling: str | None = None
    """Scales rotary positions, for longer texts: linear|dynamic|yarn=FACTOR. Default: as the model, or --adapter, has
    them."""
    save: str | None = None
    """What is kept for the backward pass: everything, matmuls, blocks, offload, compressed, compressed12,
    compressed4, and NAME=ACTION, as `jaxpeft plan` prints it. Default: matmuls; everything where the method runs the
    layers in its own way; blocks where there is no backward pass, with which alone it goes, tokens=N beside it."""
    remat: Literal["loops", "policy"] = "loops"
    """How a plan is carried out: loops of our own, or a scan over jax.checkpoint with the plan as its policy, which
    takes all rows at once and cannot compress."""
    update_in_backward: bool = False
    """Update each layer inside the backward pass: the gradients of all layers never exist. It needs --clip None, as the
    norm of all gradients is known too late, and --accumulate 1."""
    prune_embeddings: bool = False
    """Leave rows of the input's embedding table that no token of the data names in the host's memory; what the run
    leaves is whole. Not where the head reads the table (tied embeddings). Samples are answered with the whole table."""
    mesh: str | None = None
    """Devices to divide the run over, AXIS=DEVICES,...: data (rows of the batch), fsdp (rows, and every matrix), tensor
    (heads and features), seq (tokens of a row); auto: fsdp, and tensor and seq of what the batch does not divide. A run
    may be continued on another mesh. Default: one device; with several processes fsdp over all of their devices."""
    processes: int | Literal["auto"] | None = None
    """Processes that train together, each started with the same flags; auto asks JAX, as on a TPU slice. Default: as
    SLURM's srun, Open MPI's mpirun or JAX_NUM_PROCESSES say, else one."""
    process_id: int | None = None
    """Which of the processes this is, from 0. Default: as the launcher or JAX_PROCESS_ID says."""
    coordinator: str | None = None
    """HOST:PORT of process 0, by which they find each other. Default: as the launcher or JAX_COORDINATOR_ADDRESS
    says."""
    seed: int = 0
    """Seed of initialisation, shuffling and dropout."""

    pack: bool = True
    """Put several short examples in one sequence; they do not see each other. Rows to classify are never packed."""
    buckets: tuple[int, ...] = ()
    """Sequence lengths to pad up to without packing, each at most --seq-len. Default: --seq-len."""
    template: str = "auto"
    """What instruction rows go through: auto, chat, alpaca, or a file with a chat template for all rows."""
    template_date: str | None = None
    """The day, YYYY-MM-DD, that a template which writes the date is told. Default: that of the run's begin."""
    too_long: Literal["truncate", "drop"] = "truncate"
    """What happens to an example longer than --seq-len."""
    skip_bad_lines: bool = False
    """Count lines that cannot be read instead of stopping at the first."""
    compile_cache: bool = True
    """Keep compiled programs in the user's cache folder ($JAXPEFT_CACHE), so that the next run starts at once."""
    rounds: int | None = None
    """Rounds in which the training examples grow by those that the model is most uncertain of (STAR), each of as many
    steps. Default: all examples from the beginning."""
    round_size: int | None = None
    """Examples that a round adds, the first one's at random. Default: 500."""
    uncertainty: Literal["predictive", "entropy"] | None = None
    """By what rounds choose: predictive, how unlikely an example's own completion is, or the entropy of its tokens.
    Default: predictive."""
    data_cache: bool = True
    """Keep the tokens of long data in the user's cache folder ($JAXPEFT_CACHE), so that the next run starts at once."""

    eval_every: int = 50
    """Steps between two evaluations; 0 evaluates before and after the run only."""
    checkpoint_every: int = 50
    """Steps between two checkpoints; 0 writes one at the end only."""
    keep: int = 2
    """Newest checkpoints to keep, besides the one with the lowest validation loss."""
    samples: int = 32
    """Validation examples to answer before and after the run, for the overlap score."""
    shots: int = 0
    """Training examples to put before each validation example, once before the run: what the model does with them in
    context, without training."""
    profile_steps: str | None = None
    """Steps to record with JAX's profiler in OUT/trace, FIRST-LAST. Default: none."""
    profile_process: int = 0
    """Which of several processes records them."""

    def __post_init__(self):
        for name, value in _in_type(vars(self)).items():
            object.__setattr__(self, name, value)

    def settled(self) -> "Run":
        """The run with the defaults that depend on whether the model is the embedded one."""
        defaults = defaults_of(self.model)
        return dataclasses.replace(self, **{name: x for name, x in defaults.items() if getattr(self, name) is None})

    def check(self) -> None:
        """Raises InputError for the first field whose value makes no sense; the files are looked at later."""
        run = self.settled()
        hints = typing.get_type_hints(Run)
        for field in dataclasses.fields(Run):
            check_kind(field.name, getattr(run, field.name), hints[field.name])
        check_least(run, _LEAST)
        check_seed(run.seed)
        for name in ("lr", "clip", "alpha"):
            value = getattr(run, name)
            if value is not None and not 0 < value < float("inf"):
                raise InputError(f"{flag(name)} {value}: must be a finite number above 0")
        check_parts(run)
        check_rope_scaling(run)
        if run.task == "classify" and run.data is None:
            raise InputError(
                "--task classify: needs --data, a file of rows with text and label (see `jaxpeft train --help`)"
            )
        for name in ("template", "template_date"):
            if run.task == "classify" and getattr(self, name) != getattr(Run, name):
                raise InputError(f"{flag(name)} {getattr(self, name)}: has no effect with --task classify")
        check_profile(run)
        check_rounds(run)
        check_shots(run)
        if run.buckets and run.pack and run.task == "lm":
            raise InputError("--buckets: packed sequences all have --seq-len; add --no-pack")
        assert run.seq_len is not None
        for length in run.buckets:
            if not 2 <= length <= run.seq_len:
                raise InputError(f"--buckets {length}: must be from 2 to --seq-len {run.seq_len}")
        if run.resume and run.out is None:
            raise InputError("--resume: needs --out, the folder of the run to continue")
        if run.adapters:
            from jaxpeft.train import several

            several.check(run)
        run.make_method()

    def place(self) -> Place | None:
        """Which of several processes this is; None where there is one.

        Raises:
          InputError: for flags or variables of the environment that make no sense.
        """
        hints = typing.get_type_hints(Run)
        for name in launched.FLAGS:
            check_kind(name, getattr(self, name), hints[name])
        check_least(self, {name: _LEAST[name] for name in launched.FLAGS if name in _LEAST})
        return launched.place(self.processes, self.process_id, self.coordinator, os.environ)

    def rated(self) -> "Run":
        """The run with the rate and the decay of its method where it names none."""
        from jaxpeft.train.optimizer import RATES, defaults, direction_of

        if self.adapters:
            from jaxpeft.train import several

            specs = several.specs(self)
        else:
            method = self.make_method()
            specs = self._specs_of_adapter() if method is None else method.specs
        own, direction = defaults(specs), direction_of(specs, self.optimizer)
        if direction == "sgd" and self.clip not in (None, Run.clip):
            of = "--optimizer sgd" if self.optimizer else "+".join(spec.name for spec in specs)
            raise InputError(f"--clip {self.clip}: has no effect with {of}, whose gradients are not clipped")
        if direction == "sgd" != own.direction and self.lr is None:
            raise InputError("--optimizer sgd: needs --lr; a method's default is that of Adam")
        if self.update_in_backward and direction != "sgd" and self.clip is not None:
            raise InputError(
                f"--clip {self.clip}: with --update-in-backward the norm of all gradients is not known when the first "
                "layer is updated; give --clip None"
            )
        lr = (own.lr or (2e-3 if self.model is None else 2e-4)) * RATES.get(direction, 1)
        decay = own.weight_decay if self.weight_decay is None else self.weight_decay
        return dataclasses.replace(self, lr=lr if self.lr is None else self.lr, weight_decay=decay)

    def make_method(self) -> Any:
        """The `Method` that is named, with its arguments; None where an adapter brings its own, or one of several does.

        Raises:
          InputError: for what makes no method, or names another one than the adapter's.
        """
        from jaxpeft import recipe

        if self.adapters:
            from jaxpeft.train import several

            found = several.made(self)
            return None if found is None else found.method
        common = {"rank": self.rank, "alpha": self.alpha, "targets": self.targets}
        if self.adapter is None:
            return recipe.parse(self.method, self.method_options, **common)
        given = [name for name, value in common.items() if value is not None] + list(recipe.read(self.method_options))
        if given:
            raise InputError(f"--adapter {self.adapter}: brings its own {', '.join(given)}; leave these out")
        if not self.adapter.is_dir():
            raise InputError(f"--adapter {self.adapter}: no such directory")
        if self.method != Run.method and self.method != (own := recipe.spell(self._specs_of_adapter())):
            raise InputError(f"--adapter {self.adapter}: is of {own}, not of --method {self.method}; leave that out")
        return None

    def _specs_of_adapter(self) -> Any:
        """The members of the method that an adapter brings."""
        from jaxpeft.peft.read import specs_of

        assert self.adapter is not None
        return specs_of(self.adapter)


def run(run: Run | None = None, /, **fields: Any) -> dict[str, Any]:
    """Does a run and returns its report (see `jaxpeft.train.report`), which is also in OUT/report.json.

    (Not called `train`, which is the package `jaxpeft.train`.)

    Args:
      run: the run; None: one of the fields' defaults.
      **fields: of `Run`, in place of the run's.

    Raises:
      InputError: for an unknown field, or arguments or files that cannot be used; nothing has been written then.
      RunError: for a run that cannot go on (see `jaxpeft.train.begin`).
    """
    names = [field.name for field in dataclasses.fields(Run)]
    for name in fields:
        if name not in names:
            raise InputError(f"a run has no {name!r}{did_you_mean(name, names)}")
    settled = dataclasses.replace(run or Run(), **fields).settled()
    where = settled.place()
    if where is None:  # nothing of JAX is needed to refuse
        settled.check()

    from jaxpeft import compilation, distributed
    from jaxpeft.train.begin import train
    from jaxpeft.train.folder import Taken

    with distributed.joined(where) as group, compilation.cached(settled.compile_cache):
        settled.check()
        settled = settled.rated()
        if settled.out is None and group is not None:
            fresh = group.from_first(lambda: str(next(fresh_directories(Path("out")))))
            settled = dataclasses.replace(settled, out=Path(fresh))
        if settled.out is not None:
            return train(settled)
        for out in fresh_directories(Path("out")):
            with contextlib.suppress(Taken):  # another run has begun in it a moment ago
                return train(dataclasses.replace(settled, out=out))
    raise AssertionError("there is always a further one")


def defaults_of(model: str | None) -> dict[str, Any]:
    """The defaults that depend on whether the model is the embedded one."""
    return {"seq_len": 256 if model is None else 512}


def fresh_directories(parent: Path) -> Iterator[Path]:
    """Those of parent/run-1, parent/run-2, ... that do not exist, or hold a lock alone; creates nothing."""
    from jaxpeft.train.folder import LOCK

    for number in itertools.count(1):
        path = parent / f"run-{number}"
        if not path.exists() or (path.is_dir() and os.listdir(path) == [LOCK]):
            yield path


def _in_type(values: Mapping[str, Any]) -> dict[str, Any]:
    """What of a run's values is not yet in its field's type: paths, sequences, names, options as a mapping."""
    from jaxpeft.files import to_yaml

    found: dict[str, Any] = {}
    for name, value in values.items():
        if name in ("out", "adapter") and isinstance(value, str):
            found[name] = Path(value)
        elif name in ("model", "data", "eval_data") and isinstance(value, os.PathLike):
            found[name] = os.fspath(value)
        elif name == "method_options" and isinstance(value, Mapping):
            found[name] = tuple(f"{key}={to_yaml(f'method option {key}', item)}" for key, item in value.items())
        elif name == "adapters" and isinstance(value, Mapping):
            found[name] = tuple(key if item is None else f"{key}={os.fspath(item)}" for key, item in value.items())
        elif name in ("buckets", "method_options", "adapters") and isinstance(value, list):
            found[name] = tuple(value)
        elif (word := one_word(name, value)) is not value:
            found[name] = word
    return found
