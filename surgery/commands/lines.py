"""Samples of a task in JSON lines: {"text": "..."}, or {"input_ids": [...]} with or without "labels"; batches of one length."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from surgery.errors import SurgeryError, describe

IGNORED = -100
"""Labels that do not count, as transformers has it."""
FORMS = '{"text": "..."} or {"input_ids": [1, 2], "labels": [-100, 2]}'


@dataclass(frozen=True)
class Sample:
    """text, or the numbers of its tokens and, if only some count, labels. where: file and line, for messages."""

    where: str
    text: str | None = None
    ids: tuple[int, ...] = ()
    labels: tuple[int, ...] | None = None


def read_lines(path: Path, least: int) -> list[Sample]:
    """All samples of a file; empty lines are left out. Raises SurgeryError, by line, for what is none, and for too few."""
    found = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        if line.strip():
            found.append(_sample(f"{path}, line {number}", line))
    if len(found) < least:
        do = "Add samples; about 20 make a test that finds something."
        raise SurgeryError(describe(str(path), f"{len(found)} samples", f"at least {least}, a line each", do))
    return found


def batches_of(samples: list[Sample], tokenizer: Any, missing: str, size: int, most: int | None = None) -> list[dict[str, Any]]:
    """Inputs of a model in batches of at most so many samples of one length, so that nothing is padded.

    missing: why there is no tokenizer, if there is none. most: tokens of a sample that are read. Raises SurgeryError for a text
    without a tokenizer, and for a sample of which no token counts.
    """
    import torch

    groups: dict[tuple[int, bool], list[tuple[tuple[int, ...], tuple[int, ...] | None]]] = {}
    for sample in samples:
        ids, labels = sample.ids, sample.labels
        if sample.text is not None:
            if tokenizer is None:
                do = 'Give {"input_ids": [...]}, or put the tokenizer\'s files into the folder of the model.'
                raise SurgeryError(describe(sample.where, f"a text and no tokenizer ({missing})", "one beside the model", do))
            ids = tuple(tokenizer(sample.text, verbose=False)["input_ids"])
        ids, labels = ids[:most], None if labels is None else labels[:most]
        if len(ids) < 2 or (labels is not None and set(labels) == {IGNORED}):
            what = f"{len(ids)} tokens" if labels is None or len(ids) < 2 else f"labels of {IGNORED} alone"
            do = "Leave it out, or let --length read more of it."
            raise SurgeryError(describe(sample.where, what, "two tokens or more, and one to predict", do))
        groups.setdefault((len(ids), labels is None), []).append((ids, labels))
    found = []
    for (_, is_whole), rows in groups.items():
        for start in range(0, len(rows), size):
            part = rows[start : start + size]
            batch = {"input_ids": torch.tensor([ids for ids, _ in part])}
            found.append(batch if is_whole else {**batch, "labels": torch.tensor([labels for _, labels in part])})
    return found


def require_known(path: Path, batches: list[dict[str, Any]], model: Any) -> None:
    """Raises SurgeryError for tokens of a file that a model does not know, by the file's name."""
    from surgery import vocabulary

    for batch in batches:
        vocabulary.require_known(str(path), batch["input_ids"], model)


def _sample(where: str, line: str) -> Sample:
    """One line. Raises SurgeryError for anything else than the two forms."""
    try:
        given = json.loads(line)
    except ValueError as error:
        raise SurgeryError(describe(where, f"no JSON ({error})", FORMS, "Write one sample a line.")) from None
    if isinstance(given, dict) and set(given) == {"text"} and isinstance(given["text"], str):
        return Sample(where, text=given["text"])
    if isinstance(given, dict) and "input_ids" in given and set(given) <= {"input_ids", "labels"}:
        ids, labels = given["input_ids"], given.get("labels")
        if _are_numbers(ids, 0) and (labels is None or (_are_numbers(labels, IGNORED) and len(labels) == len(ids))):
            return Sample(where, ids=tuple(ids), labels=None if labels is None else tuple(labels))
        found = "input_ids or labels that are no lists of whole numbers, or not of one length"
        raise SurgeryError(describe(where, found, FORMS, "Give as many labels as input_ids."))
    found = f"the keys {', '.join(map(repr, given))}" if isinstance(given, dict) else f"a {type(given).__name__}"
    raise SurgeryError(describe(where, found, FORMS, "Leave other keys out."))


def _are_numbers(given: Any, least: int) -> bool:
    return isinstance(given, list) and all(isinstance(one, int) and not isinstance(one, bool) and one >= least for one in given)
