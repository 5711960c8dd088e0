"""What one edit does to one tensor: two heads, three positions, written out by hand with the result beside them."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from surgery import CacheError, Edit, SpecError, templates
from surgery.cuts import ACTIONS, REPLACING, TEMPLATES, TRANSFORMING
from surgery.interventions import Operation
from surgery.noise import gaussian
from surgery.reference import Entry
from surgery.sites import SITES
from surgery.where import Heads, Where

NEW = Where()


def operation(edit: Edit, heads: tuple[int, ...] = (0, 1), address: str = "self.0", **more: Any) -> Operation:
    """The edit at an attention of two heads."""
    entry = None if edit.reference is None else edit.reference.find(address, edit.site)
    return Operation(0, edit, edit.site, address, heads, more.pop("noise_heads", heads), entry, **more)


def apply(edit: Edit, x: Tensor, where: Where = NEW, heads: tuple[int, ...] = (0, 1), **more: Any) -> Tensor:
    return operation(edit, heads, **more).apply(x, where)


# batch 1, two heads, three positions, width 2
X = torch.tensor([[[[1.0, 2], [3, 4], [5, 6]], [[10, 20], [30, 40], [50, 60]]]])
NONE = torch.zeros(1, 2, 3, 2)


def rows(*values: Any) -> Tensor:
    return torch.tensor([values], dtype=torch.float32)


MEANS = torch.tensor([[7.0, 8], [70, 80]])  # (head, d)
BY_POSITION = torch.arange(12.0).view(2, 3, 2)  # (head, position, d)

VECTORS: list[tuple[str, Edit, Tensor]] = [
    ("zero", Edit("z", "zero"), NONE),
    ("number", Edit("z", "value", 9), torch.full((1, 2, 3, 2), 9.0)),
    ("vector", Edit("z", "value", torch.tensor([8.0, 9])), rows([[8, 9]] * 3, [[8, 9]] * 3)),
    ("vector by head", Edit("z", "value", MEANS), rows([[7, 8]] * 3, [[70, 80]] * 3)),
    ("vector by head and position", Edit("z", "value", BY_POSITION), BY_POSITION[None]),
    ("all four axes", Edit("z", "value", X + 1), X + 1),
    ("one for all positions", Edit("z", "value", MEANS[:, None]), rows([[7, 8]] * 3, [[70, 80]] * 3)),
    ("scale", Edit("z", "scale", 2), rows([[2, 4], [6, 8], [10, 12]], [[20, 40], [60, 80], [100, 120]])),
    ("scale by head", Edit("z", "scale", torch.tensor([[0.0], [1]])), rows([[0, 0]] * 3, X[0, 1].tolist())),
    ("add", Edit("z", "add", 1), X + 1),
    ("steer", Edit("z", "add", torch.tensor([0.0, 1])), rows([[1, 3], [3, 5], [5, 7]], [[10, 21], [30, 41], [50, 61]])),
    ("mean of a reference", Edit("z", "mean", reference=MEANS), rows([[7, 8]] * 3, [[70, 80]] * 3)),
    ("mean by position", Edit("z", "mean", reference=BY_POSITION), BY_POSITION[None]),
    ("current mean", Edit("z", "mean"), rows([[3, 4]] * 3, [[30, 40]] * 3)),
    ("noise around its mean", Edit("z", "noise", (5, 0)), torch.full((1, 2, 3, 2), 5.0)),
    ("activation", Edit("z", "activation", reference=-X), -X),
    ("identity", Edit("z", "identity"), X),
    ("callable", Edit("z", lambda x: x.flip(-1)), X.flip(-1)),
    ("callable sees the heads", Edit("z", lambda x: x - x[:, :1]), rows([[0, 0]] * 3, [[9, 18], [27, 36], [45, 54]])),
    ("half of zero", Edit("z", "zero", strength=0.5), X / 2),
    ("a quarter of the mean", Edit("z", "mean", strength=0.25, reference=MEANS), 0.75 * X + 0.25 * MEANS[None, :, None]),
    ("none of it", Edit("z", "value", 9, strength=0.0), X),
    ("half of a scale", Edit("z", "scale", 3, strength=0.5), 2 * X),
    ("one position", Edit("z", "zero", positions=[1]), rows([[1, 2], [0, 0], [5, 6]], [[10, 20], [0, 0], [50, 60]])),
    ("two positions", Edit("z", "add", 1, positions=[0, 2]), rows([[2, 3], [3, 4], [6, 7]], [[11, 21], [30, 40], [51, 61]])),
    ("a position that is not there", Edit("z", "zero", positions=[7]), X),
    (
        "half at one position",
        Edit("z", "value", 0, strength=0.5, positions=[2]),
        rows([[1, 2], [3, 4], [2.5, 3]], [[10, 20], [30, 40], [25, 30]]),
    ),
    (
        "mean of all, at one position",
        Edit("z", "mean", positions=[0]),
        rows([[3, 4], [3, 4], [5, 6]], [[30, 40], [30, 40], [50, 60]]),
    ),
]  # fmt: skip


@pytest.mark.parametrize(("edit", "expected"), [row[1:] for row in VECTORS], ids=[row[0] for row in VECTORS])
def test_vectors_by_hand(edit: Edit, expected: Tensor) -> None:
    before = X.clone()
    assert torch.equal(apply(edit, X), expected)
    assert torch.equal(before, X), "an edit must not write into what it is given"


# -- scores and pattern: causal, three queries and three keys -----------------------------------------------------------

LOW = torch.finfo(torch.float32).min
CAUSAL = Where(allowed=torch.ones(3, 3, dtype=torch.bool).tril()[None, None])
EVERYTHING = Where(allowed=torch.ones(1, 1, 3, 3, dtype=torch.bool))
S = torch.tensor([[[[1.0, LOW, LOW], [3, 5, LOW], [7, 9, 2]], [[2, LOW, LOW], [4, 6, LOW], [0, 3, 3]]]])
P = torch.tensor([[[[1.0, 0, 0], [0.25, 0.75, 0], [0.5, 0.25, 0.25]], [[1, 0, 0], [0.5, 0.5, 0], [0, 0.5, 0.5]]]])

THIRD, SIXTH = 1 / 3, 1 / 6
MATRICES: list[tuple[str, Edit, Tensor, Where, Any]] = [
    ("zero scores", Edit("scores", "zero"), S, CAUSAL, [[[0, LOW, LOW], [0, 0, LOW], [0, 0, 0]]] * 2),
    ("value", Edit("scores", "value", 4), S, CAUSAL, [[[4, LOW, LOW], [4, 4, LOW], [4, 4, 4]]] * 2),
    (
        "query by key",
        Edit("scores", "value", torch.arange(9.0).view(3, 3)),
        S,
        CAUSAL,
        [[[0, LOW, LOW], [3, 4, LOW], [6, 7, 8]]] * 2,
    ),
    (
        "scale",
        Edit("scores", "scale", 2),
        S,
        CAUSAL,
        [[[2, LOW, LOW], [6, 10, LOW], [14, 18, 4]], [[4, LOW, LOW], [8, 12, LOW], [0, 6, 6]]],
    ),
    (
        "add by key",
        Edit("scores", "add", torch.tensor([10.0, 20, 30])),
        S,
        CAUSAL,
        [[[11, LOW, LOW], [13, 25, LOW], [17, 29, 32]], [[12, LOW, LOW], [14, 26, LOW], [10, 23, 33]]],
    ),
    (
        "mean of each key's column, where allowed",
        Edit("scores", "mean"),
        S,
        CAUSAL,
        [[[11 / 3, LOW, LOW], [11 / 3, 7, LOW], [11 / 3, 7, 2]], [[2, LOW, LOW], [2, 4.5, LOW], [2, 4.5, 3]]],
    ),
    (
        "positions are queries",
        Edit("scores", "zero", positions=[1]),
        S,
        CAUSAL,
        [[[1, LOW, LOW], [0, 0, LOW], [7, 9, 2]], [[2, LOW, LOW], [0, 0, LOW], [0, 3, 3]]],
    ),
    (
        "half",
        Edit("scores", "zero", strength=0.5),
        S,
        CAUSAL,
        [[[0.5, LOW, LOW], [1.5, 2.5, LOW], [3.5, 4.5, 1]], [[1, LOW, LOW], [2, 3, LOW], [0, 1.5, 1.5]]],
    ),
    ("zero pattern", Edit("pattern", "zero"), P, CAUSAL, [[[0, 0, 0]] * 3] * 2),
    ("uniform", Edit("pattern", "uniform"), P, CAUSAL, [[[1, 0, 0], [0.5, 0.5, 0], [THIRD, THIRD, THIRD]]] * 2),
    ("uniform, no mask", Edit("pattern", "uniform"), P, NEW, [[[THIRD, THIRD, THIRD]] * 3] * 2),
    ("diagonal", Edit("pattern", "diagonal"), P, CAUSAL, [[[1, 0, 0], [0, 1, 0], [0, 0, 1]]] * 2),
    ("diagonal, no mask", Edit("pattern", "diagonal"), P, NEW, [[[1, 0, 0], [0, 1, 0], [0, 0, 1]]] * 2),
    ("previous", Edit("pattern", "previous"), P, CAUSAL, [[[1, 0, 0], [1, 0, 0], [0, 1, 0]]] * 2),
    ("previous, no mask", Edit("pattern", "previous"), P, NEW, [[[1, 0, 0], [1, 0, 0], [0, 1, 0]]] * 2),
    ("first", Edit("pattern", "first"), P, CAUSAL, [[[1, 0, 0], [1, 0, 0], [1, 0, 0]]] * 2),
    ("first, no mask", Edit("pattern", "first"), P, NEW, [[[1, 0, 0], [1, 0, 0], [1, 0, 0]]] * 2),
    (
        "half uniform",
        Edit("pattern", "uniform", strength=0.5),
        P,
        CAUSAL,
        [
            [[1, 0, 0], [0.375, 0.625, 0], [0.25 + SIXTH, 0.125 + SIXTH, 0.125 + SIXTH]],
            [[1, 0, 0], [0.5, 0.5, 0], [SIXTH, 0.25 + SIXTH, 0.25 + SIXTH]],
        ],
    ),
    (
        "diagonal at one query",
        Edit("pattern", "diagonal", positions=[2]),
        P,
        CAUSAL,
        [[[1, 0, 0], [0.25, 0.75, 0], [0, 0, 1]], [[1, 0, 0], [0.5, 0.5, 0], [0, 0, 1]]],
    ),
    (
        "activation, not where masked",
        Edit("scores", "activation", reference=-S),
        S,
        CAUSAL,
        [[[-1, LOW, LOW], [-3, -5, LOW], [-7, -9, -2]], [[-2, LOW, LOW], [-4, -6, LOW], [0, -3, -3]]],
    ),
    ("callables get everything", Edit("pattern", lambda p: p + 1), P, CAUSAL, (P + 1)[0].tolist()),
    ("identity", Edit("scores", "identity"), S, CAUSAL, S[0].tolist()),
]  # fmt: skip


@pytest.mark.parametrize(
    ("edit", "x", "where", "expected"), [row[1:] for row in MATRICES], ids=[row[0].replace(",", "") for row in MATRICES]
)
def test_matrices_by_hand(edit: Edit, x: Tensor, where: Where, expected: Any) -> None:
    # One rounding of a division or product apart.
    assert torch.allclose(apply(edit, x, where), torch.tensor([expected], dtype=torch.float32), rtol=1e-6, atol=0)


def test_the_tables_hold_every_action() -> None:
    rows_ = [row[1] for row in VECTORS] + [row[1] for row in MATRICES]
    shown = {edit.action for edit in rows_ if isinstance(edit.action, str)}
    assert shown | {"resample"} == set(ACTIONS), "resample has a test of its own"
    assert {"scores", "pattern", "z"} <= {edit.site for edit in rows_}


# -- rows without any key, padding, windows -----------------------------------------------------------------------------

PADDED = Where(allowed=torch.tensor([[0, 0, 0], [0, 1, 0], [0, 1, 1]], dtype=torch.bool)[None, None])


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("uniform", [[0.2, 0.3, 0.5], [0, 1, 0], [0, 0.5, 0.5]]),
        ("first", [[0.2, 0.3, 0.5], [0, 1, 0], [0, 1, 0]]),
        ("diagonal", [[0.2, 0.3, 0.5], [0, 1, 0], [0, 0, 1]]),
        # Position 1 may not look at the padding before it: it looks at itself.
        ("previous", [[0.2, 0.3, 0.5], [0, 1, 0], [0, 1, 0]]),
    ],
)
def test_templates_leave_rows_without_keys_and_never_use_padding(name: str, expected: Any) -> None:
    x = torch.tensor([[0.2, 0.3, 0.5], [0, 1, 0], [0, 0.6, 0.4]]).expand(1, 2, 3, 3)
    found = apply(Edit("pattern", name), x, PADDED)
    assert torch.equal(found, torch.tensor([[expected] * 2]))


@pytest.mark.parametrize(
    ("site", "action"),
    [("scores", a) for a in ("zero", "value", "scale", "add", "mean", "noise")]
    + [("pattern", a) for a in (*TEMPLATES, "value", "scale", "add", "mean", "noise")],
)
def test_what_the_mask_forbids_stays(site: str, action: str) -> None:
    """Whatever stands there. (Only a pattern to zero is zero everywhere.)"""
    x = torch.rand(1, 2, 3, 3)
    found = apply(Edit(site, action, 2.0 if action in ("value", "scale", "add") else None), x, PADDED)
    allowed = PADDED.allowed.expand_as(x)  # type: ignore[union-attr]
    assert torch.equal(found[~allowed], x[~allowed])
    assert not torch.equal(found[allowed], x[allowed])


@pytest.mark.parametrize("action", ["zero", "mean", "uniform", "first", "diagonal", "previous"])
def test_a_row_without_keys_stays_finite(action: str) -> None:
    nothing = Where(allowed=torch.zeros(1, 1, 3, 3, dtype=torch.bool))
    for site in ["pattern"] if action in TEMPLATES else ["pattern", "scores"]:
        found = apply(Edit(site, action), P, nothing)
        # A pattern to zero means z = 0, in empty rows as well; all else leaves them as the kernel did.
        assert torch.equal(found, torch.zeros_like(P) if (site, action) == ("pattern", "zero") else P)


def test_noise_ignores_masked_entries_and_leaves_them() -> None:
    found = apply(Edit("scores", "noise"), S, CAUSAL)
    allowed = CAUSAL.allowed.expand_as(S)  # type: ignore[union-attr]
    assert torch.equal(found[~allowed], S[~allowed])
    assert found[allowed].abs().max() < 100, "the masked minimum must not come into mean and spread"
    assert torch.equal(found[:, :, 0, 0], S[:, :, 0, 0]), "one allowed key: its own mean, spread 0"


def test_a_window_that_excludes_the_own_position() -> None:
    where = Where(allowed=torch.tensor([[1, 0, 0], [1, 0, 0], [1, 0, 0]], dtype=torch.bool)[None, None])
    found = apply(Edit("pattern", "diagonal"), P, where)
    expected = torch.tensor([[1.0, 0, 0], [0.25, 0.75, 0], [0.5, 0.25, 0.25]])
    assert torch.equal(found[0, 0], expected), "a row that may not see the key that the template names stays"


def test_heads_may_have_masks_of_their_own() -> None:
    allowed = torch.stack([torch.ones(3, 3), torch.ones(3, 3).tril()]).bool()[None]
    found = apply(Edit("pattern", "uniform"), P, Where(allowed=allowed))
    assert torch.allclose(found[0, 0], torch.full((3, 3), THIRD)) and torch.equal(found[0, 1, 0], torch.tensor([1.0, 0, 0]))
    found = apply(Edit("pattern", "uniform"), P, Where(allowed=allowed), heads=(1,))
    assert torch.equal(found[0, 0], P[0, 0]) and torch.equal(found[0, 1, 0], torch.tensor([1.0, 0, 0]))


# -- which heads --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("numbers", [(0,), (1,), (2, 3), (0, 1, 2, 3), (0, 2), (1, 3), (0, 1, 3)])
def test_only_the_chosen_heads_change(numbers: tuple[int, ...]) -> None:
    x = torch.randn(2, 4, 3, 2)
    others = [h for h in range(4) if h not in numbers]
    found = apply(Edit("z", "zero"), x, heads=numbers)
    assert torch.equal(found[:, others], x[:, others]) and not found[:, list(numbers)].any()
    chosen = Heads(numbers)
    assert torch.equal(chosen.take(x), x[:, list(numbers)])
    assert torch.equal(chosen.put(x, chosen.take(x) + 1)[:, list(numbers)], x[:, list(numbers)] + 1)
    assert torch.equal(chosen.put(x, chosen.take(x)), x)
    assert torch.equal(chosen.take(x.transpose(1, 2), 2), x.transpose(1, 2)[:, :, list(numbers)])


@given(st.lists(st.integers(0, 5), max_size=6))
def test_any_heads_are_read_in_the_order_given(numbers: list[int]) -> None:
    x = torch.randn(2, 6, 3)
    assert torch.equal(Heads(numbers).take(x), x[:, numbers])
    assert torch.equal(Heads(numbers).take(x.transpose(1, 2), -1), x[:, numbers].transpose(1, 2))


def test_evenly_spaced_heads_are_a_view() -> None:
    x = torch.randn(2, 6, 3)
    for numbers in [(4,), (1, 2), (1, 5), (0, 2, 4)]:
        assert Heads(numbers).take(x).untyped_storage().data_ptr() == x.untyped_storage().data_ptr()
    assert Heads((0, 1, 3)).take(x).untyped_storage().data_ptr() != x.untyped_storage().data_ptr()


def test_heads_keep_no_index_of_a_block_that_ends() -> None:
    """Neither a tensor of inference mode, which gradients refuse, nor one without numbers."""
    x = torch.randn(2, 6, 3, requires_grad=True)
    with torch.inference_mode():
        chosen = Heads((0, 1, 3))
        chosen.take(x)
    assert chosen.take(x.to("meta")).is_meta
    chosen.put(x, 2 * chosen.take(x)).sum().backward()
    assert x.grad is not None and torch.equal(x.grad[:, [0, 1, 3]], torch.full((2, 3, 3), 2.0))


def test_values_by_head_go_to_the_heads_in_the_order_of_their_names() -> None:
    x = torch.zeros(1, 4, 1, 1)
    value = torch.tensor([[1.0], [3.0]])
    assert apply(Edit("z", "value", value, heads=[3, 1]), x, heads=(1, 3)).flatten().tolist() == [0, 3, 0, 1]


def test_a_tensor_may_hold_some_heads_only() -> None:
    x = torch.arange(4.0).view(1, 4, 1, 1)
    value = torch.tensor([[-1.0], [-3.0]])
    edit = operation(Edit("pattern", "value", value[:, :, None]), heads=(1, 3))
    assert edit.apply(x[:, [1, 2, 3]], NEW, held=(1, 2, 3)).flatten().tolist() == [-1, 2, -3]


@pytest.mark.parametrize("held", [None, (0, 2)])
def test_rows_of_a_reference_are_found_by_head_number(held: Any) -> None:
    means = torch.tensor([[0.0], [1], [2]])
    entry = Entry(means if held is None else means[[0, 2]], None, held)
    edit = Edit("z", "mean", reference={("*", "*"): means})
    found = Operation(0, edit, "z", "self.0", (2,), (2,), entry).apply(torch.full((1, 3, 2, 1), 9.0), NEW)
    assert found[0, :, 0, 0].tolist() == [9, 9, 2]


# -- where in the sequence ----------------------------------------------------------------------------------------------

LONG = torch.arange(2 * 2 * 7 * 4, dtype=torch.float32).view(2, 2, 7, 4).sin()
BY_SEVEN = torch.arange(2 * 7 * 4, dtype=torch.float32).view(2, 7, 4)

POSITIONED = [
    Edit("z", "zero", positions=[1, 4, 6]),
    Edit("z", "value", BY_SEVEN),
    Edit("z", "add", BY_SEVEN, positions=[0, 5]),
    Edit("z", "scale", BY_SEVEN[None]),
    Edit("z", "mean", reference=BY_SEVEN),
    Edit("z", "activation", reference=torch.randn(2, 2, 7, 4)),
    Edit("z", "noise"),
    Edit("z", "noise", (1, 2), positions=[3, 4]),
    Edit("z", "noise", seed=4, strength=0.5),
    Edit("z", "resample"),
    Edit("rot_k", "noise"),
    Edit("v", "value", BY_SEVEN, positions=[2, 6]),
]


@pytest.mark.parametrize("edit", POSITIONED, ids=str)
@pytest.mark.parametrize("chunks", [[3, 4], [1] * 7, [6, 1]], ids=str)
def test_chunks_give_what_the_whole_sequence_gives(edit: Edit, chunks: list[int]) -> None:
    whole = apply(edit, LONG)
    start, parts = 0, []
    for part in LONG.split(chunks, dim=2):
        is_key = SITES[edit.site].over_keys
        where = Where(query_offset=0 if is_key else start, key_offset=start if is_key else 0)
        parts.append(apply(edit, part, where))
        start += part.shape[2]
    assert torch.equal(torch.cat(parts, dim=2), whole)
    as_tensor = Where(query_offset=torch.tensor(3), key_offset=torch.tensor(3))
    assert torch.equal(apply(edit, LONG[:, :, 3:], as_tensor), whole[:, :, 3:]), "a static cache counts in a tensor"


@pytest.mark.parametrize("name", TEMPLATES)
def test_templates_in_chunks(name: str) -> None:
    pattern = torch.rand(1, 2, 6, 6).tril()
    allowed = torch.ones(6, 6, dtype=torch.bool).tril()[None, None]
    whole = apply(Edit("pattern", name), pattern, Where(allowed=allowed))
    for start in range(1, 6):
        part = pattern[:, :, start:]
        found = apply(Edit("pattern", name), part, Where(query_offset=start, allowed=allowed[:, :, start:]))
        assert torch.equal(found, whole[:, :, start:])


@pytest.mark.parametrize("name", TEMPLATES)
def test_templates_when_a_sliding_cache_has_dropped_keys(name: str) -> None:
    # Queries 4 and 5 of a sequence, of which keys 3, 4, 5 are left, window 3.
    allowed = torch.tensor([[1, 1, 0], [1, 1, 1]], dtype=torch.bool)[None, None]
    found = apply(Edit("pattern", name), torch.rand(1, 2, 2, 3) * allowed, Where(4, 3, allowed))
    expected = {
        "uniform": [[0.5, 0.5, 0], [THIRD, THIRD, THIRD]],
        "diagonal": [[0, 1, 0], [0, 0, 1]],
        "previous": [[1, 0, 0], [0, 1, 0]],
        "first": [[1, 0, 0], [1, 0, 0]],
    }
    assert torch.allclose(found, torch.tensor(expected[name], dtype=torch.float32).expand(1, 2, 2, 3))


@pytest.mark.parametrize("is_cross", [False, True])
def test_positions_count_queries_or_keys(is_cross: bool) -> None:
    """Keys in the core are those of the cache, keys at the projection those of this call, of the source in cross-attention."""
    where = Where(query_offset=5, key_offset=3, is_cross=is_cross)
    for site in SITES.values():
        first = 3 if site.name in ("rot_k", "v") or (site.name == "k" and is_cross) else 5
        assert where.offset(site.name) == first
        found = apply(Edit(site.name, "value", 9, positions=[first + 1]), X[..., :3].expand(1, 2, 3, 2), where)
        assert (found == 9).all(dim=-1)[0, 0].tolist() == [False, True, False], site.name


def test_a_cache_with_room_to_spare() -> None:
    """Of a static cache of four positions, three are filled: the fourth counts for nothing, and needs no value."""
    where = Where(filled=torch.tensor(3))
    x = torch.tensor([1.0, 2, 6, 100]).view(1, 1, 4, 1).expand(1, 2, 4, 1)
    means = apply(Edit("v", "mean"), x, where)
    assert (means == 3).all()
    values = torch.tensor([7.0, 8, 9]).view(1, 3, 1).expand(2, 3, 1)
    found = apply(Edit("rot_k", "value", values), x, where)
    assert found[0, :, :3].flatten().tolist() == [7, 8, 9] * 2
    with pytest.raises(SpecError, match="used at position 3"):
        apply(Edit("z", "value", values), x, where)
    scores = torch.zeros(1, 2, 1, 4)
    found = apply(Edit("scores", "add", torch.tensor([1.0, 2, 3])), scores, where)
    assert found[0, 0, 0, :3].tolist() == [1, 2, 3]
    with pytest.raises(SpecError, match="used at position 3"):
        apply(Edit("scores", "add", torch.tensor([1.0, 2, 3])), scores, NEW)


def test_one_position_of_a_reference_is_not_all_of_them() -> None:
    """A value with one position stands for every position; what was measured at position 0 does not."""
    one = torch.ones(2, 1, 2)
    assert (apply(Edit("z", "value", one), X) == 1).all()
    with pytest.raises(SpecError, match="found values for 1 positions, used at position 2"):
        apply(Edit("z", "mean", reference=one), X)
    with pytest.raises(SpecError, match="found values for 1 positions"):
        apply(Edit("z", "activation", reference=one[None]), X)
    assert (apply(Edit("z", "mean", reference=one[:, 0]), X) == 1).all(), "a mean over positions serves all"


def test_callables_may_work_in_place() -> None:
    """Without writing into what the model goes on with."""
    before = X.clone()
    assert torch.equal(apply(Edit("z", lambda x: x.mul_(2)), X), 2 * before)
    assert torch.equal(apply(Edit("z", lambda x: x.zero_(), strength=0.5), X), before / 2)
    assert torch.equal(before, X)


def test_values_that_end_before_the_sequence_are_refused_where_they_are_used() -> None:
    short = Edit("z", "value", BY_SEVEN[:, :2])
    with pytest.raises(SpecError, match=r"self\.0 z: found values for 2 positions, used at position 6; expected a value"):
        apply(short, LONG)
    with pytest.raises(SpecError, match=r"positions=range\(2\)"):
        apply(short, LONG[:, :, :2], Where(query_offset=1))
    with pytest.raises(SpecError, match="used at position 6"):
        apply(Edit("scores", "value", torch.zeros(7, 2)), LONG[..., :3].new_zeros(1, 2, 7, 7))
    restricted = Edit("z", "value", BY_SEVEN[:, :2], positions=[0, 1])
    found = apply(restricted, LONG)
    assert torch.equal(found[:, :, 2:], LONG[:, :, 2:]) and torch.equal(found[0, :, :2], BY_SEVEN[:, :2])


@pytest.mark.parametrize(
    ("edit", "needs"),
    [
        (Edit("z", "zero"), False),
        (Edit("z", "zero", positions=[0]), True),
        (Edit("z", "value", MEANS), False),
        (Edit("z", "value", BY_POSITION), True),
        (Edit("z", "mean", reference=MEANS), False),
        (Edit("z", "mean", reference=BY_POSITION), True),
        (Edit("z", "mean"), True),
        (Edit("z", "noise"), True),
        (Edit("pattern", "uniform"), False),
        (Edit("pattern", "first"), False),
        (Edit("pattern", "previous"), True),
        (Edit("pattern", "diagonal"), True),
        (Edit("scores", "add", torch.zeros(3, 3)), True),
        (Edit("z", "resample"), False),
        (Edit("z", "activation", reference=X), True),
    ],
    ids=str,
)
def test_which_edits_need_to_know_the_length_of_the_cache(edit: Edit, needs: bool) -> None:
    assert operation(edit).needs_position is needs


@pytest.mark.parametrize("site", ["z", "rot_q", "rot_k", "v", "scores", "pattern"])
def test_the_current_mean_is_refused_when_decoding(site: str) -> None:
    edit = Edit(site, "mean")
    assert operation(edit).is_current_mean
    for offset in (1, torch.tensor(1)):
        with pytest.raises(CacheError, match=rf"self\.0 {site}: mean of the current.*cache of 1 positions.*collect_reference"):
            apply(edit, S if SITES[site].is_matrix else X, Where(query_offset=offset))
    given = Edit(site, "mean", reference=torch.ones(2, 3))
    assert not operation(given).is_current_mean
    assert (apply(given, S, Where(query_offset=1)) == 1).all()


def test_the_current_mean_is_over_batch_and_positions() -> None:
    x = torch.stack([X[0], X[0] + 10])
    assert torch.equal(apply(Edit("z", "mean"), x), rows([[8, 9]] * 3, [[35, 45]] * 3).expand(2, 2, 3, 2))


# -- gradients ----------------------------------------------------------------------------------------------------------

W = torch.arange(1.0, 13).view(1, 2, 3, 2)  # the gradient that comes from above


def gradient(edit: Edit, x: Tensor = X, where: Where = NEW) -> tuple[Tensor, Tensor]:
    x = x.clone().requires_grad_()
    out = apply(edit, x, where)
    (out * W.view(-1)[: out.numel()].view_as(out)).sum().backward() if out.requires_grad else None
    return out.detach(), torch.zeros_like(x) if x.grad is None else x.grad


REPLACED = [
    Edit("z", "zero"),
    Edit("z", "value", 3),
    Edit("z", "mean"),
    Edit("z", "mean", reference=MEANS),
    Edit("z", "noise"),
    Edit("z", "identity"),
    Edit("z", "activation", reference=-X),
]


@pytest.mark.parametrize("edit", REPLACED, ids=str)
@pytest.mark.parametrize("strength", [0.0, 0.25, 1.0])
def test_gradients_of_replacements(edit: Edit, strength: float) -> None:
    def like(**changes: Any) -> Edit:
        fields = {n: getattr(edit, n) for n in type(edit).model_fields}
        return Edit(**{**fields, "strength": strength, **changes})

    value, plain = gradient(like())
    assert torch.equal(plain, (1 - strength) * W), "nothing comes through the replacement"
    again, stopped = gradient(like(backward="stopgrad"))
    assert torch.equal(stopped, plain) and torch.equal(again, value)
    again, through = gradient(like(backward="ste"))
    assert torch.equal(through, W), "as if it were not replaced"
    assert torch.equal(again, value), "backward never changes the forward"
    _, at_one = gradient(like(positions=[1]))
    keep = torch.tensor([1.0, 1 - strength, 1])[None, None, :, None]
    assert torch.equal(at_one, W * keep)
    if edit.action == "identity":
        assert torch.equal(value, X)


@pytest.mark.parametrize("strength", [0.25, 1.0])
def test_gradients_of_transformations(strength: float) -> None:
    def check(action: Any, value: Any, natural: Tensor) -> None:
        expected = {"natural": (1 - strength) * W + strength * natural, "stopgrad": (1 - strength) * W, "ste": W}
        values = []
        for backward, grad in expected.items():
            out, found = gradient(Edit("z", action, value, backward=backward, strength=strength))
            assert torch.allclose(found, grad, rtol=1e-6), backward
            values.append(out)
        assert torch.equal(values[0], values[1]) and torch.equal(values[0], values[2])

    check("scale", 3, 3 * W)
    check("add", 5, W)
    check(lambda x: x**2, None, 2 * X * W)
    check(lambda x: torch.zeros_like(x), None, 0 * W)


@pytest.mark.parametrize("backward", ["natural", "stopgrad", "ste"])
@pytest.mark.parametrize("name", TEMPLATES)
def test_gradients_of_templates_and_masked_scores(name: str, backward: str) -> None:
    w = W.view(-1)[:9].view(1, 1, 3, 3)
    x = P[:, :1]
    edit = operation(Edit("pattern", name, backward=backward), heads=(0,))
    x = x.clone().requires_grad_()
    (edit.apply(x, PADDED) * w).sum().backward()
    # What is forbidden stays, gradient and all.
    expected = w if backward == "ste" else torch.where(PADDED.allowed, 0, w)  # type: ignore[call-overload]
    assert torch.equal(x.grad, expected)
    low = torch.where(PADDED.allowed, x.detach(), -torch.inf).requires_grad_()  # type: ignore[arg-type]
    zero = operation(Edit("scores", "scale", 0.0, strength=0.5, backward=backward), heads=(0,))
    (zero.apply(low, PADDED).nan_to_num(neginf=0) * w).sum().backward()
    assert torch.isfinite(low.grad).all(), "infinite masked scores give no NaN"  # type: ignore[arg-type]


def test_a_steering_vector_can_be_learned() -> None:
    vector = torch.zeros(2, requires_grad=True)
    (apply(Edit("z", "add", vector), X) * W).sum().backward()
    assert torch.equal(vector.grad, W.sum(dim=(0, 1, 2)))  # type: ignore[arg-type]
    fixed = torch.zeros(2, requires_grad=True)
    out = apply(Edit("z", "value", fixed), X)
    assert not out.requires_grad, "what replaces is a constant"


def test_without_gradients_nothing_is_tracked() -> None:
    x = X.clone().requires_grad_()
    with torch.no_grad():
        for backward in ("stopgrad", "ste"):
            assert not apply(Edit("z", "identity", backward=backward), x).requires_grad
    assert not apply(Edit("z", "zero", backward="ste"), X).requires_grad


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_the_type_stays(dtype: torch.dtype) -> None:
    edits = [row[1] for row in VECTORS if isinstance(row[1].action, str)] + [Edit("z", "noise"), Edit("z", "noise", (0, 1))]
    for edit in edits:
        for backward in ("natural", "stopgrad", "ste"):
            fields = {n: getattr(edit, n) for n in Edit.model_fields}
            found = apply(Edit(**{**fields, "backward": backward}), X.to(dtype))
            assert found.dtype == dtype and found.shape == X.shape, str(edit)


# -- resampling ---------------------------------------------------------------------------------------------------------


@settings(max_examples=100, deadline=None)
@given(st.integers(-(2**70), 2**70), st.integers(2, 12))
def test_resampling_permutes_the_batch_without_fixed_points(seed: int, batch: int) -> None:
    x = torch.arange(batch).float()[:, None, None, None].expand(batch, 2, 3, 2)
    found = apply(Edit("z", "resample", seed=seed), x)
    order = found[:, 0, 0, 0].long().tolist()
    assert sorted(order) == list(range(batch))
    assert all(new != old for old, new in enumerate(order))
    assert torch.equal(found, x[order]), "whole rows: all heads and positions of one row come from one row"
    assert torch.equal(found, apply(Edit("z", "resample", seed=seed), x))


def test_seeds_choose_among_the_rotations() -> None:
    x = torch.arange(5.0)[:, None, None, None].expand(5, 2, 3, 2)
    first = {apply(Edit("z", "resample", seed=seed), x)[0, 0, 0, 0].item() for seed in range(20)}
    assert first == {1, 2, 3, 4}


def test_one_row_cannot_be_resampled() -> None:
    with pytest.raises(SpecError, match=r"self\.0 z: found a batch of 1 row; expected at least 2 rows.*Run a larger batch"):
        apply(Edit("z", "resample"), X)


# -- noise --------------------------------------------------------------------------------------------------------------


def by_hand(stream: int, position: int, column: int) -> float:
    """splitmix64 on Python's integers, then Box and Muller."""
    whole = (1 << 64) - 1

    def mix(x: int) -> int:
        x = (x + 0x9E3779B97F4A7C15) & whole
        x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & whole
        x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & whole
        return x ^ (x >> 31)

    counter = (position << 24) + column
    one, two = ((mix(mix(counter + salt) + stream) >> 11) / 2**53 for salt in (0x1234567, 0x89ABCDE))
    return math.sqrt(-2 * math.log1p(-one)) * math.cos(2 * math.pi * two)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**62), st.integers(0, 2**20), st.integers(0, 2**20))
