"""Attention that a class computes inline: every style of `remote/styles.py` against the formula, and what is refused and why.

`by_hand` computes the same attention from the outputs of the projections, one axis each for batch, head, query and key.
"""

from __future__ import annotations

import copy
import inspect
import itertools
import math
import pickle
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from remote import styles
from remote.styles import D_MODEL, FUSED, HEADS, REACH, WIDTH, WRITTEN_OUT
from torch import Tensor, nn
from transformers import SamConfig, SamModel

import surgery.record
from surgery import (
    Edit,
    Freeze,
    NoMatchError,
    UnsupportedArchitectureError,
    capture,
    find_anatomy,
    inspect_model,
    patch_model,
    unpatch_model,
)
from surgery.classes import SurgicalAttention
from surgery.errors import SurgeryError
from surgery.family import register_softmax
from surgery.layout import BATCH, COLUMN, HEAD, ROW, Layout
from surgery.sites import CORE_SITES, SITES

# The formula takes products and sums in another order than the classes.
CLOSE = dict(rtol=1e-4, atol=1e-5)
BATCH_SIZE, LENGTH = 2, 6

by_style = pytest.mark.parametrize("style", WRITTEN_OUT, ids=lambda style: style.__name__)
by_fused = pytest.mark.parametrize("style", FUSED, ids=lambda style: style.__name__)
by_any = pytest.mark.parametrize("style", [*WRITTEN_OUT, *FUSED], ids=lambda style: style.__name__)

LINES = Path(__file__).read_text(encoding="utf-8").splitlines()

Cuts = dict[str, Callable[[Tensor], Tensor]]


def build(style: Any, seed: int = 0) -> Any:
    """A model of one attention, clearly not uniform."""
    torch.manual_seed(seed)
    model = nn.ModuleDict({"layer": style()}).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.8 * torch.randn(parameter.shape))
    return model


def states(seed: int = 0, length: int = LENGTH) -> Tensor:
    return torch.randn(BATCH_SIZE, length, D_MODEL, generator=torch.Generator().manual_seed(seed))


def mask_of(style: Any) -> Tensor | None:
    """A causal mask, additive, where the style takes one."""
    if style is styles.Blocks:
        return None
    mask = torch.full((LENGTH, LENGTH), -1e9).triu(1).expand(BATCH_SIZE, 1, LENGTH, LENGTH).clone()
    mask[0, :, :, 1] = torch.where(torch.arange(LENGTH) == 1, 0.0, -1e9)
    return mask


def call(model: Any, x: Tensor, mask: Tensor | None = None, **more: Any) -> Tensor:
    """The output, batch first."""
    layer = model["layer"]
    x = x.transpose(0, 1) if layer.is_sequence_first else x
    out = layer(x, **({} if mask is None else {"attention_mask": mask}), **more)
    out = first(out)
    return out.transpose(0, 1) if layer.is_sequence_first else out


def first(output: Any) -> Any:
    return first(output[0]) if isinstance(output, tuple) else output


def by_hand(layer: Any, x: Tensor, mask: Any = None, cuts: Cuts | None = None) -> dict[str, Tensor]:
    """Every site, and the output, by the formula, with changes of the tensors at sites."""
    seen: dict[str, Tensor] = {}
    x = -x if isinstance(layer, styles.Extended) else x

    def at(site: str, tensor: Tensor) -> Tensor:
        tensor = (cuts or {}).get(site, lambda t: t)(tensor)
        seen[site] = tensor
        return tensor

    parts = layer.qkv(x).chunk(3, dim=-1) if layer.is_fused else [first(p(x)) for p in (layer.q, layer.k, layer.v)]
    q, k, v = (part.unflatten(-1, (-1, WIDTH)).permute(0, 2, 1, 3) for part in parts)
    q, k = at("q", q), at("k", k)
    groups = HEADS // k.shape[1]
    q = at("rot_q", q * WIDTH**-0.5 if layer.scales_q else q)
    k = at("rot_k", k.repeat_interleave(groups, 1))
    full_v = at("v", v.repeat_interleave(groups, 1))
    scores = torch.einsum("bhqd,bhkd->bhqk", q, k)
    if isinstance(layer, styles.Relative):
        for i, j in itertools.product(range(x.shape[1]), repeat=2):
            far = layer.distance.weight[max(-REACH, min(REACH, j - i)) + REACH]
            scores = scores + 0
            scores[:, :, i, j] += q[:, :, i] @ far
    if not layer.scales_q:
        scores = scores / math.sqrt(WIDTH)
    if isinstance(layer, styles.Blocks):
        block = torch.arange(x.shape[1]) // 3
        mask = torch.where(block == block[:, None], 0.0, -torch.inf)
    scores = at("scores", scores if mask is None else scores + mask)
    pattern = at("pattern", scores.exp() / scores.exp().sum(-1, keepdim=True))
    z = at("z", torch.einsum("bhqk,bhkd->bhqd", pattern, full_v))
    heads = layer.o.weight.T.view(HEADS, WIDTH, D_MODEL)
    result = at("result", torch.einsum("bhqd,hdm->bhqm", z, heads))
    seen["output"] = result.sum(1) + layer.o.bias
    return seen


