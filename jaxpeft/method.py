"""The contract: a method is a handful of pure functions, each the identity by default, and `chain` composes them.

    slot      signature                                     used by
    prepare   (params, view) -> params                      quantization, SVD and data-driven starts, cutting the stack
    forward   (Model, view) -> Model                        adapters, prompts, ReFT, reversible stacks, side networks
    roles     (path -> Role) -> (path -> Role)              every method: the one source of what trains, and what moves
    loss      (loss, view) -> loss                          auxiliary losses, distillation from the frozen base
    gradient  (Objective, view) -> Objective                zeroth-order, layer sampling, coresets, preconditioning
    update    (optax transform, view) -> optax transform    moments that restart, learning-rate groups
    move      (leaves, moment) -> leaves                    projections, sampled layers, index sets, weights
    merge     params -> params                              everything that folds back into the base

Every leaf has one role:

    frozen    never differentiated, never changed
    trained   differentiated structurally: it is in the dict with respect to which the loss is differentiated, and no
              other leaf is. Its master has the role's dtype; the models cast it where they use it
    moved     changed by `move` and never differentiated; it keeps its own dtype, and lies in the state once

A step is: loss and gradients of the trained leaves (`gradient`), gradients to directions (`update`), then

    leaf <- leaf - rate (direction + decay leaf)

and at last `move`, which sees the trained leaves as they are now, the moved ones, and a `Moment`. Rate, schedule and
decay are the step's: a method that starts its moments anew, or ignores them, does not touch them. (With an optax
optimizer of one's own, rate and all, the step adds its updates instead.) Gradients have the names and shapes of the
trained leaves, so neighbours in a chain need not know one another.

`view` says what the whole chain does: the base, every leaf's role and shape, batches to calibrate on. State between
steps is in three places: trained leaves, moved leaves, and the optimizer's state, where `update` may add its own
(`optax.tree_utils.tree_get(opt_state, "field")` finds it again). What `gradient` has to say to `update` and `move` it
puts into `aux`, where they ask for it by `told`.

In a chain, `prepare` acts in order and `merge` in reverse; of several adapters at one site the last of the chain is
nearest to the kernel. A method that only changes how others train (a *modifier*: MeZO, LISA) says in `alone` what
trains where nothing else in the chain does. A method file says what it promises in its `ABOUT` (jaxpeft/about.py);
docs/contract.md tells the slots by the shipped methods.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from types import ModuleType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxpeft import aliases, factory, scopes, tree
from jaxpeft.about import About, check
from jaxpeft.errors import InputError, shown
from jaxpeft.model import Batch, Model
from jaxpeft.quant import Absent, Folded, is_packed, matrix, refolded, unfolded, unfolded_all
from jaxpeft.spec import Spec


class Role(NamedTuple):
    """What a leaf is to a step: one of FROZEN, MOVED, and TRAINED or another `trained(dtype)`.

    name: "frozen", "trained" or "moved".
    dtype: of a trained leaf's master; None leaves it as it is. Of a moved leaf: of the masters that train in its place,
      part by part (LISA); None where none do.
    host: whether it lies in the host's pinned memory, of a moved leaf of the layers: the model and `move` bring a layer
      to the device and back.
    """

    name: str
    dtype: Any = None
    host: bool = False


def trained(dtype: Any = jnp.float32) -> Role:
    """A leaf that is differentiated, with a master of this dtype."""
    return Role("trained", dtype)


FROZEN, TRAINED, MOVED = Role("frozen"), trained(), Role("moved")
Roles = Callable[[str], Role]


def trains(predicate: Callable[[str], bool], role: Role = TRAINED) -> Callable[[Roles], Roles]:
    """The `roles` slot of a method that gives one role to the paths of which `predicate` is true."""
    return lambda others: lambda path: role if predicate(path) else others(path)


class View(NamedTuple):
    """What every slot is told of the whole chain.

    base: the model before any method.
    specs: of the chain's members, in order.
    role: path -> Role, of the whole chain.
    shapes: {path: ShapeDtypeStruct}; of the base in `prepare` and `forward`, then of all of the adapted model's leaves.
    batches: a function that gives some batches of the training data, for starts that are calculated from it; it gives
      none when a run is planned, or goes on from a checkpoint: then the leaves' shapes alone count. None where there is
      no data.
    loss: (model, params, batch, key) -> (loss, aux), which such starts differentiate; None: by what a batch holds.
    rate: () float32, the learning rate of the step that is traced; None where there is none, or the optimizer has its
      own.
    """

    base: Model
    specs: tuple[Spec, ...]
    role: Roles
    shapes: Mapping[str, Any]
    batches: Callable[[], Iterable[Batch]] | None = None
    loss: Callable[..., Any] | None = None
    rate: Any = None

    def of(self, *names: str) -> tree.Flat:
        """The shapes of the leaves with one of these roles."""
        return {path: leaf for path, leaf in self.shapes.items() if self.role(path).name in names}

    def conversions(self, params: tree.Params) -> dict[str, Callable[[jax.Array], Any]]:
        """{path: array -> leaf} of what the chain's members store otherwise than it is in `params`; see `convert`."""
        found: dict[str, Callable[[jax.Array], Any]] = {}
        for spec in self.specs:
            found = {**make(*spec).convert(params), **found}
        return found

    @property
    def trained(self) -> tree.Flat:
        """The shapes of the trained leaves."""
        return self.of("trained")

    @property
    def moved(self) -> tree.Flat:
        """The shapes of the moved leaves."""
        return self.of("moved")


