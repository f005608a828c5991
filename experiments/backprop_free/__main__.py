"""What do steps need in which not all layers have gradients, and those that have none at all?

    python -m experiments.backprop_free           # compiles what the data lacks, two minutes each; then draws
    python -m experiments.backprop_free --draw    # tables from the data

Each topic is a module of this folder with `NAME`, the rows that it asks for (`collect`) and its page (`document`). Data
in results/backprop_free/NAME.json, pages in NAME.md.
"""

from __future__ import annotations

from experiments.backprop_free import forward_passes, full_in_24_gb, sampled_layers
from experiments.memory import common

RESULTS = common.RESULTS.parent / "backprop_free"
TOPICS = (sampled_layers, forward_passes, full_in_24_gb)


if __name__ == "__main__":
    args = common.arguments(__doc__)
    for topic in TOPICS:
        figures = common.Figures(topic.NAME, None if args.draw else topic.measure, RESULTS)
        common.write(f"{topic.NAME}.md", topic.document(topic.collect(figures)), RESULTS)
