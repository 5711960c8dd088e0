"""Masks: every implementation's format against eager's, on matrices written by hand and on models that build them.

Flash attention is not installed. Two things stand in: models whose config names it, so that transformers builds its masks
(`kernel="eager"` must then give the eager model's numbers), and the functions of the flash package written slowly from their
documentation, below transformers' own flash path, so that "auto" is tested beside a kernel that is not ours.
"""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch
import transformers.integrations.flex_attention as hf_flex
import transformers.masking_utils as masking
import transformers.modeling_flash_attention_utils as hf_flash
from cached import CACHE
from families import FAMILIES, LAYERS, LENGTH, VOCAB
from torch import Tensor, nn
from torch.nn.attention.flex_attention import create_block_mask, flex_attention
from transformers import DynamicCache, StaticCache
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import surgery.unfused
from surgery import Edit, Freeze, MaskError, capture, patch_model, unpatch_model
from surgery.masks import Mask, to_additive
from surgery.reconstruction import Reconstruction

FLASH = ("flash_attention_2", "flash_attention_3", "flash_attention_4")
LOW = torch.finfo(torch.float32).min
# Windows (mistral, phi3, gemma2, gemma3, gpt_oss), soft-capping (gemma2), sinks (gpt_oss), no groups (gpt2).
DECODERS = ("llama", "mistral", "qwen2", "phi3", "gpt2", "gemma2", "gemma3", "gpt_oss")
TWO_WAY = ("bert", "roberta", "bart", "whisper")
COMPILED_MASK, COMPILED_FLEX = masking.create_block_mask, hf_flex.compile_friendly_flex_attention


def by_case(names: Sequence[str]) -> Any:
    """Every family with every implementation; the three versions of flash attention, which share one format, with two."""
    implementations = ("flash_attention_2", "sdpa", "flex_attention", *FLASH[1:])
    cases = [(n, i) for n in names for i in implementations if i not in FLASH[1:] or n in ("llama", "gpt_oss", "bart")]
    return pytest.mark.parametrize(("name", "implementation"), cases)


# -- matrices written by hand --------------------------------------------------------------------------------------------------


def matrix(*rows: str) -> Tensor:
    """Rows like "x x ." to booleans, x where a query may attend."""
    return torch.tensor([[c == "x" for c in row.split()] for row in rows])


def convert(implementation: str, mask: Any, n_queries: int, n_keys: int, module: Any = None, **kwargs: Any) -> Mask:
    """`to_additive` for one row and two heads."""
    batch = mask.shape[0] if isinstance(mask, Tensor) else 1
    query, key = torch.zeros(batch, 2, n_queries, 4), torch.zeros(batch, 1, n_keys, 4)
    return to_additive(implementation, mask, query, key, module or nn.Module(), kwargs)


def check(found: Mask, allowed: Tensor) -> None:
    """Allowed, given as (query, key) or (batch, query, key); the additive mask holds 0 and the lowest float."""
    assert found.additive is not None and found.allowed is not None
    allowed = allowed[None, None] if allowed.dim() == 2 else allowed[:, None]
    assert torch.equal(found.allowed.expand_as(found.additive), allowed.expand_as(found.additive))
    assert torch.equal(found.additive, torch.where(found.allowed, 0.0, LOW).expand_as(found.additive))


def test_eager_masks_pass_as_they_are() -> None:
    given_mask = torch.tensor([[0.0, LOW, 0.5], [-3.0, 0.0, -torch.inf]])[None, None]
    found = convert("eager", given_mask, 2, 3)
    assert found.additive is not None and torch.equal(found.additive, given_mask)
    check(Mask(torch.where(found.allowed, 0.0, LOW), found.allowed), matrix("x . x", "x x ."))  # type: ignore[arg-type]
    longer = convert("eager", torch.cat([given_mask, given_mask], dim=-1), 2, 3)
    assert longer.additive is not None and torch.equal(longer.additive, given_mask), "keys beyond the cache are cut off"
    assert convert("eager", None, 2, 3) == Mask(None, None)


def test_sdpa_masks() -> None:
    allowed = matrix("x . .", "x x .")
    check(convert("sdpa", allowed[None, None], 2, 3), allowed)
    additive = torch.where(allowed, 0.25, LOW)[None, None]
    found = convert("sdpa", additive, 2, 3)
    assert found.additive is not None and torch.equal(found.additive, additive)
    assert found.allowed is not None and torch.equal(found.allowed[0, 0], allowed)


def test_sdpa_none_means_causal_only_where_the_kernel_takes_it_so() -> None:
    causal, free = nn.Module(), nn.Module()
    causal.is_causal, free.is_causal = True, False  # type: ignore[assignment]
    square = matrix("x . .", "x x .", "x x x")
    check(convert("sdpa", None, 3, 3, causal), square)
    check(convert("sdpa", None, 3, 3), square)  # the kernel's default where the module does not say
    assert convert("sdpa", None, 3, 3, free) == Mask(None, None)
    assert convert("sdpa", None, 3, 3, causal, is_causal=False) == Mask(None, None)
    check(convert("sdpa", None, 3, 3, free, is_causal=True), square)
    # One query sees all keys; the first call on a static cache has its triangle at the upper left, as torch's is_causal.
    assert convert("sdpa", None, 1, 3, causal) == Mask(None, None)
    check(convert("sdpa", None, 2, 4, causal), matrix("x . . .", "x x . ."))