def test_noise_is_the_documented_function(stream: int, position: int, column: int) -> None:
    found = gaussian(stream, torch.tensor([position]), torch.tensor([column]))
    assert found.dtype == torch.float64 and found.shape == (1, 1)
    # Logarithm and cosine of two libraries.
    assert math.isclose(found.item(), by_hand(stream, position, column), rel_tol=1e-9, abs_tol=1e-12)


def test_noise_is_standard_normal() -> None:
    n = 512
    for stream in (0, 1, 1 << 40, 987654321):
        x = gaussian(stream, torch.arange(n), torch.arange(n))
        assert torch.equal(x, gaussian(stream, torch.arange(n), torch.arange(n)))
        assert torch.isfinite(x).all()
        x, count = x.flatten(), n * n
        # Five standard errors: of the mean 1, of the second, third and fourth moment sqrt(2), sqrt(15), sqrt(96).
        for power, moment, spread in ((1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96)):
            assert abs((x**power).mean() - moment) < 5 * math.sqrt(spread / count)
        # Kolmogorov and Smirnov: 1.95 / sqrt(n) is exceeded with probability 0.001.
        steps = torch.arange(1, count + 1, dtype=torch.float64) / count
        assert (torch.special.ndtr(x.sort().values) - steps).abs().max() < 1.95 / math.sqrt(count)


