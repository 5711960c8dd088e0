"""Real attentions with a loss that plants what heads two tasks have in common, and how well the tests find it.

The attentions of a random model, each layer by itself: what a layer reads is cut from the graph, so that a head's gradient is
what the loss planted there. The loss of a sample is linear in what each attention computed, with random coefficients:

* ⟨z, R⟩ gives head h's z the gradient R_h, and Q, K and V theirs through its own softmax;
* ⟨result − z W_O, Δ⟩ has the gradient Δ at the output projection and none at z (it is 0 but for rounding). Δ is chosen such
  that the gradient of W_O, zᵀΔ, is any given matrix: all heads of a layer share Δ, and without that a head whose z resembles a
  planted one's would be raised in truth.

How large a head's R and zᵀΔ are is its strength in the sample: log-normal, and larger at planted heads. Heads that oppose or
co-operate have a part of R and zᵀΔ that is the same in all samples: W_V's gradient then has a mean, as layer norms have biases.
"""

from __future__ import annotations

import warnings
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import torch
import transformers
from torch import Tensor, nn

from surgery.analysis.interference import (
    Gradients,
    Scores,
    Tested,
    collect,
    conflict_test,
    heatmap,
    overlap_test,
    permutation_test,
)
from surgery.analysis.metrics import Measured, Metric
from surgery.patch import anatomy_of

VOCABULARY = 97
SPREAD = 0.5
"""Of the logs of strengths: samples of one task differ among themselves."""

Place = tuple[str, int]
"""Address and head."""


@dataclass(frozen=True)
class Sizes:
    """Of the model, of a task, and of what is planted. raised: strength of a planted head; scale: B's loss over A's."""

    layers: int = 6
    heads: int = 6
    d_head: int = 4
    length: int = 32
    samples: int = 40
    planted: int = 4
    raised: float = 2.5
    scale: float = 3.0


def model(s: Sizes, seed: int = 0) -> Any:
    """A GPT-NeoX in float32, which keeps Q, K and V head by head in one matrix; its layer norms have biases."""
    config = transformers.GPTNeoXConfig(
        vocab_size=VOCABULARY,
        hidden_size=s.heads * s.d_head,
        intermediate_size=2 * s.heads * s.d_head,
        num_hidden_layers=s.layers,
        num_attention_heads=s.heads,
        rotary_pct=0.5,
        max_position_embeddings=s.length,
        use_cache=False,
    )
    torch.manual_seed(seed)
    found = transformers.GPTNeoXForCausalLM(config).eval()
    with torch.no_grad():
        for name, parameter in found.named_parameters():
            if parameter.dim() == 2:
                parameter.normal_(0, parameter.shape[1] ** -0.5)
            elif name.endswith("layernorm.bias"):
                parameter.normal_(0, 0.5)
    return found


class Planter:
    """Collects tasks of a model by a loss whose gradient at every head is known. See the module."""

    def __init__(self, model: Any, s: Sizes, seed: int = 0) -> None:
        self.model, self.s = model, s
        self.attentions = list(anatomy_of(model))
        self.generator = torch.Generator().manual_seed(seed)
        self.directions = {
            a.address: (self._noise(a.heads, a.d_value), self._noise(a.heads, a.d_value, s.heads * s.d_head))
            for a in self.attentions
        }
        self.calls: dict[str, tuple[nn.Linear, Tensor, Tensor]] = {}
        self.raised: set[Place] = set()
        self.signs: dict[Place, float] = {}
        self.scale = 1.0
        for attention in self.attentions:
            reading = {attention.projections[site].path for site in "qkv"}
            for path in reading:
                model.get_submodule(path).register_forward_pre_hook(lambda module, args: tuple(a.detach() for a in args))
            writing = model.get_submodule(attention.projections["o"].path)
            writing.register_forward_hook(self._keep(attention.address))

    def places(self) -> list[Place]:
        """All heads."""
        return [(attention.address, head) for attention in self.attentions for head in range(attention.heads)]

    def draw(self, *sizes: int) -> list[list[Place]]:
        """Disjoint sets of heads of these sizes, at random."""
        places = self.places()
        order = [places[number] for number in torch.randperm(len(places), generator=self.generator).tolist()]
        return [[order.pop() for _ in range(size)] for size in sizes]

    def task(
        self,
        name: str,
        samples: int,
        raised: Collection[Place] = (),
        signs: dict[Place, float] | None = None,
        scale: float = 1.0,
    ) -> Gradients:
        """Random tokens; raised: heads that are stronger; signs: heads whose V and O gradients have a mean of that sign."""
        self.raised, self.signs, self.scale = set(raised), signs or {}, scale
        ids = torch.randint(1, VOCABULARY, (samples, self.s.length), generator=self.generator)
        metric = Metric("planted", "", self._loss)
        return collect(self.model, list(ids.split(40)), loss=metric, task=name, progress=False)

    def _noise(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self.generator)

    def _keep(self, address: str) -> Any:
        def keep(module: nn.Linear, args: tuple[Tensor], output: Tensor) -> None:
            self.calls[address] = module, args[0], output

        return keep

    def _loss(self, measured: Measured) -> Tensor:
        total: Any = 0
        for attention in self.attentions:
            module, z, result = self.calls[attention.address]
            samples, length = z.shape[:2]
            channels = attention.projections["o"].channels
            strength = (SPREAD * self._noise(samples, attention.heads)).exp()
            for head in range(attention.heads):
                strength[:, head] *= self.s.raised if (attention.address, head) in self.raised else 1.0
            signs = torch.tensor([self.signs.get((attention.address, head), 0.0) for head in range(attention.heads)])
            at_z, at_weight = self.directions[attention.address]
            errors = self._noise(samples, length, *at_z.shape) + signs[:, None] * at_z
            wanted = self._noise(samples, *at_weight.shape) + signs[:, None, None] * at_weight
            errors, wanted = errors * strength[:, None, :, None], wanted * strength[:, :, None, None]
            apart = z[..., channels.flatten()]
            total = total + (apart * errors.flatten(2)).sum((1, 2))
            total = total + ((result - nn.functional.linear(z, module.weight)) * _behind(apart, wanted.flatten(1, 2))).sum(
                (1, 2)
            )
        return self.scale * total


