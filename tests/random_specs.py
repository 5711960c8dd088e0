"""Random cuts and specs of every kind, for properties that hold of all of them."""

from __future__ import annotations

from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

from surgery import Edit, Freeze, Reference, Spec
from surgery.cuts import ACTIONS, CIRCUITS, FREEZES, GROUPED, TEMPLATES
from surgery.reference import Entry
from surgery.sites import SITES

small = st.integers(0, 6)
numbers = st.one_of(small, st.lists(small, min_size=1, max_size=4, unique=True))
addresses = st.sampled_from(["self.0", "encoder.self.1", "decoder.*", "*"])
layers = st.one_of(st.just("all"), numbers, addresses, st.lists(st.one_of(small, addresses), min_size=1, max_size=3))
floats = st.floats(-1e6, 1e6)


@st.composite
def tensors(draw: Any, dims: tuple[int, ...] = (0, 1, 2, 3, 4)) -> Tensor:
    shape = [draw(st.integers(1, 3)) for _ in range(draw(st.sampled_from(dims)))]
    dtype = draw(st.sampled_from([torch.float32, torch.float64, torch.float16, torch.bfloat16]))
    return torch.randn(shape, generator=torch.Generator().manual_seed(draw(small))).to(dtype)


@st.composite
def references(draw: Any, kind: str) -> Reference:
    dims = (4,) if kind == "activation" else (2, 3)
    entries = {}
    for key in draw(
        st.sets(st.tuples(st.sampled_from(["self.0", "self.1", "*"]), st.sampled_from(["z", "rot_q"])), min_size=1)
    ):
        value = draw(tensors(dims))
        spread = value.abs() if kind == "mean" and draw(st.booleans()) else None
        entries[key] = Entry(value, spread, draw(st.sampled_from([None, (0, 2)])))
    return Reference(kind, entries, draw(st.sampled_from([None, "Model(self.0)"])))  # type: ignore[arg-type]


def common() -> dict[str, Any]:
    return {
        "layers": layers,
        "heads": st.one_of(st.just("all"), numbers),
        "strength": st.floats(0, 1),
        "positions": st.one_of(st.none(), numbers),
        "gqa": st.sampled_from(["isolated", "shared"]),
        "seed": st.integers(-5, 5),
    }


@st.composite
def edits(draw: Any) -> Edit:
    action = draw(st.sampled_from(ACTIONS))
    site = "pattern" if action in TEMPLATES else draw(st.sampled_from(list(SITES)))
    options = draw(
        st.fixed_dictionaries({}, optional={**common(), "backward": st.sampled_from(["natural", "stopgrad", "ste"])})
    )
    if site not in GROUPED:
        options.pop("gqa", None)
    if action in ("value", "scale", "add"):
        options["value"] = draw(st.one_of(floats, small, tensors()))
    if action == "noise":
        options["value"] = draw(st.one_of(st.none(), st.tuples(floats, st.floats(0, 9))))
    if action in ("mean", "noise"):
        options["reference"] = draw(st.one_of(st.none(), references("mean")))
    if action == "activation":
        options["reference"] = draw(references("activation"))
    return Edit(site, action, **options)


@st.composite
def freezes(draw: Any) -> Freeze:
    to = draw(st.sampled_from(FREEZES))
    options = draw(st.fixed_dictionaries({}, optional={**common(), "backward": st.sampled_from(["stopgrad", "ste"])}))
    if to in ("mean", "noise"):
        options["reference"] = draw(st.one_of(st.none(), references("mean")))
    if to == "activation":
        options["reference"] = draw(references("activation"))
    return Freeze(draw(st.sampled_from(CIRCUITS)), to=to, **options)


specs = st.lists(st.one_of(edits(), freezes()), max_size=4).map(Spec)