def test_the_checks_of_normality_can_fail() -> None:
    uniform = torch.linspace(-3, 3, 512 * 512, dtype=torch.float64)
    steps = torch.arange(1, 512 * 512 + 1, dtype=torch.float64) / (512 * 512)
    assert (torch.special.ndtr(uniform) - steps).abs().max() > 1.95 / 512


def test_noise_depends_on_stream_position_and_column() -> None:
    n = 256
    x = gaussian(3, torch.arange(n), torch.arange(n))
    others = {
        "the next stream": gaussian(4, torch.arange(n), torch.arange(n)),
        "the next head": gaussian(3 + (1 << 40), torch.arange(n), torch.arange(n)),
        "the next position": gaussian(3, torch.arange(n) + 1, torch.arange(n)),
        "the next column": gaussian(3, torch.arange(n), torch.arange(n) + 1),
        "position and column exchanged": x.T,
    }
    for name, y in others.items():
        off = ~torch.eye(n, dtype=torch.bool) if name.endswith("exchanged") else torch.ones(n, n, dtype=torch.bool)
        assert not (x == y)[off].any(), name
        correlation = torch.corrcoef(torch.stack([x[off], y[off]]))[0, 1]
        assert abs(correlation) < 5 / n, name
    assert x.unique().numel() == n * n, "no number twice"


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**56), st.integers(0, 5000), st.integers(1, 6), st.integers(1, 6))
def test_noise_in_parts_is_noise_of_the_whole(stream: int, offset: int, before: int, after: int) -> None:
    positions, columns = torch.arange(before + after) + offset, torch.arange(5)
    whole = gaussian(stream, positions, columns)
    parts = [gaussian(stream, positions[:before], columns), gaussian(stream, positions[before:], columns)]
    assert torch.equal(torch.cat(parts), whole)
    assert torch.equal(gaussian(stream, positions, columns[2:]), whole[:, 2:])