class Objective(NamedTuple):
    """What a step minimises.

    value: (trainable, rest, batch, key) -> (loss, aux) of a batch of any size; a key of None is deterministic
    value_and_grad: (trainable, rest, batch, key, opt_state) -> ((loss, aux), gradients) of a step's batch; the
      micro-batches of gradient accumulation are inside. Gradients are like `trainable`, which may be any part of the
      leaves as long as `rest` holds the others.
    parts: micro-batches of a step.
    on: (change of a Model) -> the objective on the changed model, before any `gradient` slot. The change comes around
      all that the chain has done to the model, and inside its `loss` slots; it may use what a step calculates.
    backward: whether there is a backward pass; what is planned and reported asks it.

    `key` is a PRNG key, always given to `value_and_grad`. `aux` is a dict of arrays: "weight" is what the loss is a
    mean over, scalars become metrics.
    """

    value: Callable[..., tuple[jax.Array, dict[str, Any]]]
    value_and_grad: Callable[..., tuple[tuple[jax.Array, dict[str, Any]], tree.Flat]]
    parts: int
    on: Callable[[Callable[[Model], Model]], Objective]
    backward: bool = True


class Leaves(NamedTuple):
    """The leaves that a step changes.

    trained, moved: {path: leaf}.
    """

    trained: tree.Flat
    moved: tree.Flat


class Moment(NamedTuple):
    """A step, as `move` sees it.

    step: () int32, steps done before this one.
    key: the step's PRNG key, which `gradient` was given too.
    rate: () float32, the learning rate; None where the optimizer has its own.
    decay: the weight decay, a number.
    aux: what `gradient` said.
    frozen: {path: leaf}.
    view: of the chain.
    before: {path: leaf}, the trained leaves as they were before the step: what of them is frozen by now is put back,
      from a direction as from the decay.
    """

    step: jax.Array
    key: jax.Array
    rate: jax.Array | None
    decay: float
    aux: dict[str, Any]
    frozen: tree.Flat
    view: View
    before: tree.Flat


def told(name: str, aux: Mapping[str, Any] | None, key: str) -> Any:
    """aux[key], what a method's `gradient` says to its `update` and `move`.

    Raises:
      InputError: where it was not asked, because a member of the chain behind it calculates gradients of its own.
    """
    if aux is None or key not in aux:
        raise InputError(
            f"{name}: stands in front of what replaces the gradient; put {name} last, or leave one of them out"
        )
    return aux[key]


def unchanged(x, *_):
    """A slot that does nothing."""
    return x


def layer_by_layer(slot: Callable[..., Any]) -> Callable[..., Any]:
    """A `gradient` or `update` slot, marked as one of a step whose layers are updated inside the backward pass, too.

    An `update` so marked does to a layer what it does to the stack; its masks go by path. A `gradient` hands on what
    its objective gives: it reads no gradient of a trained leaf of the layers, for none may be there.
    """
    slot.layer_by_layer = True  # type: ignore[attr-defined]
    return slot


def blind(slot: Callable[..., Any]) -> Callable[..., Any]:
    """An `update` slot, marked as one that does not look into the state of the optimizer that it is given.

    It may scale gradients and directions, hand on some of them, and begin the state anew (`host.chosen`); so the state
    may lie in the host's memory.
    """
    slot.blind = True  # type: ignore[attr-defined]
    return slot


def is_blind(slot: Callable[..., Any]) -> bool:
    """Whether a slot does nothing, or `blind` has marked it."""
    return slot is unchanged or getattr(slot, "blind", False)


