"""What the commands on findings read, and of what part of a model: random tokens said twice, texts, batches, layers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from surgery.analysis.repeats import Copies

Layers = Annotated[str, typer.Option(help="Addresses with commas, such as 3,4 or decoder.cross.*")]
Seed = Annotated[int, typer.Option(help="Of random tokens, and of whatever else is drawn.")]


def layers_of(text: str) -> Any:
    """A selection of layers as cuts take it."""
    return "all" if text == "all" else [int(name) if name.isdecimal() else name for name in text.split(",")]


def labelled(copies: Copies) -> dict[str, Any]:
    """Sequences that say everything twice as inputs, with labels where the first time determines the second."""
    labels = copies.ids.clone()
    labels[:, 1:][~copies.scored[:, :-1]] = -100
    labels[:, 0] = -100
    return {"input_ids": copies.ids, "labels": labels}


def sequences(tokenizer: Any, missing: str, text: str, length: int, rows: int) -> dict[str, Any]:
    """A text in sequences of equal length; its rest is left out. Raises SurgeryError for a text that is too short."""
    import torch

    from surgery.demo.subject import read_text
    from surgery.errors import SurgeryError, describe

    require_tokenizer("--text", tokenizer, missing)
    ids = torch.tensor(tokenizer(read_text(text), add_special_tokens=False, verbose=False)["input_ids"], dtype=torch.long)
    if len(ids) < length:
        raise SurgeryError(describe("--text", f"{len(ids)} tokens", f"at least --length {length}", "Pass a longer text."))
    return {"input_ids": ids[: len(ids) // length * length].view(-1, length)[:rows]}


def require_tokenizer(option: str, tokenizer: Any, missing: str) -> None:
    """Raises SurgeryError where a text was given and there is no tokenizer for it."""
    from surgery.errors import SurgeryError, describe

    if tokenizer is None:
        do = f"Pass --inputs, or leave {option} out."
        raise SurgeryError(describe(option, f"no tokenizer ({missing})", "one beside the model", do))


def in_batches(given: dict[str, Any], size: int | None) -> list[dict[str, Any]]:
    """Inputs in batches of so many rows, or in one."""
    if size is None:
        return [given]
    rows = len(next(iter(given.values())))
    return [{name: value[i : i + size] for name, value in given.items()} for i in range(0, rows, size)]
