"""W_V and b_V of a v that is changed behind its projection: what enters the weighted sum, or a refusal with the reason."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from surgery import UnsupportedArchitectureError, capture, find_anatomy, patch_model
from surgery.weights import W_V, b_V, ov_circuit, pieces

D_MODEL, HEADS, D_HEAD = 12, 3, 4

# Values of order 1 in float32 (machine epsilon 1.2e-7), summed over 12 channels in another order.
CLOSE = {"rtol": 1e-5, "atol": 1e-6}


class Plain(nn.Module):
    """Attention whose v is what the projection gives; subclasses change it."""

    def __init__(self, bias: bool = True) -> None:
        super().__init__()
        self.q, self.k, self.o = (nn.Linear(D_MODEL, D_MODEL) for _ in range(3))
        self.v = nn.Linear(D_MODEL, D_MODEL, bias=bias)
        self.gate = nn.Linear(D_MODEL, D_MODEL)
        self.vector = nn.Parameter(torch.randn(D_MODEL))
        self.norm = nn.LayerNorm(D_HEAD)
        self.batch_norm = nn.BatchNorm1d(D_MODEL)

    def changed(self, v: Tensor, hidden_states: Tensor, position_embeddings: Any) -> Tensor:
        return v

    def forward(self, hidden_states: Tensor, position_embeddings: Any = None) -> Tensor:
        shape = (*hidden_states.shape[:-1], HEADS, D_HEAD)
        q, k = (p(hidden_states).view(shape).transpose(1, 2) for p in (self.q, self.k))
        v = self.changed(self.v(hidden_states), hidden_states, position_embeddings).view(shape).transpose(1, 2)
        pattern = (q @ k.transpose(-1, -2) * D_HEAD**-0.5).softmax(dim=-1)
        return self.o((pattern @ v).transpose(1, 2).flatten(2))


class Biased(Plain):
    def changed(self, v: Tensor, hidden_states: Tensor, position_embeddings: Any) -> Tensor:
        return v + self.vector


class Scaled(Plain):
    def changed(self, v: Tensor, hidden_states: Tensor, position_embeddings: Any) -> Tensor:
        return 0.5 * v


class BatchNormed(Plain):
    def changed(self, v: Tensor, hidden_states: Tensor, position_embeddings: Any) -> Tensor:
        return self.batch_norm(v.flatten(0, 1)).reshape_as(v)


class Normed(Plain):
    def changed(self, v: Tensor, hidden_states: Tensor, position_embeddings: Any) -> Tensor:
        return self.norm(v.view(*v.shape[:-1], HEADS, D_HEAD)).flatten(-2)


class Gated(Plain):
    def changed(self, v: Tensor, hidden_states: Tensor, position_embeddings: Any) -> Tensor:
        return v * self.gate(hidden_states).sigmoid()


class Residual(Plain):
    def changed(self, v: Tensor, hidden_states: Tensor, position_embeddings: Any) -> Tensor:
        return v + hidden_states


class Rotated(Plain):
    def changed(self, v: Tensor, hidden_states: Tensor, position_embeddings: Any) -> Tensor:
        first, second = v.chunk(2, dim=-1)
        angle = torch.arange(v.shape[1])[:, None] if position_embeddings is None else position_embeddings[0]
        return torch.cat([first * angle.cos() - second * angle.sin(), second * angle.cos() + first * angle.sin()], dim=-1)


class Rectified(Plain):
    """This, and those below: 1 at every entry stays 1."""

    def changed(self, v: Tensor, hidden_states: Tensor, position_embeddings: Any) -> Tensor:
        return v.relu()


class Squared(Plain):
    def changed(self, v: Tensor, hidden_states: Tensor, position_embeddings: Any) -> Tensor:
        return v * v


class RootMeanSquared(Plain):
    def changed(self, v: Tensor, hidden_states: Tensor, position_embeddings: Any) -> Tensor:
        return nn.functional.rms_norm(v, (D_MODEL,), eps=1e-8)


class HeadsMixed(Plain):
    def changed(self, v: Tensor, hidden_states: Tensor, position_embeddings: Any) -> Tensor:
        return (v + v.flip(-1)) / 2


class Smoothed(Plain):
    """Over positions, the same at each if all are alike."""

    def changed(self, v: Tensor, hidden_states: Tensor, position_embeddings: Any) -> Tensor:
        return 0.5 * v + 0.5 * v.roll(1, 1)


class MeanAdded(Plain):
    def changed(self, v: Tensor, hidden_states: Tensor, position_embeddings: Any) -> Tensor:
        return v + v.mean(dim=1, keepdim=True)


class SlightlyMixed(Plain):
    """By less than bfloat16 would show."""

    def changed(self, v: Tensor, hidden_states: Tensor, position_embeddings: Any) -> Tensor:
        return v + 1e-3 * v.flip(-1)


class Mixed(Plain):
    def changed(self, v: Tensor, hidden_states: Tensor, position_embeddings: Any) -> Tensor:
        return v + v.mean(dim=-1, keepdim=True)


def build(style: Any, **options: Any) -> Any:
    torch.manual_seed(0)
    model = nn.ModuleDict({"layer": style(**options)})
    norm = model["layer"].batch_norm
    for buffer in (norm.running_mean, norm.running_var):
        buffer.uniform_(0.5, 2)
    with torch.no_grad():
        for parameter in norm.parameters():
            parameter.normal_()
    return model.eval()


def states() -> Tensor:
    return torch.randn(2, 5, D_MODEL, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("is_patched", [True, False])
@pytest.mark.parametrize("style", [Plain, Biased, Scaled, BatchNormed])
def test_a_scale_and_a_shift_are_in_the_weights(style: Any, is_patched: bool, bias: bool) -> None:
    model, x = build(style, bias=bias), states()
    with capture(model, ["v"], detach=True) as run:
        model["layer"](x)
    if is_patched:
        patch_model(model)
    matrix, shift = W_V(model, 0), b_V(model, 0)
    v = x[:, None] @ matrix + (0 if shift is None else shift[:, None])
    torch.testing.assert_close(v, run[0, "v"], **CLOSE)
    assert (shift is None) is (style in (Plain, Scaled) and not bias)
    torch.testing.assert_close(ov_circuit(model, 0).A, matrix)


@pytest.mark.parametrize("style", [Plain, Biased, Scaled, BatchNormed])
def test_a_coarse_type_has_the_weights_of_a_fine_one(style: Any) -> None:
    coarse = build(style).to(torch.bfloat16)
    fine = build(style).to(torch.bfloat16).double()
    assert W_V(coarse, 0).dtype == b_V(coarse, 0).dtype == torch.bfloat16  # type: ignore[union-attr]
    # The scale, the weight and their product are rounded to 8 bits each, and so are the terms of the shift.
    torch.testing.assert_close(W_V(coarse, 0).double(), W_V(fine, 0), rtol=2**-7, atol=0)
    torch.testing.assert_close(b_V(coarse, 0).double(), b_V(fine, 0), rtol=0.05, atol=0.02)  # type: ignore[union-attr]


def test_a_shift_that_was_zero_when_patched_is_the_one_that_it_is() -> None:
    model = build(Biased)
    with torch.no_grad():
        model["layer"].vector.zero_()
    patch_model(model)
    with torch.no_grad():
        model["layer"].vector.normal_()
    assert torch.equal(b_V(model, 0).flatten(), model["layer"].v.bias + model["layer"].vector)  # type: ignore[union-attr]


@pytest.mark.parametrize("style", [Plain, Biased])
def test_without_a_scale_the_weight_is_the_parameter_itself(style: Any) -> None:
    model = build(style)
    assert torch.equal(W_V(model, 0), model["layer"].v.weight.T.reshape(D_MODEL, HEADS, D_HEAD).transpose(0, 1))


def test_they_are_read_as_they_are_now_and_have_gradients() -> None:
    model = patch_model(build(Biased))
    layer = model["layer"]
    with torch.no_grad():
        layer.vector.fill_(3)
    assert torch.equal(b_V(model, 0).flatten(), layer.v.bias + 3)  # type: ignore[union-attr]
    b_V(model, 0).sum().backward()  # type: ignore[union-attr]
    assert torch.equal(layer.vector.grad, torch.ones(D_MODEL)) and torch.equal(layer.v.bias.grad, torch.ones(D_MODEL))
    normed = build(BatchNormed)
    W_V(normed, 0).sum().backward()
    assert bool(normed["layer"].batch_norm.weight.grad.any())
    with torch.no_grad():
        assert not W_V(normed, 0).requires_grad
    with torch.inference_mode():
        assert torch.equal(W_V(normed, 0), W_V(normed, 0))


REFUSED = [Normed, Gated, Residual, Rotated, Mixed, Rectified, Squared, RootMeanSquared, HeadsMixed, Smoothed, MeanAdded]


@pytest.mark.parametrize(
    ("style", "dtype"),
    [
        *((style, torch.float32) for style in REFUSED),
        *((style, torch.bfloat16) for style in (Normed, RootMeanSquared, SlightlyMixed)),
        (RootMeanSquared, torch.float64),
    ],
)
def test_what_is_no_scale_and_shift_is_refused(style: Any, dtype: torch.dtype) -> None:
    model = build(style).to(dtype)
    for read in (W_V, b_V, ov_circuit):
        with pytest.raises(
            UnsupportedArchitectureError, match=r"W_V of self\.0.*more than a scale and a shift of what v gives"
        ):
            read(model, 0)
    only = pieces(model, 0, "v")
    assert [piece.projection for piece in only] == ["layer.v"]
    assert torch.equal(only[0].matrix.transpose(0, 1).flatten(1), model["layer"].v.weight.T)


def test_a_batch_norm_is_that_of_evaluation_and_counts_nothing() -> None:
    model = build(BatchNormed)
    expected = W_V(model, 0), b_V(model, 0)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model.train()
    find_anatomy(model)
    patch_model(model)
    assert torch.equal(W_V(model, 0), expected[0]) and torch.equal(b_V(model, 0), expected[1])  # type: ignore[arg-type]
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert all(module.training for module in model.modules())
