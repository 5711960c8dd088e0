"""The recorded run: what it derives for modules written by hand, what it refuses, and what of the user's it leaves alone."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from families import FAMILIES
from torch import Tensor, nn
from transformers import PreTrainedConfig
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from surgery import (
    Edit,
    PatchError,
    SpecError,
    UnsupportedArchitectureError,
    capture,
    find_anatomy,
    patch_model,
    unpatch_model,
)
from surgery.labels import Labelled, stays_in_place
from surgery.weights import W_V, b_V, pieces

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


class Gated(Attention):
    """The gate comes first, so that its channels are met before z's."""

    def __init__(self) -> None:
        super().__init__(nn.Linear(D_MODEL, D_MODEL), nn.Linear(D_MODEL, D_MODEL))
        self.gate = nn.Linear(D_MODEL, D_MODEL)

    def forward(self, hidden_states: Tensor, attention_mask: Any = None) -> Tensor:
        shape = (*hidden_states.shape[:-1], HEADS, D_HEAD)
        q, k, v = (self.heads(p(hidden_states), shape) for p in (self.q, self.k, self.v))
        attend: Callable[..., Any] = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention)
        z, _ = attend(self, q, k, v, attention_mask)
        return self.o((self.gate(hidden_states).view(shape).sigmoid() * z).reshape(hidden_states.shape))


def test_z_behind_a_gate_that_comes_first_is_z() -> None:
    model = nn.ModuleDict({"attention": Gated()})
    attention = find_anatomy(model).attentions[0]
    assert attention.projections["o"].path == "attention.o"
    x = torch.randn(2, 6, D_MODEL)
    with capture(model, "result") as run:
        output = model["attention"](x)
    torch.testing.assert_close(run[0, "result"].sum(1) + model["attention"].o.bias, output)


class Pooling(Attention):
    """One query, whose axis is averaged away."""

    def forward(self, hidden_states: Tensor, attention_mask: Any = None) -> Tensor:
        shape = (hidden_states.shape[0], -1, HEADS, D_HEAD)
        q = self.heads(self.q(hidden_states[:, :1]), shape)
        k, v = (self.heads(p(hidden_states), shape) for p in (self.k, self.v))
        attend: Callable[..., Any] = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention)
        z, _ = attend(self, q, k, v, attention_mask)
        return self.o(z.flatten(2).mean(dim=1))


def test_the_mean_of_one_entry_is_a_view() -> None:
    model = nn.ModuleDict({"attention": Pooling(nn.Linear(D_MODEL, D_MODEL), nn.Linear(D_MODEL, D_MODEL))})
    attention = find_anatomy(model).attentions[0]
    assert torch.equal(attention.projections["o"].channels, torch.arange(D_MODEL).view(HEADS, D_HEAD))


class Bare(Attention):
    """Returns z, in one of several containers, and projects nothing."""

    container: Callable[[Tensor], Any] = staticmethod(lambda z: z)

    def forward(self, hidden_states: Tensor, attention_mask: Any = None) -> Any:
        shape = (*hidden_states.shape[:-1], HEADS, D_HEAD)
        q, k, v = (self.heads(p(hidden_states), shape) for p in (self.q, self.k, self.v))
        attend: Callable[..., Any] = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention)
        z, _ = attend(self, q, k, v, attention_mask)
        return self.container(z.reshape(hidden_states.shape))


class Around(nn.Module):
    """Projects what the attention returned, and adds what its caller must give."""

    def __init__(self, container: Any, taken: Any) -> None:
        super().__init__()
        self.attention = Bare(nn.Linear(D_MODEL, D_MODEL), nn.Identity())
        self.attention.container = container
        self.output, self.taken = nn.Linear(D_MODEL, D_MODEL), taken

    def forward(self, hidden_states: Tensor, residual: Tensor) -> Tensor:
        return self.output(self.taken(self.attention(hidden_states))) + 0 * residual.sum()


CONTAINERS: dict[str, tuple[Any, Any]] = {
    "none": (lambda z: z, lambda output: output),
    "a tuple of one": (lambda z: (z,), lambda output: output[0]),
    "a tuple of three": (lambda z: (z, None, None), lambda output: next(part for part in output if part is not None)),
    "a dictionary": (lambda z: {"context": z}, lambda output: output["context"]),
}


