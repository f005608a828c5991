"""Embedding tables without the rows that the data never use.

    ids    = used(batches)                        ids of tokens that occur, in order
    pruned = prune_embeddings(model, params, ids)
    E'     = E[ids],   x = E'[place of each token in ids]       the device holds n x d in place of V x d
    E[ids] <- E'                                  pruned.whole(leaves), to save, merge or export

    jaxpeft train --prune-embeddings              the same by a word; what it leaves is whole

A row of the input's table that no token names has gradient 0: frozen, or trained by Adam, SGD, or what else moves no
leaf whose gradients are all 0, it stays as it was, so losses and leaves are those of the whole table, bit for bit. What
is not so: weight decay moves such rows, and here it does not; a norm over all gradients (`clip`) adds fewer zeros, and
so may differ in its last bit; noise that is drawn by a leaf's shape (MeZO) is another draw; statistics of several rows
(Adafactor's, the blocks of moments in 8 bits) are others. A run with the word refuses decay, such noise and such
statistics where the table trains.

The head is whole, as the softmax reads all of it, so a model may say any token. One that it says, and that has no row
here, cannot be read: its stream is NaN, never another token's. To generate, take the whole table, which the model takes
too: `pruned.whole`. A run answers its samples so.

Llama-3.1-8B's table is 128256 x 4096: 1.0 GiB in bfloat16, and 7.8 GiB with float32 master, gradient and two moments
where it trains; 20000 ids keep 0.15 and 1.2 GiB of it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxpeft import shares, tree
from jaxpeft.errors import InputError, shown
from jaxpeft.method import Method
from jaxpeft.model import Batch, Model
from jaxpeft.models.layers import lookup, with_inner

TABLE = "embed_tokens/embedding"
_OF_SEVERAL = ("adafactor", "adam8bit")  # whose state of a row depends on other rows


class Rows:
    """A table (V, d) as its modules see it while they are traced, of which some rows are there.

    rows: (n, d), or another type with a `lookup`.  places: (V,) where each token's row is; n of one that has none.
    """

    def __init__(self, rows: Any, places: np.ndarray):
        self.rows = rows
        self.places = places
        self.shape = (len(places), rows.shape[1])
        self.dtype = getattr(rows, "dtype", None)


@lookup.register
def _(table: Rows, ids: jax.Array) -> jax.Array:
    return lookup(table.rows, jnp.take(table.places, ids, axis=0, fill_value=table.rows.shape[0]))


class Pruned(NamedTuple):
    """A model whose table has some rows.

    model, params: for `setup`, as a pretrained model's. The model takes the whole table, too.
    ids: (n,) int32, the token of each row, in order.
    table: (V, d) the whole table as it was, in the host's memory.
    """

    model: Model
    params: tree.Params
    ids: np.ndarray
    table: np.ndarray

    def cut(self, leaves: Mapping[str, Any]) -> tree.Flat:
        """Leaves of the whole model, by path, with the rows that stay of the table if it is one of them.

        A method that starts from the table's values is set up on the whole one, and its leaves are cut then.
        """
        flat = dict(leaves)
        if TABLE in flat:
            flat[TABLE] = jnp.asarray(shares.on_host(flat[TABLE])[self.ids])
        return flat

    def whole(self, leaves: Mapping[str, Any]) -> tree.Params:
        """Parameters (nested or flat) with all rows of the table, those that were away as they were; nested.

        Raises:
          InputError: for a table of other rows.
        """
        flat = tree.flatten(leaves)
        return tree.unflatten({**flat, TABLE: filled(self.table, self.ids, flat[TABLE])})


def filled(table: Any, ids: np.ndarray, rows: Any) -> np.ndarray:
    """A table (V, d) with rows (n, d) in the places of `ids`, in the rows' dtype.

    Raises:
      InputError: for rows of another shape.
    """
    own = shares.on_host(rows)
    if own.shape != (len(ids), table.shape[1]):
        raise InputError(f"{TABLE}: has shape {own.shape}; the pruned one has {(len(ids), table.shape[1])}")
    whole = shares.on_host(table).astype(own.dtype)
    whole[ids] = own
    return whole


def used(batches: Iterable[Batch]) -> np.ndarray:
    """The ids of tokens that occur in batches, padding too, (n,) int32 in order."""
    found: set[int] = set()
    for batch in batches:
        found.update(np.unique(np.asarray(batch["tokens"])).tolist())
    return np.array(sorted(found), np.int32)


def prune_embeddings(model: Model, params: tree.Params, ids: Sequence[int] | np.ndarray) -> Pruned:
    """Leaves rows of the input's embedding table in the host's memory.

    Args:
      model: a pretrained model, before any method is put on it.
      params: its parameters, nested.
      ids: of the tokens whose rows stay: all that training and evaluation read (`used`).

    Raises:
      InputError: for a model without such a table, whose head reads it too (tied embeddings), or that is adapted; for
        ids that are none of its tokens, or no ids.
    """
    flat = tree.flatten(params)
    check(model, flat)
    table = flat[TABLE]
    given = np.asarray(ids)
    if given.ndim != 1 or not given.size or not np.issubdtype(given.dtype, np.integer):
        raise InputError(f"prune_embeddings: ids of {given.dtype}, shape {given.shape}; give a list of whole numbers")
    if len(outside := given[(given < 0) | (given >= len(table))]):
        raise InputError(f"prune_embeddings: id {outside[0]}: the table has rows 0 to {len(table) - 1}")
    kept = np.unique(given).astype(np.int32)
    whole = shares.on_host(table)
    rows = jnp.asarray(whole[kept])
    return Pruned(with_rows(model, kept, len(whole)), tree.unflatten({**flat, TABLE: rows}), kept, np.array(whole))


def check(model: Model, flat: tree.Flat) -> None:
    """Raises InputError for a model of whose table no row can leave: see `prune_embeddings`; shapes will do."""
    if model.base is not None:
        raise InputError("prune_embeddings: the model is adapted already; prune before setup puts a method on it")
    if TABLE not in flat:
        raise InputError(f"prune_embeddings: the model has no {TABLE}")
    if not isinstance(flat[TABLE], jax.Array | np.ndarray | jax.ShapeDtypeStruct):
        raise InputError(f"prune_embeddings: {TABLE} is packed; prune before it is packed")
    if _head_reads(model, flat):
        raise InputError(
            f"prune_embeddings: the head reads all rows of {TABLE} (tied embeddings), so none can leave the device"
        )


def check_still(method: Method, direction: str, weight_decay: float | None = None) -> None:
    """Raises InputError where a step may move, or tell by, rows of the table that no token names.

    Args:
      method: of the run.
      direction: what makes steps of gradients (`jaxpeft.train.optimizer`).
      weight_decay: of the run.
    """
    role = method.role(TABLE)
    if role.name == "moved":
        raise InputError(
            f"prune_embeddings: {method.name} moves {TABLE} itself, rows that the data never use with it; choose what "
            "it changes otherwise, or keep the whole table"
        )
    if role.name == "trained" and weight_decay:
        raise InputError(
            f"prune_embeddings: weight decay {weight_decay:g} shrinks rows of {TABLE} that are taken away; leave one "
            "out"
        )
    if role.name == "trained" and direction in _OF_SEVERAL:
        raise InputError(
            f"prune_embeddings: {direction} tells by several rows of {TABLE} how far each goes, and some are taken "
            "away; take adam, sm3, lion or sgd"
        )


def with_rows(model: Model, ids: np.ndarray, total: int) -> Model:
    """The model that takes a table of the rows `ids`, ascending, of `total`; and the whole table as well."""
    places = np.full(total, len(ids), np.int32)
    places[ids] = np.arange(len(ids), dtype=np.int32)
    embed = model.stack.embed

    def with_places(rows: Any) -> Any:
        return rows if isinstance(rows, Rows) or rows.shape[0] == total else Rows(rows, places)

    def embed_kept(params, batch, key=None):
        module, name = TABLE.split("/")
        table = with_inner(params[module][name], with_places)
        return embed({**params, module: {**params[module], name: table}}, batch, key)

    return model._replace(stack=model.stack._replace(embed=embed_kept))


def spelt(ids: np.ndarray) -> str:
    """Ascending ids as text: "0, 3-9, 17"."""
    from jaxpeft.train.progress import ranges

    return ranges([ids.tolist()])


def read(text: str) -> np.ndarray:
    """The ids of `spelt`.

    Raises:
      InputError: for other text.
    """
    try:
        parts = [tuple(map(int, part.split("-"))) for part in text.split(", ")]
    except ValueError:
        raise InputError(f"rows {shown(text)}: should be numbers, as 0, 3-9, 17") from None
    return np.concatenate([np.arange(part[0], part[-1] + 1, dtype=np.int32) for part in parts])


def _head_reads(model: Model, flat: tree.Flat) -> bool:
    """Whether the head calculates with the input's table."""
    shape = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype)
    others = {path: jax.tree.map(shape, leaf) for path, leaf in flat.items() if path != TABLE}
    head = lambda table, others, x: model.stack.head(tree.unflatten({**others, TABLE: table}), x)
    table = flat[TABLE]
    stream = jax.ShapeDtypeStruct((1, table.shape[1]), getattr(model.config, "dtype", table.dtype))
    jaxpr = jax.make_jaxpr(head)(shape(table), others, stream).jaxpr
    return any(x is jaxpr.invars[0] for equation in jaxpr.eqns for x in equation.invars)
