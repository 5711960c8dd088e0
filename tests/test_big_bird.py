"""BigBird attends in full, or over blocks of which some are drawn at random: the one is patched, the other refused by name."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from transformers import BigBirdConfig, BigBirdForMaskedLM, BigBirdPegasusConfig, BigBirdPegasusForConditionalGeneration

from surgery import Freeze, NoMatchError, UnsupportedArchitectureError, inspect_model, patch_model, unpatch_model

SIZES: dict[str, Any] = {"vocab_size": 80, "block_size": 4, "num_random_blocks": 1, "max_position_embeddings": 256}


def big_bird(kind: str) -> Any:
    torch.manual_seed(0)
    config = BigBirdConfig(
        **SIZES, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64, attention_type=kind
    )
    return BigBirdForMaskedLM(config).eval()


def pegasus(kind: str) -> Any:
    torch.manual_seed(0)
    config = BigBirdPegasusConfig(
        **SIZES, d_model=32, encoder_layers=2, decoder_layers=1, encoder_attention_heads=4, decoder_attention_heads=4,
        encoder_ffn_dim=64, decoder_ffn_dim=64, attention_type=kind,
    )  # fmt: skip
    return BigBirdPegasusForConditionalGeneration(config).eval()


@pytest.mark.parametrize("make", [big_bird, pegasus])
def test_full_attention_is_patched(make: Any) -> None:
    model = make("original_full")
    ids = torch.arange(2, 42)[None]
    with torch.no_grad():
        plain = model(input_ids=ids).logits
        patch_model(model, Freeze("ov", heads=[1]))
        cut = model(input_ids=ids).logits
        unpatch_model(model)
        assert not torch.equal(cut, plain) and torch.equal(model(input_ids=ids).logits, plain)


@pytest.mark.parametrize("make", [big_bird, pegasus])
def test_blocks_are_refused_with_their_class_and_the_reason(make: Any) -> None:
    np.random.seed(5)
    state = np.random.get_state()[1].tolist()  # type: ignore[index, union-attr]
    with pytest.raises(UnsupportedArchitectureError) as caught:
        patch_model(make("block_sparse"))
    text = str(caught.value)
    assert text.count("BlockSparseAttention)") == 2 and text.count("found a second softmax over scores, at ") == 2
    assert np.random.get_state()[1].tolist() == state, "the class seeds numpy"  # type: ignore[index, union-attr]


def test_not_strict_they_are_left_as_they_are_and_named() -> None:
    with pytest.raises(NoMatchError, match="BlockSparseAttention"):
        patch_model(big_bird("block_sparse"), strict=False)
    model = pegasus("block_sparse")
    with pytest.warns(UserWarning, match=r"leaves as they are: 2 problems\n.*BigBirdPegasusBlockSparseAttention"):
        patch_model(model, Freeze("ov", heads=[1]), strict=False)
    assert [row.address for row in inspect_model(model)] == ["decoder.self.0", "decoder.cross.0"]