def halved(head: int | list[int]) -> Callable[[Tensor], Tensor]:
    def change(tensor: Tensor) -> Tensor:
        tensor = tensor.clone()
        tensor[:, head] *= 0.5
        return tensor

    return change


def blocks(tensor: Tensor) -> Tensor:
    """(batch * block, head, query, d) from (batch, head, position, d)."""
    return tensor.unflatten(2, (-1, 3)).transpose(1, 2).flatten(0, 1)


# -- every style ---------------------------------------------------------------------------------------------------------------


@by_any
def test_equal_bit_for_bit_and_undone(style: Any) -> None:
    model, x, mask = build(style), states(), mask_of(style)
    layer, own, parameters = model["layer"], style.__dict__.copy(), dict(model.named_parameters())
    names = set(vars(styles))

    def outcome() -> list[Tensor]:
        model.zero_grad()
        outputs = [call(model, x), call(model, states(1, length=3))] + ([] if mask is None else [call(model, x, mask)])
        sum((out * torch.linspace(0, 1, out.numel()).view_as(out)).sum() for out in outputs).backward()
        return [*outputs, *(p.grad for p in model.parameters())]

    expected = outcome()
    unchanged = [Edit(site, "scale", 1.0) for site in ("rot_q", "rot_k", "v", "z")]
    if style not in FUSED:
        unchanged += [Edit("scores", "scale", 1.0), Edit("pattern", "scale", 1.0)]
    for cuts, kernel in (((), "auto"), (unchanged, "auto")) + (() if style in FUSED else (((), "eager"),)):
        if style.kv_heads < HEADS and cuts:
            cuts = [
                cut for cut in cuts if cut.site not in ("rot_k", "v")
            ]  # those read copies, whose products may round otherwise
        patch_model(model, cuts, kernel=kernel)  # type: ignore[arg-type]
        assert isinstance(layer, style) and isinstance(layer, SurgicalAttention)
        assert all(torch.equal(a, b) for a, b in zip(outcome(), expected, strict=True))
    assert all(p is parameters[n] for n, p in model.named_parameters())
    unpatch_model(model)
    assert type(layer) is style and style.__dict__ == own and set(vars(styles)) == names
    assert all(torch.equal(a, b) for a, b in zip(outcome(), expected, strict=True))


