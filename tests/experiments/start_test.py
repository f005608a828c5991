"""The experiment on how commands start: the table is drawn from the data, and the data says what is claimed of it."""

import json
import re
import statistics

from experiments import start

ROWS = json.loads((start.RESULTS / "start.json").read_text())
MEDIAN = {(row["command"], row["cache"]): statistics.median(row["cpu_seconds"]) for row in ROWS}


def test_table_is_drawn_from_the_data():
    assert start.draw(ROWS) == (start.RESULTS / "start.md").read_text()
    assert {row["command"] for row in ROWS} == set(start.COMMANDS)
    assert all(len(row["cpu_seconds"]) == start.TIMES for row in ROWS)


def test_with_its_programs_in_the_cache_a_command_takes_about_half():
    for command in start.COMMANDS:
        assert MEDIAN[command, "again"] < 0.6 * MEDIAN[command, "first"]


def test_docstring_says_what_the_data_says():
    said = re.findall(r"(?:takes|and) (\d+(?:\.\d)?)\b", " ".join(start.__doc__.split()).partition("Of the")[0])
    figures = [MEDIAN[command, cache] for command in ("train", "generate") for cache in ("again", "first")]
    assert said == [f"{figures[0]:.0f}", f"{figures[1]:.0f}", f"{figures[2]:.1f}", f"{figures[3]:.1f}"]
