"""TransformerLens (4.3 or newer): hook points of a TransformerBridge, which runs eager attention."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any, ClassVar

import torch
from torch import Tensor

from benchmarks.comparison.task import Task
from benchmarks.comparison.way import Way, frozen

SITES = ("q", "k", "v", "pattern", "z")


class TransformerLens(Way):
    name, key = "TransformerLens", "transformer-lens"
    package: ClassVar[str | None] = "transformer-lens"
    remark: ClassVar[str | None] = "computes attention as eager models do in all work: compare with unpatched eager"
    whole_layers = 1

    def __init__(self, task: Task) -> None:
        super().__init__(task)
        self.bridge = self._boot(self.model)

    def _boot(self, model: Any) -> Any:
        from tokenizers import Tokenizer, models
        from transformer_lens.model_bridge import TransformerBridge
        from transformers import PreTrainedTokenizerFast

        words = Tokenizer(models.WordLevel({"a": 0}, unk_token="a"))
        with tempfile.TemporaryDirectory() as folder:
            model.config.save_pretrained(folder)
            special = dict.fromkeys(("unk_token", "pad_token", "bos_token", "eos_token"), "a")
            tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, name_or_path=folder, **special)
            more = {"device": str(model.device), "dtype": model.dtype, "tokenizer": tokenizer}
            return TransformerBridge.boot_transformers(folder, hf_model=model, **more)

    def cut(self, site: str, layers: Sequence[int], heads: Sequence[int], ste: bool = False) -> AbstractContextManager[Any]:
        index = list(heads)

        def zero(tensor: Tensor, hook: Any) -> Tensor:
            if not ste:
                tensor[:, :, index] = 0
                return tensor
            cut = tensor.index_fill(2, torch.tensor(index, device=tensor.device), 0)
            return tensor + (cut - tensor).detach()

        return self.bridge.hooks(fwd_hooks=[(f"blocks.{layer}.attn.hook_{site}", zero) for layer in layers])

    def logits(self, ids: Tensor, past: Any = None) -> Tensor:
        return self.bridge(ids) if past is None else self.bridge(ids, past_key_values=past)

    def cache(self, ids: Tensor) -> Any:
        return self.bridge(ids, use_cache=True, return_type="logits_and_cache")[1]

    def generate(self, ids: Tensor, steps: int) -> Tensor:
        return self.bridge.generate(ids, steps, stop_at_eos=False, do_sample=False, verbose=False, return_type="tokens")

    def _cached(self, sites: Sequence[str]) -> Any:
        wanted = {f"blocks.{layer}.attn.hook_{site}" for layer in self.task.layers for site in sites}
        return self.bridge.run_with_cache(self.task.ids, names_filter=lambda name: name in wanted)[1]

    def patterns(self, heads: Sequence[int] | None) -> list[Tensor]:
        names = [f"blocks.{layer}.attn.hook_pattern" for layer in self.task.layers]
        if heads is None:
            cache = self._cached(["pattern"])
            return [cache[name] for name in names]
        found: list[Tensor] = []

        def keep(tensor: Tensor, hook: Any) -> None:
            found.append(tensor[:, list(heads)])

        self.bridge.run_with_hooks(self.task.ids, fwd_hooks=[(name, keep) for name in names])
        return found

    def everything(self) -> Any:
        return self._cached(SITES)

    def read_everything(self, found: Any) -> list[Tensor]:
        tensors = [found[f"blocks.{layer}.attn.hook_{site}"] for layer in self.task.layers for site in SITES]
        return [t if site == "pattern" else t.transpose(1, 2) for t, site in zip(tensors, SITES * len(tensors), strict=False)]

    def importance(self) -> Tensor:
        found: dict[str, dict[str, Tensor]] = {"fwd": {}, "bwd": {}}

        def keep(way: str, name: str) -> Callable[[Tensor, Any], None]:
            return lambda tensor, hook: found[way].update({name: tensor})

        names = [f"blocks.{layer}.attn.hook_z" for layer in self.task.layers]
        hooks = {f"{way}_hooks": [(name, keep(way, name)) for name in names] for way in found}
        with torch.enable_grad(), self.bridge.hooks(**hooks):
            self.task.difference(self.bridge(self.task.ids)).backward()
        return torch.stack([-(found["fwd"][name].detach() * found["bwd"][name]).sum((0, 1, 3)) for name in names])

    def for_importance(self) -> AbstractContextManager[Any]:
        return frozen(self.model)

    def install(self, model: Any) -> None:
        self._boot(model)