@by_any
def test_captures_are_the_formula(style: Any) -> None:
    model, x, mask = build(style), states(), mask_of(style)
    expected = by_hand(model["layer"], x, mask)
    # What the module gives itself is the formula, too.
    torch.testing.assert_close(call(model, x, mask), expected["output"], **CLOSE)
    with torch.no_grad(), capture(model, list(SITES)) as run:
        call(model, x, mask)
    for site in SITES:
        found, wanted = run["self.0", site], expected[site]
        if site in ("v", "k"):
            wanted = wanted[:, :: wanted.shape[1] // style.kv_heads]
        if style is styles.Blocks:
            if site in ("scores", "pattern"):
                wanted = torch.stack([wanted[:, :, i : i + 3, i : i + 3] for i in (0, 3)], dim=1).flatten(0, 1)
            elif site in CORE_SITES:
                wanted = blocks(wanted)
            else:
                found = found.view_as(wanted)
        torch.testing.assert_close(found, wanted, **CLOSE)


@by_any
def test_cuts_are_the_formula(style: Any) -> None:
    """At every site, of every head: so every point is live, and acts on the head that it says."""
    model, x, mask = build(style), states(), mask_of(style)
    layer = copy.deepcopy(model["layer"])
    plain = call(model, x, mask)
    patch_model(model)
    for site in SITES:
        chosen = [[0, 1, 2]] if site == "k" and style.kv_heads == 1 else [[0], [1], [2], [2, 0]]
        for heads in chosen:
            patch_model(model, Edit(site, "scale", 0.5, heads=heads))
            found = call(model, x, mask)
            wanted = by_hand(layer, x, mask, {site: halved(heads if len(chosen) > 1 else [0])})["output"]
            if site != "scores" or mask is None:  # there a cut leaves alone what is masked
                torch.testing.assert_close(found, wanted, **CLOSE)
            assert not torch.allclose(found, plain, atol=1e-4), (site, heads)
    patch_model(model, Freeze("qk", heads=[1]))
    wanted = by_hand(layer, x, mask, {"rot_q": lambda t: torch.stack([t[:, 0], 0 * t[:, 1], t[:, 2]], dim=1)})["output"]
    torch.testing.assert_close(call(model, x, mask), wanted, **CLOSE)


@by_any
def test_anatomy(style: Any) -> None:
    [attention] = find_anatomy(build(style))
    assert (attention.heads, attention.kv_heads, attention.d_head, attention.d_value) == (HEADS, style.kv_heads, WIDTH, WIDTH)
    assert attention.fusion == ("q+k+v" if style.is_fused else "q | k | v")
    assert attention.projections["o"].path == "layer.o" and not attention.why


@pytest.mark.parametrize("style", [styles.Matmul, styles.Helper, styles.Decorated, styles.Relative], ids=lambda s: s.__name__)
def test_copies_and_pickles(style: Any) -> None:
    model, x = patch_model(build(style), Freeze("qk", heads=[1])), states()
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(call(other, x), call(model, x))
        assert type(unpatch_model(other)["layer"]) is style


def test_every_point_is_reached_with_a_mask_and_without() -> None:
    model, x = build(styles.Branches), states()
    for mask in (None, mask_of(styles.Branches)):
        for site in CORE_SITES:
            patch_model(model, Edit(site, "scale", 0.5))
            assert not torch.equal(call(model, x, mask), call(build(styles.Branches), x, mask))
    code = model["layer"].reconstruction.code
    assert all(code.count(f"spot('{site}', ") == 2 for site in CORE_SITES)


class Unmasked(styles.Attention):
    def forward(self, hidden_states: Tensor) -> Tensor:
        query, key, value = self.qkv_by_head(hidden_states)
        return self.merge(torch.softmax(query @ key.transpose(-1, -2), dim=-1) @ value)


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> list[nn.Module]:
    """The modules that were run on stubs."""
    found: list[nn.Module] = []
    own = surgery.record.run_on_stubs

    def counted(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        found.append(module)
        return own(module, *args, **kwargs)

    monkeypatch.setattr(surgery.record, "run_on_stubs", counted)
    return found


def test_the_recorded_run_is_of_the_class_alone_and_not_repeated(runs: list[nn.Module]) -> None:
    """What has a module recorded (this test, say) is none of its code; a mask that it does not take is no other run."""
    _, [witness] = surgery.record.watch(build(Unmasked)["layer"], False)
    assert len(runs) == 1
    names = {place.function.__name__ for step in witness.order_of_steps for place in step.places}
    assert names == {"forward", "qkv_by_head", "by_head", "merge"}


def test_the_next_layer_is_run_as_the_one_before(runs: list[nn.Module]) -> None:
    """Guesses at what a forward takes are made once for each class."""
    config = SamConfig(vision_config={"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2, "image_size": 32})
    first, *others = find_anatomy(SamModel(config).vision_encoder).attentions
    assert len(others) == 2 and all(runs.count(attention.module) == 1 for attention in others)
    assert runs.count(first.module) > 1, "the first guess is another"


@pytest.mark.parametrize("style", [styles.Relative, styles.UnboundRelative], ids=lambda s: s.__name__)
def test_scores_of_two_terms_are_cut_off_from_q(style: Any) -> None:
    model, x = build(style), states()
    patch_model(model, Edit("rot_q", "zero"))
    with capture(model, ["scores", "pattern"]) as run:
        call(model, x)
    assert torch.equal(run["self.0", "scores"], torch.zeros(BATCH_SIZE, HEADS, LENGTH, LENGTH))
    torch.testing.assert_close(run["self.0", "pattern"], torch.full((BATCH_SIZE, HEADS, LENGTH, LENGTH), 1 / LENGTH))


def test_the_pattern_is_that_before_dropout() -> None:
    model, plain, x = build(styles.Dropped).train(), build(styles.Dropped).train(), states()
    with capture(model, ["pattern", "z", "v"]) as run:
        torch.manual_seed(1)
        out = call(model, x)
    pattern = run["self.0", "pattern"]
    torch.testing.assert_close(pattern.sum(-1), torch.ones(BATCH_SIZE, HEADS, LENGTH))
    assert not torch.allclose(pattern @ run["self.0", "v"], run["self.0", "z"], atol=1e-2)
    torch.manual_seed(1)
    assert torch.equal(call(plain, x), out)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_dtypes(dtype: torch.dtype) -> None:
    for style in (styles.Dropped, styles.BatchTimesHead, styles.Relative, styles.Fused):
        model, x = build(style).to(dtype), states().to(dtype)
        expected = call(model, x)
        assert torch.equal(call(patch_model(model, Edit("z", "scale", 1.0)), x), expected) and expected.dtype == dtype
        with capture(model, ["pattern"]) as run:
            call(model, x)
        wanted = by_hand(copy.deepcopy(unpatch_model(model)["layer"]).double(), x.double())["pattern"]
        # bfloat16 has eight bits.
        torch.testing.assert_close(
            run["self.0", "pattern"].double(), wanted, rtol=0, atol=0.05 if dtype == torch.bfloat16 else 1e-6
        )


# -- fused kernels -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["none", "additive", "boolean", "causal"])
@by_fused
def test_a_fused_kernel_under_each_mask(style: Any, kind: str) -> None:
    model, x = build(style), states()
    layer = copy.deepcopy(model["layer"])
    causal = torch.ones(LENGTH, LENGTH, dtype=torch.bool).tril().expand(BATCH_SIZE, 1, LENGTH, LENGTH)
    formula = None if kind == "none" else torch.where(causal, 0.0, -torch.inf)
    mask = {"additive": torch.where(causal, 0.0, -1e9), "boolean": causal}.get(kind)
    more = {"is_causal": True} if kind == "causal" else {}
    expected = call(model, x, mask, **more)
    assert torch.equal(call(patch_model(model), x, mask, **more), expected)
    torch.testing.assert_close(expected, by_hand(layer, x, formula)["output"], **CLOSE)
    for site in ("rot_q", "rot_k", "v", "pattern", "z"):
        for kernel in ("auto", "eager"):
            patch_model(model, Edit(site, "scale", 0.5, heads=[2, 0]), kernel=kernel)  # type: ignore[arg-type]
            wanted = by_hand(layer, x, formula, {site: halved([2, 0])})["output"]
            torch.testing.assert_close(call(model, x, mask, **more), wanted, **CLOSE)
    with capture(patch_model(model), ["pattern", "scores"], heads=[1]) as run:
        assert torch.equal(call(model, x, mask, **more), expected)
    torch.testing.assert_close(run["self.0", "pattern"], by_hand(layer, x, formula)["pattern"][:, 1:2], **CLOSE)


@pytest.mark.parametrize(
    "style", [styles.Fused, styles.Matmul, styles.HelperInHelper, styles.Unbound, styles.Within], ids=lambda s: s.__name__
)
def test_compiled(style: Any) -> None:
    torch._dynamo.reset()
    model, x = build(style), states()
    for cut in (Freeze("qk", heads=[1]), Edit("pattern", "scale", 0.5, heads=[0])):
        patch_model(model, cut)
        assert torch.equal(torch.compile(model["layer"], backend="eager", fullgraph=True)(x)[0], model["layer"](x)[0])
    torch._dynamo.reset()


# -- layouts -------------------------------------------------------------------------------------------------------------------

LAYOUTS: dict[Any, str] = {
    styles.Matmul: "rot_q: b h r c, rot_k: b h c r, scores: b h r c, pattern: b h r c, v: b h r c, z: b h r c",
    styles.BatchTimesHead: "rot_q: bh r c, rot_k: bh c r, scores: bh r c, pattern: bh r c, v: bh r c, z: bh r c",
    styles.HeadMajor: "rot_q: hb r c, rot_k: hb c r, scores: hb r c, pattern: hb r c, v: hb r c, z: hb r c",
    styles.SequenceFirst: "rot_q: r b h c, rot_k: r b h c, scores: b h r c, pattern: b h r c, v: r b h c, z: r b h c",
    styles.KeysFirst: "rot_q: b h c r, rot_k: b h r c, scores: b h c r, pattern: b h c r, v: b h c r, z: b h c r",
    styles.Added: "rot_q: bh r c, rot_k: bh c r, scores: bh r c, pattern: bh r c, v: bh r c, z: bh r c",
    styles.Fused: "rot_q: b h r c, rot_k: b h r c, v: b h r c, z: b h r c",
    styles.FusedFlat: "rot_q: bh r c, rot_k: bh r c, v: bh r c, z: bh r c",
}
ROLES = {"b": BATCH, "h": HEAD, "r": ROW, "c": COLUMN}


def roles(text: str) -> tuple[tuple[int, ...], ...]:
    return tuple(tuple(ROLES[c] for c in axis) for axis in text.split())


@pytest.mark.parametrize("style", LAYOUTS, ids=lambda style: style.__name__)
def test_layouts_that_the_witness_finds(style: Any) -> None:
    layouts = patch_model(build(style))["layer"].reconstruction.layouts
    expected = dict(text.split(": ") for text in LAYOUTS[style].split(", "))
    assert layouts == {site: Layout(roles(text), HEADS) for site, text in expected.items()}


SIZES = {BATCH: 2, HEAD: 3, ROW: 4, COLUMN: 5}
layouts_of = st.sampled_from(["b h r c", "bh r c", "hb r c", "b r c", "h r c", "r c", "b b h r c", "b h r", "bh r"]).flatmap(
    lambda text: st.permutations(text.split()).map(" ".join)
)


def tensor_of(text: str) -> Tensor:
    sizes = [math.prod(SIZES[ROLES[c]] for c in axis) for axis in text.split()]
    return torch.arange(math.prod(sizes)).view(sizes)


@settings(max_examples=150, deadline=None)
@given(layouts_of)
def test_there_and_back(text: str) -> None:
    tensor = tensor_of(text)
    layout = Layout(roles(text), SIZES[HEAD] if "h" in text else 1)
    standard = layout.to_standard(tensor)
    assert torch.equal(layout.from_standard(standard, tensor), tensor)
    # Entry by entry: every axis counts, the outer batch axes first.
    counts = {role: SIZES[role] ** text.count(c) for c, role in ROLES.items()}
    assert standard.shape == tuple(counts.values())
    for b, h, r, c in itertools.product(*(range(counts[role]) for role in (BATCH, HEAD, ROW, COLUMN))):
        batches = [b // SIZES[BATCH], b % SIZES[BATCH]][-text.count("b") :] if text.count("b") else []
        place = []
        for axis in text.split():
            number = 0
            for letter in axis:
                part = {"b": lambda: batches.pop(0), "h": lambda: h, "r": lambda: r, "c": lambda: c}[letter]()  # noqa: B023
                number = number * SIZES[ROLES[letter]] + part
            place.append(number)
        assert standard[b, h, r, c] == tensor[tuple(place)]


@settings(max_examples=60, deadline=None)
@given(st.permutations("bhrc"), st.integers(2, 4))
def test_a_tensor_may_get_more_heads_than_it_has(order: list[str], heads: int) -> None:
    """One kv head, broadcast over query heads, becomes one for each."""
    sizes = {"b": 2, "h": 1, "r": 4, "c": 5}
    tensor = torch.randn([sizes[letter] for letter in order])
    layout = Layout(roles(" ".join(order)), 1)
    back = layout.from_standard(layout.to_standard(tensor).repeat_interleave(heads, 1), tensor)
    assert torch.equal(back, tensor.expand([heads if letter == "h" else sizes[letter] for letter in order]))


# -- what is refused -----------------------------------------------------------------------------------------------------------


class Refused(styles.Attention):
    """What the refused classes share: q, k and v by head."""


class TwoSoftmaxes(Refused):
    def forward(self, hidden_states: Tensor) -> Tensor:
        query, key, value = self.qkv_by_head(hidden_states)
        scores = query @ key.mT
        return self.merge((scores.softmax(-1) + scores.softmax(-2)) @ value)


class SoftmaxOfSoftmax(Refused):
    def forward(self, hidden_states: Tensor) -> Tensor:
        query, key, value = self.qkv_by_head(hidden_states)
        return self.merge((query @ key.mT).softmax(-1).softmax(-1) @ value)


class Unmultiplied(Refused):
    def forward(self, hidden_states: Tensor) -> Tensor:
        query, key, value = self.qkv_by_head(hidden_states)
        probs = torch.softmax(query @ key.mT, dim=-1)
        return self.merge((probs[..., None] * value[:, :, None]).sum(-2))


class HeadByHead(Refused):
    def forward(self, hidden_states: Tensor) -> Tensor:
        found = []
        for query, key, value in zip(*(part.unbind(1) for part in self.qkv_by_head(hidden_states)), strict=True):
            probs = torch.softmax(query @ key.mT, dim=-1)
            found.append(probs @ value)
        return self.o(torch.cat(found, dim=-1))


class QueryByQuery(Refused):
    def forward(self, hidden_states: Tensor) -> Tensor:
        query, key, value = self.qkv_by_head(hidden_states)
        scores = torch.cat([torch.matmul(one, key.mT) for one in query.split(1, dim=2)], dim=2)
        return self.merge(scores.softmax(-1) @ value)


class ValuesInParts(Refused):
    def forward(self, hidden_states: Tensor) -> Tensor:
        query, key, value = self.qkv_by_head(hidden_states)
        probs = torch.softmax(query @ key.mT, dim=-1)
        found = []
        for part in value.split(2, dim=-1):
            found.append(torch.matmul(probs, part))
        return self.merge(torch.cat(found, dim=-1))


class ValuesInAComprehension(Refused):
    def forward(self, hidden_states: Tensor) -> Tensor:
        query, key, value = self.qkv_by_head(hidden_states)
        probs = torch.softmax(query @ key.mT, dim=-1)
        return self.merge(torch.cat([torch.matmul(probs, part) for part in value.split(2, dim=-1)], dim=-1))


MADE = """
class Made(Refused):
    def forward(self, hidden_states):
        query, key, value = self.qkv_by_head(hidden_states)
        return self.merge(torch.softmax(query @ key.mT, dim=-1) @ value)
"""
space = {"Refused": Refused, "torch": torch, "__name__": __name__}
exec(MADE, space)
Made: Any = space["Made"]

REFUSALS = {
    TwoSoftmaxes: ("a second softmax over scores", "scores.softmax(-2)"),
    SoftmaxOfSoftmax: ("a second softmax", "(query @ key.mT).softmax(-1).softmax(-1)"),
    Unmultiplied: ("a softmax over q k^T that no product with values follows", "torch.softmax(query @ key.mT, dim=-1)"),
    HeadByHead: ("a second softmax over scores", "torch.softmax(query @ key.mT, dim=-1)"),
    QueryByQuery: ("scores whose axes are not products of batch, head, query and key", "torch.cat("),
    ValuesInParts: ("a second product of the pattern", "torch.matmul(probs, part)"),
    ValuesInAComprehension: ("a second product of the pattern", ""),  # what is named is the call, or the whole line
    styles.MultiQueryEinsum: ("a product over the axes bihd, bjd -> bhij", "torch.einsum("),
}


@pytest.mark.parametrize("style", REFUSALS, ids=lambda style: style.__name__)
def test_refusals_name_the_class_the_line_and_the_expression(style: Any) -> None:
    model = build(style)
    with pytest.raises((UnsupportedArchitectureError, NoMatchError)) as caught:
        patch_model(model)
    message, (reason, expression) = str(caught.value), REFUSALS[style]
    assert f"'layer' ({style.__name__})" in message and reason in message
    lines, first = inspect.getsourcelines(style.forward)
    at = next(n for n, line in enumerate(lines, first) if (expression or "for part in") in line)
    quote = f": '{expression}" if expression else ": "
    assert f"{style.__module__}.{style.__name__}.forward, line {at}{quote}" in message.replace('"', "'")
    assert type(model["layer"]) is style and torch.isfinite(call(model, states())).all()


class OverQueries(Refused):
    """Each key is given to the queries in shares."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        query, key, value = self.qkv_by_head(hidden_states)
        shares = (query @ key.mT).softmax(-2)
        return self.merge(shares / shares.sum(-1, keepdim=True) @ value)


class Assigned(Refused):
    """Each key is given to one query; the soft shares are only shown."""

    def forward(self, hidden_states: Tensor) -> tuple[Tensor, Tensor]:
        query, key, value = self.qkv_by_head(hidden_states)
        soft = (query @ key.mT).softmax(-2)
        hard = torch.zeros_like(soft).scatter_(-2, soft.argmax(-2, keepdim=True), 1.0) - soft.detach() + soft
        return self.merge(hard @ value), (query @ key.mT).softmax(-2)


class Additive(Refused):
    """One number for each state, by a vector that is learned; no query meets a key."""

    def __init__(self) -> None:
        super().__init__()
        self.weigh = nn.Parameter(torch.ones(D_MODEL, 1))

    def forward(self, hidden_states: Tensor) -> Tensor:
        query, value = self.q(hidden_states), self.v(hidden_states)
        shares = (query @ self.weigh).softmax(1)
        return self.o((shares * query).sum(1, keepdim=True) * value)


LEFT_ALONE = {
    OverQueries: ("a softmax over the queries of each key, which weights no values", "(query @ key.mT).softmax(-2)"),
    Assigned: ("a softmax over the queries of each key, which weights no values", "(query @ key.mT).softmax(-2)"),
    Additive: ("a softmax over a linear map of states, which is no q k^T", "(query @ self.weigh).softmax(1)"),
}


@pytest.mark.parametrize("style", LEFT_ALONE, ids=lambda style: style.__name__)
def test_a_softmax_that_is_no_attention_is_left_alone_and_named(style: Any) -> None:
    reason, expression = LEFT_ALONE[style]
    alone = build(style)
    with pytest.raises(NoMatchError, match="ModuleDict has a softmax that is no attention, and is left alone") as caught:
        patch_model(alone)
    message = str(caught.value)
    assert f"'layer' ({style.__name__})" in message and reason in message and expression in message
    beside = nn.ModuleDict({"other": alone["layer"], "layer": styles.Matmul()})
    anatomy = find_anatomy(patch_model(beside, Freeze("ov", heads=[1])))
    assert [a.path for a in anatomy] == ["layer"] and anatomy.unsupported == ()
    assert len(anatomy.others) == 1 and reason in anatomy.others[0]
    assert type(beside["other"]) is style


def test_a_class_method_is_refused() -> None:
    """It does not know the instance whose cuts it should make."""
    with pytest.raises(UnsupportedArchitectureError, match=r"'layer' \(OfClass\)"):
        patch_model(build(styles.OfClass))


def test_a_class_without_source_is_refused() -> None:
    model = build(Made)
    with pytest.raises(
        UnsupportedArchitectureError, match=r"'layer' \(Made\): found source that cannot be rewritten .*<string>"
    ):
        patch_model(model)
    assert type(model["layer"]) is Made


def test_an_interface_that_is_called_twice_is_refused() -> None:
    from families import FAMILIES
    from transformers.models.llama import modeling_llama

    def twice(self: Any, hidden_states: Tensor, position_embeddings: Any, attention_mask: Any = None, **more: Any) -> Any:
        given = (hidden_states, position_embeddings, attention_mask)
        first, weights = modeling_llama.LlamaAttention.forward(self, *given, **more)
        return first + modeling_llama.LlamaAttention.forward(self, *given, **more)[0], weights

    model = FAMILIES["llama"].build()
    Twice = type("TwiceAttention", (modeling_llama.LlamaAttention,), {"forward": twice})
    model.model.layers[1].self_attn.__class__ = Twice
    with pytest.raises(UnsupportedArchitectureError, match=r"layers\.1\.self_attn' \(TwiceAttention\).*function 2 times"):
        patch_model(model)


# -- several softmaxes ---------------------------------------------------------------------------------------------------------


class BothWays(styles.Attention):
    """Keys read the queries, too, by the same product: the softmax that runs first."""

    def forward(self, hidden_states: Tensor) -> tuple[Tensor, Tensor]:
        query, key, value = self.qkv_by_head(hidden_states)
        scores = query @ key.mT * self.scale
        back = torch.softmax(scores.mT, dim=-1) @ query
        return self.merge(torch.softmax(scores, dim=-1) @ value), back


class Undeclared(BothWays):
    def forward(self, hidden_states: Tensor) -> tuple[Tensor, Tensor]:
        return super().forward(hidden_states)


register_softmax(1, f"{__name__}.BothWays")


def test_of_several_softmaxes_the_registered_one_is_the_attention() -> None:
    model, x = build(BothWays), states()
    layer = copy.deepcopy(model["layer"])
    output, back = model["layer"](x)
    patch_model(model)
    assert torch.equal(model["layer"](x)[0], output)
    for site in SITES:
        patch_model(model, Edit(site, "scale", 0.5, heads=[2]))
        found = model["layer"](x)
        wanted = by_hand(layer, x, None, {site: halved(2)})["output"]
        torch.testing.assert_close(found[0], wanted, **CLOSE)
        # What is cut of q and k acts in both; the rest of the other way stays as it is.
        assert torch.equal(found[1], back) is (site not in ("q", "k", "rot_q", "rot_k")), site
    with capture(model, ["pattern"]) as run:
        model["layer"](x)
    torch.testing.assert_close(run["self.0", "pattern"], by_hand(layer, x)["pattern"], **CLOSE)


def test_what_is_beside_the_attention_is_named() -> None:
    text = " ".join(str(inspect_model(build(BothWays))).split())
    assert "not patched beside the attention: 'layer' (BothWays): its softmax over scores at" in text
    assert "torch.softmax(scores.mT, dim=-1)" in text
    assert "not patched beside" not in str(inspect_model(build(styles.Matmul)))


def test_several_softmaxes_are_refused_unless_one_is_registered(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert len(find_anatomy(build(Undeclared))) == 1
    monkeypatch.setattr("surgery.family._SOFTMAXES", {})
    with pytest.raises(UnsupportedArchitectureError, match=r"'layer' \(Undeclared\): found a second softmax over scores"):
        find_anatomy(build(Undeclared))
    register_softmax(0, "package.Class")
    register_softmax(0, "package.Class")
    with pytest.raises(ValueError, match=r"register_softmax: package\.Class is registered with softmax 0 already"):
        register_softmax(1, "package.Class")


# -- rewriting -----------------------------------------------------------------------------------------------------------------


class Fragile(styles.Attention):
    def forward(self, hidden_states: Tensor) -> Tensor:
        query, key, value = self.qkv_by_head(hidden_states)
        probs = torch.softmax(
            query @ key.mT,
            dim=-1,
        )
        if hidden_states.shape[1] == 5:
            raise ValueError("five")
        return self.merge(self.last(probs, value))

    def last(self, probs: Tensor, value: Tensor) -> Tensor:
        return torch.matmul(
            probs,
            value if value.shape[2] != 4 else value[..., :1, :],
        )


def test_errors_in_rewritten_code_point_to_the_file_and_the_line() -> None:
    model = patch_model(build(Fragile), Edit("z", "scale", 0.5))
    for length, kind, text in ((5, ValueError, 'raise ValueError("five")'), (4, RuntimeError, "return torch.matmul(")):
        with pytest.raises(kind) as caught:
            model["layer"](states(length=length))
        frames = [f for f in traceback.extract_tb(caught.value.__traceback__) if f.filename == __file__]
        assert frames[-1].name == ("forward" if length == 5 else "last")
        assert LINES[frames[-1].lineno - 1].strip() == text  # type: ignore[operator]


class EitherWay(styles.Attention):
    def __init__(self, is_plain: bool = True) -> None:
        super().__init__()
        self.is_plain = is_plain

    def forward(self, hidden_states: Tensor) -> Tensor:
        query, key, value = self.qkv_by_head(hidden_states)
        if self.is_plain:
            return self.merge((query @ key.mT * self.scale).softmax(-1) @ value)
        weights = F.softmax(torch.matmul(query, key.mT) * self.scale, dim=-1)
        return self.merge(torch.matmul(weights, value))


def test_instances_of_one_class_get_the_points_of_their_own_branch() -> None:
    model = nn.ModuleDict({name: build(lambda name=name: EitherWay(name == "a"))["layer"] for name in "ab"})
    x = states()
    layers = copy.deepcopy(model)
    expected = {name: model[name](x) for name in "ab"}
    patch_model(model, Edit("pattern", "scale", 0.5, heads=[1]))
    codes = {name: model[name].reconstruction.code for name in "ab"}
    assert codes["a"] != codes["b"] and all(code.count("spot('pattern', ") == 1 for code in codes.values())
    for name in "ab":
        wanted = by_hand(layers[name], x, None, {"pattern": halved(1)})["output"]
        torch.testing.assert_close(model[name](x), wanted, **CLOSE)
    unpatch_model(model)
    assert all(torch.equal(model[name](x), expected[name]) for name in "ab")


@by_any
def test_the_code_can_be_read(style: Any) -> None:
    code = patch_model(build(style))["layer"].reconstruction.code
    compile(code, "code", "exec")
    names = ["_surgery.fused("] if style in FUSED else [f"spot('{site}', " for site in CORE_SITES]
    assert all(name in code for name in names)


def test_a_hook_on_a_module_whose_code_is_rewritten_is_an_error_under_cuts() -> None:
    """It would not fire there."""
    model, x = build(styles.Within), states()
    expected = call(model, x)
    patch_model(model)
    handle = model["layer"].products.register_forward_hook(lambda module, args, output: output * 2)
    assert not torch.equal(call(model, x), expected), "without cuts it fires"
    patch_model(model, Freeze("qk", heads=[1]))
    with pytest.raises(SurgeryError, match=r"a Products in 'layer', which has cuts: found a hook on it"):
        call(model, x)
    handle.remove()
    assert not torch.equal(call(model, x), expected)


class Normed(styles.Attention):
    """Its keys are normed by running statistics, which a forward in training moves on."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(D_MODEL)

    def forward(self, hidden_states: Tensor) -> Tensor:
        query, _, value = self.qkv_by_head(hidden_states)
        key = self.by_head(self.norm(self.k(hidden_states).mT).mT)
        return self.merge(torch.softmax(query @ key.mT, dim=-1) @ value)


def test_patching_in_training_leaves_running_statistics_as_they_are() -> None:
    model = build(Normed).train()
    before = {name: (buffer, buffer.clone()) for name, buffer in model.named_buffers()}
    assert before
    patch_model(model, Freeze("ov", heads=[1]))
    assert all(buffer is before[name][0] and torch.equal(*before[name]) for name, buffer in model.named_buffers())
    call(model, states())
    assert not any(torch.equal(*before[name]) for name in before)


def test_this_module_is_left_as_it_is() -> None:
    names = set(vars(sys.modules[__name__]))
    for style in (Fragile, EitherWay):
        own = dict(vars(style))
        patch_model(build(style), Edit("z", "scale", 0.5))["layer"](states())
        assert dict(vars(style)) == own
    assert set(vars(sys.modules[__name__])) == names
