"""Forwards that a patch writes out with points of its own: taken if they are the class's, bit for bit, and reach every site."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from surgery import Edit, ParityError, SurgeryError, capture, find_anatomy, patch_model, patched
from surgery.family import _PATCHES, register_patch
from surgery.interface import point, refuse, written_out
from surgery.sites import SITES

HEADS, WIDTH = 4, 8


class Folded(torch.autograd.Function):
    """A softmax, and more behind it, in one expression of its caller."""

    @staticmethod
    def forward(ctx: Any, scores: Tensor) -> Tensor:
        return torch.softmax(scores, -1) * 1.0


class FoldedAttention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = (nn.Linear(32, 32) for _ in range(4))

    def split(self, projected: Tensor) -> Tensor:
        return projected.unflatten(-1, (HEADS, WIDTH)).transpose(1, 2)

    def forward(self, hidden_states: Tensor) -> Tensor:
        q, k, v = (self.split(p(hidden_states)) for p in (self.q_proj, self.k_proj, self.v_proj))
        pattern = Folded.apply(q @ k.mT / WIDTH)
        return self.o_proj((pattern @ v).transpose(1, 2).flatten(2))


class FoldedModel(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(FoldedAttention() for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = x + layer(x)
        return x


def written(self: Any, hidden_states: Tensor) -> Tensor:
    q, k, v = (self.split(p(hidden_states)) for p in (self.q_proj, self.k_proj, self.v_proj))
    q, k, v = point(self, "rot_q", q), point(self, "rot_k", k), point(self, "v", v)
    scores = point(self, "scores", q @ k.mT / WIDTH)
    z = point(self, "z", point(self, "pattern", torch.softmax(scores, -1)) @ v)
    return self.o_proj(z.transpose(1, 2).flatten(2))


def of_another_scale(self: Any, hidden_states: Tensor) -> Tensor:
    return written(self, hidden_states) * 1.001


def without_scores(self: Any, hidden_states: Tensor) -> Tensor:
    q, k, v = (self.split(p(hidden_states)) for p in (self.q_proj, self.k_proj, self.v_proj))
    q, k, v = point(self, "rot_q", q), point(self, "rot_k", k), point(self, "v", v)
    z = point(self, "z", point(self, "pattern", torch.softmax(q @ k.mT / WIDTH, -1)) @ v)
    return self.o_proj(z.transpose(1, 2).flatten(2))


def with_z_turned_round(self: Any, hidden_states: Tensor) -> Tensor:
    q, k, v = (self.split(p(hidden_states)) for p in (self.q_proj, self.k_proj, self.v_proj))
    q, k, v = point(self, "rot_q", q), point(self, "rot_k", k), point(self, "v", v)
    pattern = point(self, "pattern", torch.softmax(point(self, "scores", q @ k.mT / WIDTH), -1))
    return self.o_proj(point(self, "z", (pattern @ v).transpose(1, 2)).flatten(2))


def that_refuses(self: Any, hidden_states: Tensor) -> Tensor:
    output = written(self, hidden_states)
    if hidden_states.shape[1] > 5:
        refuse(self, "6 positions", "at most 5", "Cut the sequence.")
    return output


@pytest.fixture
def describe(monkeypatch: pytest.MonkeyPatch) -> Callable[[Any], None]:
    """Registers a forward for the class, until the test ends."""

    def register(forward: Any) -> None:
        name = f"{FoldedAttention.__module__}.{FoldedAttention.__qualname__}"
        family = written_out({"forward": forward})
        monkeypatch.setitem(_PATCHES, name, lambda module, found: family)

    return register


X = torch.randn(2, 5, 32, generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def test_every_site_is_seen_and_cut(describe: Any) -> None:
    describe(written)
    model = FoldedModel()
    plain, attention = model(X), model.layers[0]
    with capture(model, list(SITES)) as seen:
        assert torch.equal(model(X), plain)
    q, k, v = (attention.split(p(X)) for p in (attention.q_proj, attention.k_proj, attention.v_proj))
    pattern = (q @ k.mT / WIDTH).softmax(-1)
    expected = {
        "q": q,
        "k": k,
        "rot_q": q,
        "rot_k": k,
        "v": v,
        "scores": q @ k.mT / WIDTH,
        "pattern": pattern,
        "z": pattern @ v,
    }
    for site, tensor in expected.items():
        assert torch.equal(seen[0, site], tensor), site
    for site in SITES:
        with patched(model, Edit(site, "scale", 0.5, layers=[0], heads=[1])):
            assert not torch.equal(model(X), plain), site
    patch_model(model, Edit("pattern", "uniform", heads=[1]))
    cut = model(X)
    assert "point(self" in model.layers[0].reconstruction.code
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(other(X), cut)
    assert find_anatomy(model)["self.1"].fusion == "q | k | v"


def test_without_the_patch_the_class_is_refused() -> None:
    with pytest.raises(SurgeryError, match=r"'layers.0' \(FoldedAttention\): found a softmax that runs more than once"):
        patch_model(FoldedModel())


@pytest.mark.parametrize(
    ("forward", "found"),
    [
        (of_another_scale, "a difference of"),
        (without_scores, r"found scores of shape \(\)"),
        (with_z_turned_round, r"found z of shape \(1, 3, 4, 8\)"),
    ],
)
def test_another_computation_or_a_missing_point_is_refused(describe: Any, forward: Any, found: str) -> None:
    describe(forward)
    model = FoldedModel()
    with pytest.raises(ParityError, match=found) as caught:
        patch_model(model)
    assert "'layers.0'" in str(caught.value) and type(model.layers[0]) is FoldedAttention


def test_a_forward_may_refuse_what_it_cannot_do(describe: Any) -> None:
    describe(that_refuses)
    model = patch_model(FoldedModel(), Edit("z", "zero"))
    model(X)
    with pytest.raises(SurgeryError) as caught:
        model(torch.cat([X, X], 1))
    assert str(caught.value) == "'layers.0': found 6 positions; expected at most 5. Cut the sequence."


def test_one_description_for_a_class() -> None:
    register_patch("tests.Nothing")(first := lambda module, family: None)
    try:
        with pytest.raises(ValueError, match=r"tests\.Nothing is already described"):
            register_patch("tests.Nothing")(lambda module, family: None)
        assert _PATCHES["tests.Nothing"] is first
    finally:
        del _PATCHES["tests.Nothing"]
