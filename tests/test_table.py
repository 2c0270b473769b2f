"""Tables and figures whose rows do not all have the same metrics."""

from __future__ import annotations

import json

from comq_np.table import Figures


def test_rows_with_other_metrics_have_a_table_of_their_own(tmp_path, capsys):
    figures = Figures()
    figures.add("plain", 4, "rtn", error=0.5)
    figures.add("judged", 4, "rtn", error=0.25, agreement=1)
    figures.show(tmp_path / "figures.json")
    assert capsys.readouterr().out.splitlines() == [
        "case   bits  recipe  error",
        "--------------------------",
        "plain     4  rtn       0.5",
        "",
        "case    bits  recipe  error  agreement",
        "--------------------------------------",
        "judged     4  rtn      0.25          1",
    ]
    rows = json.loads((tmp_path / "figures.json").read_text())
    assert [(row["case"], row["metric"], row["value"]) for row in rows] == [
        ("plain", "error", 0.5),
        ("judged", "error", 0.25),
        ("judged", "agreement", 1),
    ]
