"""Two steps of transformers' Trainer on random tokens, as several files take them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from families import LENGTH, VOCAB
from transformers import TrainingArguments


def two_steps(folder: Path, **options: Any) -> dict[str, Any]:
    """Arguments of a Trainer beside the model: its settings (options of TrainingArguments beside the usual), and the data."""
    generator = torch.Generator().manual_seed(0)
    rows = [{"input_ids": x, "labels": x} for x in torch.randint(5, VOCAB, (8, LENGTH), generator=generator)]
    usual = {
        "max_steps": 2,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-2,
        "report_to": [],
        "save_strategy": "no",
        "logging_strategy": "no",
        "disable_tqdm": True,
        "use_cpu": True,
        "seed": 0,
    }
    return {"args": TrainingArguments(str(folder), **{**usual, **options}), "train_dataset": rows}
