"""The sizes of a measurement of overhead, and what is checked before anything is timed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from benchmarks import arguments, models
from benchmarks.results import Row, by_cpu, row
from benchmarks.timing import interleave
from surgery import Spec, patched


@dataclass(frozen=True)
class Settings(arguments.Common):
    """Sizes of the measurement. The defaults are those that the targets are stated for."""

    rounds: int = 20
    layers: int = 12
    heads: int = 12
    kv_heads: int = 4
    d_head: int = 64
    batch: int = 4
    length: int = 128
    prompt: int = 16
    steps: int = 64
    memory_length: int = 8192
    patch_layers: tuple[int, ...] = (6, 12, 24, 48)
    patch_rounds: int = 5

    @property
    def two(self) -> list[int]:
        return models.two_heads(self.heads)

    @property
    def caches(self) -> tuple[int, int]:
        """How many tokens a cache holds before a step."""
        return self.length, 8 * self.length

    @property
    def unfused_length(self) -> int:
        """How many tokens there are where some heads' matrix is computed beside the kernel."""
        return 32 * self.length

    @property
    def shape(self) -> str:
        return f"{self.batch} × {self.length} tokens"

    def build(self, make: Callable[..., Any] = models.gpt2, **options: Any) -> tuple[Any, Any, Tensor]:
        """A model, its twin, and token ids for both."""
        plain = make(self.layers, self.heads, width=self.heads * self.d_head, device=self.device, seed=self.seed, **options)
        return plain, models.twin(plain), models.tokens(self.batch, self.length, self.device, self.seed)

    def time(
        self,
        group: str,
        what: str,
        over: Callable[[], Any],
        run: Callable[[], Any],
        target: float | None = None,
        times: int = 1,
    ) -> Row:
        """Times `run` over `over`; on a CPU by CPU time. group: "time of ..". times: as many rounds.

        The targets are stated for the CPU; elsewhere they are left out.
        """
        pairs = interleave(over, run, rounds=times * self.rounds, seed=self.seed, device=self.device)
        group, numbers = by_cpu(group, pairs.to_dict(), self.device)
        return row(group, what, numbers, target if self.device == "cpu" else None)


QUICK = Settings(rounds=3, batch=1, length=32, steps=4, memory_length=512, patch_layers=(6, 12), patch_rounds=1)


def states(model: Any, ids: Tensor) -> Tensor:
    return model(ids).last_hidden_state


def agree(what: str, found: Tensor, expected: Tensor) -> None:
    """Raises RuntimeError unless equal bit for bit: nothing is timed that does not compute what it should."""
    if not torch.equal(found, expected):
        raise RuntimeError(f"{what}: differs from the unpatched model by {(found - expected).abs().max():.3g}")


def check_cut(what: str, model: Any, spec: Spec, ids: Tensor, uncut: Tensor) -> None:
    """Raises RuntimeError unless the cut changes the output, and as kernel="eager" changes it, up to rounding."""
    found = states(model, ids)
    with patched(model, spec, kernel="eager"):
        reference = states(model, ids)
    if torch.equal(found, uncut):
        raise RuntimeError(f"{what}: the cut changes nothing")
    require_close(f"{what}: the kernels differ by", found, reference)


def require_close(what: str, found: Tensor, reference: Tensor) -> None:
    """Raises RuntimeError, of `what` and how much, for what differs by more than rounding."""
    tolerance = 1e-3 if found.dtype == torch.float32 else 0.1
    if not torch.allclose(found, reference, rtol=tolerance, atol=tolerance):
        raise RuntimeError(f"{what} {(found - reference).abs().max():.3g}")
