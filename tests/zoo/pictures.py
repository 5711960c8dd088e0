"""Pictures and videos in the layouts that the families take."""

from __future__ import annotations

from typing import Any

import torch

from zoo.shapes import BATCH, channels, find, normal, pair, patch, side, vision

GRID = 4  # patches along each side of a picture, where the number is free

# One more dimension after the batch: several pictures for each row.
_SEVERAL = {
    "idefics", "idefics2", "idefics3", "smolvlm", "granite_docling", "modernvbert", "ultravbert", "colmodernvbert",
    "llava_next_video", "llava_onevision", "granite4_vision", "inkling_mm_model",  "perception_lm",
}  # fmt: skip
# Two tiles and the whole, and the size of the whole.
_TILES = {"llava_next", "llava_next_video", "llava_onevision", "granite4_vision"}
_SIZED = {"apertus1p5", "mistral3", "mistral4", "mistral_large4", "lighton_ocr", "emu3", "pixtral"}
_FLAT = {"fuyu"}
_SQUARE = {"kimi_k25", "kimi_k25_vision", "paddleocr_vl"}
_PAIRS = {"lightglue", "superglue", "efficientloftr"}
_SIDES = {"depth_pro": (128, 128), "pp_ocrv5_mobile_rec": (96, 64), "seggpt": (32, 32), "tvp": (64, 64), "vitmatte": (64, 64)}
_FRAMES = {"timesformer", "videomae", "vivit", "xclip", "instructblipvideo", "tvp"}


def patch_width(config: Any) -> int:
    """The numbers of one flat patch."""
    seen = vision(config)
    time = find(seen, "temporal_patch_size", "patch_temporal") or 1
    time = time if isinstance(time, int) else time[0]
    return channels(config) * time * patch(config) ** 2


def _grids(made: dict[str, Any], config: Any, model_type: str, names: dict[str, Any], generator: torch.Generator) -> bool:
    """Pictures as a flat row of patches with the grid of each; whether the family takes them so."""
    grid = next((name for name in ("image_grid_thw", "grid_thw") if name in names), None)
    if grid is None:
        return False
    made[grid] = torch.tensor([[1, GRID, GRID]] * BATCH)
    target = "pixel_values" if "pixel_values" in names else "hidden_states"
    made[target] = normal(generator, BATCH * GRID * GRID, patch_width(config))
    size = patch(config)
    if model_type in _SQUARE:
        made[target] = normal(generator, BATCH * GRID * GRID, channels(config), size, size)
    if model_type in {"inkling2", "inkling2_vision", "inkling2_loop"}:  # as many blocks of patches as tokens
        made[grid] = torch.tensor([[1, 2, 2]] * BATCH)
        made[target] = normal(generator, BATCH * 4, 2 * size, 2 * size, channels(config))
    for merge in ("image_merge_sizes", "merge_sizes"):
        if merge in names:
            made[merge] = torch.tensor([1] * BATCH)
    return True


def _free_patches(made: dict[str, Any], config: Any, names: dict[str, Any], generator: torch.Generator) -> bool:
    """Pictures as padded rows of patches with their shapes."""
    if "spatial_shapes" not in names:
        return False
    made["spatial_shapes"] = torch.tensor([[GRID, GRID]] * BATCH)
    made["pixel_values"] = normal(generator, BATCH, GRID * GRID, patch_width(config))
    made["pixel_attention_mask"] = torch.ones(BATCH, GRID * GRID, dtype=torch.long)
    return True


def _positions(made: dict[str, Any], config: Any, names: dict[str, Any], generator: torch.Generator) -> None:
    """Flat patches with the place of each: a multiple of what the family pools together."""
    name = next((name for name in ("image_position_ids", "pixel_position_ids") if name in names), None)
    if name is None:
        return
    each = 2 * (find(vision(config), "pooling_kernel_size", "spatial_merge_size") or 1)
    places = torch.stack(torch.meshgrid(torch.arange(each), torch.arange(each), indexing="ij"), dim=-1).flip(-1)
    made[name] = places.reshape(1, -1, 2).repeat(BATCH, 1, 1)
    width = patch_width(config)
    if config.model_type.startswith("gemma4_unified"):  # the patches come pooled
        width *= (find(vision(config), "pooling_kernel_size") or 1) ** 2
    made["pixel_values"] = torch.rand(BATCH, each * each, width, generator=generator)


def add_pictures(made: dict[str, Any], config: Any, model_type: str, names: dict[str, Any], generator: torch.Generator) -> None:
    if _grids(made, config, model_type, names, generator) or _free_patches(made, config, names, generator):
        return
    if "vision_config" in vars(config) and config.vision_config is None:
        return
    height, width = _SIDES.get(model_type) or side(config)
    if "pixel_values" in names or "images" in names:
        middle = (1,) if model_type in _SEVERAL else (2,) if model_type in _PAIRS else ()
        if model_type in _TILES:
            middle = (3,)
        if model_type in _FRAMES:
            middle = (find(config, "num_frames") or 2,)
        name = "pixel_values" if "pixel_values" in names else "images"
        made[name] = normal(generator, BATCH, *middle, channels(config), height, width)
        if model_type in _FLAT:
            made[name] = normal(generator, BATCH, GRID * GRID, patch_width(config))
        if "image_sizes" in names and model_type in _SIZED | _TILES:
            made["image_sizes"] = torch.tensor([[height, width * (2 if model_type in _TILES else 1)]] * BATCH)
        _positions(made, config, names, generator)
    elif "pixel_values_videos" in names:
        time = pair(find(config, "num_frames", "frames_per_clip"), 2)[0]
        made["pixel_values_videos"] = normal(generator, BATCH, time, channels(config), height, width)
