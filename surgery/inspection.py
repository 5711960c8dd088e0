"""What a model's attention looks like and what has been done to it, as a table for people and as data."""

from __future__ import annotations

import html
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields
from typing import Any, Generic, TypeVar

from rich.table import Table
from torch import nn

from surgery.anatomy import Attention
from surgery.classes import SurgicalAttention, describe_cuts
from surgery.errors import NoMatchError, describe
from surgery.patch import anatomy_of, session_of
from surgery.terminal import printed, table_of

R = TypeVar("R", bound=Any)


@dataclass(frozen=True)
class Row:
    """One attention. heads and kv_heads: counts; fusion: "q | k | v" for separate projections, "q+k+v" for one matrix.

    kernel: the implementation in use, and how many heads are reconstructed; cuts: in words; runs: forwards since patching
    (None if not patched).
    """

    address: str
    path: str
    attention: str
    heads: int
    kv_heads: int
    d_head: int
    projections: str
    fusion: str
    kernel: str
    cuts: str
    runs: int | None


class Rows(Generic[R]):
    """Rows of attentions, each with an `address`, by number or address. made_by: the function that gives them, for messages."""

    rows: tuple[R, ...]
    made_by: str

    def __iter__(self) -> Iterator[R]:
        return iter(self.rows)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, address: str | int) -> R:
        """The row of an address, or by its number in the table. Raises NoMatchError."""
        for number, row in enumerate(self.rows):
            if address in (number, *row.address.split(", ")):
                return row
        known = ", ".join(row.address for row in self.rows)
        raise NoMatchError(describe(self.made_by, f"{address!r}", f"one of {known}, or a row number", "Print the table."))

    def as_dicts(self) -> list[dict[str, Any]]:
        return [asdict(row) for row in self.rows]


class Inspection(Rows[Row]):
    """The rows of `inspect_model`. `print` shows a table; `.rows`, `.as_dicts()` and `.to_frame()` are the data."""

    made_by = "inspect_model"

    def __init__(
        self,
        model_class: str,
        rows: tuple[Row, ...],
        unsupported: tuple[str, ...],
        others: tuple[str, ...] = (),
        beside: tuple[str, ...] = (),
    ) -> None:
        self.model_class, self.rows, self.unsupported, self.others, self.beside = model_class, rows, unsupported, others, beside

    def to_frame(self) -> Any:
        """The rows as a pandas DataFrame (needs pandas)."""
        import pandas as pd

        return pd.DataFrame(self.as_dicts())

    def table(self) -> Table:
        """The rows as a rich table; without cuts and runs where there are none."""
        names = ("address", "class", "heads / kv", "d_head", "projections", "fused", "kernel", "cuts", "runs")
        lines = [
            [r.address, r.attention, f"{r.heads} / {r.kv_heads}", str(r.d_head), r.projections, r.fusion, r.kernel, r.cuts]
            for r in self.rows
        ]
        for r, line in zip(self.rows, lines, strict=True):
            line.append("" if r.runs is None else str(r.runs))
        return table_of(names, lines, f"Attention of {self.model_class}", whole=("address",))

    def __str__(self) -> str:
        kinds = {"left as it is": self.unsupported, "not patched beside the attention": self.beside}
        kinds["no softmax attention"] = self.others
        return printed(self.table(), *(f"{kind}: {line}" for kind, lines in kinds.items() for line in lines))

    __repr__ = __str__

    def _repr_html_(self) -> str:
        names = [f.name for f in fields(Row)]
        head = "".join(f"<th>{name}</th>" for name in names)
        body = "".join(
            "<tr>" + "".join(f"<td>{html.escape(str(row[name]))}</td>" for name in names) + "</tr>" for row in self.as_dicts()
        )
        return f"<table><caption>Attention of {self.model_class}</caption><tr>{head}</tr>{body}</table>"


def inspect_model(model: nn.Module, *, strict: bool = False) -> Inspection:
    """What attention a model has and what is done to it; the model may be patched or not, and is not changed.

    strict: raise UnsupportedArchitectureError for attention that cannot be patched; by default it is listed below the table.
    Raises NoMatchError for a model without attention.
    """
    anatomy = anatomy_of(model, strict)
    is_patched = session_of(model) is not None
    rows = tuple(_row(attention, is_patched) for attention in anatomy)
    beside = tuple(attention.beside for attention in anatomy if attention.beside)
    return Inspection(anatomy.model_class, rows, anatomy.unsupported, anatomy.others, beside)


def _row(attention: Attention, is_patched: bool) -> Row:
    module: Any = attention.module
    surgery = module._surgery if is_patched and isinstance(module, SurgicalAttention) else None
    implementation = getattr(module.__dict__.get("config"), "_attn_implementation", None) or "eager"
    names = {p.name: None for site in "qkvo" if (p := attention.projections.get(site)) is not None}
    names.update(dict.fromkeys(attention.recording.projections))
    return Row(
        address=", ".join(attention.addresses),
        path=attention.path,
        attention=attention.class_name,
        heads=attention.heads,
        kv_heads=attention.kv_heads,
        d_head=attention.d_head,
        projections=", ".join(names),
        fusion=attention.fusion,
        kernel=implementation if surgery is None else surgery.kernel_in_use,
        cuts="" if surgery is None else describe_cuts(surgery),
        runs=None if surgery is None else surgery.session.runs.get(surgery.address, 0),
    )
