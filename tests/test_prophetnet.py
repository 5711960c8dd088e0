"""ProphetNet's streams: equal bit for bit, and cuts against a dense attention of one stream after another."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from cached import CACHE
from torch import Tensor
from transformers import ProphetNetConfig, ProphetNetForConditionalGeneration

from surgery import CacheError, Edit, Freeze, SurgeryError, capture, find_anatomy, patched
from surgery.sites import SITES

HEADS, STREAMS, LENGTH = 4, 3, 6
DECODER = ["decoder.self.*"]
CLOSE = {"rtol": 1e-5, "atol": 1e-6}
"""The reference sums in another order, in float32."""


@functools.cache
def model() -> Any:
    """A model that no test may change but by patching in a block."""
    torch.manual_seed(0)
    config = ProphetNetConfig(
        vocab_size=40, hidden_size=32, num_encoder_layers=2, num_decoder_layers=2, num_encoder_attention_heads=HEADS,
        num_decoder_attention_heads=HEADS, encoder_ffn_dim=64, decoder_ffn_dim=64, max_position_embeddings=32,
        ngram=STREAMS - 1, num_buckets=8, relative_max_distance=16, disable_ngram_loss=True, decoder_start_token_id=2,
    )  # fmt: skip
    made = ProphetNetForConditionalGeneration(config).eval()
    with torch.no_grad():  # larger weights, so that no pattern is near uniform
        for name, parameter in made.named_parameters():
            if any(part in name for part in ("query_proj", "key_proj", "relative_pos")):
                parameter.mul_(8)
    return made


def inputs() -> dict[str, Tensor]:
    """Two rows; the decoder's second is padded."""
    torch.manual_seed(1)
    mask = torch.ones(2, LENGTH, dtype=torch.long)
    mask[1, -2:] = 0
    ids = torch.randint(3, 40, (2, LENGTH))
    return {"input_ids": torch.randint(3, 40, (2, 5)), "decoder_input_ids": ids, "decoder_attention_mask": mask}


@torch.no_grad()
def run(one: Any = None) -> list[Tensor]:
    output = (one or model())(**inputs(), use_cache=False, output_attentions=True, output_hidden_states=True)
    parts = [value if isinstance(value, tuple) else (value,) for value in output.values()]
    return [t for part in parts for t in part if isinstance(t, Tensor)]


