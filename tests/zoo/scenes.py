"""Text with pictures for the families that want them in a form of their own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from zoo.pictures import GRID, patch_width
from zoo.placeholders import insert
from zoo.shapes import BATCH, LENGTH, channels, find, ids, normal, patch

Made = dict[str, Any]
Feed = Callable[[Any, Made, torch.Generator], Made]


def _two_resolutions(model: Any, made: Made, generator: torch.Generator) -> Made:
    size = model.config.high_res_vision_config.image_size
    return {**made, "high_res_pixel_values": normal(generator, BATCH, 3, size, size)}


def _one_tile(model: Any, made: Made, generator: torch.Generator) -> Made:
    return {**made, "pixel_attention_mask": torch.ones(BATCH, 1, dtype=torch.bool)}


def _seen_by_all(model: Any, made: Made, generator: torch.Generator) -> Made:
    return {**made, "image_attention_mask": torch.ones(BATCH, LENGTH, 1, dtype=torch.long)}


def _questions(model: Any, made: Made, generator: torch.Generator) -> Made:
    return {**made, "qformer_input_ids": ids(generator, 5), "qformer_attention_mask": torch.ones(BATCH, 5, dtype=torch.long)}


def _marked_places(model: Any, made: Made, generator: torch.Generator) -> Made:
    made = insert(made, 90, model.config.latent_query_num)
    return {**made, "image_embeds_position_mask": (made["input_ids"] == 90).long()}


def _padded_patches(model: Any, made: Made, generator: torch.Generator) -> Made:
    count = GRID * GRID
    made = insert(made, find(model.config, "image_token_id"), count // 4)
    return {**made, "pixel_values": made["pixel_values"].reshape(BATCH, count, -1)}


def _rows_of_patches(model: Any, made: Made, generator: torch.Generator) -> Made:
    size = patch(model.config)
    return {
        **made,
        "pixel_values": normal(generator, 1, channels(model.config), size, BATCH * GRID * GRID * size),
        "target_sizes": torch.tensor([[GRID, GRID]] * BATCH, dtype=torch.int32),
    }


def _tiles_and_ratios(model: Any, made: Made, generator: torch.Generator) -> Made:
    seen = model.config.vision_config
    tiles, size = seen.max_num_tiles, seen.image_size
    return {
        **made,
        "pixel_values": normal(generator, BATCH, 1, tiles, 3, size, size),
        "aspect_ratio_ids": torch.ones(BATCH, 1, dtype=torch.long),
        "aspect_ratio_mask": torch.ones(BATCH, 1, tiles, dtype=torch.long),
        "cross_attention_mask": torch.ones(BATCH, LENGTH, 1, tiles, dtype=torch.long),
    }


def _grid_of_two(model: Any, made: Made, generator: torch.Generator) -> Made:
    return {
        **made,
        "pixel_values": normal(generator, BATCH * GRID * GRID, patch_width(model.config)),
        "image_grid_hw": torch.tensor([[GRID, GRID]] * BATCH),
    }


def _classes_and_tasks(model: Any, made: Made, generator: torch.Generator) -> Made:
    return {
        "pixel_values": made["pixel_values"],
        "classes_input_ids": ids(generator, 5, batch=4),
        "classes_attention_mask": torch.ones(4, 5, dtype=torch.long),
        "tasks_input_ids": ids(generator, 6),
        "tasks_attention_mask": torch.ones(BATCH, 6, dtype=torch.long),
        "classes_structure": torch.tensor([2, 2]),
    }


def _robot(model: Any, made: Made, generator: torch.Generator) -> Made:
    config = model.config
    size = model.config.vlm_config.vision_config.image_size
    return {
        **made,
        "pixel_values": normal(generator, BATCH, 1, 3, size, size),
        "pixel_attention_mask": torch.ones(BATCH, 1, dtype=torch.bool),
        "state": normal(generator, BATCH, config.max_state_dim),
        "noise": normal(generator, BATCH, config.chunk_size, config.max_action_dim),
        "timestep": torch.rand(BATCH, generator=generator),
    }


def _flattened(model: Any, made: Made, generator: torch.Generator) -> Made:
    values = normal(generator, BATCH, GRID * GRID, patch_width(model.config))
    rows = torch.arange(1, GRID + 1, dtype=torch.float32)
    places = torch.cartesian_prod(rows, rows).expand(BATCH, -1, -1)
    mask = torch.ones(BATCH, GRID * GRID, dtype=torch.long)
    patches = torch.cat([places, values], dim=-1)
    return {"flattened_patches": patches, "attention_mask": mask, "decoder_input_ids": ids(generator, LENGTH - 2)}


def _rows(model: Any, made: Made, generator: torch.Generator) -> Made:
    return {**made, "pixel_values": normal(generator, BATCH * GRID * GRID, patch_width(model.config))}


def _pooled(model: Any, made: Made, generator: torch.Generator) -> Made:
    patches = torch.arange(BATCH * GRID * GRID).reshape(BATCH * 4, 4)
    return {
        **made,
        "pixel_values": normal(generator, BATCH, GRID * GRID, patch_width(model.config)),
        "image_token_pooling": patches,
        "image_grids": torch.tensor([[2, 2, 0, 0]] * BATCH),
        "image_num_crops": torch.ones(BATCH, dtype=torch.long),
    }


def _folded(model: Any, made: Made, generator: torch.Generator) -> Made:
    seen = model.config.vision_config
    shape = (seen.temporal_patch_size, seen.patch_size, seen.patch_size, seen.num_channels)
    return {**made, "pixel_values": normal(generator, BATCH * 4, *shape)}


def _one_row(model: Any, made: Made, generator: torch.Generator) -> Made:
    return {name: value[1:] for name, value in made.items()}


def _tiles(count: int) -> Feed:
    def feed(model: Any, made: Made, generator: torch.Generator) -> Made:
        return insert(made, find(model.config, "image_token_id", "image_token_index"), count)

    return feed


def _text_alone(*names: str) -> Feed:
    def feed(model: Any, made: Made, generator: torch.Generator) -> Made:
        return {name: value for name, value in made.items() if name not in names}

    return feed


def _hidden_patches(model: Any, made: Made, generator: torch.Generator) -> Made:
    count = (model.config.image_size // model.config.patch_size) ** 2
    return {**made, "noise": torch.rand(BATCH, count, generator=generator)}


def _marked_patches(model: Any, made: Made, generator: torch.Generator) -> Made:
    made = insert(made, 90, model.config.latent_query_num)
    places = _flattened(model, made, generator)["flattened_patches"]
    return {**made, "flattened_patches": places, "image_embeds_position_mask": (made["input_ids"] == 90).long()}


def _protein(model: Any, made: Made, generator: torch.Generator) -> Made:
    mask = torch.ones(BATCH, LENGTH, dtype=torch.long)
    return {**made, "protein_input_ids": ids(generator), "protein_attention_mask": mask}


SCENES: dict[str, Feed] = {
    "evolla": _protein,
    "kosmos-2.5": _marked_patches,
    "vit_mae": _hidden_patches,
    "dots3_note": _text_alone("input_features"),
    "granite4_vision": _tiles(14),
    "glm_image": _text_alone("pixel_values", "image_grid_thw"),
    "inkling_mm_model": _folded,
    "tvp": _one_row,  # the family does not run on more than one row
    "minicpm_ocr": _rows_of_patches,
    "minicpmv4_6": _rows_of_patches,
    "minicpmv4_7": _rows_of_patches,
    "molmo2": _pooled,
    "neomme": _rows,
    "colqwen2": _padded_patches,
    "deepseek_vl_hybrid": _two_resolutions,
    "granite_docling": _one_tile,
    "idefics": _seen_by_all,
    "instructblip": _questions,
    "instructblipvideo": _questions,
    "kosmos-2": _marked_places,
    "minicpm_ocr_vision": _rows_of_patches,
    "minicpmv4_7_vision": _rows_of_patches,
    "mllama": _tiles_and_ratios,
    "nemotron_h_omni": _grid_of_two,
    "omdet-turbo": _classes_and_tasks,
    "pi0": _robot,
    "pix2struct": _flattened,
}
