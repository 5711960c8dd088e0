"""Means and spreads of activations over a data set, in one streaming pass: the reference of mean and noise cuts."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from surgery.anatomy import Attention
from surgery.captures import capture
from surgery.errors import SpecError, describe
from surgery.patch import anatomy_of
from surgery.reference import Entry, Reference
from surgery.sites import SITES
from surgery.taps import runs_on


@dataclass
class _Moments:
    """Running count, mean and sum of squared deviations (Chan, Golub and LeVeque 1983), float64."""

    count: Tensor
    mean: Tensor
    squares: Tensor

    def add(self, values: Tensor, weights: Tensor) -> None:
        """values: (row, .., d); weights: (row, .., 1) of 0 and 1. Rows are merged into the state."""
        count = weights.sum(dim=0)
        mean = (values * weights).sum(dim=0) / count.clamp(min=1)
        squares = (weights * (values - mean) ** 2).sum(dim=0)
        total = self.count + count
        share = count / total.clamp(min=1)
        delta = mean - self.mean
        self.squares += squares + delta**2 * self.count * share
        self.mean += delta * share
        self.count = total


def collect_reference(
    model: nn.Module,
    data: Iterable[Any],
    sites: Sequence[str] | str = ("rot_q", "rot_k", "v", "z"),
    layers: Any = "all",
    *,
    per_position: bool = False,
    progress: bool = True,
    strict: bool = True,
) -> Reference:
    """Mean and standard deviation of activations over a data set, per head and channel, with the cuts that the model has.

    data: any iterable of model inputs: mappings of keyword arguments, or tensors of token ids; read once, batch by batch,
      and moved to the model's device. Positions that an attention mask marks as padding do not count.
    sites: any but scores and pattern; the default is what Freeze to "mean" and "noise" needs for both circuits.
    per_position: keep positions apart: values are (head, position, d) instead of (head, d), positions from 0, as far as
      the longest batch; otherwise all positions of all rows are pooled.
    progress: show a progress bar. Sums are float64; results have the model's dtype. The spread is the population's
    (divided by n). Gradients are off; the model's train or eval mode is left as it is.
    Raises SpecError if the data is empty, if all that it has for a position is padding, or if a site cannot have a mean.
    """
    sites = (sites,) if isinstance(sites, str) else tuple(sites)
    if matrix := [site for site in sites if site in SITES and SITES[site].is_matrix]:
        raise SpecError(
            describe(
                "collect_reference",
                f"sites {', '.join(matrix)}",
                "sites of vectors: " + ", ".join(s for s in SITES if not SITES[s].is_matrix),
                "Capture attention matrices with surgery.capture; their width is not fixed.",
            )
        )
    if isinstance(data, Tensor | Mapping) or not isinstance(data, Iterable):
        raise SpecError(
            describe(
                "collect_reference", f"data of type {type(data).__name__}", "an iterable of batches", "Pass a list: [batch]."
            )
        )
    anatomy = anatomy_of(model, strict)
    state: dict[tuple[str, str], _Moments] = {}
    dtypes: dict[tuple[str, str], torch.dtype] = {}
    device = runs_on(model)
    with torch.no_grad(), capture(model, sites, layers, detach=True, strict=strict) as run:
        for batch in tqdm(data, desc="reference", unit="batch", disable=not progress):
            inputs = _inputs(batch, device)
            model(**inputs)
            for (address, site), tensor in run.taken():
                attention = anatomy[address]
                if site == "v" and tensor.shape[1] < attention.heads:
                    tensor = tensor.repeat_interleave(attention.heads // tensor.shape[1], 1)
                dtypes[address, site] = tensor.dtype
                _accumulate(state, (address, site), tensor, _weights(attention, site, tensor, inputs), per_position)
    if not state:
        raise SpecError(describe("collect_reference", "no data", "at least one batch", "Pass a non-empty iterable."))
    entries = {}
    for key, moments in state.items():
        missing = moments.count[:, 0, 0] == 0 if per_position else moments.count[0] == 0
        if empty := missing.nonzero().flatten().tolist():
            where = f"at positions {', '.join(map(str, empty))}" if per_position else "at any position"
            raise SpecError(
                describe(
                    f"collect_reference: {' '.join(key)}",
                    f"no token {where}",
                    "at least one",
                    "Check the data's attention mask.",
                )
            )
        spread = (moments.squares / moments.count.clamp(min=1)).sqrt()
        # (position, head, d) while collecting; the head axis comes first in a reference.
        value, spread = (t.transpose(0, 1) if per_position else t for t in (moments.mean, spread))
        entries[key] = Entry(value.to(dtypes[key]).contiguous(), spread.to(dtypes[key]).contiguous())
    return Reference("mean", entries, anatomy.fingerprint)


def _inputs(batch: Any, device: torch.device) -> dict[str, Any]:
    if isinstance(batch, Tensor):
        batch = {"input_ids": batch}
    if not isinstance(batch, Mapping):
        raise SpecError(
            describe(
                "collect_reference",
                f"a batch of type {type(batch).__name__}",
                "a mapping of model inputs or a tensor of token ids",
                "Tokenise the data first, or wrap it: ({'input_ids': x} for x in data).",
            )
        )
    inputs = {name: value.to(device) if isinstance(value, Tensor) else value for name, value in batch.items()}
    return {**inputs, "use_cache": False} if "use_cache" not in inputs else inputs


def _weights(attention: Attention, site: str, tensor: Tensor, inputs: Mapping[str, Any]) -> Tensor:
    """(batch, position) 1 for tokens, 0 for padding, along the site's own positions."""
    decoder = attention.address.startswith("decoder.")
    name = "decoder_attention_mask" if decoder else "attention_mask"
    if attention.kind == "cross" and SITES[site].over_keys:
        name = "encoder_attention_mask" if not decoder or "encoder_attention_mask" in inputs else "attention_mask"
    mask = inputs.get(name)
    length = tensor.shape[2]
    if isinstance(mask, Tensor) and mask.dim() == 2 and mask.shape[1] == length:
        return mask.to(torch.float64)
    return torch.ones(tensor.shape[0], length, dtype=torch.float64, device=tensor.device)


def _accumulate(
    state: dict[tuple[str, str], _Moments], key: tuple[str, str], tensor: Tensor, weights: Tensor, per_position: bool
) -> None:
    values = tensor.double().transpose(1, 2)  # (batch, position, head, d)
    weights = weights.to(values.device)[:, :, None, None]
    if not per_position:
        values, weights = values.flatten(0, 1), weights.flatten(0, 1)
    moments = state.get(key)
    if moments is None:
        zeros = values.new_zeros(values.shape[1:])
        moments = state[key] = _Moments(zeros[..., :1].clone(), zeros.clone(), zeros.clone())
    if per_position:
        _lengthen(moments, values.shape[1])
        known = moments.mean.shape[0]
        if values.shape[1] < known:
            pad = (0, 0, 0, 0, 0, known - values.shape[1])
            values, weights = nn.functional.pad(values, pad), nn.functional.pad(weights, pad)
    moments.add(values, weights)


def _lengthen(moments: _Moments, length: int) -> None:
    missing = length - moments.mean.shape[0]
    if missing > 0:
        pad = (0, 0, 0, 0, 0, missing)
        moments.count, moments.mean, moments.squares = (
            nn.functional.pad(t, pad) for t in (moments.count, moments.mean, moments.squares)
        )
