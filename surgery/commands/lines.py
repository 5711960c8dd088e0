"""Samples of a task in JSON lines: {"text": "..."}, or {"input_ids": [...]} with or without "labels"; batches of one length."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
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

    @property
    def content(self) -> tuple[Any, ...]:
        """What tells it from others."""
        return self.ids, self.labels


def read_lines(path: Path, least: int) -> list[Sample]:
    """All samples of a file; empty lines are left out. Raises SurgeryError, by line, for what is none, and for too few."""
    found = []
    # by line feeds alone: splitlines also splits at characters that JSON may have in a string
    for number, line in enumerate(path.read_bytes().decode("utf-8").split("\n"), 1):
        if line.strip():
            found.append(_sample(f"{path}, line {number}", line))
    if len(found) < least:
        do = "Add samples; about 20 make a test that finds something."
        raise SurgeryError(describe(str(path), f"{len(found)} samples", f"at least {least}, a line each", do))
    return found


def as_tokens(samples: Sequence[Sample], tokenizer: Any, missing: str, most: int | None = None) -> list[Sample]:
    """The same with texts as numbers of tokens.

    missing: why there is no tokenizer, if there is none. most: tokens of a sample that are read. Raises SurgeryError for a text
    without a tokenizer, and for a sample of which no token counts.
    """
    found = []
    for sample in samples:
        ids, labels = sample.ids, sample.labels
        if sample.text is not None:
            if tokenizer is None:
                do = 'Give {"input_ids": [...]}, or put the tokenizer\'s files into the folder of the model.'
                raise SurgeryError(describe(sample.where, f"a text and no tokenizer ({missing})", "one beside the model", do))
            ids = tuple(tokenizer(sample.text, verbose=False)["input_ids"])
        ids, labels = ids[:most], None if labels is None else labels[:most]
        if len(ids) < 2 or not _counts(labels):
            what = f"{len(ids)} tokens" if len(ids) < 2 else f"labels of {IGNORED} alone, or none"
            do = "Leave it out, or let --length read more of it."
            raise SurgeryError(describe(sample.where, what, "two tokens or more, and one to predict", do))
        found.append(replace(sample, text=None, ids=ids, labels=labels))
    return found


def batches_of(samples: Sequence[Sample], size: int) -> list[dict[str, Any]]:
    """Inputs of a model in batches of at most so many samples with as many tokens and labels, so that nothing is padded."""
    import torch

    groups: dict[tuple[int, int | None], list[Sample]] = {}
    for sample in samples:
        groups.setdefault((len(sample.ids), None if sample.labels is None else len(sample.labels)), []).append(sample)
    found = []
    for (_, labelled), rows in groups.items():
        for start in range(0, len(rows), size):
            part = rows[start : start + size]
            batch = {"input_ids": torch.tensor([sample.ids for sample in part])}
            found.append(batch if labelled is None else {**batch, "labels": torch.tensor([sample.labels for sample in part])})
    return found


def require_fitting(samples: Sequence[Sample], model: Any) -> None:
    """Raises SurgeryError, by line, for tokens and labels that a model does not know, and for labels that it cannot predict."""
    from surgery.analysis.metrics import predicts_the_next
    from surgery.vocabulary import vocabulary_of

    tokens, is_next = vocabulary_of(model), predicts_the_next(model)
    targets = _targets_of(model) or tokens
    for sample in samples:
        for what, numbers, known in (("token", sample.ids, tokens), ("label", sample.labels, targets)):
            if numbers and known is not None and max(numbers) >= known:
                expected = f"numbers below the model's {known} tokens"
                do = "Take the tokenizer of this model."
                raise SurgeryError(describe(sample.where, f"{what} {max(numbers)}", expected, do))
        if sample.labels is None or not is_next:
            continue
        if len(sample.labels) != len(sample.ids):
            found, expected = f"{len(sample.labels)} labels of {len(sample.ids)} tokens", "a label for each token"
            do = f"Give {IGNORED} where a token does not count; a {type(model).__name__} predicts the tokens that it reads."
            raise SurgeryError(describe(sample.where, found, expected, do))
        if not _counts(sample.labels[1:]):
            found, expected = "the first label alone", "a label that counts behind the first token"
            do = f"Leave it out: a {type(model).__name__} predicts each token from those before it."
            raise SurgeryError(describe(sample.where, found, expected, do))


def _targets_of(model: Any) -> int | None:
    """How many tokens a model predicts, which need not be as many as it reads; None where transformers does not say."""
    try:
        return getattr(model.get_output_embeddings(), "out_features", None)
    except (AttributeError, NotImplementedError):
        return None


def _counts(labels: Sequence[int] | None) -> bool:
    return labels is None or any(label != IGNORED for label in labels)


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
        if not _are_numbers(ids):
            found = "input_ids that are no list of whole numbers from 0 on"
            raise SurgeryError(describe(where, found, FORMS, "Give the numbers of its tokens."))
        if labels is not None and not (isinstance(labels, list) and _are_numbers([one for one in labels if not _ignored(one)])):
            found = f"labels that are no list of tokens' numbers and {IGNORED}"
            raise SurgeryError(describe(where, found, FORMS, f"Give {IGNORED} where a token does not count."))
        return Sample(where, ids=tuple(ids), labels=None if labels is None else tuple(labels))
    found = f"the keys {', '.join(map(repr, given))}" if isinstance(given, dict) else f"a {type(given).__name__}"
    raise SurgeryError(describe(where, found, FORMS, "Leave other keys out."))


def _ignored(label: Any) -> bool:
    return isinstance(label, int) and label == IGNORED


def _are_numbers(given: Any) -> bool:
    return isinstance(given, list) and all(isinstance(one, int) and not isinstance(one, bool) and one >= 0 for one in given)
