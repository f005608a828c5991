"""GaLore: full fine-tuning whose gradient of each kernel exists projected onto a few directions only.

    n <= m:  dR = P^T dW (r, m)    W <- W + s P R        P (n, r) with orthonormal columns, of the kernel's shorter side
    n > m:   dR = dW P   (n, r)    W <- W + s R P^T      P (m, r)

R is a trained leaf that is zero: what a step makes of it goes to W, and it is zero again. So Adam's moments are R's
size. At a site y = x W, and the backward pass computes dR from x P and dy, or x and dy P: dW is never made. Kernels W
(L, n, m) are moved and keep their dtype, P too (`<site>/galore/p` float32); norms and biases train as in full
fine-tuning; embeddings and head only with `which="all"`. Every `every` steps P is renewed:

    sketch    dS = dW Omega (n, k), Omega Gaussian (m, k), k = r + 8, from the same backward pass: the randomised range
              finder (Halko et al. 2011, arXiv:0909.4061). The r leading left singular vectors of dS are P from the
              next step on. (n > m: of dW^T.) Linear in dW, so it adds up over groups of rows and micro-batches
    svd       the r leading singular vectors of dW are P in this step already, as published. It holds all dW

Both are branches of the step: the sketch's products, or dW, cost no time in all other steps (but their memory is set
aside in each).

Kept for the backward pass: x P (r per token) where n <= m, else x; x at every site in the branch of a sketch.

Paper: Zhao et al. 2024, "GaLore", arXiv:2403.03507. State 2 r max(n, m) numbers per kernel. Deviations: the sketch, as
above, and the first step's P is random with it; W's rounding in bf16 is stochastic, as small changes would be lost on
average otherwise (`rounding="nearest"` is the published code's); the optimizer clips by the norm of dR; Adam's eps is
that of all other leaves. As in the published code, moments stay when P changes.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from jaxpeft import projections, sites, tree
from jaxpeft.about import About, Promises
from jaxpeft.errors import InputError
from jaxpeft.method import FROZEN, MOVED, TRAINED, Leaves, Method, Moment, Objective, Spec, View, layer_by_layer, told
from jaxpeft.methods import lora as _lora
from jaxpeft.methods.full import full, of
from jaxpeft.model import Context, Model
from jaxpeft.quant import is_packed
from jaxpeft.train.optimizer import decays

STEPS = "galore/steps"
PROJECTIONS = ("sketch", "svd")
ROUNDINGS = ("stochastic", "nearest")


class GaLore(nn.Module):
    """The product, and the gradient of R. Parameters: p (min(n, m), r) float32; r, zeros float32.

    s (min(n, m), k) zeros and seed () uint32 of Omega are there in the steps that sketch.
    """

    stacked = True  # only products read the kernel

    rank: int

    @nn.compact
    def __call__(self, inner: Callable, x: jax.Array, site: sites.Site, ctx: Context) -> jax.Array:
        n, m = site.kernel.shape
        p = self.param("p", nn.initializers.orthogonal(), (min(n, m), self.rank))
        r = self.param("r", nn.initializers.zeros, (self.rank, m) if n <= m else (n, self.rank))
        y, fixed, p = inner(x), jax.lax.stop_gradient(x), p.astype(x.dtype)
        if n <= m:
            y = _left(y, r, checkpoint_name(fixed @ p, "galore_low"))
        else:
            y = _right(y, r, fixed, p)
        if not self.has_variable("params", "s"):
            return y
        s, seed = self.get_variable("params", "s"), self.get_variable("params", "seed")
        omega = jax.random.normal(jax.random.key(seed), (max(n, m), s.shape[1]), x.dtype)
        return _right(y, s, fixed, omega) if n <= m else _right_transposed(y, s, fixed @ omega)


# y, and of a leaf that is zero the gradient that it would have as a factor of the kernel's change.


def _tap(gradient: Callable[..., jax.Array]) -> Callable[..., jax.Array]:
    """(y, leaf, *parts) -> y, with d leaf = gradient(dy (t, m), *parts (t, ...)) in float32."""

    @jax.custom_vjp
    def tap(y, leaf, *parts):
        del leaf, parts
        return y

    def forward(y, leaf, *parts):
        return y, (jnp.zeros((0,), leaf.dtype), parts)

    def backward(saved, dy):
        like, parts = saved
        d_leaf = gradient(dy.reshape(-1, dy.shape[-1]), *(part.reshape(-1, part.shape[-1]) for part in parts))
        return dy, d_leaf.astype(like.dtype), *map(jnp.zeros_like, parts)

    tap.defvjp(forward, backward)
    return tap


def _outer(a: jax.Array, b: jax.Array) -> jax.Array:
    """a^T b, float32."""
    return jax.lax.dot_general(a, b, (((0,), (0,)), ((), ())), preferred_element_type=jnp.float32)


_left = _tap(lambda dy, low: _outer(low, dy))  # P^T dW
_right = _tap(lambda dy, x, p: _outer(x, dy @ p))  # dW P
_right_transposed = _tap(lambda dy, low: _outer(dy, low))  # dW^T Omega


def saved_bytes(inputs: int, outputs: int, itemsize: int, rank: int, **_) -> int:
    """Bytes per token kept at one kernel beyond what a frozen backbone keeps: x, which a sketch reads, and x P."""
    del outputs
    return (inputs + rank) * itemsize


def state_numbers(view: View, rank: int, **_) -> int:
    """Numbers of Adam's state: 2 r max(n, m) for each projected kernel, two for each of what trains beside them."""
    sites_ = [path.removesuffix("/galore/p") for path in view.moved if path.endswith("/galore/p")]
    kernels = [view.shapes[f"{site}/kernel"].shape for site in sites_]
    projected = sum((shape[0] if len(shape) == 3 else 1) * rank * max(shape[-2:]) for shape in kernels)
    others = {path: leaf for path, leaf in view.trained.items() if not path.endswith("/galore/r")}
    return 2 * (projected + tree.size(others))