def is_layer_by_layer(slot: Callable[..., Any]) -> bool:
    """Whether a slot does nothing, or `layer_by_layer` has marked it."""
    return slot is unchanged or getattr(slot, "layer_by_layer", False)


def _no_conversions(params: tree.Params) -> dict[str, Callable[[jax.Array], Any]]:
    del params
    return {}


class _Slots(NamedTuple):
    """The slots of a `Method`, as they are given."""

    prepare: Callable[[tree.Params, View], tree.Params] = unchanged
    forward: Callable[[Model, View], Model] = unchanged
    roles: Callable[[Roles], Roles] = unchanged
    loss: Callable[[Callable[..., Any], View], Callable[..., Any]] = unchanged
    gradient: Callable[[Objective, View], Objective] = unchanged
    update: Callable[[optax.GradientTransformation, View], optax.GradientTransformation] = unchanged
    move: Callable[[Leaves, Moment], Leaves] = unchanged
    merge: Callable[[tree.Params], tree.Params] = unchanged
    specs: tuple[Spec, ...] = ()
    alone: Roles | None = None
    convert: Callable[[tree.Params], Mapping[str, Callable[[jax.Array], Any]]] = _no_conversions


class Method(_Slots):
    """One way to fine-tune. See the module's docstring for the slots.

    alone: for a modifier: the roles where no other method of a chain gives any; None for all others.
    convert: params -> {path: array -> leaf}: which leaves `prepare` stores otherwise, each of them alone, so that a
      checkpoint is converted as it is read (`jaxpeft.hf.load_pretrained`) and never lies in memory as it was. It is
      given shapes, and refuses what it cannot convert; each function takes the leaf, or one layer (n, m) of it, and the
      leaf is the layers stacked. `prepare` does the same to what comes to it as it was, and leaves the rest.
    """

    __slots__ = ()

    def merge(self, params: Mapping[str, Any]) -> tree.Params:  # type: ignore[override]
        """Parameters of the adapted model, nested or flat -> nested parameters of the base with what was learnt.

        Every leaf is as its module has it, whatever shape adapters read it in.

        Raises:
          InputError: where adapters of another method would be left, or the base's own parameters are missing.
        """
        adapts = lambda name: about(name).level in ("site", "module")
        merged = scopes.merged(self.name, self.merge_own, params, names(), adapts)
        return tree.unflatten(unfolded_all(tree.flatten(merged)))

    @property
    def merge_own(self) -> Callable[[tree.Params], tree.Params]:
        """The `merge` slot as it was given: it leaves what others have added, and is what a method is made of."""
        return super().merge

    def role(self, path: str) -> Role:
        """A leaf's role."""
        return self.roles(self.alone or _frozen)(path)

    def trainable(self, path: str) -> bool:
        """Whether a leaf is differentiated."""
        return self.role(path).name == "trained"

    def changes(self, path: str) -> bool:
        """Whether a leaf is not frozen."""
        return self.role(path) != FROZEN

    @property
    def name(self) -> str:
        """The members' names: "quantize+lora"."""
        return "+".join(spec.name for spec in self.specs) or "method"


def _frozen(path: str) -> Role:
    del path
    return FROZEN


def chain(*methods: Method) -> Method:
    """Applies methods in order; `merge` unwinds them in reverse order.

    Roles are given in order, too: of two methods that claim a path the later one is right. What a modifier trains
    `alone` counts only where all that give roles are modifiers.

    Leaves are converted while they are read only before the first method that prepares something else, which may need
    them as they were (PiSSA): from there on conversions are part of `prepare`.

    Raises:
      InputError: for one method twice, whose leaves would be one set for both, unless its file says that it may be.
    """
    specs = [spec for method in methods for spec in method.specs]
    check_once([spec.name for spec in specs])

    def in_order(slot: str):
        active = [getattr(method, slot) for method in methods if getattr(method, slot) is not unchanged]
        if not active:
            return Method._field_defaults[slot]

        def apply(x, *rest):
            for function in active:
                x = function(x, *rest)
            return x

        for marked, mark in ((is_layer_by_layer, layer_by_layer), (is_blind, blind)):
            apply = mark(apply) if all(map(marked, active)) else apply
        return apply

    def merge(params):
        before = tree.flatten(params)
        for method in reversed(methods):  # each of them reads the kernels as matrices
            params = tree.unflatten(refolded(tree.flatten(method.merge_own(params)), before))
        return params

    def convert(params):
        found: dict[str, Callable[[jax.Array], Any]] = {}
        for method in methods:
            if method.convert is _no_conversions and method.prepare is not unchanged:
                break
            found = {**method.convert(params), **found}
        return found

    claims = [method for method in methods if method.roles is not unchanged and method.alone is None]
    alone = [method.alone for method in methods if method.alone is not None]
    slots = ("prepare", "forward", "roles", "loss", "gradient", "update", "move")
    return Method(
        **{slot: in_order(slot) for slot in slots},
        merge=merge,
        specs=tuple(specs),
        alone=alone[0] if alone and not claims else None,
        convert=convert if any(method.convert is not _no_conversions for method in methods) else _no_conversions,
    )


