"""SEW-D's disentangled attention with its softmax written out: equal bit for bit, gradients too, and masked where it masks."""

from __future__ import annotations

import functools
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor

from surgery import Edit, Freeze, capture, patched
from surgery.sites import SITES

with warnings.catch_warnings():
    warnings.simplefilter("ignore", DeprecationWarning)  # older versions call torch.jit.script
    from transformers import SEWDConfig, SEWDForCTC

HEADS = 4
CLOSE = {"rtol": 1e-5, "atol": 1e-6}
"""The reference divides and sums in another order, in float32."""


@functools.cache
def sew_d(shared: bool) -> Any:
    """shared: positions go through the projections of q and k. A model that no test may change but by patching in a block."""
    torch.manual_seed(0)
    config = SEWDConfig(
        vocab_size=20, hidden_size=32, num_hidden_layers=2, num_attention_heads=HEADS, intermediate_size=64, squeeze_factor=1,
        conv_dim=(16, 16), conv_stride=(5, 2), conv_kernel=(10, 3), max_position_embeddings=64, position_buckets=8,
        share_att_key=shared, num_conv_pos_embeddings=4, num_conv_pos_embedding_groups=2, feat_proj_dropout=0.0, pad_token_id=0,
        attention_dropout=0.1, hidden_dropout=0.1, activation_dropout=0.1, layerdrop=0.0, apply_spec_augment=False,
    )  # fmt: skip
    return SEWDForCTC(config).eval()


by_shared = pytest.mark.parametrize("shared", [False, True])


def inputs() -> dict[str, Tensor]:
    """Two sounds, the second padded."""
    torch.manual_seed(1)
    mask = torch.ones(2, 200, dtype=torch.long)
    mask[1, 120:] = 0
    return {"input_values": torch.randn(2, 200), "attention_mask": mask}


@torch.no_grad()
def run(model: Any) -> list[Tensor]:
    output = model(**inputs(), output_attentions=True, output_hidden_states=True)
    return [output.logits, *output.hidden_states, *output.attentions]


def attention(model: Any, layer: int = 0) -> Any:
    return model.sew_d.encoder.encoder.layer[layer].attention.self


@by_shared
def test_without_cuts_and_watched_it_is_the_same_model(shared: bool) -> None:
    model = sew_d(shared)
    expected = run(model)
    for spec, kernel in ((None, "auto"), (Edit("pattern", "scale", 1.0), "auto"), (None, "eager")):
        with patched(model, spec, kernel=kernel):  # type: ignore[arg-type]
            assert all(torch.equal(a, b) for a, b in zip(run(model), expected, strict=True))
    with capture(model, list(SITES)):
        assert all(torch.equal(a, b) for a, b in zip(run(model), expected, strict=True))


@by_shared
def test_gradients_with_dropout_are_those_of_its_own_softmax(shared: bool) -> None:
    model = sew_d(shared)

    def gradients() -> dict[str, Tensor]:
        model.zero_grad()
        torch.manual_seed(0)
        model(**inputs(), labels=torch.tensor([[3, 4], [5, 6]])).loss.backward()
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    model.train()
    try:
        expected = gradients()
        with capture(model, ["scores", "pattern"]):
            found = gradients()
    finally:
        model.eval()
        model.zero_grad()
    assert found.keys() == expected.keys() and any("query_proj" in name for name in found)
    for name, gradient in found.items():
        # Gradients of a tensor that is used several times are added in another order.
        torch.testing.assert_close(gradient, expected[name], rtol=1e-4, atol=1e-7, msg=name)


@by_shared
def test_q_and_k_are_those_of_the_sequence(shared: bool) -> None:
    """Not those of positions, which may share their projections."""
    model = sew_d(shared)
    with capture(model, ["q", "k", "rot_q", "rot_k", "v"], layers=[0]) as seen:
        run(model)
    for plain, turned in (("q", "rot_q"), ("k", "rot_k")):
        assert len(seen.steps(0, plain)) == 1
        assert torch.equal(seen[0, plain], seen[0, turned])


@by_shared
def test_cuts_against_dense_attention(shared: bool) -> None:
    """Without q, what remains of the scores is of k and positions; with k gone as well, every key that is none of padding."""
    model = sew_d(shared)
    with capture(model, ["scores", "pattern", "v", "z"], layers=[0]) as plain:
        run(model)
    kept = plain[0, "scores"] > -5000
    assert bool((~kept[1]).any()) and bool(kept[0].all())
    wanted = torch.where(kept, plain[0, "scores"], -torch.inf).softmax(-1)
    torch.testing.assert_close(plain[0, "pattern"], wanted, **CLOSE)
    torch.testing.assert_close(plain[0, "z"], wanted @ plain[0, "v"], **CLOSE)
    even = kept / kept.sum(-1, keepdim=True)
    for spec in (
        [Edit("rot_q", "zero", heads=[1]), Edit("rot_k", "zero", heads=[1])],
        Edit("scores", "zero", heads=[1]),
        Edit("pattern", "uniform", heads=[1]),
    ):
        with patched(model, spec), capture(model, ["pattern", "z"], layers=[0]) as seen:
            run(model)
        torch.testing.assert_close(seen[0, "pattern"][:, 1], even.expand_as(wanted)[:, 1], **CLOSE)
        torch.testing.assert_close(seen[0, "z"][:, 1], (even @ plain[0, "v"])[:, 1], **CLOSE)
        assert torch.equal(seen[0, "pattern"][:, [0, 2, 3]], plain[0, "pattern"][:, [0, 2, 3]])


def test_a_frozen_head_is_its_columns_of_the_output_projection_gone() -> None:
    model = sew_d(False)
    dense = model.sew_d.encoder.encoder.layer[0].attention.output.dense

    def without_head(module: Any, args: Any) -> Any:
        (x,) = args
        return (torch.cat([x[..., :8] * 0, x[..., 8:]], dim=-1),)

    handle = dense.register_forward_pre_hook(without_head)
    expected = run(model)
    handle.remove()
    with patched(model, Freeze("ov", layers=[0], heads=[0])):
        found = run(model)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