def same(found: list[Tensor], expected: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_without_cuts_and_watched_it_is_the_same_model() -> None:
    expected = run()
    for spec, kernel in ((None, "auto"), (Edit("pattern", "scale", 1.0, layers=DECODER), "auto"), (None, "eager")):
        with patched(model(), spec, kernel=kernel):  # type: ignore[arg-type]
            assert same(run(), expected)
    with capture(model(), list(SITES), layers=DECODER) as seen:
        assert same(run(), expected)
    for site in ("rot_q", "rot_k", "v", "scores", "pattern", "z"):
        assert len(seen.steps("decoder.self.0", site)) == STREAMS
    assert find_anatomy(model())["decoder.self.0"].fusion == "q | k | v"


def test_gradients_with_dropout() -> None:
    one = copy.deepcopy(model()).train()
    one.config.attention_dropout = 0.1
    for module in one.modules():
        if hasattr(module, "attention_dropout"):
            module.attention_dropout = 0.1

    def gradients() -> dict[str, Tensor]:
        one.zero_grad()
        torch.manual_seed(0)
        one(**inputs(), labels=inputs()["decoder_input_ids"]).loss.backward()
        return {name: p.grad.clone() for name, p in one.named_parameters() if p.grad is not None}

    expected = gradients()
    with capture(one, ["scores", "pattern"], layers=DECODER):
        found = gradients()
    assert found.keys() == expected.keys()
    for name, gradient in found.items():
        # Gradients of a tensor that is used several times are added in another order.
        torch.testing.assert_close(gradient, expected[name], rtol=1e-4, atol=1e-6, msg=name)


def dense(module: Any, given: dict[str, Any], cuts: dict[str, Callable[[Tensor], Tensor]]) -> list[dict[str, Tensor]]:
    """The core's tensors of every stream, the main one last, under cuts by site."""

    def cut(site: str, tensor: Tensor) -> Tensor:
        return cuts[site](tensor.clone()) if site in cuts else tensor

    states = given["hidden_states"]
    streams = states.chunk(STREAMS, dim=1)
    width = states.shape[-1] // HEADS

    def split(projection: Any, stream: int, factor: float = 1.0) -> Tensor:
        return projection(streams[stream]).unflatten(-1, (HEADS, width)).transpose(1, 2) * factor

    size = streams[0].shape[1]
    like = torch.zeros(len(states), STREAMS - 1, HEADS, size, 2 * size)
    biases = module.get_predict_relative_pos_embeddings(
        torch.stack(streams[1:], 2), like, given["position_ids"], given["predict_relative_position_buckets"]
    )
    main = module.get_main_relative_pos_embeddings(
        streams[0], like[:, 0, ..., :size], given["position_ids"], given["main_relative_position_buckets"]
    )
    found = []
    for stream in (*range(1, STREAMS), 0):
        own = [0, stream] if stream else [0]
        rot_q = cut("rot_q", split(module.query_proj, stream, width**-0.5))
        rot_k = cut("rot_k", torch.cat([split(module.key_proj, one) for one in own], 2))
        v = cut("v", torch.cat([split(module.value_proj, one) for one in own], 2))
        mask = given["extended_predict_attention_mask"][:, :, stream - 1] if stream else given["attention_mask"]
        scores = rot_q @ rot_k.mT + (biases[:, stream - 1] if stream else main) + mask
        scores = cut("scores", scores)
        pattern = cut("pattern", scores.softmax(-1))
        z = cut("z", pattern @ v)
        found.append({"rot_q": rot_q, "rot_k": rot_k, "v": v, "scores": scores, "pattern": pattern, "z": z})
    return found


def scaled(tensor: Tensor) -> Tensor:
    tensor[:, 1] = torch.where(tensor[:, 1] > -5000, tensor[:, 1] * -0.5, tensor[:, 1])
    return tensor


def nothing(tensor: Tensor) -> Tensor:
    tensor[:, 2] = 0
    return tensor


def even(pattern: Tensor) -> Tensor:
    seen = (pattern[:, 3] > 0).float()
    pattern[:, 3] = seen / seen.sum(-1, keepdim=True)
    return pattern


CUTS: dict[str, tuple[Any, Any]] = {
    site: (Edit(site, "scale", -0.5, heads=[1], layers=DECODER), {site: scaled})
    for site in ("rot_q", "rot_k", "v", "scores", "pattern", "z")
} | {
    "qk": (Freeze("qk", heads=[2], layers=DECODER), {"rot_q": nothing}),
    "ov": (Freeze("ov", heads=[2], layers=DECODER), {"z": nothing}),
    "uniform": (Edit("pattern", "uniform", heads=[3], layers=DECODER), {"pattern": even}),
}


@pytest.mark.parametrize("name", CUTS)
def test_cuts_are_those_of_dense_attention_in_every_stream(name: str) -> None:
    spec, cuts = CUTS[name]
    module = model().prophetnet.decoder.layers[0].self_attn
    given: list[Any] = []
    handle = module.register_forward_hook(lambda m, args, kwargs, out: given.append((kwargs, out[0])), with_kwargs=True)
    try:
        with patched(model(), spec), capture(model(), list(CUTS)[:6], layers=["decoder.self.0"]) as seen:
            run()
    finally:
        handle.remove()
    kwargs, output = given[0]
    with torch.no_grad():
        expected = dense(module, kwargs, cuts)
        z = [one["z"].transpose(1, 2).flatten(2) for one in (expected[-1], *expected[:-1])]
        torch.testing.assert_close(output, module.out_proj(torch.cat(z, 1)), **CLOSE)
    for site in ("rot_q", "rot_k", "v", "scores", "pattern", "z"):
        for found, stream in zip(seen.steps("decoder.self.0", site), expected, strict=True):
            kept = stream[site] > -5000
            torch.testing.assert_close(found[kept], stream[site][kept], **CLOSE)
            assert torch.equal(found > -5000, kept)


def without_relative_positions() -> Any:
    """A model whose cache changes nothing: with one, the family takes other relative positions than without."""
    one = copy.deepcopy(model())
    with torch.no_grad():
        for layer in one.prophetnet.decoder.layers:
            layer.self_attn.relative_pos_embeddings.weight.zero_()
            layer.self_attn.relative_pos_embeddings.bias.zero_()
    return one


def step_by_step(one: Any) -> tuple[Tensor, Tensor]:
    """The last logits of every prefix, with a cache and without one."""
    ids, past, found = inputs()["decoder_input_ids"], None, []
    source = {"input_ids": inputs()["input_ids"]}
    with torch.no_grad():
        for step in range(LENGTH):
            output = one(**source, decoder_input_ids=ids[:, step : step + 1], **{CACHE: past}, use_cache=True)
            past = output[CACHE]
            whole = one(**source, decoder_input_ids=ids[:, : step + 1], use_cache=False)
            found.append((output.logits[:, -1], whole.logits[:, -1]))
    first, second = zip(*found, strict=True)
    return torch.stack(first), torch.stack(second)


@pytest.mark.parametrize(
    "cut",
    [
        Freeze("both", heads=[1], layers=DECODER),
        Edit("pattern", "uniform", heads=[0], layers=DECODER),
        Edit("rot_q", "noise", heads=[0], layers=DECODER),
        Edit("z", "scale", -1.0, positions=[2, 3], layers=DECODER),
    ],
    ids=["both", "uniform", "noise", "positions"],
)
def test_decoding_with_a_cache_equals_recomputing(cut: Any) -> None:
    one = without_relative_positions()
    plain = step_by_step(one)[0]
    with patched(one, cut):
        cached, whole = step_by_step(one)
    assert not torch.allclose(cached, plain, atol=1e-4)
    # Products over one position and over several have other last bits; then two layers and the head behind them.
    torch.testing.assert_close(cached, whole, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("site", ["k", "rot_k", "v", "scores", "result"])
def test_what_depends_on_the_number_of_a_key_is_refused_with_a_cache(site: str) -> None:
    with patched(model(), Edit(site, "noise", layers=DECODER)):
        run()
        with pytest.raises(SurgeryError) as caught:
            step_by_step(model())
    assert f"cuts at {site} that depend on the position" in str(caught.value) and "use_cache=False" in str(caught.value)


def test_cuts_by_position_in_the_cross_attention_of_streams_need_the_whole_sequence() -> None:
    """There every stream has a row for each position: no number of a row is the same in every step."""
    one, given = model(), inputs()
    with patched(one, Edit("rot_q", "noise", heads=[0], layers=["decoder.cross.*"])):
        one(**given, use_cache=False)
        with pytest.raises(CacheError, match=r"18 queries where the decoder has counted 6 positions.*use_cache=False"):
            one(**given, use_cache=True)
    with torch.no_grad():
        plain = one(**given, use_cache=True).logits
        with capture(one, ["z"], layers=["decoder.cross.*"]) as seen:
            assert torch.equal(one(**given, use_cache=True).logits, plain) and len(seen) == 2
        with patched(one, Freeze("qk", heads=[0], layers=["decoder.cross.*"])):
            assert not torch.equal(one(**given, use_cache=True).logits, plain)
