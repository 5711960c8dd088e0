"""The demo model in a folder, with a tokenizer of whole words: w0 to w63."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from surgery.demo import load_model


def write_worded(folder: Path) -> Path:
    """Writes it, and gives the folder."""
    load_model().save_pretrained(folder)
    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(64)}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="w0", bos_token="w0").save_pretrained(folder)
    return folder


def write_task(path: Path, samples: int, first: int, is_repeated: bool) -> None:
    """JSON lines of texts: 10 to 12 of the 31 words from a first one on, said twice, or as many others behind them."""
    generator = torch.Generator().manual_seed(first)
    lines = []
    for number in range(samples):
        count = 10 + number % 3
        once, other = ([f"w{first + int(i)}" for i in torch.randperm(31, generator=generator)[:count]] for _ in range(2))
        lines.append(json.dumps({"text": " ".join(["w0", *once, *(once if is_repeated else other)])}))
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
