"""Where an optimizer's state has parts by path.

Below a dict with the paths of leaves are the parts by path; those of a stack have an axis of layers. All else is
counters and the like, which every leaf's update reads.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any, NamedTuple

import jax


class Places(NamedTuple):
    """The places of a state.

    shared: what it has in other places; None in these.
    treedef: of all places.
    """

    shared: list[Any]
    treedef: Any

    @classmethod
    def of(cls, state: Any, trained: Collection[str]) -> Places:
        """Those of a state, of leaves with the paths `trained`."""
        known = set(trained)
        by_path = lambda node: isinstance(node, dict) and bool(node) and node.keys() <= known
        nodes, treedef = jax.tree.flatten(state, is_leaf=by_path)
        return cls([None if by_path(node) else node for node in nodes], treedef)

    def parts(self, state: Any, paths: Collection[str]) -> list[dict[str, Any]]:
        """[{path: its part}, ...] of some paths, place by place, of a state of these or more."""
        found = zip(self.shared, self.treedef.flatten_up_to(state), strict=True)
        return [{path: node[path] for path in paths if path in node} for shared, node in found if shared is None]

    def after(self, state: Any) -> Places:
        """With what is shared as it is in another state."""
        found = zip(self.shared, self.treedef.flatten_up_to(state), strict=True)
        return self._replace(shared=[None if shared is None else node for shared, node in found])

    def joined(self, *parts: list[dict[str, Any]]) -> Any:
        """The state whose parts are these."""
        whole = iter([{path: x for node in nodes for path, x in node.items()} for nodes in zip(*parts, strict=True)])
        return self.treedef.unflatten([next(whole) if node is None else node for node in self.shared])