@pytest.mark.parametrize("name", CONTAINERS)
def test_a_projection_beside_the_attention_is_found_however_z_is_returned(name: str) -> None:
    torch.manual_seed(0)
    model = nn.ModuleDict({"layer": Around(*CONTAINERS[name])})
    attention = find_anatomy(model).attentions[0]
    assert attention.projections["o"].path == "layer.output"
    x = torch.randn(2, 6, D_MODEL)
    with capture(model, "result") as run:
        output = model["layer"](x, x)
    torch.testing.assert_close(run[0, "result"].sum(1) + model["layer"].output.bias, output)


class Points(Attention):
    """The second axis counts points, each with a sequence of its own; given a sequence alone it counts that as points."""

    def forward(self, hidden_states: Tensor, attention_mask: Any = None) -> Tensor:
        batch, points = hidden_states.shape[:2]
        shape = (batch * points, -1, HEADS, D_HEAD)
        q, k, v = (self.heads(p(hidden_states), shape) for p in (self.q, self.k, self.v))
        attend: Callable[..., Any] = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention)
        z, _ = attend(self, q, k, v, attention_mask)
        return self.o(z.reshape(hidden_states.shape))


def test_one_more_axis_of_the_batch_is_seen_as_such() -> None:
    torch.manual_seed(0)
    model = nn.ModuleDict({"attention": Points(nn.Linear(D_MODEL, D_MODEL), nn.Linear(D_MODEL, D_MODEL))})
    layer, x = model["attention"], torch.randn(2, 3, 5, D_MODEL)
    assert {place.batch_axes for place in find_anatomy(model).attentions[0].projections.values()} == {2}
    output = layer(x)
    with capture(model, ["q", "result", "pattern"], detach=True) as run:
        assert torch.equal(layer(x), output)
    assert torch.equal(run[0, "q"], layer.q(x).reshape(6, 5, HEADS, D_HEAD).transpose(1, 2))
    torch.testing.assert_close(run[0, "result"].sum(1).view(2, 3, 5, D_MODEL) + layer.o.bias, output)
    with capture(patch_model(model, Edit("q", "scale", value=-1.0, heads=[1])), "pattern", detach=True) as cut:
        layer(x)
    changed = (cut[0, "pattern"] != run[0, "pattern"]).flatten(2).any(dim=-1).any(dim=0)
    assert changed.tolist() == [False, True, False]


class LooksBack(nn.Module):
    """Each position looks at what two layers gave there, and stands where an attention has heads."""

    def __init__(self) -> None:
        super().__init__()
        self.config = PreTrainedConfig(attn_implementation="eager")
        self.query = nn.Parameter(torch.ones(1))

    def forward(self, hidden_states: Tensor) -> Tensor:
        given = torch.stack([hidden_states, hidden_states.tanh()], dim=-2)
        query = (self.query * torch.ones_like(hidden_states)).unsqueeze(-2)
        attend: Callable[..., Any] = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention)
        return attend(self, query, given, given, None)[0].transpose(1, 2).squeeze(-2)


def test_positions_are_no_heads() -> None:
    """Nor does what has no heads take a number among the attentions."""
    layers = [nn.ModuleDict({"back": LooksBack(), "attention": model_of()["attention"]}) for _ in range(2)]
    model, x = nn.ModuleList(layers), torch.randn(2, 5, D_MODEL)
    anatomy = find_anatomy(model)
    assert [(a.address, a.path) for a in anatomy] == [("self.0", "0.attention"), ("self.1", "1.attention")]
    assert len(anatomy.others) == 2 and "positions on the axis of heads" in anatomy.others[0]
    before, after = (layer["back"](x) for layer in (layers[0], patch_model(model, kernel="eager")[0]))
    assert torch.equal(before, after) and type(layers[0]["back"]) is LooksBack


def test_labels_follow_axes_that_are_changed_in_place() -> None:
    """Of the tensor itself, and of no other that has the same labels."""
    one = Labelled.make(torch.ones(2, 3), torch.arange(6).view(2, 3))
    other = Labelled.make(torch.ones(2, 3), one.labels)
    out = one.unsqueeze_(1)
    assert one.shape == out.shape == one.labels.shape == out.labels.shape == (2, 1, 3)
    one.transpose_(0, 2)
    assert one.shape == one.labels.shape == (3, 1, 2) and one.labels[2, 0].tolist() == [2, 5]
    assert other.shape == other.labels.shape == (2, 3)