def check_once(chained: Sequence[str]) -> None:
    """Raises InputError for a name that stands twice in a chain and whose file does not allow it."""
    for name in dict.fromkeys(chained):
        if chained.count(name) > 1 and not _twice(name):
            raise InputError(
                f"{'+'.join(chained)}: {name} stands twice; to give different targets or names is not possible yet"
            )


def _twice(name: str) -> bool:
    return name in names() and about(name).twice


def settled(method: Method) -> Method:
    """The method with what it trains alone as its own claim, so that what is chained to it comes on top."""
    if method.alone is None:
        return method
    alone, roles = method.alone, method.roles
    own = lambda path, others: role if (role := alone(path)) != FROZEN else others(path)
    return method._replace(roles=lambda others: roles(lambda path: own(path, others)), alone=None)


def setup(
    method: Method,
    base: Model,
    params: Mapping[str, Any],
    key: jax.Array,
    batches: Callable[[], Iterable[Batch]] | None = None,
    loss: Callable[..., Any] | None = None,
) -> tuple[Model, tree.Flat, tree.Flat]:
    """Puts a method on a model.

    Args:
      method: what to train and how.
      base: the pretrained model.
      params: its parameters (nested dict); adapter leaves that are already there are kept.
      key: PRNG key for the parameters that the method adds.
      batches: gives some batches of the training data, for a method that starts from them.
      loss: (model, params, batch, key) -> (loss, aux), the step's own, for a method that starts from these batches;
        None: `classification_loss` of batches with labels, `completion_loss` of those with targets.

    Returns:
      (model, trainable, rest): the adapted model; flat dicts. Trainable leaves have their masters' dtype (float32
      unless the method says otherwise; the models cast them to the compute dtype where they are used); the rest, frozen
      leaves and moved ones, keep their dtype.

    Raises:
      InputError: if nothing would train, or a packed kernel would; for adapter leaves that nothing would read, or a
        base that has the method already.
      TypeError: for what is no method, or no model.
    """
    for what, given, kind, source in (
        ("method", method, Method, "jp.lora(8)"),
        ("base", base, Model, "jp.load_pretrained"),
    ):
        if not isinstance(given, kind):
            raise TypeError(f"setup: {what} is {shown(given)}; it should be a {kind.__name__}, as {source} gives one")
    params = base.adopt(dict(params))
    _check_read(method, base, params, key)
    view = View(base, method.specs, method.role, shapes_of(params), batches, loss)
    members = tuple(spec.name for spec in method.specs)
    model = method.forward(base, view)._replace(base=base, methods=base.methods + members)
    params = model.init(key, method.prepare(dict(params), view))
    flat = _in_own_shapes(method, tree.flatten(params))
    again = [name for name in dict.fromkeys(members) if name in base.methods and not _twice(name)]
    scopes.check_new(method.name, flat, again)
    if not any(method.changes(path) for path in flat):
        asked = [which for spec in method.specs if (which := spec.config.get("which", "all")) != "all"]
        beside = f"chain what trains to it, as {_with_what_trains(method)}"
        why = f"none is named by which={asked[0]!r}" if asked else beside
        raise InputError(
            f"{method.name}: no parameter is trainable; {why}; the model has {', '.join(sorted(flat)[:6])}, ..."
        )
    trainable = {
        path: as_master(path, leaf, method.role(path)) for path, leaf in flat.items() if method.trainable(path)
    }
    return model, trainable, {path: leaf for path, leaf in flat.items() if path not in trainable}


def _with_what_trains(method: Method) -> str:
    """The names of a chain that trains nothing, with what its members are tried with: lora+ba_lora."""
    asked = [spec.name for spec in method.specs]
    tried = [about(name).within if name in names() else "" for name in asked]
    words = dict.fromkeys("+".join(within or name for name, within in zip(asked, tried, strict=True)).split("+"))
    return "+".join(words if len(words) > len(asked) else [*words, "lora"])