def test_noise_differs_by_seed_layer_site_and_head_but_not_by_row() -> None:
    x = torch.zeros(3, 2, 4, 8)

    def noise(edit: Edit = Edit("z", "noise", (0, 1)), **more: Any) -> Tensor:  # noqa: B008 (a value)
        return apply(edit, x, **more)

    base = noise()
    assert torch.equal(base, noise())
    assert torch.equal(base[0], base[1]) and torch.equal(base[0], base[2])
    for other in (
        noise(Edit("z", "noise", (0, 1), seed=1)),
        noise(address="self.1"),
        noise(Edit("rot_q", "noise", (0, 1))),
        base.flip(1),
    ):
        assert not (other == base).any()
    one = noise(heads=(1,))
    assert torch.equal(one[:, 1], base[:, 1]) and not one[:, 0].any(), "a head's noise does not depend on the others"
    alike = noise(heads=(0, 1), noise_heads=(0, 0))
    assert torch.equal(alike[:, 0], alike[:, 1]), "heads that share a kv head get its noise"


def test_noise_has_the_mean_and_spread_asked_for() -> None:
    x = torch.randn(1, 2, 400, 300) * torch.tensor([2.0, 5.0])[None, :, None, None] + 3
    per_vector = apply(Edit("z", "noise"), x)
    # Five standard errors of the mean and spread of 300 numbers.
    assert ((per_vector - x).mean(-1).abs() < 5 * x.std(-1) / math.sqrt(300) * 1.5).all()
    assert ((per_vector.std(-1) / x.std(-1) - 1).abs() < 5 / math.sqrt(2 * 300)).all()
    given_ = apply(Edit("z", "noise", (7, 0.5)), x)
    assert abs(given_.mean() - 7) < 0.01 and abs(given_.std() - 0.5) < 0.01
    mean, spread = torch.randn(2, 300), torch.rand(2, 300)
    edit = Edit("z", "noise", reference={("*", "*"): mean})
    found = Operation(0, edit, "z", "self.0", (0, 1), (0, 1), Entry(mean, spread)).apply(x, NEW)
    standard = (found[0] - mean[:, None]) / spread[:, None]
    assert abs(standard.mean()) < 0.02 and abs(standard.std() - 1) < 0.02
    unit = apply(Edit("z", "noise", (0, 1)), x)
    assert torch.allclose(standard, unit[0], atol=1e-3), "the same numbers, scaled"


