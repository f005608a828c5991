"""What do steps need in which not all layers have gradients, and those that have none at all, and what do they learn?

    python -m experiments.backprop_free           # measures what the data lacks, up to two minutes each; then draws
    python -m experiments.backprop_free --draw    # tables and the picture from the data

Each topic is a module of this folder with `NAME`, the rows that it asks for (`collect`) and its page (`document`). Data
in results/backprop_free/NAME.json, pages in NAME.md. The last, `one_table`, is drawn as far as it is measured, from the
runs of `python -m experiments.compare --only quality --tasks e2e_nlg` too; its picture is pareto.png. JAXPEFT_DATA
says where its data and model are.
"""

from __future__ import annotations

from experiments.backprop_free import forward_passes, full_in_24_gb, one_table, sampled_layers
from experiments.memory import common

RESULTS = common.RESULTS.parent / "backprop_free"
TOPICS = (sampled_layers, forward_passes, full_in_24_gb)


if __name__ == "__main__":
    args = common.arguments(__doc__)
    for topic in (*TOPICS, one_table):
        figures = common.Figures(topic.NAME, None if args.draw else topic.measure, RESULTS)
        rows = topic.collect(figures)
        common.write(f"{topic.NAME}.md", topic.document(rows), RESULTS)
    one_table.draw(rows, RESULTS / "pareto.png")
