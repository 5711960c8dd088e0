"""The random models that are measured, and twins of them that share their weights."""

from __future__ import annotations

import copy
import os
from dataclasses import fields
from typing import Any

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import torch
import transformers
from torch import nn
from transformers.modeling_outputs import BaseModelOutputWithPast

VOCABULARY = 50257
CACHE = next(field.name for field in fields(BaseModelOutputWithPast) if field.name in ("cache", "past_key_values"))
"""What transformers calls a KV cache, given and returned: cache since 5.24, past_key_values before."""


def gpt2(
    layers: int = 12,
    heads: int = 12,
    width: int = 768,
    *,
    positions: int = 1024,
    vocabulary: int = VOCABULARY,
    tied: bool = True,
    **options: Any,
) -> Any:
    """A GPT-2 with random weights, by default of the small model's shape; options as in `_build`.

    tied: as GPT-2 is, reading out with its embedding; a random one then says the last token again, whatever attention does.
    """
    sizes = {"n_layer": layers, "n_head": heads, "n_embd": width, "n_positions": positions, "vocab_size": vocabulary}
    config = transformers.GPT2Config(**sizes, use_cache=False, tie_word_embeddings=tied)
    return _build("GPT2", config, **options)


def llama(
    layers: int = 12,
    heads: int = 12,
    kv_heads: int = 4,
    width: int = 768,
    *,
    positions: int = 2048,
    vocabulary: int = VOCABULARY,
    **options: Any,
) -> Any:
    """A Llama with grouped heads, otherwise of the same shape."""
    config = transformers.LlamaConfig(
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        hidden_size=width,
        intermediate_size=width * 8 // 3,
        max_position_embeddings=positions,
        vocab_size=vocabulary,
        use_cache=False,
    )
    return _build("Llama", config, **options)


def _build(
    name: str,
    config: Any,
    *,
    head: bool = False,
    implementation: str = "sdpa",
    device: str = "cpu",
    seed: int = 0,
    half: bool = True,
    spread: float = 0.02,
) -> Any:
    """head: with the projection to the vocabulary. It costs as much as the rest of a small model and is never patched, so that
    it would halve every overhead: measurements do without it unless they generate. bfloat16 on CUDA, unless half=False. spread:
    standard deviation of weights."""
    config._attn_implementation, config.initializer_range = implementation, spread
    torch.manual_seed(seed)
    model = getattr(transformers, f"{name}{'LMHeadModel' if name == 'GPT2' else 'ForCausalLM'}" if head else f"{name}Model")(
        config
    )
    return model.to(device, torch.bfloat16 if half and torch.device(device).type == "cuda" else torch.float32).eval()


def twin(model: nn.Module, own_parameters: bool = False) -> Any:
    """A copy that shares every weight: two models that differ in nothing that a memory bus could notice.

    own_parameters: the same memory in parameters of its own, whose gradients, or lack of them, are no other model's.
    """
    shared = {id(tensor): tensor for tensor in [*model.parameters(), *model.buffers()]}
    if own_parameters:
        shared |= {id(tensor): nn.Parameter(tensor.detach()) for tensor in model.parameters()}
    return copy.deepcopy(model, shared)


def two_heads(heads: int) -> list[int]:
    """Two that are not neighbours: neighbours are cut without index tensors, and would look cheaper."""
    return [heads // 4, heads // 2 + 1]


def greedy(steps: int) -> dict[str, Any]:
    """Options of generate: exactly so many tokens, with a cache."""
    return {"min_new_tokens": steps, "max_new_tokens": steps, "do_sample": False, "use_cache": True, "pad_token_id": 0}


def tokens(batch: int, length: int, device: str = "cpu", seed: int = 0, vocabulary: int = VOCABULARY) -> torch.Tensor:
    """Random token ids (batch, length)."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, vocabulary, (batch, length), generator=generator).to(device)
