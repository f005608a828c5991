"""What does each method save, and what does it learn?

    python -m experiments.compare --count           # CPU hours that the missing figures take
    python -m experiments.compare                   # fills in what is missing (resumable), then draws
    python -m experiments.compare --only memory --models llama3.2-3b --methods "lora;lora_fa"
    python -m experiments.compare --only quality --tasks e2e_nlg
    python -m experiments.compare --draw            # tables and pictures from the data

A row for each method with its own defaults: trained numbers, the adapter's file, the compiled peak of a step of
Llama-3.2-3B and Llama-2-7B (batch 4 x 768, bfloat16 base, on an H200) under each plan, its FLOPs, what it learns in
equally many steps (see quality.py), and in words what it saves. Data in results/compare/memory.json and quality.json,
tables in compare.md, pictures in peaks.png and pareto.png. Several processes may fill the data at once.
"""

from __future__ import annotations

import argparse
import os
import sys

from experiments.compare import contestants, memory, quality, table
from experiments.memory import common

RESULTS = common.RESULTS.parent / "compare"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--draw", action="store_true", help="draw from the committed data; measure nothing")
    parser.add_argument("--count", action="store_true", help="CPU hours that are still missing; measure nothing")
    parser.add_argument("--only", choices=("memory", "quality"), help="of the two, one alone")
    parser.add_argument("--methods", default=";".join(contestants.everybody()), help="recipes, with semicolons")
    parser.add_argument("--models", default=",".join(memory.MODELS), help="geometries, with commas")
    parser.add_argument("--tasks", default=",".join(quality.DATA), help="with commas")
    args = parser.parse_args()
    words, models, tasks = args.methods.split(";"), args.models.split(","), args.tasks.split(",")
    for option, given, known in (
        ("--methods", words, contestants.everybody()),
        ("--models", models, memory.MODELS),
        ("--tasks", tasks, quality.DATA),
    ):
        if unknown := [name for name in given if name not in known]:
            parser.error(f"{option}: {unknown[0]!r} is none of {', '.join(known)}")
    if args.count:
        left = quality.hours(common.load("quality", RESULTS), words, tasks)
        for task, hours in left.items():
            print(f"{task}: {hours:.1f} CPU hours")
        return
    if not args.draw and args.only != "quality":
        memory.collect(common.Figures("memory", memory.measure, RESULTS), words, models)
    if not args.draw and args.only != "memory":
        if not quality.shared().is_dir():
            sys.exit(f"{os.fspath(quality.shared())}: no such folder; JAXPEFT_DATA says where the data is")
        quality.collect(common.Figures("quality", quality.measure, RESULTS), words, tasks)
    table.draw(common.load("memory", RESULTS), common.load("quality", RESULTS), RESULTS)


if __name__ == "__main__":
    main()
