"""docs/scale.md: its tables are those of the last measurement."""

import json
from pathlib import Path

BENCHMARKS = Path(__file__).parents[1] / "examples" / "benchmarks"


def test_the_tables_are_drawn_from_the_results(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import scale

    text = scale.PAGE.read_text()
    drawn = scale.tables(json.loads(scale.RESULTS.read_text()))
    assert len(drawn) > 5
    for name, table in drawn.items():
        assert f"{scale.MARK.format(name)}\n\n{table}\n\n{scale.END}" in text