def test_flash_masks() -> None:
    check(convert("flash_attention_2", None, 3, 3), matrix("x . .", "x x .", "x x x"))
    # Queries are the last positions: the triangle is at the lower right.
    check(convert("flash_attention_2", None, 2, 4), matrix("x x x .", "x x x x"))
    check(convert("flash_attention_2", None, 1, 3), matrix("x x x"))
    check(convert("flash_attention_2", None, 2, 3, is_causal=False), matrix("x x x", "x x x"))
    # A window of 2: the query's own position and one before it; symmetric where nothing is causal.
    check(convert("flash_attention_2", None, 4, 4, sliding_window=2), matrix("x . . .", "x x . .", ". x x .", ". . x x"))
    check(
        convert("flash_attention_2", None, 4, 4, sliding_window=2, is_causal=False),
        matrix("x x . .", "x x x .", ". x x x", ". . x x"),
    )
    check(convert("flash_attention_2", None, 3, 3, sliding_window=3), matrix("x . .", "x x .", "x x x"))


def test_flash_padding() -> None:
    left = torch.tensor([[0, 1, 1], [1, 1, 1]])
    found = convert("flash_attention_2", left, 3, 3)
    check(found, torch.stack([matrix(". . .", ". x .", ". x x"), matrix("x . .", "x x .", "x x x")]))
    assert found.empty_rows is not None and found.empty_rows.tolist() == [[True, False, False], [False] * 3]
    right = torch.tensor([[True, True, False]])
    found = convert("flash_attention_2", right, 3, 3)
    check(found, matrix("x . .", "x x .", "x x ."))
    assert found.empty_rows is not None and found.empty_rows.tolist() == [[False, False, True]]
    # Decoding: the one query is never padding. A second chunk: the last columns are the queries'.
    assert convert("flash_attention_2", left, 1, 3).empty_rows is None
    found = convert("flash_attention_2", torch.tensor([[0, 0, 0, 1]]), 2, 4)
    assert found.empty_rows is not None and found.empty_rows.tolist() == [[True, False]]


def test_flash_on_a_static_cache_leaves_out_what_is_not_filled() -> None:
    """The mask is shorter than the keys: what it does not reach is empty, and the queries are the last that it reaches."""
    found = convert("flash_attention_2", torch.tensor([[1, 1, 1]]), 3, 5)
    check(found, matrix("x . . . .", "x x . . .", "x x x . ."))
    assert found.empty_rows is not None and not found.empty_rows.any()
    found = convert("flash_attention_2", torch.tensor([[0, 1, 1, 1]]), 2, 6, sliding_window=2)
    check(found, matrix(". x x . . .", ". . x x . ."))
    check(convert("flash_attention_2", torch.tensor([[1, 1]]), 1, 5), matrix("x x . . ."))
    found = convert("flash_attention_2", torch.tensor([[0, 1]]), 2, 4)
    assert found.empty_rows is not None and found.empty_rows.tolist() == [[True, False]]


def test_flash_cross_attention_with_padded_source() -> None:
    found = convert("flash_attention_2", torch.tensor([[1, 1, 0]]), 4, 3, is_causal=False)
    check(found, matrix(*["x x ."] * 4))
    assert found.empty_rows is None, "queries of another sequence are not the mask's positions"


def test_flash_packed_sequences() -> None:
    blocks = matrix("x . . . .", "x x . . .", ". . x . .", ". . x x .", ". . x x x")
    check(convert("flash_attention_2", None, 5, 5, position_ids=torch.tensor([[0, 1, 0, 1, 2]])), blocks)
    check(convert("flash_attention_2", None, 5, 5, position_ids=torch.tensor([[2, 3, 2, 3, 4]])), blocks)
    lengths = torch.tensor([0, 2, 5], dtype=torch.int32)
    more: Any = {"cu_seq_lens_q": lengths, "cu_seq_lens_k": lengths, "max_length_q": 3, "max_length_k": 3}
    check(convert("flash_attention_2", None, 5, 5, **more), blocks)
    check(convert("flash_attention_2", None, 5, 5, **more, sliding_window=2), blocks & ~torch.eye(5).bool().roll(2, 0))
    plain = torch.ones(4, 4).tril().bool()
    check(convert("flash_attention_2", None, 4, 4, position_ids=torch.tensor([[3, 4, 5, 6]])), plain)
    # Two rows are not one packed row, and a padding mask says more than positions.
    query = torch.zeros(2, 2, 4, 4)
    positions = torch.tensor([[0, 1, 0, 1], [0, 1, 2, 3]])
    check(to_additive("flash_attention_2", None, query, query, nn.Module(), {"position_ids": positions}), plain)
    masked = convert("flash_attention_2", torch.ones(1, 4), 4, 4, position_ids=positions[:1])
    check(masked, plain)