class Table(nn.Module):
    """A live part, no projection: fits itself to the longest sequence that it has seen."""

    def __init__(self) -> None:
        super().__init__()
        self.longest = 1
        self.register_buffer("scale", torch.ones(()))

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[1] > self.longest:
            self.longest, self.scale = x.shape[1], self.scale / x.shape[1]
        return self.scale


def _keep_books(self: Any, x: Tensor) -> Tensor:
    self.count += 1
    self.average.data.lerp_(torch.full((), float(np.random.rand())), 0.5)
    self.log.append(random.random())
    self.books["lengths"].append(x.shape[1])
    self.last = x
    return x * self.table(x)


def _open_books(self: Any) -> None:
    self.table, self.log, self.books = Table(), list[float](), {"lengths": list[int]()}
    self.register_buffer("count", torch.zeros(()))
    self.register_buffer("average", torch.zeros(()))


class Bookkeeping(Attention):
    """Keeps all kinds of state in its forward, in evaluation mode, too."""

    def __init__(self) -> None:
        super().__init__(nn.Linear(D_MODEL, D_MODEL), nn.Linear(D_MODEL, D_MODEL))
        _open_books(self)

    def forward(self, hidden_states: Tensor, attention_mask: Any = None) -> Tensor:
        return super().forward(_keep_books(self, hidden_states), attention_mask)


