"""The experiment on long data: the table is drawn from the data, and the data says what is claimed of it."""

import json
import re

from experiments import long_data

ROWS = json.loads((long_data.RESULTS / "long_data.json").read_text())


def test_document_is_drawn_from_the_data():
    assert long_data.document(ROWS) == (long_data.RESULTS / "long_data.md").read_text()


def test_the_second_reading_gives_the_same_batches_in_a_twentieth_of_the_time():
    for kind in long_data.ROWS:
        own = {row["reading"]: row for row in ROWS if row["kind"] == kind}
        assert tuple(own) == long_data.READINGS
        assert len({row["identity"] for row in own.values()}) == 1
        assert own["second"]["cpu_seconds"] < own["first"]["cpu_seconds"] / 20
        assert max(row["peak_growth"] for row in own.values()) < 200 * 2**20


def test_docstring_says_what_the_data_says():
    text, by = " ".join(long_data.__doc__.split()), {(row["kind"], row["reading"]): row for row in ROWS}
    said = re.search(r"took ([\d.]+) s, ([\d.]+) of CPU, where the first reading took (\d+) s and (\d+) of CPU", text)
    first, second = by["texts", "first"], by["texts", "second"]
    figures = [second["seconds"], second["cpu_seconds"], first["seconds"], first["cpu_seconds"]]
    assert list(said.groups()) == [f"{figures[0]:.1f}", f"{figures[1]:.1f}", f"{figures[2]:.0f}", f"{figures[3]:.0f}"]
