"""KV caches under cuts: decoding step by step gives what the whole sequence gives, for every decoder and any cut."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from families import DECODERS, FAMILIES
from torch import Tensor
from transformers import DynamicCache, StaticCache

from surgery import Edit, Freeze, Spec, capture, collect_reference, patch_model, unpatch_model

PROMPT, STEPS = 6, 4

# Chunks and steps reorder sums inside the products, so equality is to float32 rounding of logits of size about 5.
CLOSE = dict(atol=2e-4, rtol=1e-4)


def cuts(model: Any, family: Any) -> dict[str, Spec]:
    """Cuts of every kind whose value could depend on how the sequence is fed in."""
    means = collect_reference(model, [family.inputs(seed=5)], progress=False)
    with capture(model, ["z", "rot_q", "rot_k"], detach=True) as other, torch.no_grad():
        model(**family.inputs(seed=6, length=PROMPT + STEPS, padding=0), use_cache=False)
    return {
        "qk zero": Spec(Freeze("qk", heads=[1])),
        "both mean": Spec(Freeze("both", layers=[1], heads=[0, 2], to="mean", reference=means)),
        "noise": Spec([Freeze("both", heads=[0], to="noise", seed=3), Freeze("ov", heads=[2], to="noise", strength=0.5)]),
        "positions": Spec([Edit("z", "scale", 0.0, heads=[0], positions=[2, 7]), Edit("rot_k", "zero", positions=[1, 8])]),
        "templates": Spec([Edit("pattern", "previous", heads=[1]), Edit("pattern", "first", layers=[1], heads=[3])]),
        "uniform": Spec([Edit("pattern", "uniform", heads=[0]), Edit("pattern", "diagonal", heads=[2])]),
        "scores": Spec([Edit("scores", "scale", 0.5, heads=[2]), Edit("pattern", "noise", value=(0.0, 0.1), heads=[0])]),
        "kv": Spec([Edit("v", "scale", 0.5, heads=[1]), Edit("rot_k", "add", 0.3, heads=[0], gqa="shared")]),
        "projection": Spec([Edit("q", "scale", 0.5, heads=[2]), Edit("result", "scale", 2.0, heads=[1], positions=[0, 3, 7])]),
        "other run": Spec(Freeze("both", heads=[3], to=other)),
        "resample": Spec(Freeze("ov", heads=[1], to="resample")),
    }


def sequence(family: Any, label: str = "") -> tuple[Tensor, Tensor]:
    # Resampling takes another row's activation at the same place; what kernels give at padding depends on the keys so far.
    inputs = family.inputs(length=PROMPT + STEPS, padding=0 if label == "resample" else 2)
    return inputs["input_ids"], inputs["attention_mask"]


@torch.no_grad()
def in_pieces(model: Any, ids: Tensor, mask: Tensor, pieces: list[int], cache: Any) -> Tensor:
    """Logits of a sequence that is fed in pieces of these lengths."""
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    found, start = [], 0
    for length in pieces:
        end = start + length
        arguments = model.prepare_inputs_for_generation(
            ids[:, :end], past_key_values=cache, attention_mask=mask[:, :end], position_ids=positions[:, :end],
            next_sequence_length=length, use_cache=True, is_first_iteration=start == 0,
        )  # fmt: skip
        arguments.pop("logits_to_keep", None)
        assert arguments["input_ids"].shape[1] == length
        found.append(model(**arguments).logits)
        start = end
    return torch.cat(found, dim=1)


@torch.no_grad()
def whole(model: Any, ids: Tensor, mask: Tensor) -> Tensor:
    return in_pieces(model, ids, mask, [ids.shape[1]], None)


def assert_close(found: Tensor, expected: Tensor, mask: Tensor) -> None:
    """At real tokens; what a kernel gives for padding is its own."""
    torch.testing.assert_close(found[mask.bool()], expected[mask.bool()], **CLOSE)


@pytest.mark.parametrize("name", DECODERS)
def test_steps_chunks_and_the_whole_sequence_agree(name: str) -> None:
    family = FAMILIES[name]
    for implementation in ("eager", "sdpa") if family.sdpa else ("eager",):
        model = family.build(implementation)
        for label, spec in cuts(model, family).items():
            ids, mask = sequence(family, label)
            plain = whole(unpatch_model(model), ids, mask)
            patch_model(model, spec)
            expected = whole(model, ids, mask)
            assert not torch.allclose(expected, plain, **CLOSE), f"{label} must act, or this shows nothing"
            steps = in_pieces(model, ids, mask, [PROMPT] + [1] * STEPS, DynamicCache(config=model.config))
            assert_close(steps, expected, mask)
            chunks = in_pieces(model, ids, mask, [4, 3, 3], DynamicCache(config=model.config))
            assert_close(chunks, expected, mask)


# transformers' own falcon with alibi fails on a static cache, patched or not: it makes its bias from a 2-D mask and gets 4-D.
STATIC = [n for n in DECODERS if FAMILIES[n].build()._can_compile_fullgraph and n != "falcon_alibi"]


@pytest.mark.parametrize("name", STATIC)
def test_a_static_cache_agrees(name: str) -> None:
    family = FAMILIES[name]
    implementation = "sdpa" if family.sdpa else "eager"
    model = family.build(implementation)
    for label, spec in cuts(model, family).items():
        ids, mask = sequence(family, label)
        patch_model(model, spec)
        expected = whole(model, ids, mask)
        cache = StaticCache(config=model.config, max_cache_len=PROMPT + STEPS + 2)
        assert_close(in_pieces(model, ids, mask, [PROMPT] + [1] * STEPS, cache), expected, mask)


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma3", "falcon_grouped", "bloom"])
def test_generation_with_and_without_a_cache_agrees(name: str) -> None:
    family = FAMILIES[name]
    model, inputs = family.build("sdpa" if family.sdpa else "eager"), family.inputs()
    patch_model(model, [Freeze("qk", heads=[1]), Freeze("ov", heads=[0], to="noise"), Edit("pattern", "previous", heads=[2])])
    tokens = [
        model.generate(**inputs, max_new_tokens=8, min_new_tokens=8, do_sample=False, use_cache=use) for use in (True, False)
    ]
    assert torch.equal(*tokens)
