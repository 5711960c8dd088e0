"""Frames of findings as text and as HTML: numbers of four digits, no index."""

from __future__ import annotations

from typing import Any

import pandas as pd


def as_text(frame: pd.DataFrame, **options: Any) -> str:
    """For a terminal. options: of DataFrame.to_string."""
    return _whole(frame).to_string(**{"index": False, "na_rep": "", "float_format": four_digits, **options})


def as_html(frame: pd.DataFrame, **options: Any) -> str:
    """For a notebook. options: of DataFrame.to_html."""
    return _whole(frame).to_html(**{"index": False, "na_rep": "", "float_format": four_digits, "border": 0, **options})


def four_digits(value: float) -> str:
    """A number as tables show it."""
    return f"{value:.4g}"


def _whole(frame: pd.DataFrame) -> pd.DataFrame:
    """Heads as whole numbers, also where some rows have none."""
    if "head" not in frame or not frame["head"].isna().any():
        return frame
    return frame.assign(head=["" if pd.isna(head) else str(int(head)) for head in frame["head"]])
