"""Findings in print: as wide as the terminal, nothing lost, and the same numbers as HTML."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
import pytest

from surgery import Freeze, inspect_model
from surgery.analysis import ablation_study, check_gradients, compatibility, cumulative_ablation, metrics, verify_effect
from surgery.analysis.tables import as_html, as_text
from surgery.demo import load_model
from surgery.demo.data import repeated_sequences
from surgery.terminal import printed, table_of

CUTS = [Freeze("qk", layers=[1], heads=[3]), Freeze("ov", layers=[0], to="mean", backward="ste")]


@pytest.mark.parametrize("columns", [80, 120])
def test_tables_are_as_wide_as_the_terminal(columns: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    model, ids = load_model(), repeated_sequences(2, 6, 64, 0)
    scored = metrics.loss(positions=range(6, 12))
    order: list[tuple[str | int, int]] = [(1, head) for head in range(4)] + [(0, head) for head in range(4)]
    gradients = check_gradients(model, CUTS, ids)
    found: list[Any] = [
        inspect_model(model),
        verify_effect(model, CUTS, ids),
        gradients,
        ablation_study(model, ids, metrics=scored, progress=False),
        cumulative_ablation(model, ids, order, metrics=scored, progress=False),
    ]
    for one in found:
        assert max(map(len, str(one).splitlines())) <= columns, one
        assert "<td>" in one._repr_html_()
    weight = gradients.weights.iloc[0]
    assert f"{weight.norm:.3g}" in str(gradients) and "self.0   W_Q     0" in str(gradients)  # whole at any width
    table, *reasons = str(compatibility(model)).split("\nself.0 to self.1: ")  # reasons are sentences, and not broken
    assert max(map(len, table.splitlines())) <= columns and len(reasons) == 2
    assert "1.0 + 7 more" in str(found[4]) and "self.1.0" not in str(found[4])


def test_columns_that_say_nothing_are_left_out_and_text_is_as_it_is() -> None:
    table = table_of(("a", "empty", "number"), [("[bold]x[/]", "", "1.5"), ("y", "", "22")], "[a] title", numbers=("number",))
    assert [column.header for column in table.columns] == ["a", "number"]
    text = printed("a [red]line[/red]", table)
    assert "a [red]line[/red]" in text and "[bold]x[/]" in text and "[a] title" in text and "empty" not in text
    assert all(line == line.rstrip() for line in text.splitlines())
    ends = [line for line in text.splitlines() if line.endswith(("1.5", "22"))]
    assert len({len(line) for line in ends}) == 1
    assert len(printed("x" * 300)) == 300


def test_frames_have_four_digits_and_whole_heads() -> None:
    frame = pd.DataFrame({"head": [3.0, np.nan], "effect": [1.23456789, -2.5e-7], "name": ["<a>", "b"]})
    assert as_text(frame).split() == ["head", "effect", "name", "3", "1.235", "<a>", "-2.5e-07", "b"]
    page = as_html(frame)
    assert all(f"<td>{cell}</td>" in page for cell in ("3", "", "1.235", "-2.5e-07", "&lt;a&gt;")) and "3.0" not in page
    assert frame["head"].dtype == float, "the frame itself stays"
