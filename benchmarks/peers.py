"""One head's z set to zero, as other libraries do it: each by its own documented way, on a model of its own, equal weights.

Each is a function (model) -> (ids, layer, head) -> logits (batch, vocabulary) at the last position, for transformers' GPT-2.
None of them is needed for anything but this comparison: `pip install -e ".[peers]"`.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from functools import lru_cache
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
from torch import Tensor

Cut = Callable[[Tensor, int, int], Tensor]


def transformer_lens(model: Any) -> Cut:
    """A hook on hook_z."""
    from transformer_lens.model_bridge import TransformerBridge

    with tempfile.TemporaryDirectory() as folder:
        model.config.save_pretrained(folder)
        bridge = TransformerBridge.boot_transformers(folder, hf_model=model, device=str(model.device), dtype=model.dtype)

    def cut(ids: Tensor, layer: int, head: int) -> Tensor:
        def zero(z: Tensor, hook: Any) -> Tensor:
            z[:, :, head] = 0
            return z

        with torch.no_grad():
            return bridge.run_with_hooks(ids, fwd_hooks=[(f"blocks.{layer}.attn.hook_z", zero)])[:, -1]

    return cut


def nnsight(model: Any) -> Cut:
    """An assignment to the input of W_O within a trace."""
    from nnsight import NNsight

    traced, d_head = NNsight(model), model.config.n_embd // model.config.n_head

    def cut(ids: Tensor, layer: int, head: int) -> Tensor:
        with torch.no_grad(), traced.trace(ids):
            traced.transformer.h[layer].attn.c_proj.input[..., head * d_head : (head + 1) * d_head] = 0
            logits = traced.lm_head.output[:, -1].save()
        return logits

    return cut


def pyvene(model: Any) -> Cut:
    """ZeroIntervention on a head's attention value output; one intervenable model for each layer, made before."""
    import pyvene as library

    @lru_cache
    def intervenable(layer: int) -> Any:
        component = {"layer": layer, "component": "head_attention_value_output", "unit": "h"}
        return library.IntervenableModel({**component, "intervention_type": library.ZeroIntervention}, model=model)

    for layer in range(model.config.n_layer):
        intervenable(layer)

    def cut(ids: Tensor, layer: int, head: int) -> Tensor:
        with torch.no_grad():
            _, output = intervenable(layer)({"input_ids": ids}, unit_locations={"base": head})
        return output.logits[:, -1]

    return cut


PEERS: dict[str, Callable[[Any], Cut]] = {"transformer-lens": transformer_lens, "nnsight": nnsight, "pyvene": pyvene}
"""By the name of the package."""


def installed() -> dict[str, str]:
    """Versions of the peers that are here, by name."""
    found = {}
    for name in PEERS:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found
