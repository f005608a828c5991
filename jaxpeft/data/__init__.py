"""Tokenized, padded or bucketed or packed, checkpointable batches from files of rows.

sources.py, records.py (records) -> formats.py, chat.py (text) -> encode.py (ids) -> examples.py -> batches.py
                     -> classify.py (rows with a label)                              -> batches.py

Between encode.py and examples.py, encodings.py holds the tokens of all rows, and cache.py keeps them on disk.
Names are imported at their first use: batches need grain, which takes seconds to import, and a prompt needs none.
"""

from typing import TYPE_CHECKING

from jaxpeft.on_demand import imports

if TYPE_CHECKING:
    from jaxpeft.data.batches import Batch as Batch
    from jaxpeft.data.batches import Batches as Batches
    from jaxpeft.data.batches import Lines as Lines
    from jaxpeft.data.batches import eval_batches as eval_batches
    from jaxpeft.data.batches import make_batches as make_batches
    from jaxpeft.data.batches import power_of_two_buckets as power_of_two_buckets
    from jaxpeft.data.classify import Labels as Labels
    from jaxpeft.data.classify import Row as Row
    from jaxpeft.data.classify import collate_rows as collate_rows
    from jaxpeft.data.classify import load_rows as load_rows
    from jaxpeft.data.encode import encode_prompt as encode_prompt
    from jaxpeft.data.examples import Example as Example
    from jaxpeft.data.examples import Examples as Examples
    from jaxpeft.data.examples import Report as Report
    from jaxpeft.data.examples import load_examples as load_examples
    from jaxpeft.data.formats import instruction_prompt as instruction_prompt
    from jaxpeft.data.rounds import Rounds as Rounds
    from jaxpeft.data.shots import in_context as in_context
    from jaxpeft.data.shots import shown as shown

_MODULES = {
    "batches": ("Batch", "Batches", "Lines", "eval_batches", "make_batches", "power_of_two_buckets"),
    "classify": ("Labels", "Row", "collate_rows", "load_rows"),
    "encode": ("encode_prompt",),
    "examples": ("Example", "Examples", "Report", "load_examples"),
    "formats": ("instruction_prompt",),
    "rounds": ("Rounds",),
    "shots": ("in_context", "shown"),
}
_MODULE_OF = {name: module for module, names in _MODULES.items() for name in names}
__all__ = [*_MODULE_OF]

__getattr__, __dir__ = imports(__name__, _MODULE_OF)
