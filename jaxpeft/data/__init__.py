"""Tokenized, padded or bucketed or packed, checkpointable batches from JSONL files.

jsonl.py (lines) -> formats.py, chat.py (text) -> encode.py (ids) -> examples.py -> batches.py
                 -> classify.py (rows with a label)                              -> batches.py
"""

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
from jaxpeft.data.examples import Report as Report
from jaxpeft.data.examples import load_examples as load_examples
from jaxpeft.data.formats import instruction_prompt as instruction_prompt
