"""Embedding tables without the rows that the data never use.

    ids    = used(batches)                        ids of tokens that occur, in order
    pruned = prune_embeddings(model, params, ids)
    E'     = E[ids],   x = E'[place of each token in ids]       the device holds n x d in place of V x d
    E[ids] <- E'                                  pruned.whole(leaves), to save, merge or export

A row of the input's table that no token names has gradient 0: frozen, or trained by Adam, SGD, or what else moves no
leaf whose gradients are all 0, it stays as it was, so losses and leaves are those of the whole table, bit for bit. What
is not so: weight decay moves such rows, and here it does not; a norm over all gradients (`clip`) adds fewer zeros, and
so may differ in its last bit; noise that is drawn by a leaf's shape (MeZO) is another draw.

The head is whole, as the softmax reads all of it, so a model may say any token. One that it says, and that has no row
here, cannot be read: its stream is NaN, never another token's. To generate, take the whole model: `pruned.whole`.

Llama-3.1-8B's table is 128256 x 4096: 1.0 GiB in bfloat16, and 7.8 GiB with float32 master, gradient and two moments
where it trains; 20000 ids keep 0.15 and 1.2 GiB of it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxpeft import tree
from jaxpeft.errors import InputError
from jaxpeft.model import Batch, Model
from jaxpeft.models.layers import lookup

TABLE = "embed_tokens/embedding"


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

    model, params: for `setup`, as a pretrained model's.
    ids: (n,) int32, the token of each row, in order.
    table: (V, d) the whole table as it was, in the host's memory.
    """

    model: Model
    params: tree.Params
    ids: np.ndarray
    table: np.ndarray

    def whole(self, leaves: Mapping[str, Any]) -> tree.Params:
        """Parameters (nested or flat) with all rows of the table, those that were away as they were; nested.

        Raises:
          InputError: for a table of other rows.
        """
        flat = tree.flatten(leaves)
        rows = np.asarray(flat[TABLE])
        if rows.shape != (len(self.ids), self.table.shape[1]):
            raise InputError(
                f"{TABLE}: has shape {rows.shape}; the pruned one has {(len(self.ids), self.table.shape[1])}"
            )
        table = self.table.astype(rows.dtype)
        table[self.ids] = rows
        return tree.unflatten({**flat, TABLE: table})


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
    if model.base is not None:
        raise InputError("prune_embeddings: the model is adapted already; prune before setup puts a method on it")
    flat = tree.flatten(params)
    if TABLE not in flat:
        raise InputError(f"prune_embeddings: the model has no {TABLE}")
    table = flat[TABLE]
    if not isinstance(table, jax.Array | np.ndarray):
        raise InputError(f"prune_embeddings: {TABLE} is packed; prune before it is packed")
    if _head_reads(model, flat):
        raise InputError(
            f"prune_embeddings: the head reads all rows of {TABLE} (tied embeddings), so none can leave the device"
        )
    given = np.asarray(ids)
    if given.ndim != 1 or not given.size or not np.issubdtype(given.dtype, np.integer):
        raise InputError(f"prune_embeddings: ids of {given.dtype}, shape {given.shape}; give a list of whole numbers")
    if len(outside := given[(given < 0) | (given >= len(table))]):
        raise InputError(f"prune_embeddings: id {outside[0]}: the table has rows 0 to {len(table) - 1}")
    kept = np.unique(given).astype(np.int32)
    places = np.full(len(table), len(kept), np.int32)
    places[kept] = np.arange(len(kept), dtype=np.int32)
    embed = model.stack.embed

    def embed_kept(params, batch, key=None):
        module, name = TABLE.split("/")
        rows = Rows(params[module][name], places)
        return embed({**params, module: {**params[module], name: rows}}, batch, key)

    pruned = model._replace(stack=model.stack._replace(embed=embed_kept))
    return Pruned(pruned, tree.unflatten({**flat, TABLE: table[kept]}), kept, np.array(table))


def _head_reads(model: Model, flat: tree.Flat) -> bool:
    """Whether the head calculates with the input's table."""
    shape = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype)
    others = {path: jax.tree.map(shape, leaf) for path, leaf in flat.items() if path != TABLE}
    head = lambda table, others, x: model.stack.head(tree.unflatten({**others, TABLE: table}), x)
    table = flat[TABLE]
    stream = jax.ShapeDtypeStruct((1, table.shape[1]), getattr(model.config, "dtype", table.dtype))
    jaxpr = jax.make_jaxpr(head)(shape(table), others, stream).jaxpr
    return any(x is jaxpr.invars[0] for equation in jaxpr.eqns for x in equation.invars)