class Inline(nn.Module):
    """An attention that is written out; subclasses change what enters the core, and what leaves the module."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(D_MODEL, D_MODEL) for _ in range(4))

    def heads(self, x: Tensor) -> Tensor:
        return x.view(*x.shape[:-1], HEADS, D_HEAD).transpose(1, 2)

    def inputs(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return self.heads(self.q(x)), self.heads(self.k(x)), self.heads(self.v(x))

    def output(self, z: Tensor) -> Tensor:
        return self.o(z.transpose(1, 2).flatten(2))

    def forward(self, hidden_states: Tensor) -> Tensor:
        q, k, v = self.inputs(hidden_states)
        pattern = nn.functional.softmax(q @ k.transpose(-1, -2), dim=-1)
        return self.output(pattern @ v)


class InlineBookkeeping(Inline):
    def __init__(self) -> None:
        super().__init__()
        _open_books(self)

    def inputs(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = super().inputs(_keep_books(self, x))
        return q * self.count * self.average, k, v


class Failing(Bookkeeping):
    def forward(self, hidden_states: Tensor, attention_mask: Any = None) -> Tensor:
        super().forward(hidden_states, attention_mask)
        raise ValueError("not today")


@pytest.mark.parametrize("style", [Bookkeeping, InlineBookkeeping, Failing])
@pytest.mark.parametrize("training", [True, False])
def test_patching_leaves_what_a_forward_keeps_as_it_was(style: Any, training: bool) -> None:
    model = nn.ModuleDict({"attention": style()}).train(training)
    layer = model["attention"]
    if style is not Failing:
        layer(torch.randn(2, 2, D_MODEL))  # so that there is something to lose
    log, buffers = list(layer.log), {name: (b, b.clone()) for name, b in model.named_buffers()}
    attributes = [(m, {n: v for n, v in vars(m).items() if n != "_surgery"}) for m in model.modules()]
    states = random.getstate(), str(np.random.get_state()), torch.get_rng_state()
    if style is Failing:
        with pytest.raises(UnsupportedArchitectureError, match="not today"):
            patch_model(model, Edit("v", "zero"))
    else:
        unpatch_model(patch_model(model, Edit("v", "zero")))
        W_V(model, 0)
    assert layer.log == log and layer.books == {"lengths": [2] * len(log)}
    assert dict(model.named_buffers()).keys() == buffers.keys()
    for name, buffer in model.named_buffers():
        assert buffer is buffers[name][0] and torch.equal(*buffers[name]), name
    for module, before in attributes:
        assert vars(module).keys() == before.keys() and all(vars(module)[n] is v for n, v in before.items())
    assert states[:2] == (random.getstate(), str(np.random.get_state())) and torch.equal(states[2], torch.get_rng_state())


def inline_model(style: Any) -> nn.Module:
    torch.manual_seed(0)
    return nn.ModuleDict({"attention": style()}).eval()


class Gathered(Inline):
    """Heads in the reverse order, by a function that gives a tensor of the same shape."""

    def inputs(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = super().inputs(x)
        order = torch.arange(HEADS).flip(0).view(1, -1, 1, 1)
        return q.gather(1, order.expand(q.shape)), k.take_along_dim(order, 1), v


class Shuffled(Inline):
    def inputs(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = super().inputs(x)
        return nn.functional.channel_shuffle(q.transpose(1, 3), 2).transpose(1, 3), k, v.sort(-1).values


class OutputGathered(Inline):
    def output(self, z: Tensor) -> Tensor:
        return super().output(z.gather(1, torch.arange(HEADS).flip(0).view(1, -1, 1, 1).expand(z.shape)))


def test_labels_move_with_what_is_gathered() -> None:
    reverse = torch.arange(HEADS * D_HEAD).view(HEADS, D_HEAD).flip(0)
    projections = find_anatomy(inline_model(Gathered)).attentions[0].projections
    assert torch.equal(projections["q"].channels, reverse) and torch.equal(projections["k"].channels, reverse)
    assert torch.equal(find_anatomy(inline_model(OutputGathered)).attentions[0].projections["o"].channels, reverse)
    model = patch_model(inline_model(Gathered), Edit("q", "zero", heads=[0]))
    with capture(model, "rot_q") as run:
        model["attention"](torch.randn(2, 6, D_MODEL))
    assert [bool((run[0, "rot_q"][:, head] == 0).all()) for head in range(HEADS)] == [True, False, False]


def test_labels_do_not_pass_through_what_may_permute_them() -> None:
    attention = find_anatomy(inline_model(Shuffled)).attentions[0]
    assert set(attention.projections) == {"k", "o"}
    for site in "qv":
        assert attention.why[site] == f"{site} does not come from a projection by views and elementwise arithmetic alone"
    with pytest.raises(SpecError, match=r"site 'q': q does not come from a projection.*Use site 'rot_q'"):
        patch_model(inline_model(Shuffled), Edit("q", "zero", heads=[0]))


@pytest.mark.parametrize(
    "name", ["relu", "mul_", "__rtruediv__", "__ipow__", "masked_fill", "where", "tanh", "layer_norm", "to", "dropout", "clamp"]
)
def test_elementwise_functions_are_known(name: str) -> None:
    assert stays_in_place(name)


@pytest.mark.parametrize("name", ["channel_shuffle", "sort", "cumsum", "scatter", "linear"])
def test_other_functions_are_not_elementwise(name: str) -> None:
    assert not stays_in_place(name)


class WithMemory(Inline):
    """Keys and values of a memory come before those of the sequence, from projections of their own."""

    def __init__(self) -> None:
        super().__init__()
        self.memory_k, self.memory_v = nn.Linear(D_MODEL, D_MODEL), nn.Linear(D_MODEL, D_MODEL)
        self.memory = nn.Parameter(torch.randn(1, 5, D_MODEL))

    def inputs(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = super().inputs(x)
        memory = self.memory.expand(len(x), -1, -1)
        k, v = (torch.cat([self.heads(p(memory)), own], dim=2) for p, own in ((self.memory_k, k), (self.memory_v, v)))
        return q, k, v


class InterfaceWithMemory(Attention):
    """The same behind transformers' interface."""

    def __init__(self) -> None:
        super().__init__(nn.Linear(D_MODEL, D_MODEL), nn.Linear(D_MODEL, D_MODEL))
        self.memory_k, self.memory_v = nn.Linear(D_MODEL, D_MODEL), nn.Linear(D_MODEL, D_MODEL)
        self.memory = nn.Parameter(torch.randn(1, 5, D_MODEL))

    def forward(self, hidden_states: Tensor, attention_mask: Any = None) -> Tensor:
        shape, memory = (len(hidden_states), -1, HEADS, D_HEAD), self.memory.expand(len(hidden_states), -1, -1)
        q = self.heads(self.q(hidden_states), shape)
        k = torch.cat([self.heads(p(x), shape) for p, x in ((self.memory_k, memory), (self.k, hidden_states))], dim=2)
        v = torch.cat([self.heads(p(x), shape) for p, x in ((self.memory_v, memory), (self.v, hidden_states))], dim=2)
        attend: Callable[..., Any] = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention)
        z, _ = attend(self, q, k, v, attention_mask)
        return self.o(z.reshape(hidden_states.shape))