def test_flex_masks() -> None:
    # Position 0 of row 0 is padding, queries start at position 1.
    def mask_mod(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (query + 1 >= key) & ((batch > 0) | (key > 0))

    blocks = create_block_mask(mask_mod, 2, None, 2, 3, device="cpu")
    query, key = torch.zeros(2, 2, 2, 4), torch.zeros(2, 1, 3, 4)
    found = to_additive("flex_attention", blocks, query, key, nn.Module(), {})
    check(found, torch.stack([matrix(". x .", ". x x"), matrix("x x .", "x x x")]))
    additive = torch.tensor([[0.0, LOW, 0.0, 0.0]] * 2)[None, None]
    found = convert("flex_attention", additive, 2, 3)
    assert found.additive is not None and torch.equal(found.additive, additive[..., :3])
    assert convert("flex_attention", None, 2, 3) == Mask(None, None)


def test_the_lowest_number_is_that_of_the_dtype() -> None:
    query = torch.zeros(1, 1, 2, 4, dtype=torch.bfloat16)
    for implementation in ("sdpa", "flash_attention_2"):
        found = to_additive(implementation, None, query, query, nn.Module(), {})
        assert found.additive is not None and found.additive.dtype == torch.bfloat16
        assert found.additive[0, 0, 0, 1] == torch.finfo(torch.bfloat16).min


@pytest.mark.parametrize(
    ("implementation", "mask", "found"),
    [
        ("sdpa", torch.ones(1, 3), "torch.float32 of shape (1, 3)"),
        ("sdpa", torch.ones(1, 1, 3, 3, dtype=torch.long), "torch.int64 of shape (1, 1, 3, 3)"),
        ("eager", torch.ones(3, 3, dtype=torch.bool), "torch.bool of shape (3, 3)"),
        ("flex_attention", {"mask": 1}, "a dict"),
        ("somebody's kernel", object(), "a object"),
        ("flash_attention_2", torch.ones(1, 1, 3, 3, dtype=torch.bool), "torch.bool of shape (1, 1, 3, 3)"),
        ("flash_attention_2", "causal", "a str"),
    ],
)
def test_an_unknown_format_is_an_error(implementation: str, mask: Any, found: str) -> None:
    query = torch.zeros(1, 1, 3, 4)
    with pytest.raises(MaskError) as error:
        to_additive(implementation, mask, query, query, nn.Linear(1, 1), {})
    assert f"found {found}; expected " in str(error.value)
    if "flash" not in implementation:
        assert repr(implementation) in str(error.value) and "Linear" in str(error.value)


@pytest.fixture(scope="module", autouse=True)
def _uncompiled_flex() -> Iterator[None]:
    """flex_attention and its masks without torch.compile, which would take seconds for every new mask; one test compiles."""

    def block_mask(*args: Any, _compile: bool, **kwargs: Any) -> Any:
        return create_block_mask(*args, **kwargs)

    def flex(query: Tensor, key: Tensor, value: Tensor, training: bool = False, **kwargs: Any) -> Any:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "flex_attention called without torch.compile")
            return flex_attention(query, key, value, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(masking, "create_block_mask", block_mask)
        patch.setattr(hf_flex, "compile_friendly_flex_attention", flex)
        yield


# -- the masks that transformers builds ----------------------------------------------------------------------------------------


def switch(model: Any, implementation: str) -> Any:
    """Names another implementation on a built model, so that transformers builds its masks from then on."""
    model.config._attn_implementation = implementation
    return model


def build(name: str, implementation: str) -> Any:
    return switch(FAMILIES[name].build("eager"), implementation)


PATTERNS = ("none", "full", "left", "right")
PIECES = [(0, 1), (0, 5), (3, 1), (3, 5), (6, 2), (2, 6)]
"""Numbers of cached positions and of queries."""


def padding_mask(pattern: str, length: int, n_queries: int) -> Tensor | None:
    """Row 0 padded by a pattern: on the left reaching into the queries where there are enough, on the right within them."""
    if pattern == "none":
        return None
    mask = torch.ones(2, length, dtype=torch.long)
    if pattern == "left":
        mask[0, : max(1, length - 3)] = 0
    elif pattern == "right" and n_queries > 2:
        mask[0, -2:] = 0
    return mask


@pytest.mark.parametrize("window", [None, 2, 4])
@pytest.mark.parametrize("kind", ["none", "dynamic", "static"])
@pytest.mark.parametrize("implementation", ["sdpa", "flex_attention", *FLASH])
def test_every_mask_that_transformers_builds_becomes_the_eager_one(implementation: str, kind: str, window: int | None) -> None:
    config = FAMILIES["llama" if window is None else "mistral"].build("eager").config
    module = nn.Module()
    module.is_causal = True  # type: ignore[assignment]
    if window is not None:
        config.sliding_window = window
    for (n_cached, n_queries), pattern in itertools.product(PIECES, PATTERNS):
        mask = padding_mask(pattern, n_cached + n_queries, n_queries)
        if (n_cached and kind == "none") or (kind == "static" and mask is None and implementation in FLASH):
            continue  # the latter gives a flash kernel the whole cache, filled or not; generate always passes a mask
        cache: Any = DynamicCache(config=config) if kind == "dynamic" else None
        cache = StaticCache(config, max_cache_len=14) if kind == "static" else cache
        if n_cached:
            cache.update(torch.zeros(2, 2, n_cached, 16), torch.zeros(2, 2, n_cached, 16), 0)
        made = {}
        for each in ("eager", implementation):
            config._attn_implementation = each
            make = masking.create_causal_mask if window is None else masking.create_sliding_window_causal_mask
            made[each] = make(config, torch.zeros(2, n_queries, 8), mask, cache)
        query, key = torch.zeros(2, 4, n_queries, 16), torch.zeros(2, 2, n_queries, 16)
        if cache is not None and not (kind == "static" and implementation == "flex_attention"):
            key, _ = cache.update(key, key, 0)
        elif cache is not None:
            # Not updated: a flex mask reads the static cache's own counter (test_flex_masks_on_a_static_cache_..).
            key = torch.zeros(2, 2, made["eager"].shape[-1], 16)
        found = to_additive(implementation, made[implementation], query, key, module, {"sliding_window": window})
        expected = to_additive("eager", made["eager"], query, key, module, {})
        assert expected.additive is not None and expected.allowed is not None
        additive = torch.zeros(1) if found.additive is None else found.additive
        case = (n_cached, n_queries, pattern)
        assert torch.equal(additive.expand(expected.additive.shape), expected.additive), case
        if found.empty_rows is not None:
            live = expected.allowed.any(dim=-1)[:, 0] & (mask[:, -n_queries:].bool() if mask is not None else True)
            assert torch.equal(~found.empty_rows, live.expand_as(found.empty_rows)), case


def tokens(batch: int = 2, length: int = LENGTH) -> Tensor:
    return torch.randint(5, VOCAB, (batch, length), generator=torch.Generator().manual_seed(3))


PADDINGS = {"none": None, "full": [1] * LENGTH, "left": [0] * 3 + [1] * (LENGTH - 3), "right": [1] * (LENGTH - 3) + [0] * 3}
CHUNKS = {"steps": (4, 1, 1, 1, 1, 1), "chunks": (4, 5), "long": (7, 2)}


@torch.no_grad()
def whole(model: Any, padding: str) -> Tensor:
    mask = PADDINGS[padding]
    return model(tokens(), attention_mask=None if mask is None else torch.tensor([mask, [1] * LENGTH])).logits


@torch.no_grad()
def cached(model: Any, padding: str, chunks: str, static: bool) -> Tensor:
    """The sequence in pieces through a KV cache."""
    cache: Any = StaticCache(model.config, max_cache_len=LENGTH + 3) if static else DynamicCache(config=model.config)
    mask, out, start = PADDINGS[padding], [], 0
    for n in CHUNKS[chunks]:
        now = None if mask is None else torch.tensor([mask, [1] * LENGTH])[:, : start + n]
        out.append(model(tokens()[:, start : start + n], attention_mask=now, **{CACHE: cache}).logits)
        start += n
    return torch.cat(out, dim=1)


POSITIONS = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 0, 1]])