def _behind(z: Tensor, wanted: Tensor) -> Tensor:
    """The smallest Δ (sample, position, d_model) for which zᵀΔ is what is wanted, (sample, channel, d_model).

    There is one as long as samples have more positions than a layer's heads have channels.
    """
    z, wanted = z.detach().double(), wanted.double()
    return (z @ torch.linalg.solve(z.mT @ z, wanted)).float()


@dataclass(frozen=True)
class Found:
    """Of one study. power: share of what is true that was found; false: share of the findings that are not true.

    sets: the heads that were planted, as they were drawn.
    """

    power: float
    false: float
    result: Tested
    sets: list[list[Place]]


def overlap(planter: Planter, seed: int = 0) -> Found:
    """`overlap_test` where A and B share heads, and each has as many of its own. True: all blocks of the shared heads."""
    s = planter.s
    shared, of_a, of_b = sets = planter.draw(s.planted, s.planted, s.planted)
    result = overlap_test(
        planter.task("A", s.samples, [*shared, *of_a]),
        planter.task("B", s.samples, [*shared, *of_b], scale=s.scale),
        planter.task("control", s.samples),
        seed=seed,
    )
    return _judged(result, {(*place, block) for place in shared for block in "QKVO"}, set(), sets)


def conflict(planter: Planter, seed: int = 0) -> Found:
    """`conflict_test` with opposed and co-operating heads. True: V and O of the opposed ones.

    Their Q and K are not judged: nothing is planted there but what R's mean happens to give them.
    """
    s = planter.s
    opposed, together = sets = planter.draw(s.planted, s.planted)
    signs = dict.fromkeys([*opposed, *together], 1.0)
    a = planter.task("A", s.samples, signs=signs)
    b = planter.task("B", s.samples, signs=signs | dict.fromkeys(opposed, -1.0), scale=s.scale)
    true, open_ = ({(*place, block) for place in opposed for block in blocks} for blocks in ("VO", "QK"))
    return _judged(conflict_test(a, b, seed=seed), true, open_, sets)


def _judged(result: Tested, true: set[Any], open_: set[Any], sets: list[list[Place]]) -> Found:
    rows = result.significant()
    found = set(zip(rows.address, rows["head"], rows.block, strict=True)) - open_
    return Found(len(found & true) / len(true), len(found - true) / max(1, len(found)), result, sets)


def level(pool: Gradients, replicates: int, seed: int = 0) -> pd.DataFrame:
    """Shares of hypotheses with p_row and p_col of at most 0.05 where A, B and the control are alike, a row for each replicate.

    The gradients are collected once: a replicate deals the pool's samples to A, B and the control anew, and takes its scores
    from the map of the pool with itself, whose reference is the whole pool's. That is as good as new samples: the level of a
    permutation test is given the samples, over whose each is, and the dealing is fair. Replicates are independent, given them.
    """
    maps = heatmap(pool, pool, is_unit=True)
    assert maps.maps is not None
    table = maps.maps.double().numpy()
    blocks = [block for _, block, _ in maps.hypotheses]
    rng = np.random.default_rng(seed)
    shares = []
    for replicate in range(replicates):
        scores = dealt(table, *np.array_split(rng.permutation(len(pool)), 3))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # of few permutations: corrected p-values are not looked at
            frame = permutation_test(scores, blocks, n_permutations=399, seed=replicate).frame
        shares.append((frame[["p_row", "p_col", "p"]] <= 0.05).mean())
    return pd.DataFrame(shares)


def dealt(table: np.ndarray, a: np.ndarray, b: np.ndarray, control: np.ndarray) -> Scores:
    """Scores of tasks whose samples have these numbers, from the map (hypothesis, sample, sample) of all."""
    a_b = table[:, a][:, :, b]
    return Scores(a_b.mean(2).T, table[:, control][:, :, b].mean(2).T, a_b.mean(1).T, table[:, a][:, :, control].mean(1).T)