@pytest.mark.parametrize("style", [WithMemory, InterfaceWithMemory])
def test_positions_from_several_projections_are_of_neither(style: Any) -> None:
    model = inline_model(style)
    attention = find_anatomy(model).attentions[0]
    assert set(attention.projections) == {"q", "o"}
    for site in "kv":
        assert attention.why[site] == f"{site} comes from other channels at other positions (of memory_{site} and {site})"
    with pytest.raises(SpecError, match=r"site 'k': k comes from other channels at other positions.*Use site 'rot_k'"):
        patch_model(model, Edit("k", "zero", heads=[0]))
    with pytest.raises(UnsupportedArchitectureError, match="v comes from other channels at other positions"):
        W_V(model, 0)
    with pytest.raises(UnsupportedArchitectureError, match="k comes from other channels at other positions"):
        pieces(model, 0, "k")


class WithBiasRow(Inline):
    """One key and value more that is no projection's, as in torch's own attention with bias_k and bias_v."""

    def __init__(self) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.randn(D_HEAD))

    def inputs(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = super().inputs(x)
        row = self.bias.expand(len(x), HEADS, 1, D_HEAD)
        return q, torch.cat([row, k], dim=2), nn.functional.pad(v, (0, 0, 0, 1))


def test_padding_and_rows_of_no_projection_leave_the_others_theirs() -> None:
    model, x = inline_model(WithBiasRow), torch.randn(2, 6, D_MODEL)
    assert set(find_anatomy(model).attentions[0].projections) == {"q", "k", "v", "o"}
    with capture(model, "v") as run:
        model["attention"](x)
    v = x[:, None] @ W_V(model, 0) + b_V(model, 0)[:, None]  # type: ignore[index]
    # Values of order 1 in float32, summed over 12 channels in another order.
    torch.testing.assert_close(run[0, "v"][:, :, :-1], v, rtol=1e-5, atol=1e-6)


class Halved(Inline):
    def output(self, z: Tensor) -> Tensor:
        return 0.5 * super().output(z)


class HalvedInPlace(Inline):
    def output(self, z: Tensor) -> Tensor:
        out = super().output(z)
        out.mul_(0.5)
        return out


class LayerScaled(Inline):
    """By a parameter that is one until it is trained."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(D_MODEL))

    def output(self, z: Tensor) -> Tensor:
        return super().output(z) * self.scale


class OutputGated(LayerScaled):
    def forward(self, hidden_states: Tensor) -> Tensor:
        q, k, v = self.inputs(hidden_states)
        out = self.output(nn.functional.softmax(q @ k.transpose(-1, -2), dim=-1) @ v)
        return hidden_states + out

    def output(self, z: Tensor) -> Tensor:
        return nn.functional.layer_norm(Inline.output(self, z), (D_MODEL,))


class PostNormed(OutputGated):
    """The residual stream is added and then normed: what the attention adds to it is still what its heads add up to."""

    def output(self, z: Tensor) -> Tensor:
        return nn.functional.dropout(Inline.output(self, z), 0.1, self.training)

    def forward(self, hidden_states: Tensor) -> Tensor:
        return nn.functional.layer_norm(super().forward(hidden_states), (D_MODEL,))


@pytest.mark.parametrize("style", [Halved, HalvedInPlace, LayerScaled, OutputGated])
def test_an_output_that_is_changed_behind_its_projection_has_no_result(style: Any) -> None:
    model = inline_model(style)
    reason = "what o gives is scaled, gated or normed before it is the output"
    assert find_anatomy(model).attentions[0].why == {"o": reason}
    with pytest.raises(SpecError, match=rf"site 'result': {reason}.*Use site 'z'"):
        patch_model(model, Edit("result", "zero"))


def test_what_is_done_to_the_residual_stream_leaves_the_result() -> None:
    model, x = inline_model(PostNormed), torch.randn(2, 6, D_MODEL)
    with capture(model, "result") as run:
        output = model["attention"](x)
    total = x + run[0, "result"].sum(1) + model["attention"].o.bias
    torch.testing.assert_close(nn.functional.layer_norm(total, (D_MODEL,)), output)
