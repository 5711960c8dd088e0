"""Two runs and what tells them apart, as `surgery importance` and `surgery patching` take them: their options, and the pair.

Clean and corrupted inputs are two texts, two files, or, where neither is given, random tokens that are said twice: in the
corrupted ones the first time is said backwards, so that another token has followed the last one that is read.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from surgery.commands.data import labelled, require_tokenizer
from surgery.commands.shared import device_of, read_inputs

if TYPE_CHECKING:
    from torch import Tensor

    from surgery.analysis.metrics import Measured
    from surgery.demo.subject import Subject

Clean = Annotated[
    str | None, typer.Option(help="A text, or a file with one in each line.", show_default="random tokens, said twice")
]
Corrupted = Annotated[
    str | None, typer.Option(help="The other text, of as many tokens.", show_default="the first time backwards")
]
PairInputs = Annotated[
    Path | None, typer.Option(help="In place of texts, a .safetensors file of inputs by the names of forward's arguments.")
]
CorruptedInputs = Annotated[Path | None, typer.Option(help="The same of the corrupted run, of the same shapes.")]
Rows = Annotated[int, typer.Option(min=1, help="Sequences of random tokens.")]
Answer = Annotated[
    str | None,
    typer.Option(help="A token, as text or number; a file has one a line. The metric is its logit at the last position .."),
]
Wrong = Annotated[str | None, typer.Option(help=".. minus the logit of this one.")]


class MetricName(StrEnum):
    """Metrics that need no more than a name."""

    loss = "loss"
    perplexity = "perplexity"
    accuracy = "accuracy"
    kl = "kl"


MetricOption = Annotated[
    MetricName | None,
    typer.Option(help="In place of the logit difference.", show_default="loss of texts and files without --answer"),
]


@dataclass(frozen=True)
class Asked:
    """What was asked for, in the words of the options of the same names."""

    clean: str | None
    corrupted: str | None
    inputs: Path | None
    corrupted_inputs: Path | None
    metric: MetricName | None
    answer: str | None
    wrong: str | None
    rows: int
    seed: int

    def check(self, needs_corrupted: bool) -> None:
        """Raises typer.BadParameter for options that do not go together."""
        is_random = self.clean is None and self.inputs is None
        only_clean = self.corrupted is None and self.corrupted_inputs is None
        for is_wrong, hint, text in (
            (self.clean is not None and self.inputs is not None, "--clean / --inputs", "Give one of the two."),
            (self.corrupted is not None and self.clean is None, "--corrupted", "It goes with --clean."),
            (self.corrupted_inputs is not None and self.inputs is None, "--corrupted-inputs", "It goes with --inputs."),
            ((self.answer is None) != (self.wrong is None), "--answer / --wrong", "Give both."),
            (self.answer is not None and self.metric is not None, "--answer / --metric", "Give one of the two."),
            (self.answer is not None and is_random, "--answer", "It goes with --clean or --inputs."),
            (
                needs_corrupted and only_clean and not is_random,
                "--corrupted / --corrupted-inputs",
                "Give the other run, or --to what does not come from there.",
            ),
        ):
            if is_wrong:
                raise typer.BadParameter(text, param_hint=hint)


@dataclass(frozen=True)
class Pair:
    """clean, corrupted: inputs of the model, corrupted None if there are none. metric: what tells them apart.

    about: what they are, for a report, line by line. tokens: texts of the positions, if all rows have the same there.
    """

    clean: dict[str, Any]
    corrupted: dict[str, Any] | None
    metric: Any
    about: tuple[str, ...]
    tokens: tuple[str, ...] = ()


def load_pair(asked: Asked, model: str, device: str | None, trust_remote_code: bool) -> tuple[Any, Pair]:
    """A model on its device, and the inputs and the metric for it. Raises SurgeryError for what does not fit."""
    from surgery.demo.subject import Subject
    from surgery.pretrained import load_any, tokenizer_of

    loaded = load_any(model, trust_remote_code=trust_remote_code).to(device_of(device))
    return loaded, _pair(asked, Subject(model, loaded, *tokenizer_of(model, trust_remote_code=trust_remote_code)))


def _pair(asked: Asked, subject: Subject) -> Pair:
    if asked.clean is None and asked.inputs is None:
        return _copies(asked, subject)
    pair = (
        _files(asked.inputs, asked.corrupted_inputs) if asked.clean is None else _texts(asked.clean, asked.corrupted, subject)
    )
    if asked.answer is None or asked.wrong is None:
        return pair if asked.metric is None else replace(pair, metric=asked.metric.value)
    metric, line = _difference(asked.answer, asked.wrong, len(next(iter(pair.clean.values()))), subject)
    return replace(pair, metric=metric, about=(*pair.about, line))


def _copies(asked: Asked, subject: Subject) -> Pair:
    """Random tokens said twice. Before the last token, the clean ones have seen it follow, the corrupted ones another."""
    from surgery.analysis import metrics
    from surgery.analysis.repeats import random_copies
    from surgery.errors import SurgeryError, describe

    if asked.metric is None and not metrics.predicts_the_next(subject.model):
        found = f"a {type(subject.model).__name__}"
        do = "Pass --clean and --corrupted, or --inputs; or another --metric, such as kl."
        raise SurgeryError(describe("random tokens, said twice", found, "a model that predicts the next token", do))
    copies = random_copies(subject.model, asked.rows, seed=asked.seed, tokenizer=subject.tokenizer)
    clean = labelled(copies)
    about = [
        f"* clean: {asked.rows} sequences of {int(copies.lengths[0])} random tokens, said twice",
        "* corrupted: the same, the first time said backwards",
    ]
    metric: Any = None if asked.metric is None else asked.metric.value
    if asked.metric is None:
        metric = metrics.Metric("logit difference", "logits", _went_on, positions=(-2,))
        about.append("* logit difference: at the last token but one, of what has followed it and what follows it backwards")
    elif asked.metric is MetricName.kl:  # where the others count by labels, which it does not read
        metric = metrics.kl(copies.scored[0].nonzero()[:, 0].tolist())
    if asked.metric is not None:
        about.append(f"* {asked.metric.value}: of the tokens that the first time determines")
    return Pair(clean, {**clean, "input_ids": copies.reversed()}, metric, tuple(about))


def _went_on(m: Measured) -> Tensor:
    """At the last token but one, the logit of what has followed it before, minus that of what does backwards."""
    from surgery.analysis.metrics import logit_difference

    ids = m.inputs["input_ids"]
    return logit_difference(ids[:, -1], ids[:, -3]).function(m)


def _files(clean: Path | None, corrupted: Path | None) -> Pair:
    given = read_inputs(clean)
    assert given is not None
    about = [f"* {what}: `{path}`" for what, path in (("clean", clean), ("corrupted", corrupted)) if path is not None]
    return Pair(given, read_inputs(corrupted), "loss", tuple(about))


def _texts(clean: str, corrupted: str | None, subject: Subject) -> Pair:
    """Texts of equal numbers of tokens."""
    import torch

    require_tokenizer("--clean", subject.tokenizer, subject.missing)
    texts = {"--clean": _lines("--clean", clean)}
    if corrupted is not None:
        texts["--corrupted"] = _lines("--corrupted", corrupted)
    rows = {option: [subject.tokenizer(t, verbose=False)["input_ids"] for t in some] for option, some in texts.items()}
    _require_in_line(rows, subject)
    ids = {option: torch.tensor(several) for option, several in rows.items()}
    more = f" (and {len(rows['--clean']) - 1} more)" if len(rows["--clean"]) > 1 else ""
    about = [f"* {option.removeprefix('--')}: `{' '.join(some[0].split())}`{more}" for option, some in texts.items()]
    columns = [set(column) for column in zip(*rows["--clean"], strict=True)]
    tokens = [subject.label(column.pop()) if len(column) == 1 else "" for column in columns]
    others = {"input_ids": ids["--corrupted"]} if "--corrupted" in ids else None
    return Pair({"input_ids": ids["--clean"]}, others, "loss", tuple(about), tuple(tokens))


def _require_in_line(rows: dict[str, list[list[int]]], subject: Subject) -> None:
    """Raises SurgeryError unless all texts have as many tokens, and the corrupted are others."""
    from surgery.errors import SurgeryError, describe

    clean, corrupted = rows["--clean"], rows.get("--corrupted", rows["--clean"])
    if len(corrupted) != len(clean):
        do = "Give one for each line."
        raise SurgeryError(describe("--corrupted", f"{len(corrupted)} texts", f"{len(clean)}, as --clean has", do))
    for number, (ids, others) in enumerate(zip(clean, corrupted, strict=True), 1):
        where = f", line {number}" if len(clean) > 1 else ""
        if len(ids) != len(others):
            found, expected = (f"{len(some)} tokens ({_shown(subject, some)})" for some in (others, ids))
            do = "Change words for words of as many tokens."
            raise SurgeryError(describe(f"--corrupted{where}", found, f"as many as --clean has, {expected}", do))
        if len(ids) != len(clean[0]) or not ids:
            expected = f"{len(clean[0])}, as line 1 has" if ids else "at least one"
            do = "Use texts of one length, or --inputs with padding."
            raise SurgeryError(describe(f"--clean{where}", f"{len(ids)} tokens", expected, do))
    if "--corrupted" in rows and clean == corrupted:
        raise SurgeryError(describe("--corrupted", "the same tokens as of --clean", "others", "Change what it is about."))


def _difference(answer: str, wrong: str, rows: int, subject: Subject) -> tuple[Any, str]:
    """The metric, and a line that says what it is."""
    import torch

    from surgery.analysis.metrics import logit_difference
    from surgery.errors import SurgeryError, describe

    found: list[Any] = []
    shown = []
    for option, text in (("--answer", answer), ("--wrong", wrong)):
        tokens = [_token(option, line, subject) for line in _lines(option, text, is_text=False)]
        if len(tokens) not in (1, rows):
            do = "Give one for all, or a file with one in each line."
            raise SurgeryError(describe(option, f"{len(tokens)} tokens", f"one, or {rows}, as there are examples", do))
        found.append(torch.tensor(tokens))
        more = f" (and {len(tokens) - 1} more)" if len(tokens) > 1 else ""
        shown.append(f"`{subject.label(tokens[0])}`{more}")
    correct, other = found
    return logit_difference(correct, other), f"* logit difference: of {shown[0]} and {shown[1]} at the last position"


def _token(option: str, text: str, subject: Subject) -> int:
    """The number of one token: itself, or of a text that is one. Raises SurgeryError for anything else."""
    from surgery.errors import SurgeryError, describe

    if text.isdecimal():
        model: Any = subject.model
        size = model.get_input_embeddings().num_embeddings
        if int(text) >= size:
            expected = f"numbers below {size}, the size of the vocabulary"
            raise SurgeryError(describe(option, f"token {text}", expected, "Change it."))
        return int(text)
    require_tokenizer(option, subject.tokenizer, subject.missing)
    ids = subject.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    is_unknown = ids == [subject.tokenizer.unk_token_id] and text != subject.tokenizer.unk_token
    if is_unknown or len(ids) != 1:
        found = f"{text!r}, which is {'unknown' if is_unknown else f'{len(ids)} tokens ({_shown(subject, ids)})'}"
        do = "In many vocabularies a word begins with its space, as ' word' does; or give a token's number."
        raise SurgeryError(describe(option, found, "one token of the vocabulary", do))
    return int(ids[0])


def _lines(option: str, text: str, is_text: bool = True) -> list[str]:
    """The lines of a file that are not empty, or the text itself. Raises SurgeryError where there is none."""
    from surgery.demo.subject import read_text
    from surgery.errors import SurgeryError, describe

    is_file = os.path.isfile(text)
    content = read_text(text) if is_text or is_file else text
    lines = [line for line in (content.splitlines() if is_file else [content]) if line.strip()]
    if not lines:
        raise SurgeryError(describe(option, "nothing to read", "a text, or a file with one in each line", "Write one."))
    return lines


def _shown(subject: Subject, ids: Sequence[int]) -> str:
    return " ".join(map(subject.label, ids))
