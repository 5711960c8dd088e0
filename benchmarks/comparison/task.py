"""What all ways are given: one random model, its inputs, and which heads are meant."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from benchmarks import arguments, models


@dataclass(frozen=True)
class Settings(arguments.Common):
    """Sizes of one comparison. vocabulary: small, so that a projection that nobody patches does not hide what cuts cost.

    heavy: rounds of what takes many forwards. steps: tokens that are generated after a prompt.
    """

    rounds: int = 10
    heavy: int = 3
    family: str = "gpt2"
    layers: int = 12
    heads: int = 12
    kv_heads: int = 4
    d_head: int = 64
    vocabulary: int = 1024
    batch: int = 1
    length: int = 128
    prompt: int = 16
    steps: int = 64

    @property
    def shape(self) -> str:
        """In words."""
        family = {"gpt2": "GPT-2", "llama": f"Llama ({self.kv_heads} kv heads)"}[self.family]
        layers = "1 layer" if self.layers == 1 else f"{self.layers} layers"
        return f"{family}, {layers}, {self.heads} heads of {self.d_head}, {self.batch} × {self.length:,} tokens"

    @property
    def name(self) -> str:
        return f"compare-{self.family}-{self.length}"


class Task:
    """A model's weights and the inputs, once; every way has a twin of it that shares the weights.

    two: heads that are not neighbours, which are cut and captured in every layer. wanted, other: tokens whose log probabilities
    or logits are read at the last position.
    """

    wanted, other = 5, 7

    def __init__(self, settings: Settings, half: bool = True) -> None:
        """half: in bfloat16 on CUDA."""
        self.settings, self.half = settings, half
        s = settings
        self.two = models.two_heads(s.heads)
        self.ids = models.tokens(s.batch, s.length, s.device, s.seed, s.vocabulary)
        self.next = models.tokens(s.batch, 1, s.device, s.seed + 1, s.vocabulary)
        self.prompt = self.ids[:1, : s.prompt]

    @cached_property
    def model(self) -> Any:
        s = self.settings
        width = s.heads * s.d_head
        of_family: dict[str, Any] = {"tied": False} if s.family == "gpt2" else {"kv_heads": s.kv_heads}
        return getattr(models, s.family)(
            s.layers,
            s.heads,
            width=width,
            positions=s.length + s.steps,
            vocabulary=s.vocabulary,
            head=True,
            device=s.device,
            seed=s.seed,
            half=self.half,
            spread=width**-0.5,  # so that attention matters as much in every width
            **of_family,
        )

    def twin(self, implementation: str) -> Any:
        """The same weights under an attention implementation of transformers; gradients are its own."""
        found = models.twin(self.model, own_parameters=True)
        found.set_attn_implementation(implementation)
        return found

    @property
    def layers(self) -> range:
        return range(self.settings.layers)

    @property
    def places(self) -> list[tuple[int, int]]:
        """Every (layer, head)."""
        return [(layer, head) for layer in self.layers for head in range(self.settings.heads)]

    def loss(self, logits: Tensor) -> Tensor:
        """Mean cross entropy of the next tokens (nats)."""
        return torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1).float(), self.ids[:, 1:].flatten())

    def difference(self, logits: Tensor) -> Tensor:
        """Of two tokens' logits at the last position, the mean over the batch: what scores of heads are about."""
        return (logits[:, -1, self.wanted] - logits[:, -1, self.other]).float().mean()
