"""Longformer's windows and global tokens (LED's encoder has the same code): equal bit for bit, and cuts against dense loops."""

from __future__ import annotations

import copy
import functools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LEDConfig, LEDForConditionalGeneration, LongformerConfig, LongformerForSequenceClassification
from transformers.models.longformer.modeling_longformer import LongformerSelfAttention

from surgery import Edit, Freeze, SurgeryError, capture, find_anatomy, patch_model, patched
from surgery.sites import SITES
from surgery.weights import head_weights

HEADS, WINDOW, LENGTH = 4, 4, 15  # one side of the window is 2; the model pads the sequence to 16
PADDING = -10000.0

CLOSE = {"rtol": 1e-5, "atol": 1e-6}
"""The reference sums in another order, in float32."""

Cuts = dict[str, Callable[[Tensor], Tensor]]


@functools.cache
def longformer() -> Any:
    """A model that no test may change but by patching in a block."""
    torch.manual_seed(0)
    config = LongformerConfig(
        vocab_size=50, hidden_size=32, num_hidden_layers=2, num_attention_heads=HEADS, intermediate_size=64,
        attention_window=WINDOW, max_position_embeddings=64, pad_token_id=0, num_labels=3,
    )  # fmt: skip
    return _spread(LongformerForSequenceClassification(config).eval())


@functools.cache
def led() -> Any:
    torch.manual_seed(0)
    config = LEDConfig(
        vocab_size=50, d_model=32, encoder_layers=2, decoder_layers=1, encoder_attention_heads=HEADS, decoder_attention_heads=2,
        encoder_ffn_dim=64, decoder_ffn_dim=64, attention_window=WINDOW, max_encoder_position_embeddings=64,
        max_decoder_position_embeddings=64, pad_token_id=0, decoder_start_token_id=2,
    )  # fmt: skip
    return _spread(LEDForConditionalGeneration(config).eval())


