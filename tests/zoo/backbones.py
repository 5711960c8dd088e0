"""Backbones that stand in for those of the library timm, which is not needed to run the tests."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from transformers import PretrainedConfig, ResNetConfig, ViTConfig


@dataclass(frozen=True)
class Part:
    """A sub-config that the family leaves out by default: the small one of this model type."""

    model_type: str


def tiny_resnet(out_indices: list[int] | None = None, **more: Any) -> PretrainedConfig:
    """Convolutions: feature maps with 32 channels."""
    return ResNetConfig(
        embedding_size=32,
        hidden_sizes=[32, 32, 32, 32],
        depths=[1, 1, 1, 1],
        layer_type="basic",
        out_indices=out_indices or [1, 2, 3, 4],
        **more,
    )


def tiny_vit(**more: Any) -> PretrainedConfig:
    """A vision transformer."""
    return ViTConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=40, image_size=32, patch_size=8, **more
    )
