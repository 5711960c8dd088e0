"""The command line that benchmarks share: how much to measure, where, and where the results go."""

from __future__ import annotations

import argparse
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TypeVar

import torch


@dataclass(frozen=True)
class Common:
    """What the command line says of every benchmark; its own sizes stand below these."""

    device: str = "cpu"
    threads: int = 1
    seed: int = 0
    rounds: int = 5


Settings = TypeVar("Settings", bound=Common)


def parser(doc: str | None, quick: str, json: str | None = "where to write the results") -> argparse.ArgumentParser:
    """--quick, --json, --device, --threads, --rounds, --seed. quick, json: what the help says of these; None: no such."""
    found = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    found.add_argument("--quick", action="store_true", help=quick)
    if json is not None:
        found.add_argument("--json", type=Path, help=json)
    found.add_argument("--device", default="cpu")
    found.add_argument("--threads", type=int, default=1)
    found.add_argument("--rounds", type=int)
    found.add_argument("--seed", type=int, default=0)
    return found


def settings(given: argparse.Namespace, whole: Settings, quick: Settings) -> Settings:
    """The sizes of a run, the whole or the quick one, as the command line changes them; sets torch's threads."""
    sizes = quick if given.quick else whole
    torch.set_num_threads(given.threads)
    changes = {"device": given.device, "threads": given.threads, "seed": given.seed, "rounds": given.rounds or sizes.rounds}
    return type(sizes)(**{**asdict(sizes), **changes})