def _spread(model: Any) -> Any:
    """Larger weights, so that no pattern is near uniform."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if any(part in name for part in ("query", "key")):
                parameter.mul_(8)
    return model


def inputs_of(marked: str) -> dict[str, Tensor]:
    """Two rows, the second padded on the right. marked: which tokens have global attention."""
    torch.manual_seed(1)
    ids = torch.randint(3, 50, (2, LENGTH))
    mask = torch.ones_like(ids)
    mask[1, -4:] = 0
    where = torch.zeros_like(ids)
    if marked != "none":
        where[: 1 if marked == "in one row" else 2, 0] = 1
    if marked == "several":
        where[0, [5, 9]] = 1
    return {"input_ids": ids * mask, "attention_mask": mask, "global_attention_mask": where}


by_marked = pytest.mark.parametrize("marked", ["none", "first", "in one row", "several"])


def run(model: Any, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """Every tensor that a model gives."""
    if model is led():
        inputs = {**inputs, "decoder_input_ids": inputs["input_ids"][:, :6]}
        if "use_cache" not in inputs:
            inputs["use_cache"] = False  # type: ignore[assignment]
    with torch.no_grad():
        output = model(**inputs, output_attentions=True, output_hidden_states=True)
    found = {}
    for name, value in output.items():
        parts = value if isinstance(value, tuple) else (value,)
        found |= {f"{name} {n}": t for n, t in enumerate(parts) if isinstance(t, Tensor)}
    return found


def assert_equal(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in found.items():
        assert torch.equal(tensor, expected[name]), name


# -- without cuts -------------------------------------------------------------------------------------------------------


@by_marked
@pytest.mark.parametrize("make", [longformer, led])
def test_without_cuts_and_watched_it_is_the_same_model(make: Callable[[], Any], marked: str) -> None:
    model, inputs = make(), inputs_of(marked)
    expected = run(model, inputs)
    encoder = "encoder.self.*" if make is led else "self.*"
    for spec, kernel in ((None, "auto"), (Edit("z", "scale", 1.0, layers=[encoder]), "auto"), (None, "eager")):
        with patched(model, spec, kernel=kernel):  # type: ignore[arg-type]
            assert_equal(run(model, inputs), expected)
    with capture(model, list(SITES), layers=[encoder]):
        assert_equal(run(model, inputs), expected)
    assert_equal(run(model, inputs), expected)


@by_marked
def test_a_cut_of_the_matrix_that_changes_nothing_comes_back_whole(marked: str) -> None:
    model, inputs = longformer(), inputs_of(marked)
    expected = run(model, inputs)
    for site in ("scores", "pattern"):
        with patched(model, Edit(site, "scale", 1.0)):
            assert_equal(run(model, inputs), expected)


def test_anatomy_and_weights() -> None:
    for model, encoder in ((longformer(), "self.0"), (led(), "encoder.self.0")):
        attention = find_anatomy(model)[encoder]
        assert attention.fusion == "q | k | v" and "o" in attention.projections
        assert attention.projections["q"].path.endswith(".query")
        assert head_weights(model, encoder).W_Q.shape == (HEADS, 32, 8)


def test_gradients_with_dropout() -> None:
    model, inputs = longformer(), inputs_of("several")

    def gradients() -> dict[str, Tensor]:
        model.zero_grad()
        torch.manual_seed(0)
        model(**inputs, labels=torch.tensor([0, 2])).loss.backward()
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    model.train()
    try:
        expected = gradients()
        with capture(model, ["pattern", "z"]):
            found = gradients()
    finally:
        model.eval()
        model.zero_grad()
    assert found.keys() == expected.keys()
    for name, gradient in found.items():
        # Gradients of a tensor that is used several times are added in another order.
        torch.testing.assert_close(gradient, expected[name], rtol=1e-4, atol=1e-7, msg=name)


# -- against dense loops ------------------------------------------------------------------------------------------------


def dense(module: Any, states: Tensor, mask: Tensor, cuts: Cuts) -> dict[str, Tensor]:
    """scores, pattern and z of one attention (batch, head, query, ..), one query after another, under cuts by site.

    mask: (batch, position) negative for padding, positive for global attention. Scores of what is not seen are -inf.
    """

    def cut(site: str, tensor: Tensor) -> Tensor:
        return cuts[site](tensor.clone()) if site in cuts else tensor

    def split(projection: Any) -> Tensor:
        return projection(states).unflatten(-1, (HEADS, -1)).transpose(1, 2)

    batch, length, _ = states.shape
    width = states.shape[-1] // HEADS
    is_global, half = mask > 0, WINDOW // 2
    q, q_global = cut("q", split(module.query)), cut("q", split(module.query_global))
    rot_q = torch.where(is_global[:, None, :, None], q_global, q) / math.sqrt(width)
    rot_q = cut("rot_q", rot_q)
    k, k_global = (cut("rot_k", cut("k", split(projection))) for projection in (module.key, module.key_global))
    v, v_global = (cut("v", split(projection)) for projection in (module.value, module.value_global))
    scores = torch.full((batch, HEADS, length, length), -torch.inf)
    for b in range(batch):
        for i in range(length):
            for j in range(length):
                if mask[b, j] < 0:
                    continue
                if is_global[b, i]:
                    scores[b, :, i, j] = (rot_q[b, :, i] * k_global[b, :, j]).sum(-1)
                elif is_global[b, j] or abs(i - j) <= half:
                    scores[b, :, i, j] = (rot_q[b, :, i] * k[b, :, j]).sum(-1)
    scores = cut("scores", scores)
    pattern = scores.softmax(dim=-1).nan_to_num()
    pattern = pattern.masked_fill((mask < 0)[:, None, :, None], 0)  # rows of padding
    pattern = cut("pattern", pattern)
    z = torch.where(is_global[:, None, :, None], pattern @ v_global, pattern @ v)
    return {"rot_q": rot_q, "rot_k": k, "v": v, "scores": scores, "pattern": pattern, "z": cut("z", z)}


def layer_inputs(model: Any, inputs: dict[str, Tensor]) -> tuple[Any, dict[str, Any], Tensor]:
    """The first attention, what its forward was given, and the output that it gave."""
    module = model.longformer.encoder.layer[0].attention.self
    seen: list[Any] = []
    handle = module.register_forward_hook(lambda m, args, kwargs, out: seen.append((args, kwargs, out)), with_kwargs=True)
    run(model, inputs)
    handle.remove()
    args, kwargs, output = seen[0]
    return module, {"hidden_states": args[0], **kwargs} if args else kwargs, output[0]


def uniform(pattern: Tensor) -> Tensor:
    """Of head 2: over what it sees."""
    seen = (pattern[:, 2] > 0).float()
    pattern[:, 2] = seen / seen.sum(dim=-1, keepdim=True).clamp(min=1)
    return pattern


def scaled(head: int, factor: float) -> Callable[[Tensor], Tensor]:
    def cut(tensor: Tensor) -> Tensor:
        tensor[:, head] = torch.where(tensor[:, head].isfinite(), tensor[:, head] * factor, tensor[:, head])
        return tensor

    return cut


def diagonal(pattern: Tensor) -> Tensor:
    pattern[:, 1] = torch.eye(pattern.shape[-1]).expand_as(pattern[:, 1]) * (pattern[:, 1].sum(-1, keepdim=True) > 0)
    return pattern


CUTS: dict[str, tuple[Any, Cuts]] = {
    "none": (Edit("z", "scale", 1.0), {}),
    **{
        site: (Edit(site, "scale", -0.5, heads=[1]), {site: scaled(1, -0.5)})
        for site in ("q", "k", "rot_q", "rot_k", "v", "scores", "pattern", "z")
    },
    "qk": (Freeze("qk", heads=[2]), {"rot_q": scaled(2, 0)}),
    "ov": (Freeze("ov", heads=[2]), {"z": scaled(2, 0)}),
    "uniform": (Edit("pattern", "uniform", heads=[2]), {"pattern": uniform}),
    "diagonal": (Edit("pattern", "diagonal", heads=[1]), {"pattern": diagonal}),
    "shared with the first": (
        [Edit("rot_k", "scale", 0.5, heads=[0]), Edit("v", "scale", 2.0, heads=[0]), Edit("scores", "scale", 3.0, heads=[3])],
        {"rot_k": scaled(0, 0.5), "v": scaled(0, 2.0), "scores": scaled(3, 3.0)},
    ),
}


@by_marked
@pytest.mark.parametrize("name", CUTS)
def test_cuts_are_those_of_dense_attention(name: str, marked: str) -> None:
    model, inputs = longformer(), inputs_of(marked)
    spec, cuts = CUTS[name]
    with patched(model, spec), capture(model, ["scores", "pattern", "z", "rot_q", "rot_k", "v"], layers=[0]) as seen:
        module, given, output = layer_inputs(model, inputs)
    mask, states = given["attention_mask"], given["hidden_states"]
    assert bool((mask < 0).any()) and bool((mask > 0).any()) == (marked != "none")
    with torch.no_grad():
        expected = dense(module, states, mask, cuts)
    # Rows of padding give zero, but for a template, which is put there as everywhere.
    real = mask >= 0 if "pattern" in cuts else torch.ones_like(mask, dtype=torch.bool)
    for site in ("rot_q", "pattern", "z"):
        found, wanted = (t.transpose(1, 2)[real] for t in (seen[0, site], expected[site]))
        torch.testing.assert_close(found, wanted, **CLOSE)
    for site in ("rot_k", "v"):
        torch.testing.assert_close(seen[0, site], expected[site], **CLOSE)
    scores, allowed = seen[0, "scores"], expected["scores"].isfinite()
    torch.testing.assert_close(scores[allowed], expected["scores"][allowed], **CLOSE)
    assert bool((scores[~allowed] < -5000).all())
    torch.testing.assert_close(output[real], expected["z"].transpose(1, 2).flatten(2)[real], **CLOSE)


def test_rows_of_global_tokens_read_keys_and_values_of_their_own() -> None:
    """Keys, and values, come twice: as rows of global tokens read them, and last as all others do."""
    model, inputs = longformer(), inputs_of("several")
    with capture(model, ["k", "rot_k", "v"], layers=[0]) as seen:
        module, given, _ = layer_inputs(model, inputs)
    for site, own, other in (("k", module.key, module.key_global), ("v", module.value, module.value_global)):
        first, last = seen.steps(0, site)
        for found, projection in ((first, other), (last, own)):
            with torch.no_grad():
                expected = projection(given["hidden_states"]).unflatten(-1, (HEADS, -1)).transpose(1, 2)
            torch.testing.assert_close(found, expected, **CLOSE)
    assert torch.equal(seen[0, "k"], seen[0, "rot_k"])


@by_marked
def test_returned_attentions_show_the_cut(marked: str) -> None:
    model, inputs = longformer(), inputs_of(marked)
    cut = Edit("pattern", "scale", 0.5, layers=[0], heads=[1])
    before = run(model, inputs)
    with patched(model, cut):
        after = run(model, inputs)
    names = ["attentions 0"] + (["global_attentions 0"] if marked != "none" else [])
    for name in names:
        expected, found = before[name].clone(), after[name]
        expected[:, 1] *= 0.5
        if name.startswith("global"):  # (batch, head, key, slot): the second row has spare slots, which nothing reads
            slots = inputs["global_attention_mask"].sum(dim=1)
            found, expected = (torch.cat([t[row, ..., : slots[row]].flatten() for row in (0, 1)]) for t in (found, expected))
        assert torch.equal(found, expected), name


@by_marked
def test_a_pattern_beyond_the_window_is_refused(marked: str) -> None:
    model, inputs = longformer(), inputs_of(marked)

    def even(pattern: Tensor) -> Tensor:
        return torch.full_like(pattern, 1 / pattern.shape[-1])

    with patched(model, Edit("pattern", even, layers=[0])), pytest.raises(SurgeryError) as caught:
        run(model, inputs)
    assert "weight to keys beyond the window" in str(caught.value) and "layer.0.attention.self" in str(caught.value)
    with patched(model):
        expected = run(model, inputs)
    assert_equal(run(model, inputs), expected)  # nothing is left behind
    # Half of the lowest number is still a mask.
    with patched(model, Edit("scores", lambda scores: scores * 0.5, layers=[0])):
        found = run(model, inputs)
    with patched(model, Edit("scores", "scale", 0.5, layers=[0])):
        assert_equal(found, run(model, inputs))


def test_in_bfloat16_and_under_autocast() -> None:
    model, inputs = copy.deepcopy(longformer()), inputs_of("several")
    watched = Edit("pattern", "scale", 1.0)
    with torch.autocast("cpu", torch.bfloat16):
        expected = run(model, inputs)
        with patched(model, watched):
            assert_equal(run(model, inputs), expected)
    model.to(torch.bfloat16)
    expected = run(model, inputs)
    with patched(model, watched), capture(model, list(SITES)):
        assert_equal(run(model, inputs), expected)


def test_on_the_meta_device_it_is_found_and_cut() -> None:
    with torch.device("meta"):
        model = LongformerForSequenceClassification(longformer().config)
    patch_model(model, Freeze("both", heads=[1]))
    assert find_anatomy(model)["self.1"].fusion == "q | k | v"


def test_the_encoder_of_led_is_the_same_computation() -> None:
    """The same weights give the same in either class, with a cut of its pattern."""
    first, second = longformer().longformer.encoder.layer[0].attention.self, led().led.encoder.layers[0].self_attn
    inner = second.longformer_self_attn
    assert isinstance(first, LongformerSelfAttention) and type(inner).__name__ == "LEDEncoderSelfAttention"
    inputs = inputs_of("several")
    with patched(longformer(), CUTS["uniform"][0]):
        _, given, _ = layer_inputs(longformer(), inputs)
        expected = first(**given)
    state = inner.state_dict()
    try:
        inner.load_state_dict(first.state_dict())
        with patched(led(), Edit("pattern", "uniform", heads=[2], layers=["encoder.self.0"])):
            found = inner(**given)
    finally:
        inner.load_state_dict(state)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