@torch.no_grad()
def packed(model: Any) -> Tensor:
    """Sequences of 4, 3 and 2 tokens in one row, told apart by their positions."""
    return model(tokens(1), position_ids=POSITIONS, use_cache=False).logits


@pytest.fixture
def arrived(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, tuple[int, int]]]:
    """The formats of the masks that come to the core, with numbers of queries and keys."""
    seen: list[tuple[str, tuple[int, int]]] = []

    def spy(implementation: str, mask: Any, query: Tensor, key: Tensor, *args: Any) -> Mask:
        kind = f"{mask.dim()}-D {str(mask.dtype).removeprefix('torch.')}" if isinstance(mask, Tensor) else type(mask).__name__
        seen.append((kind, (query.shape[2], key.shape[2])))
        return to_additive(implementation, mask, query, key, *args)

    monkeypatch.setattr(surgery.unfused, "to_additive", spy)
    return seen


def pair(name: str, implementation: str) -> tuple[Any, Any]:
    """A model under `implementation`, reconstructed everywhere, and the eager model of the same weights."""
    return patch_model(build(name, implementation), kernel="eager"), FAMILIES[name].build("eager")


@pytest.mark.parametrize("padding", PADDINGS)
@by_case(DECODERS)
def test_whole_sequences(name: str, implementation: str, padding: str, arrived: list[Any]) -> None:
    model, eager = pair(name, implementation)
    # The additive masks are the same numbers, so everything is, rows of padding included.
    assert torch.equal(whole(model, padding), whole(eager, padding))
    kinds = {kind for kind, _ in arrived}
    if implementation in FLASH:
        assert kinds == ({"2-D bool"} if padding in ("left", "right") else {"NoneType"})
    elif implementation == "flex_attention":
        assert kinds == {"BlockMask"}
    else:
        windowed = getattr(model.config, "sliding_window", None) is not None
        assert ("NoneType" in kinds) == (padding in ("none", "full") and name not in ("mistral", "phi3"))
        assert ("4-D bool" in kinds) == (windowed or padding in ("left", "right"))


@pytest.mark.parametrize("static", [False, True], ids=["dynamic", "static"])
@pytest.mark.parametrize("implementation", ["flash_attention_2", "sdpa", "flex_attention"])
@pytest.mark.parametrize("name", DECODERS)
def test_cached_sequences(name: str, implementation: str, static: bool, arrived: list[Any]) -> None:
    model, eager = pair(name, implementation)
    for padding in ("none", "full", "left"):
        if padding == "none" and static and implementation in FLASH:
            continue  # see test_every_mask_..
        for chunks in CHUNKS:
            found, expected = cached(model, padding, chunks, static), cached(eager, padding, chunks, static)
            end = CHUNKS[chunks][0] if static and implementation == "flex_attention" else LENGTH  # see the next test
            assert torch.equal(found[:, :end], expected[:, :end]), (padding, chunks)
    if name not in ("llama", "qwen2", "gpt2"):
        return
    shapes = [shape for kind, shape in arrived if kind == "NoneType"]
    if implementation == "sdpa":
        # None to a first call on a static cache (the rest of it is empty), never to a later chunk.
        first, later = ((4, LENGTH + 3), (5, LENGTH + 3)) if static else ((4, 4), (5, LENGTH))
        assert first in shapes and later not in shapes
        assert ((1, 5) in shapes) == (not static)
    if implementation in FLASH:
        assert ((5, LENGTH) in shapes) == (not static)


def test_flex_masks_on_a_static_cache_are_read_as_the_kernel_reads_them() -> None:
    """After the first call transformers' flex masks count queries by a tensor that the cache has moved on by then.

    So flex attention gives other numbers there than eager attention, and so does its reconstruction.
    """
    model, flex, eager = build("llama", "flex_attention"), build("llama", "flex_attention"), FAMILIES["llama"].build("eager")
    own, expected = cached(flex, "none", "chunks", True), cached(eager, "none", "chunks", True)
    assert not torch.allclose(own, expected, atol=1e-2), "transformers has repaired this: drop the test"
    for kernel in ("auto", "eager"):
        patch_model(model, Edit("pattern", lambda x: x.clone(), heads=[1]), kernel=kernel)
        # Another order of sums than the kernel's.
        assert torch.allclose(cached(model, "none", "chunks", True), own, atol=1e-5, rtol=1e-5)