def galore(
    rank: int = 128,
    every: int = 200,
    scale: float = 0.25,
    projection: str = "sketch",
    targets: _lora.Targets = "all-linear",
    rounding: str = "stochastic",
    which: str = "layers",
) -> Method:
    """GaLore on the kernels that `targets` chooses, of those that the chain trains, or of the model's.

    Args:
      rank: r, at most the smaller side of each kernel.
      every: steps from one renewal of the projections to the next; the first step is one.
      scale: s.
      projection: "sketch", or "svd", which needs the memory of full gradients.
      targets: "all-linear", "attention", "mlp", a regular expression, or a list of names (see `sites.find`).
      rounding: of W in bf16: "stochastic", or "nearest".
      which: alone: what trains, as in `full`: "layers"; "all" adds embeddings and head, whose masters and moments are
        then most of the state.

    Returns:
      The method; it trains `<site>/galore/r` and, of what `which` names, everything that is no chosen kernel.

    Raises:
      InputError: for a rank below 1 or above a kernel's smaller side, another argument outside its range, targets that
        match nothing, quantized kernels, or a chain in which none of these kernels trains.
    """
    config = dict(locals())
    return projected(Spec("galore", config), **config)


def projected(
    spec: Spec, rank: int, every: int, scale: float, projection: str, targets: _lora.Targets, rounding: str, which: str
) -> Method:
    """`galore`'s method for a spec of another name; the same arguments."""
    own_name = spec.name
    _lora.check_rank(own_name, rank)
    if every < 1:
        raise InputError(f"{own_name}: every {every} must be at least 1")
    if not 0 < scale < float("inf"):
        raise InputError(f"{own_name}: scale {scale} must be a finite number above 0")
    for name, value, known in (("projection", projection, PROJECTIONS), ("rounding", rounding, ROUNDINGS)):
        if value not in known:
            raise InputError(f"{own_name}: {name} {value!r} is not one of {', '.join(known)}")

    weights = full(which)

    def roles(others):
        own = {"r": TRAINED, "p": MOVED}

        def role(path):
            if path.endswith("/galore/p") and others(path) == MOVED:
                raise InputError(
                    f"{own_name}: another member of the chain projects kernels, or moves them itself; leave one out"
                )
            if "/galore/" in path:
                return own[path.rsplit("/", 1)[1]]
            if path == STEPS:
                return MOVED
            kernel = path.endswith("/kernel") and others(path).name == "trained"
            return MOVED if kernel and sites.chooses(targets, path.removesuffix("/kernel")) else others(path)

        return role

    def forward(model: Model, view: View) -> Model:
        def choose(params):
            flat = tree.flatten(params)
            found = [site for site in sites.find(params, targets, own_name) if view.role(f"{site}/kernel") == MOVED]
            if not found:
                why = of(which) if len(view.specs) == 1 else ""  # in a chain it has no say
                raise InputError(
                    f"{own_name}: none of the kernels that targets {targets!r} names trains in {_names(view)}{why}; "
                    "leaves of adapters are thinner than the rank, and are not projected"
                )
            for site in found:
                if is_packed(flat[f"{site}/kernel"]):
                    raise InputError(f"{own_name}: {site} is quantized, and cannot take up a change in each step")
                _lora.check_kernel(own_name, site, rank, flat[f"{site}/kernel"])
                if (name := view.role(f"{site}/galore/r").name) != "trained":
                    raise InputError(
                        f"{_names(view)}: {own_name}'s {site}/galore/r is differentiated whole, and would be {name}"
                    )
            return found

        own = sites.attach(model, "galore", lambda site: GaLore(rank), choose)

        def init(key, params):
            params = own.init(key, params)
            return {"galore": {"steps": jnp.zeros((), jnp.int32)}, **params}

        return own._replace(init=init)

    def gradient(objective: Objective, view: View) -> Objective:
        renew = projections.sketched if projection == "sketch" else projections.decomposed

        def value_and_grad(trainable, rest, batch, key, opt_state):
            bases = {path: leaf for path, leaf in rest.items() if path.endswith("/galore/p")}

            def go_on():
                return (*objective.value_and_grad(trainable, rest, batch, key, opt_state), bases)

            def start_anew():
                return renew(objective, rank, trainable, rest, batch, key, opt_state)

            due = rest[STEPS] % every == 0
            (value, aux), grads, bases = start_anew() if every == 1 else jax.lax.cond(due, start_anew, go_on)
            return (value, {**aux, **bases}), grads

        return objective._replace(value_and_grad=value_and_grad)

    def move(leaves: Leaves, moment: Moment) -> Leaves:
        trained, moved = dict(leaves.trained), dict(leaves.moved)
        for path in [path for path in moved if path.endswith("/galore/p")]:
            site = path.removesuffix("/galore/p")
            r, kernel = f"{site}/galore/r", f"{site}/kernel"
            fresh = told(own_name, moment.aux, path)
            key = jax.random.fold_in(moment.key, zlib.crc32(site.encode())) if rounding == "stochastic" else None
            rate = 0.0 if moment.rate is None else moment.rate
            keeps = 1 - moment.decay * rate if moment.decay and decays(kernel, moved[kernel]) else 1.0
            basis = fresh if projection == "svd" else moved[path]
            moved[kernel] = projections.taken_up(moved[kernel], basis, trained[r], scale, keeps, key)
            moved[path], trained[r] = fresh, jnp.zeros_like(trained[r])
        moved[STEPS] = moved[STEPS] + 1
        return Leaves(trained, moved)

    return Method(
        prepare=weights.prepare,
        forward=forward,
        roles=roles,
        gradient=layer_by_layer(gradient) if projection == "sketch" else gradient,
        move=move,
        merge=lambda params: weights.merge_own(merge(params)),
        specs=(spec,),
        alone=lambda path: TRAINED if weights.trainable(path) else FROZEN,
    )


def merge(params: Mapping[str, Any]) -> tree.Params:
    """The kernels have taken up every change; what is beside them goes."""
    flat = tree.flatten(params)
    return tree.unflatten({path: leaf for path, leaf in flat.items() if "/galore/" not in path and path != STEPS})


def _names(view: View) -> str:
    return "+".join(spec.name for spec in view.specs)


ABOUT = About(
    summary="full fine-tuning with gradients and moments in a few directions of each kernel",
    level="step",
    trains="what it names: by default the layers, their kernels in projected form",
    saves="gradients, float32 masters and all but 2 r max(n,m) numbers of optimizer state per kernel; no activations",
    chain="alone",
    reference="Zhao et al. 2024, arXiv:2403.03507",
    example={"rank": 4, "every": 3},
    promises=Promises(
        site_bytes=saved_bytes,
        state=state_numbers,
        returns=lambda leaves: [path for path in leaves if path.endswith("/galore/r")],
    ),
    stored="base",
)