def test_constant_activations_have_no_noise() -> None:
    assert torch.equal(apply(Edit("z", "noise"), torch.full((1, 2, 3, 4), 2.5)), torch.full((1, 2, 3, 4), 2.5))


# -- activations and callables that do not fit --------------------------------------------------------------------------


def test_activations_of_another_batch_or_width() -> None:
    edit = Edit("z", "activation", reference=torch.zeros(2, 2, 3, 2))
    with pytest.raises(SpecError, match=r"shape \(2, 2, 3, 2\); expected batch 3 \(or 1\) and width 2\. Give values"):
        apply(edit, X.expand(3, 2, 3, 2))
    with pytest.raises(SpecError, match="expected batch 2"):
        apply(edit, torch.zeros(2, 2, 3, 5))
    one = Edit("z", "activation", reference=-X)
    assert torch.equal(apply(one, X.expand(4, 2, 3, 2)), -X.expand(4, 2, 3, 2)), "one row serves every row"


@pytest.mark.parametrize("action", ["mean", "value"])
def test_a_compiled_graph_that_cannot_raise_gives_nan(action: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A mean of a step of decoding, and a value for fewer positions than there are."""
    edit = Edit("z", "mean") if action == "mean" else Edit("z", "value", torch.zeros(2, 4, 2))
    late, early = (Where(query_offset=torch.tensor(n)) for n in (3, 0))
    with pytest.raises((SpecError, CacheError)):
        apply(edit, X, late)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    found = apply(edit, X, late)
    assert bool(found[:, :, 1:].isnan().all()) and bool(found[:, :, 0].isnan().all()) == (action == "mean")
    assert not bool(apply(edit, X, early).isnan().any())


def test_every_action_has_its_arithmetic() -> None:
    known = {name.removeprefix("_by_") for name in vars(Operation) if name.startswith("_by_")} - {"template"}
    assert known | set(templates.TEMPLATES) == set(ACTIONS) == set(REPLACING) | set(TRANSFORMING) | set(TEMPLATES)