@by_case(DECODERS)
def test_packed_sequences(name: str, implementation: str) -> None:
    model, eager = pair(name, implementation)
    found = packed(model)
    # gpt_oss builds its masks without positions: only a flash kernel, which gets them itself, tells the sequences apart.
    is_told_apart = name != "gpt_oss" or implementation in FLASH
    assert torch.equal(found, packed(eager)) == (name != "gpt_oss" or implementation not in FLASH)
    if not is_told_apart:
        return
    with torch.no_grad():
        alone = [eager(part).logits for part in tokens(1).split([4, 3, 2], dim=1)]
    # Sums over longer rows, most of whose entries are 0, round differently.
    assert torch.allclose(found, torch.cat(alone, dim=1), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("padding", ["none", "left", "right"])
@by_case(TWO_WAY)
def test_bidirectional_and_cross_attention(name: str, padding: str, implementation: str) -> None:
    model, eager = pair(name, implementation)
    inputs = FAMILIES[name].inputs(padding=0)
    if "input_ids" in inputs:
        mask = PADDINGS[padding]
        inputs["attention_mask"] = torch.tensor([[1] * LENGTH if mask is None else mask, [1] * LENGTH])
    if "decoder_input_ids" in inputs:
        inputs["decoder_attention_mask"] = torch.ones_like(inputs["decoder_input_ids"])
        if padding == "right":
            inputs["decoder_attention_mask"][1, -2:] = 0
    with torch.no_grad():
        assert torch.equal(model(**inputs).logits, eager(**inputs).logits)


@pytest.mark.parametrize("implementation", ["sdpa", "flex_attention"])
def test_masks_that_the_user_made(implementation: str) -> None:
    """A 4-D mask passes through transformers as it is: each query sees itself and every key that is a multiple of 3."""
    model, eager = pair("llama", implementation)
    allowed = (torch.eye(LENGTH).bool() | (torch.arange(LENGTH) % 3 == 0)).expand(2, 1, LENGTH, LENGTH)
    additive = torch.where(allowed, 0.0, LOW)
    with torch.no_grad():
        expected = eager(tokens(), attention_mask=additive).logits
        assert torch.equal(model(tokens(), attention_mask=additive).logits, expected)
        if implementation == "sdpa":
            assert torch.equal(model(tokens(), attention_mask=allowed).logits, expected)
        cut = Edit("pattern", "uniform", heads=[1])
        expected = patch_model(eager, cut)(tokens(), attention_mask=additive).logits
        found = patch_model(model, cut)(tokens(), attention_mask=additive).logits
        # Three heads of four ran in another kernel.
        assert torch.allclose(found, expected, atol=1e-4, rtol=1e-4)


def test_a_mask_of_unknown_format_names_the_module() -> None:
    model = patch_model(build("llama", "flash_attention_2"), kernel="eager")
    with pytest.raises(MaskError, match=r"flash.*found torch.bool of shape \(2, 1, 9, 9\)"), torch.no_grad():
        model(tokens(), attention_mask=torch.ones(2, 1, LENGTH, LENGTH, dtype=torch.bool))


@pytest.mark.parametrize("name", ["llama", "gpt2", "bart"])
def test_no_mask_under_an_unknown_implementation_is_an_error(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers makes no masks for a function that the user registered: what None means there is that function's own."""
    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS, "own kernel", sdpa_attention_forward)
    model, eager, inputs = build(name, "own kernel"), FAMILIES[name].build("eager"), FAMILIES[name].inputs(padding=0)
    found = r"attn_implementation='own kernel': found no mask at a causal attention.*expected a mask, or one of"
    layer = "decoder.self.1" if name == "bart" else 1
    cuts = [Edit("scores", "scale", 0.5, [layer], [1]), Edit("pattern", "uniform", layers=[layer], heads=[1])]
    with torch.no_grad():
        before = model(**inputs).logits
        for cut in cuts:
            with pytest.raises(MaskError, match=found):
                patch_model(model, cut)(**inputs)
        with pytest.raises(MaskError, match=found):
            patch_model(model, kernel="eager")(**inputs)
        with pytest.raises(MaskError, match=found), capture(patch_model(model), "pattern", [layer]):
            model(**inputs)
        # What needs no matrix stays in that kernel.
        assert torch.equal(model(**inputs).logits, before)
        cut = Freeze("both", [layer], [1])
        expected = patch_model(eager, cut)(**inputs).logits
        assert torch.allclose(patch_model(model, cut)(**inputs).logits, expected, atol=1e-4, rtol=1e-4)
        if name == "bart":
            return
        allowed = torch.eye(LENGTH).bool() | (torch.arange(LENGTH) % 3 == 0)
        mask = torch.where(allowed, 0.0, LOW).expand(2, 1, LENGTH, LENGTH)
        for cut in cuts:
            expected = patch_model(eager, cut)(tokens(), attention_mask=mask).logits
            # Three heads of four ran in another kernel.
            assert torch.allclose(patch_model(model, cut)(tokens(), attention_mask=mask).logits, expected, atol=1e-4, rtol=1e-4)
            assert torch.allclose(model(tokens()[:, :1]).logits, eager(tokens()[:, :1]).logits, atol=1e-4), "one query sees all"


@pytest.mark.parametrize("name", ["llama", "mistral", "gpt2"])
def test_rows_of_padding_beside_sdpa_are_the_kernels(name: str) -> None:
    model = build(name, "sdpa")
    with capture(model, "z", layers=[0]) as before:
        whole(model, "left")
    patch_model(model, Edit("pattern", "scale", 0.5, layers=[0], heads=[2]))
    with capture(model, "z", layers=[0]) as after:
        whole(model, "left")
    empty = ~torch.tensor([PADDINGS["left"], [1] * LENGTH]).bool()
    rows = [run[0, "z"].transpose(1, 2)[empty] for run in (before, after)]
    assert torch.equal(*(torch.nan_to_num(row, nan=7.0) for row in rows))
    assert torch.equal(after[0, "z"][:, [0, 1, 3]].nan_to_num(7.0), before[0, "z"][:, [0, 1, 3]].nan_to_num(7.0))
    assert not torch.allclose(after[0, "z"][1, 2], before[0, "z"][1, 2], atol=1e-2)


# -- beside a flash kernel -----------------------------------------------------------------------------------------------------


# Not gpt2: without any nn.Linear in its attention, transformers runs it under flash attention in half precision only.
KERNEL = ("llama", "mistral", "qwen2", "phi3", "opt", "gemma2", "gemma3", "gpt_oss")


class SlowFlash:
    """The functions of the flash_attn package, from their documentation, one query at a time.

    Causal and windows count from the lower right corner, window sizes leave the query's own position out, a query without
    any key gives zeros, a sink joins the softmax.
    """

    def __init__(self) -> None:
        self.calls: list[tuple[int, ...]] = []

    def one(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        dropout_p: float = 0.0,
        softmax_scale: float | None = None,
        causal: bool = False,
        window_size: tuple[int, int] = (-1, -1),
        softcap: float = 0.0,
        s_aux: Tensor | None = None,
    ) -> Tensor:
        """q (query, head, d), k and v (key, kv_head, d)."""
        out = torch.zeros_like(q)
        assert dropout_p == 0.0
        for h, i in itertools.product(range(q.shape[1]), range(q.shape[0])):
            own = i + k.shape[0] - q.shape[0]
            first = 0 if window_size[0] < 0 else max(0, own - window_size[0])
            last = k.shape[0] - 1 if window_size[1] < 0 else min(k.shape[0] - 1, own + window_size[1])
            last = min(last, own) if causal else last
            if last < first:
                continue
            g = h // (q.shape[1] // k.shape[1])
            scores = k[first : last + 1, g] @ q[i, h] * (q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale)
            scores = softcap * torch.tanh(scores / softcap) if softcap else scores
            scores = scores if s_aux is None else torch.cat([scores, s_aux[h, None]])
            out[i, h] = scores.softmax(0)[: last + 1 - first] @ v[first : last + 1, g]
        return out

    def flash(self, q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
        self.calls.append(tuple(q.shape))
        return torch.stack([self.one(*rows, **options) for rows in zip(q, k, v, strict=True)])

    def varlen(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        cu_seqlens_q: Tensor,
        cu_seqlens_k: Tensor,
        max_seqlen_q: int,
        max_seqlen_k: int,
        dropout_p: float = 0.0,
        softmax_scale: float | None = None,
        causal: bool = False,
        window_size: tuple[int, int] = (-1, -1),
        softcap: float = 0.0,
        s_aux: Tensor | None = None,
    ) -> Tensor:
        self.calls.append(tuple(q.shape))
        lengths_q, lengths_k = cu_seqlens_q.diff().tolist(), cu_seqlens_k.diff().tolist()
        options: Any = {"dropout_p": dropout_p, "softmax_scale": softmax_scale, "causal": causal}
        options |= {"window_size": window_size, "softcap": softcap, "s_aux": s_aux}
        rows = zip(q.split(lengths_q), k.split(lengths_k), v.split(lengths_k), strict=True)
        return torch.cat([self.one(*row, **options) for row in rows])

    def imported(self, implementation: str | None, *args: Any, **kwargs: Any) -> Any:
        """What transformers imports of the package."""
        functions = (self.flash, self.varlen, None, hf_flash._pad_input, hf_flash._unpad_input)
        keywords = hf_flash._lazy_define_process_function(self.varlen)
        # Older versions have none for the function that reads a cache.
        return functions, (keywords, dict) if hasattr(hf_flash, "_process_with_kvcache_kwargs_fn") else keywords


@pytest.fixture
def flash(monkeypatch: pytest.MonkeyPatch) -> SlowFlash:
    """Runs transformers' own flash attention on CPU, with SlowFlash in place of the package."""
    slow = SlowFlash()
    monkeypatch.setattr(hf_flash, "lazy_import_flash_attention", slow.imported)
    return slow


@pytest.fixture
def no_reconstruction(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any) -> Any:
        raise AssertionError("the attention matrix was computed")

    monkeypatch.setattr("surgery.patch.verify", lambda attention: None)  # it runs the reconstruction, once in a process
    monkeypatch.setattr(Reconstruction, "__call__", refuse)


def real(logits: Tensor, padding: str) -> Tensor:
    mask = PADDINGS[padding]
    return logits if mask is None else logits[torch.tensor([mask, [1] * LENGTH]).bool()]


@pytest.mark.parametrize("name", KERNEL)
def test_the_reconstruction_equals_a_flash_kernel(name: str, flash: SlowFlash) -> None:
    """The stand-in, called by transformers' own code, and our reading of the same masks give the same numbers."""
    model, eager = build(name, "flash_attention_2"), FAMILIES[name].build("eager")
    runs: dict[str, Tensor] = {}
    for kernel in (None, "eager"):
        if kernel is not None:
            patch_model(model, kernel=kernel)
            flash.calls.clear()
        for padding in PADDINGS:
            found = {padding: whole(model, padding)}
            if padding != "right":
                found |= {f"{padding} {c}": cached(model, padding, c, False) for c in CHUNKS}
            if padding in ("full", "left"):
                found |= {f"{padding} {c} static": cached(model, padding, c, True) for c in CHUNKS}
            if kernel is None:
                assert flash.calls
                runs |= found
                assert torch.allclose(real(found[padding], padding), real(whole(eager, padding), padding), atol=1e-4)
                continue
            for run, logits in found.items():
                # Another order of sums; float32.
                assert torch.allclose(real(logits, padding), real(runs[run], padding), atol=1e-4, rtol=1e-4), run
        if kernel is None:
            runs["packed"] = packed(model)
    assert torch.allclose(packed(model), runs["packed"], atol=1e-4, rtol=1e-4)
    assert not flash.calls


@pytest.mark.parametrize("padding", ["none", "left", "right"])
@pytest.mark.parametrize("name", KERNEL)
def test_an_empty_spec_and_captures_keep_the_flash_kernel(name: str, padding: str, flash: SlowFlash) -> None:
    model = build(name, "flash_attention_2")
    before = whole(model, padding)
    patch_model(model)
    assert torch.equal(whole(model, padding), before)
    assert len(flash.calls) == 2 * LAYERS
    with capture(model, ["pattern", "scores", "z"], heads=[1, 3]) as run:
        assert torch.equal(whole(model, padding), before)
    with capture(model, "pattern", layers=[1]) as every:
        assert torch.equal(whole(model, padding), before)
    assert len(flash.calls) == 4 * LAYERS
    pattern = run[1, "pattern"]
    assert torch.equal(every[1, "pattern"][:, [1, 3]], pattern)
    with torch.no_grad():
        eager = FAMILIES[name].build("eager")
        mask = PADDINGS[padding]
        given_mask = None if mask is None else torch.tensor([mask, [1] * LENGTH])
        expected = eager(tokens(), attention_mask=given_mask, output_attentions=True).attentions[1][:, [1, 3]]
    rows = [real(x.transpose(1, 2), padding) for x in (pattern, expected)]
    # The layers below ran in different kernels.
    assert torch.allclose(*rows, atol=1e-4)
    unpatch_model(model)
    assert torch.equal(whole(model, padding), before)


@pytest.mark.parametrize("site", ["q", "k", "rot_q", "rot_k", "v", "z", "result"])
@pytest.mark.parametrize("name", ["llama", "opt", "gpt_oss"])
def test_cuts_outside_the_matrix_stay_in_the_flash_kernel(
    name: str, site: str, flash: SlowFlash, no_reconstruction: None
) -> None:
    model = build(name, "flash_attention_2")
    before = whole(model, "left")
    flash.calls.clear()
    gqa = "shared" if site == "k" else "isolated"
    patch_model(model, Edit(site, "scale", 0.5, layers=[0], heads=[1], gqa=gqa))
    after = whole(model, "left")
    assert len(flash.calls) == LAYERS
    assert not torch.equal(real(after, "left"), real(before, "left"))
    with capture(model, [site], heads=[0, 1]) as run:
        assert torch.equal(whole(model, "left"), after)
    assert run[0, site].shape[1] == 2
    for freeze in (Freeze("qk", heads=[1]), Freeze("ov", heads=[1]), Freeze("both", to="mean"), Freeze("ov", to="identity")):
        flash.calls.clear()
        whole(patch_model(model, freeze), "left")
        assert len(flash.calls) == LAYERS


@pytest.mark.parametrize("entries", [1 << 20, 40], ids=["at once", "in blocks"])
@pytest.mark.parametrize("padding", ["none", "left", "right"])
@pytest.mark.parametrize("site", ["scores", "pattern"])
@pytest.mark.parametrize("name", KERNEL)
def test_a_matrix_cut_takes_only_its_heads_out_of_the_flash_kernel(
    name: str, site: str, padding: str, entries: int, flash: SlowFlash, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(surgery.unfused, "BLOCK_ENTRIES", {"other": entries})
    model, reference = build(name, "flash_attention_2"), FAMILIES[name].build("eager")
    cut = Edit(site, "scale", 0.5, layers=[0], heads=[2])
    with capture(model, "z", layers=[0]) as before:
        whole(model, padding)
    patch_model(model, cut)
    patch_model(reference, cut)
    with capture(model, "z", layers=[0]) as after:
        found = whole(model, padding)
    with capture(reference, "z", layers=[0]) as expected:
        whole(reference, padding)
    others = [0, 1, 3]
    assert torch.equal(after[0, "z"][:, others], before[0, "z"][:, others])
    # The cut head's rows are the reconstruction's; a group of heads may be multiplied in another order than all of them.
    rows = [real(run[0, "z"].transpose(1, 2), padding)[..., 2, :] for run in (after, expected)]
    assert torch.allclose(*rows, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(after[0, "z"][:, 2], before[0, "z"][:, 2], atol=1e-2)
    assert torch.allclose(real(found, padding), real(whole(reference, padding), padding), atol=1e-4, rtol=1e-4)
    if padding in ("left", "right"):
        empty = ~torch.tensor([PADDINGS[padding], [1] * LENGTH]).bool()
        # Rows of padding are the kernel's: zeros.
        assert bool((after[0, "z"].transpose(1, 2)[empty] == 0).all())


@pytest.mark.parametrize("static", [False, True], ids=["dynamic", "static"])
@pytest.mark.parametrize("name", KERNEL)
def test_a_matrix_cut_beside_flash_while_decoding(name: str, static: bool, flash: SlowFlash) -> None:
    model, reference = build(name, "flash_attention_2"), FAMILIES[name].build("eager")
    cut = Edit("pattern", "scale", 0.5, heads=[2])
    patch_model(model, cut)
    expected = whole(patch_model(reference, cut), "left")
    for chunks in CHUNKS:
        found = cached(model, "left", chunks, static)
        assert torch.allclose(real(found, "left"), real(expected, "left"), atol=1e-4, rtol=1e-4), chunks


def test_a_matrix_cut_beside_flash_in_packed_sequences(flash: SlowFlash) -> None:
    cut = Edit("pattern", "uniform", heads=[2])
    for name in ("llama", "mistral"):
        model = patch_model(build(name, "flash_attention_2"), cut)
        reference = patch_model(FAMILIES[name].build("eager"), cut)
        with torch.no_grad():
            alone = torch.cat([reference(part).logits for part in tokens(1).split([4, 3, 2], dim=1)], dim=1)
        assert torch.allclose(packed(model), alone, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("padding", ["none", "left", "right"])
@pytest.mark.parametrize("name", ["bert", "bart", "whisper"])
def test_two_way_models_beside_flash(name: str, padding: str, flash: SlowFlash) -> None:
    model, inputs = build(name, "flash_attention_2"), FAMILIES[name].inputs(padding=0)
    if "input_ids" in inputs:
        mask = PADDINGS[padding]
        inputs["attention_mask"] = torch.tensor([[1] * LENGTH if mask is None else mask, [1] * LENGTH])
    with torch.no_grad():
        before = model(**inputs).logits
        patch_model(model)
        assert torch.equal(model(**inputs).logits, before)
        calls = len(flash.calls)
        patch_model(model, Edit("pattern", "identity", layers=["*"], heads=[1]))
        cut = model(**inputs).logits
    assert len(flash.calls) == calls // 2 * 3
    # Also where transformers takes a padded source for padded queries (cross-attention under flash): as the kernel has it.
    assert torch.allclose(cut, before, atol=1e-4, rtol=1e-4)


# -- beside flex attention -----------------------------------------------------------------------------------------------------

FLEX = ("llama", "mistral", "gpt2", "gemma2", "bert", "bart")


@pytest.mark.parametrize("entries", [1 << 20, 40], ids=["at once", "in blocks"])
@pytest.mark.parametrize("name", FLEX)
def test_beside_flex_attention(name: str, entries: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(surgery.unfused, "BLOCK_ENTRIES", {"other": entries})
    model, inputs = build(name, "flex_attention"), FAMILIES[name].inputs()
    layer = "decoder.self.0" if name == "bart" else 0
    cut = Edit("pattern", "scale", 0.5, layers=[layer], heads=[2])
    keep = slice(1, None)  # row 0 is padded
    reference = patch_model(FAMILIES[name].build("eager"), cut)
    with torch.no_grad():
        before = model(**inputs).logits
        patch_model(model)
        with capture(model, "z", layers=[layer]) as uncut, capture(model, "pattern", heads=[1]):
            assert torch.equal(model(**inputs).logits, before)
        patch_model(model, cut)
        with capture(model, "z", layers=[layer]) as run:
            after = model(**inputs).logits
        expected = reference(**inputs).logits
    assert torch.equal(run[layer, "z"][:, [0, 1, 3]], uncut[layer, "z"][:, [0, 1, 3]])
    assert not torch.allclose(run[layer, "z"][keep, 2], uncut[layer, "z"][keep, 2], atol=1e-2)
    # The other layers and heads ran in another kernel.
    assert torch.allclose(after[keep], expected[keep], atol=1e-4, rtol=1e-4)
    assert not torch.allclose(after[keep], before[keep], atol=1e-2)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's own, while it compiles, and transformers' use of torch
@pytest.mark.filterwarnings("ignore:.*torch.compile.*:UserWarning")
def test_beside_compiled_flex_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel as transformers runs it: compiled."""
    monkeypatch.setattr(masking, "create_block_mask", COMPILED_MASK)
    monkeypatch.setattr(hf_flex, "compile_friendly_flex_attention", COMPILED_FLEX)
    model, inputs = build("llama", "flex_attention"), FAMILIES["llama"].inputs()
    with torch.no_grad():
        before = model(**inputs).logits
        patch_model(model)
        assert torch.equal(model(**inputs).logits, before)
        with capture(model, "pattern", heads=[1]):
            assert torch.equal(model(**inputs).logits, before)
        cut = Edit("pattern", "scale", 0.5, heads=[2])
        found = patch_model(model, cut)(**inputs).logits
        expected = patch_model(FAMILIES["llama"].build("eager"), cut)(**inputs).logits
        assert torch.allclose(found[1], expected[1], atol=1e-4, rtol=1e-4)
        whole_eager = patch_model(model, kernel="eager")(**inputs).logits
        assert torch.equal(whole_eager, FAMILIES["llama"].build("eager")(**inputs).logits)


def test_a_block_mask_may_differ_by_head() -> None:
    """Odd heads see two keys only; the other heads all."""

    def rule(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return (q >= k) & ((h % 2 == 0) | (q - k < 2))

    mask = create_block_mask(rule, 2, 4, LENGTH, LENGTH, device="cpu")
    query = torch.zeros(2, 4, LENGTH, 8)
    allowed = to_additive("flex_attention", mask, query, query, nn.Identity(), {}).allowed
    assert allowed is not None and allowed.shape == (2, 4, LENGTH, LENGTH)
    near = torch.ones(LENGTH, LENGTH).bool().tril() & ~torch.ones(LENGTH, LENGTH).bool().tril(-2)
    for head in range(4):
        assert torch.equal(allowed[0, head], near if head % 2 else torch.ones(LENGTH, LENGTH).bool().tril())
    model = build("llama", "flex_attention")
    with torch.no_grad():
        plain = model(tokens(), attention_mask=mask, use_cache=False).logits
        patch_model(model, Edit("scores", "scale", 1.0))
        # The reconstruction beside another kernel.
        assert torch.allclose(model(tokens(), attention_mask=mask, use_cache=False).logits, plain, atol=1e-4, rtol=1e-4)
