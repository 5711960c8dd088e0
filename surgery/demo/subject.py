"""The model that a study is made on, its tokenizer, and the sequences that it reads."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.resources import as_file, files
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers.utils import logging as transformers_logging

from surgery.analysis.repeats import LEAST_SEGMENT, Copies, bos_of, fitting_segment, usable_tokens
from surgery.demo.data import repeated_sequences
from surgery.errors import SurgeryError, describe
from surgery.pretrained import existing, require_weights, tokenizer_of, unreadable


@dataclass(frozen=True, eq=False)
class Subject:
    """A causal language model under study. tokenizer: None if the model comes without one, and `missing` then says why."""

    name: str
    model: nn.Module
    tokenizer: Any = None
    missing: str = "no files of a tokenizer"

    @property
    def bos(self) -> int | None:
        """The token that a sequence begins with, or None."""
        return bos_of(self.model, self.tokenizer)

    def copies(
        self, batch: int, segment: int | None = None, seed: int = 0, text: str | None = None, varied: bool = False
    ) -> Copies:
        """Sequences of a segment written twice: of random tokens, or of a text.

        Random segments hold distinct tokens of the whole vocabulary, special ones left out. A text is cut into segments; its
        rest is dropped, and a text of fewer tokens than a segment is one segment. batch: sequences, of a text at most.
        segment: tokens in one copy. varied: use the first tokens of each segment, randomly half of them to all.
        Raises SurgeryError for what the model or the text is too short for.
        """
        if text is None:
            tokens = usable_tokens(self.model, self.tokenizer)
            segment = self._fitting(segment, len(tokens))
            # Numbers from 1 on, in place of the usable tokens.
            segments = tokens[repeated_sequences(batch, segment, len(tokens) + 1, seed)[:, 1 : 1 + segment] - 1]
        else:
            tokens = self._tokens(text)
            segment = min(self._fitting(segment), len(tokens))
            segments = tokens[: len(tokens) // segment * segment].view(-1, segment)[:batch]
        rows, longest = segments.shape
        shortest = max(3, longest // 2) if varied else longest
        lengths = torch.randint(shortest, longest + 1, (rows,), generator=torch.Generator().manual_seed(seed))
        return Copies.of(segments, self.bos, lengths)

    def label(self, token: int) -> str:
        """A token as text, short enough for an axis; its number if there is no tokenizer."""
        if token == self.bos:
            return "BOS"
        if self.tokenizer is None:
            return str(token)
        shown = self.tokenizer.decode([token]).replace(" ", "␣").replace("\n", "⏎").replace("\t", "⇥")
        return shown if len(shown) <= 10 else f"{shown[:9]}…"

    def _fitting(self, segment: int | None, tokens: int | None = None) -> int:
        """A segment of which two copies fit into the model's positions, of no more than so many tokens."""
        return fitting_segment(self.model, segment, self.name, self.bos, tokens)

    def _tokens(self, text: str) -> Tensor:
        if self.tokenizer is None:
            do = "Pass another --model, or leave --text out: random tokens need no tokenizer."
            raise SurgeryError(
                describe(f"text for {self.name}", f"no tokenizer ({self.missing})", "a tokenizer beside the model", do)
            )
        ids = torch.tensor(self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"], dtype=torch.long)
        if len(ids) < LEAST_SEGMENT:
            raise SurgeryError(describe("text", f"{len(ids)} tokens", f"at least {LEAST_SEGMENT}", "Pass a longer --text."))
        return ids


def load(name: str | None = None, device: str | torch.device = "cpu") -> Subject:
    """A causal language model from a folder or the hub, in evaluation mode; the packaged one if name is None.

    Nothing is downloaded for the packaged model. Code that comes with a model is not run. Raises SurgeryError.
    """
    if name is not None:
        subject = _loaded(existing(name), name, device)
        _require_causal(name, subject.model)
        return subject
    with as_file(files("surgery.demo").joinpath("model")) as folder, _quiet():
        return _loaded(str(folder), "the packaged model", device)


def load_model(name: str | None = None, device: str | torch.device = "cpu") -> Any:
    """The model alone that `load` loads: without a name the packaged one, a LlamaForCausalLM. Raises SurgeryError."""
    return load(name, device).model


def read_text(text: str) -> str:
    """The text itself, or the contents of the file that it names. Raises SurgeryError for a file that is not there."""
    if os.path.isfile(text):
        return Path(text).read_text(encoding="utf-8")
    if not any(character.isspace() for character in text) and (os.sep in text or Path(text).suffix):
        raise SurgeryError(describe("text", f"no file {text!r}", "a text, or the path of a text file", "Check the path."))
    return text


def _loaded(path: str, name: str, device: str | torch.device) -> Subject:
    try:
        model, notes = transformers.AutoModelForCausalLM.from_pretrained(
            path, dtype="auto", trust_remote_code=False, output_loading_info=True
        )
    except Exception as error:  # whatever a foreign loader raises, there is no model
        raise unreadable(name, "a causal language model", error) from error
    require_weights(name, model, notes)
    tokenizer, missing = tokenizer_of(path)  # only a text needs it
    return Subject(name, model.to(device).eval(), tokenizer, missing)


def _require_causal(name: str, model: Any) -> None:
    """Raises SurgeryError for a model whose first position sees the second, such as an encoder that was loaded as a decoder."""
    ids = torch.tensor([[0, 1], [0, 2]], device=model.device) % model.get_input_embeddings().num_embeddings
    with torch.no_grad():
        first, second = model(ids, use_cache=False).logits[:, 0].float()
    if not torch.allclose(first, second, rtol=1e-3, atol=1e-3):
        found, expected = "a first position that sees the second", "a causal language model"
        raise SurgeryError(describe(f"model {name!r}", found, expected, "Pass a decoder; an encoder predicts no next token."))


@contextmanager
def _quiet() -> Iterator[None]:
    """No progress bar of transformers within the block."""
    shown = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            transformers_logging.enable_progress_bar()