def _check_read(method: Method, base: Model, params: tree.Params, key: jax.Array) -> None:
    """Raises InputError for leaves that an adapter has left, and neither the base nor the method reads."""
    root = base.base or base
    if root.config is None and root.shapes is None:  # what its own parameters are called is not known
        return
    others = set(names()) - {*base.methods, *(spec.name for spec in method.specs)}
    found = scopes.within(tree.flatten(params), others)
    if found and root.shapes is not None:
        found = sorted(set(found) - set(root.shapes()))
    scopes.check_read(method.name, params, found, lambda rest: setup(method, base, rest, key, lambda: ())[1:])


def _in_own_shapes(method: Method, flat: tree.Flat) -> tree.Flat:
    """The leaves as their modules have them, but for the kernels of sites, which adapters read as matrices.

    Raises:
      InputError: for such a kernel that changes itself.
    """
    beside = {path.rsplit("/", 2)[0] for path in flat if path.count("/") > 1}
    # Of layers that are sampled a method may keep the adapters in its own scope.
    beside |= {site.removeprefix(f"{spec.name}/") for site in beside for spec in method.specs}
    adapted = {f"{site}/{name}" for site in beside for name in ("kernel", "embedding")}
    for path, leaf in flat.items():
        if path in adapted and isinstance(leaf, Folded) and method.changes(path):
            shape = "x".join(map(str, leaf.array.shape))
            raise InputError(f"{method.name}: changes {path}, a kernel of {shape}, itself; leave it out of targets")
    return {path: leaf if path in adapted else unfolded(leaf) for path, leaf in flat.items()}


def view_of(model: Model, method: Method, leaves: Mapping[str, Any], rate: Any = None) -> View:
    """The view of an adapted model's slots; `leaves` are all of its leaves, or their shapes."""
    return View(model.base or model, method.specs, method.role, shapes_of(leaves), rate=rate)


def shapes_of(params: Mapping[str, Any]) -> tree.Flat:
    """{path: leaf of shapes} of nested or flat parameters."""
    shape = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype)
    return {path: jax.tree.map(shape, leaf) for path, leaf in tree.flatten(params).items()}


def as_master(path: str, leaf: Any, role: Role = TRAINED) -> jax.Array:
    """A trained leaf in its master's dtype: in float32 small updates are not rounded away.

    Raises:
      InputError: for a packed kernel.
    """
    if isinstance(matrix(leaf), Absent):
        raise InputError(f"{path} trains, and factors have taken its place; leave one of the two methods out")
    if is_packed(leaf):
        raise InputError(
            f"{path} is packed and trains; give quantize targets that leave it out, or train an adapter beside it"
        )
    floating = role.dtype is not None and jnp.issubdtype(leaf.dtype, jnp.floating)
    return leaf.astype(role.dtype) if floating else leaf


# Methods by name: one file each in jaxpeft/methods, with a public factory of the file's name.


def names() -> list[str]:
    """Every method's name: the files of `jaxpeft.methods`."""
    package = importlib.import_module("jaxpeft.methods")
    return sorted(info.name for info in pkgutil.iter_modules(package.__path__) if not info.name.startswith("_"))


def module(name: str) -> ModuleType:
    """The file of a method.

    Raises:
      InputError: for an unknown name, with what it is here or the nearest ones.
    """
    if name not in names():
        if flags := aliases.flags_of(name):
            raise InputError(f"unknown method {name!r}; here it is {flags} (see `jaxpeft methods`)")
        near = tree.nearest(name.lower(), names())
        raise InputError(f"unknown method {name!r}; nearest: {near} (see `jaxpeft methods`)")
    return importlib.import_module(f"jaxpeft.methods.{name}")


def about(name: str) -> About:
    """What a method's file says of it, checked."""
    return check(name, module(name))


def make(name: str, settings: Mapping[str, Any]) -> Method:
    """The method of a name with arguments of its factory.

    Raises:
      InputError: for an unknown name or argument, or an argument of the wrong type.
    """
    return factory.call(name, getattr(module(name), name), settings)


def from_specs(specs: Iterable[Spec | Sequence[Any]]) -> Method:
    """Makes a method again from what `Method.specs` recorded; [name, config] pairs, as JSON has them, do as well.

    Raises:
      InputError: as `make` does.
    """
    made = [make(name, settings) for name, settings in specs]
    return made[0] if len(made) == 1 else chain(*made)
