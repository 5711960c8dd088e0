"""The recorded run: what it derives for modules written by hand, what it refuses, and what of the user's it leaves alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from families import FAMILIES
from torch import Tensor, nn
from transformers import PreTrainedConfig
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from surgery import Edit, PatchError, SpecError, capture, find_anatomy, patch_model

HEADS, D_HEAD, D_MODEL = 3, 4, 12


def eager_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, scaling: float = 0.5, **kwargs: Any
) -> tuple[Tensor, Tensor]:
    weights = torch.matmul(query, key.transpose(2, 3)) * scaling
    if attention_mask is not None:
        weights = weights + attention_mask
    weights = nn.functional.softmax(weights, dim=-1)
    return torch.matmul(weights, value).transpose(1, 2), weights


class Attention(nn.Module):
    """An attention behind transformers' interface, of any projections q and o."""

    def __init__(self, q: nn.Module, o: nn.Module) -> None:
        super().__init__()
        self.config = PreTrainedConfig(attn_implementation="eager")
        self.q, self.o = q, o
        self.k, self.v = nn.Linear(D_MODEL, D_MODEL), nn.Linear(D_MODEL, D_MODEL)
        self.norm = nn.LayerNorm(D_HEAD)

    def forward(self, hidden_states: Tensor, attention_mask: Any = None) -> Tensor:
        shape = (*hidden_states.shape[:-1], HEADS, D_HEAD)
        q, k, v = (self.heads(p(hidden_states), shape) for p in (self.q, self.k, self.v))
        attend: Callable[..., Any] = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention)
        z, _ = attend(self, self.norm(q), k, v, attention_mask)
        return self.o(z.reshape(hidden_states.shape))

    def heads(self, x: Tensor, shape: tuple[int, ...]) -> Tensor:
        return x.view(shape).transpose(1, 2)


def model_of(q: nn.Module | None = None, o: nn.Module | None = None) -> nn.Module:
    torch.manual_seed(0)
    return nn.ModuleDict({"attention": Attention(q or nn.Linear(D_MODEL, D_MODEL), o or nn.Linear(D_MODEL, D_MODEL))})


class Mixed(nn.Module):
    """A projection that turns all channels about once more, with a weight of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.turn = nn.Linear(D_MODEL, D_MODEL), nn.Parameter(torch.randn(D_MODEL, D_MODEL))

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(self.inner(x), self.turn)


def test_plain_projections_are_derived() -> None:
    attention = find_anatomy(model_of()).attentions[0]
    assert set(attention.projections) == {"q", "k", "v", "o"}
    for place in attention.projections.values():
        assert torch.equal(place.channels, torch.arange(HEADS * D_HEAD).view(HEADS, D_HEAD))


@pytest.mark.parametrize("low", [nn.Linear(D_MODEL, 5), nn.Linear(D_MODEL, D_MODEL)], ids=["narrow", "square"])
def test_projections_in_a_row_are_those_of_the_last(low: nn.Linear) -> None:
    """A low-rank pair of maps; a square one must not be taken for elementwise arithmetic."""
    model = model_of(
        q=nn.Sequential(low, nn.Linear(low.out_features, D_MODEL)), o=nn.Sequential(nn.Linear(D_MODEL, D_MODEL), nn.Dropout())
    )
    attention = find_anatomy(model).attentions[0]
    assert attention.projections["q"].path == "attention.q.1" and attention.projections["o"].path == "attention.o.0"
    with pytest.raises(PatchError, match=r"q: the projection 'attention.q.1' is an entry of a list.*Use site 'rot_q'"):
        patch_model(model, Edit("q", "zero"))
    x = torch.randn(2, 6, D_MODEL)
    before = model.eval()["attention"](x)
    assert not torch.equal(patch_model(model, Edit("rot_q", "zero", heads=[1]))["attention"](x), before)


def test_channels_mixed_after_a_projection_are_not_its_own() -> None:
    model = model_of(q=Mixed(), o=Mixed())
    attention = find_anatomy(model).attentions[0]
    assert set(attention.projections) == {"k", "v"}
    assert attention.why["q"] == "q does not come from a projection by views and elementwise arithmetic alone"
    assert attention.why["o"] == "o.inner, which reads z, is not the last map before the output"
    with pytest.raises(SpecError, match=r"site 'q': q does not come from a projection.*Use site 'rot_q'"):
        patch_model(model, Edit("q", "zero"))
    with pytest.raises(SpecError, match=r"site 'result': o.inner, which reads z, is not the last.*Use site 'z'"):
        patch_model(model, Edit("result", "zero"))


def test_an_output_of_two_maps_has_no_result_by_head() -> None:
    attention = find_anatomy(model_of(o=nn.Sequential(nn.Linear(D_MODEL, 5), nn.Linear(5, D_MODEL)))).attentions[0]
    assert attention.why["o"] == "o.0, which reads z, is not the last map before the output"


def test_patching_runs_nothing_of_the_users_and_draws_no_random_numbers() -> None:
    for model in (model_of(o=nn.Sequential(nn.Linear(D_MODEL, D_MODEL), nn.Dropout())), FAMILIES["bert"].build("eager")):
        calls: list[Any] = []
        for module in model.modules():
            module.register_forward_hook(lambda *args, calls=calls: calls.append(args))
            module.register_forward_pre_hook(lambda *args, calls=calls: calls.append(args))
        model.train()
        before = torch.get_rng_state()
        patch_model(model, Edit("pattern", "uniform", heads=[0]), kernel="eager")
        with capture(model, "z"):
            pass
        assert torch.equal(torch.get_rng_state(), before)
        assert not calls
