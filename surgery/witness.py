"""Watching one labelled run of a forward that computes its attention inline: where in its code the core's steps stand.

The products of q and k, the softmax over them and its product with v are recognised by the labels of what they are given,
whatever they are called and in whichever method or helper they stand. Each is known by its place in the source, so that
`surgery.inline` can put the intervention points there.
"""

from __future__ import annotations

import string
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from surgery.labels import BASE, PATTERN, SCORES, WEIGHT, Labelled, Z, owner_of
from surgery.layout import BATCH, COLUMN, HEAD, ROW, Layout, Roles, coordinates, from_coordinates, head_axes, letters
from surgery.source import KEYWORDS, method_names, owned_functions
from surgery.steps import PRODUCTS, Defeat, Product, Step, locate

_PARTS = ("exp", "exp_", "logsumexp", "log_softmax")
"""What a softmax is written out with."""


class Witness:
    """Sees every function of one run (`surgery.labels.Watcher`), and finds the core in them.

    view: the class of the object whose forward runs; projections: names of the owners of channels, in their order; inner:
    classes of modules within, whose code may hold points, too; chosen: which softmax over scores is the attention, if there
    are several.
    """

    def __init__(self, view: type, projections: list[str], inner: Iterable[type] = (), chosen: int | None = None) -> None:
        self.methods, self.names = owned_functions(view), method_names(view)
        self.inner = {code: f for cls in inner for code, f in owned_functions(cls).items() if code not in self.methods}
        self.projections, self.weights = projections, list[str]()
        self.steps: dict[int, Step] = {}
        self.parts: dict[int, int | None] = {}
        self.order_of_steps: list[Step] = []
        self.kept: list[Any] = []
        self.products: list[Product] = []
        self.softmax: Step | None = None
        self.main: Product | None = None
        self.values: Product | None = None
        self.fused: Step | None = None
        self.part: Step | None = None
        self.is_part_used = False
        self.chosen, self.n_softmaxes = chosen, 0
        self.second: Step | None = None
        self.lost: Step | None = None
        self.normed: Step | None = None
        self.normed_first = True
        self.drops: list[tuple[Labelled, Step]] = []
        self.layouts: dict[str, Layout] = {}
        self.before: dict[str, Layout] = {}
        self.heads = 0
        self.tensors: dict[str, Tensor] = {}

    def weight(self, parameter: Tensor, name: str) -> Labelled:
        """A matrix that the forward reads itself, labelled by its entries."""
        if name not in self.weights:
            self.weights.append(name)
        owner = WEIGHT + self.weights.index(name)
        entries = torch.arange(parameter.numel()).view(parameter.shape)
        return Labelled.make(parameter.detach(), entries + owner * BASE, self)

    # -- seeing ---------------------------------------------------------------------------------------------------------

    def see(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any], given: list[Labelled], out: Any) -> None:
        step = Step(name, *locate(self.methods, self.names, self.inner, 3), tuple(given))
        if name == "linear" and isinstance(args[1], Labelled) and args[1].dim() == 2:
            self._projected(("...i", "oi", "...o"), args[0], args[1], out)
        elif name in PRODUCTS and isinstance(out, Tensor):
            step = self._product(step, args, kwargs, out) or step
        elif name in ("softmax", "_softmax", "softmax_"):
            if PATTERN <= owner_of(given[0].labels) < Z:
                raise Defeat("a second softmax, over the pattern", step.place)
            if owner_of(given[0].labels) < 0 and (self.products or self.projections):
                self.lost = step  # q and k may have gone through something that labels do not follow
            elif owner_of(given[0].labels) < SCORES:
                self.normed_first = self.normed_first and not self.products
                self.normed = step
            elif SCORES <= owner_of(given[0].labels) < PATTERN:
                self._normed(step, given[0], out, args, kwargs)
        elif name in _PARTS and self.softmax is None and SCORES <= owner_of(given[0].labels) < PATTERN:
            self.part = self.part or step
        elif name == "scaled_dot_product_attention":
            self._fused(step, args, kwargs, out)
        elif "dropout" in name and PATTERN <= owner_of(given[0].labels) < Z:
            self.drops.append((given[0], step))
        self.order_of_steps.append(step)
        several = isinstance(out, tuple | list)
        for number, result in enumerate(out if several else (out,)):
            if isinstance(result, Labelled):
                self.steps[id(result)] = step
                self.parts[id(result)] = number if several else None
                self.kept.append(result)

    def _product(self, step: Step, args: tuple[Any, ...], kwargs: dict[str, Any], out: Tensor) -> Product | None:
        start = PRODUCTS[step.name]
        for names in KEYWORDS[len(args) :] if step.name != "einsum" else ():
            args = (*args, *(kwargs[name] for name in names if name in kwargs))
        factors = args[start] if step.name == "einsum" and isinstance(args[1], tuple | list) else args[start : start + 2]
        if len(factors) != 2:
            return None
        first, second = factors
        owners = [owner_of(t.labels) if isinstance(t, Labelled) else -1 for t in factors]
        if min(first.dim(), second.dim()) < 2 or max(owners) < 0:
            return None
        self.is_part_used = self.part is not None
        axes = letters(step.name, args[0] if step.name == "einsum" else None, first, second)
        owned = [WEIGHT <= owner < SCORES for owner in owners]
        if any(owned) and owners[1 - owned.index(True)] < 0:
            self._projected(axes, first, second, out)  # type: ignore[arg-type]
            return None
        if any(owned):
            owners = [-1 if is_weight else owner for is_weight, owner in zip(owned, owners, strict=True)]
        result = out if isinstance(out, Labelled) else Labelled.make(out, torch.full(out.shape, -1), self)
        found = Product(step.name, step.places, step.depth, step.given, (first, second), axes, result)
        if any(PATTERN <= owner < Z for owner in owners):
            self._weighted(found, owners)
        elif max(owners) < SCORES:
            self.products.append(found)
            entries = torch.arange(out.numel()).view(out.shape)
            result.labels = entries + (SCORES + len(self.products) - 1) * BASE
        return found

    def _projected(self, axes: tuple[str, str, str], first: Tensor, second: Tensor, out: Labelled) -> None:
        """States times a matrix that is a parameter: its columns are channels."""
        a, b, result = axes
        weight = second if isinstance(second, Labelled) and owner_of(second.labels) >= WEIGHT else first
        own, other = (b, a) if weight is second else (a, b)
        name = self.weights[owner_of(weight.labels) - WEIGHT]  # type: ignore[attr-defined]
        free = [c for c in own if c not in other]
        if not free or any(c not in result for c in free):
            return
        if name not in self.projections:
            self.projections.append(name)
        sizes = dict(zip(own, weight.shape, strict=True))
        channels: Tensor = torch.zeros(out.shape, dtype=torch.long)
        for letter in free:
            place = result.replace("...", "").index(letter) - len(result.replace("...", ""))
            index = torch.arange(sizes[letter]).view(-1, *[1] * (-place - 1))
            channels = channels * sizes[letter] + index
        start = _offset(weight) if axes[1] == "oi" else 0  # a part of a matrix (channel, d_model)
        out.labels = channels + start + self.projections.index(name) * BASE

    def _normed(self, step: Step, scores: Labelled, out: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.n_softmaxes += 1
        if self.n_softmaxes - 1 != (self.chosen or 0):
            self.second = self.second or step
            out.labels = torch.full(out.shape, -1)
            return
        self.softmax = step
        dim = kwargs.get("dim", args[1] if len(args) > 1 else -1)
        self._scores(scores, dim)
        out.labels = torch.where(scores.labels >= 0, scores.labels - SCORES * BASE + PATTERN * BASE, -1)

    # -- the core -------------------------------------------------------------------------------------------------------

    def _scores(self, scores: Labelled, dim: int) -> None:
        """At the softmax: which product these scores are, which factor is q, and every layout up to here."""
        assert self.softmax is not None
        if bool((scores.labels < 0).any()):
            raise Defeat("a softmax over more than one product's entries", self.softmax.place)
        self.main = main = self.products[owner_of(scores.labels) - SCORES]
        if self._is_map(main):
            raise Defeat("a softmax over a linear map of states, which is no q k^T", self.softmax.place, is_other=True)
        out = main.axes[2]
        entries = scores.labels.remainder(BASE)
        index = dict(zip(out, torch.unravel_index(entries, main.result.shape), strict=True))
        rows, keys = main.free
        over = [c for c in out if len(set(index[c].movedim(dim, 0).flatten(1)[:, 0].tolist())) > 1]
        if over == [rows]:
            rows, keys, main.factors = keys, rows, (main.factors[1], main.factors[0])
            main.axes = (main.axes[1], main.axes[0], out)
            self.order = (1, 0)
        elif over == [keys]:
            self.order = (0, 1)
        else:
            if not over:
                raise ValueError("a single key, whose axis does not show")
            raise Defeat(f"a softmax over the axes {over} of the product", self.softmax.place)
        (a, b, _), d = main.axes, main.contracted
        query, key = main.factors
        found = [_by_labels(axes, {row: ROW, d: COLUMN}, t) for axes, row, t in ((a, rows, query), (b, keys, key))]
        roles, self.heads = max(found, key=lambda one: one[1])
        if self.heads == 1:
            _single(roles, out)
        self.roles = {**{c: role for c, role in roles.items() if c in out}, rows: (ROW,), keys: (COLUMN,)}
        self._factor("rot_q", query, a, {rows: (ROW,), d: (COLUMN,)})
        self._factor("rot_k", key, b, {keys: (ROW,), d: (COLUMN,)})
        self._coordinates = coordinates(main.result.shape, [self.roles[c] for c in out], self.heads)
        self.find_layout("scores", scores, SCORES)

    @staticmethod
    def _is_map(product: Product) -> bool:
        """Whether a factor is a parameter that shares no axis with what is mapped but the one that is summed over."""
        for own, other, factor in zip(product.axes[:2], product.axes[1::-1], product.factors, strict=True):
            is_weight = isinstance(factor, Labelled) and WEIGHT <= owner_of(factor.labels) < SCORES
            if is_weight and len(set(own) & set(other)) == 1 and len(own) == 2:
                return True
        return False

    def _factor(self, site: str, tensor: Tensor, axes: str, own: Mapping[str, Roles]) -> None:
        """The layout of a factor: the axes that it shares with the scores, or one entry where it is broadcast over them."""
        found = [own[c] if c in own else self.roles.get(c, (BATCH,)) for c in axes]
        sizes = zip(axes, found, tensor.shape, strict=True)
        found = [role if c in own or size > 1 or role == (HEAD,) or self.heads == 1 else (BATCH,) for c, role, size in sizes]
        heads = self.heads if any(HEAD in role for role in found) else 1
        self.layouts[site], self.tensors[site] = Layout(tuple(found), heads), tensor

    def find_layout(self, site: str, tensor: Labelled, owner: int) -> None:
        entries = tensor.labels.remainder(BASE)
        layout = None
        if not bool((tensor.labels < 0).any()):
            layout = from_coordinates(tuple(c.flatten()[entries] for c in self._coordinates), self.heads)  # type: ignore[arg-type]
        if layout is None:
            step = self.steps.get(id(tensor))
            raise Defeat(f"{site} whose axes are not products of batch, head, query and key", step.place if step else None)
        self.layouts[site], self.tensors[site] = layout, tensor

    def _fused(self, step: Step, args: tuple[Any, ...], kwargs: dict[str, Any], out: Labelled) -> None:
        """At a fused kernel: the layouts of q, k, v and z, and z's labels."""
        if self.fused is not None:
            raise Defeat("a second fused kernel", step.place)
        self.fused = step
        tensors = [*args[:3], *(kwargs[name] for name in ("query", "key", "value")[len(args[:3]) :])]
        lead = max(t.dim() for t in tensors) - 2
        shared = string.ascii_lowercase[:lead]
        axes = [f"{shared[lead - t.dim() + 2 :]}{tail}" for t, tail in zip(tensors, ("qd", "kd", "ke"), strict=True)]
        own: dict[str, Roles] = {"q": (ROW,), "k": (ROW,), "d": (COLUMN,), "e": (COLUMN,)}
        found = [_by_labels(a, {c: own[c][0] for c in a if c in own}, t) for a, t in zip(axes, tensors, strict=True)]
        roles, self.heads = max(found[:2], key=lambda one: one[1])
        if self.heads == 1:
            _single(roles, shared)
        self.roles = {c: role for c, role in roles.items() if c in shared}
        for site, tensor, letters_ in zip(("rot_q", "rot_k", "v"), tensors, axes, strict=True):
            self._factor(site, tensor, letters_, own)
        self.roles = {**self.roles, "q": (ROW,), "e": (COLUMN,)}
        self._label_z(out, f"{shared}qe")

    def _label_z(self, out: Labelled, axes: str) -> None:
        self.layouts["z"] = Layout(tuple(self.roles[c] for c in axes), self.heads)
        self.tensors["z"] = out
        out.labels = z_labels(self.layouts["z"], out)

    def _weighted(self, product: Product, owners: list[int]) -> None:
        """At the product of pattern and v: the layouts of v and z, and z's labels."""
        own = 0 if PATTERN <= owners[0] < Z else 1
        if self.values is not None:
            if max(owners[1 - own], 0) == owners[1 - own]:
                raise Defeat("a second product of the pattern", product.place)
            return
        pattern, value = product.factors[own], product.factors[1 - own]
        assert isinstance(pattern, Labelled)
        self.values, self.is_first = product, own == 0
        self.find_layout("pattern", pattern, PATTERN)
        free = product.free
        rows, column = (free[0], free[1]) if own == 0 else (free[1], free[0])
        a, b = (product.axes[own], product.axes[1 - own])
        layout = self.layouts["pattern"]
        roles = dict(zip(a, layout.axes, strict=True))
        if roles[product.contracted] == (ROW,):
            reason = "a softmax over the queries of each key, which weights no values"
            raise Defeat(reason, self.softmax.place if self.softmax else None, is_other=True)
        self.roles = {c: role for c, role in roles.items() if c in product.axes[2]}
        self._factor("v", value, b, {product.contracted: (ROW,), column: (COLUMN,)})
        self.roles = {**roles, rows: (ROW,), column: (COLUMN,)}
        self._label_z(product.result, product.axes[2])

    @property
    def has_core(self) -> bool:
        """Whether scores were normed, or handed to a fused kernel: other arguments would show the same."""
        return self.softmax is not None or self.fused is not None

    def check(self) -> None:
        """Raises Defeat if the core was not seen whole."""
        if self.second is not None and self.chosen is None:
            raise Defeat("a second softmax over scores", self.second.place)
        if self.fused is not None and self.softmax is not None:
            raise Defeat("a fused kernel beside a softmax over scores", self.fused.place)
        if self.values is None and self.fused is None:
            if self.softmax is not None and self.main is not None:
                used = {owner_of(t.labels) for t in self.main.factors if isinstance(t, Labelled)}
                reason = "a softmax over q k^T that no product with values follows"
                raise Defeat(reason, self.softmax.place, is_other=len(used) == len(self.projections))
            if self.part is not None:
                reason = f"a softmax that is written out in parts ({self.part.name} of scores)"
                raise Defeat(reason, self.part.place, is_other=not self.is_part_used)
            if self.lost is not None:
                raise Defeat("a softmax over what cannot be followed back to a product of q and k", self.lost.place)
            if self.normed is not None:
                raise Defeat("a softmax over no product of projections", self.normed.place, is_other=self.normed_first)
            if self.products:
                raise Defeat("products of projections without a softmax over them that could be seen", self.products[0].place)
            raise Defeat("no softmax and no product of projections in its recorded run")

    # -- places ---------------------------------------------------------------------------------------------------------

    def places_of(self, step: Step) -> Iterator[int]:
        """The numbers of a step's places whose expression is computed once in the forward, with this step as its last."""
        steps = self.order_of_steps
        last = steps.index(step)
        for number, place in enumerate(step.places):
            others = [n for n, other in enumerate(steps) if place in other.places]
            if others[-1] == last and others == list(range(others[0], last + 1)):
                yield number

    def ancestors(self, tensor: Tensor) -> Iterator[Tensor]:
        """A tensor and what it was made of, along what handed on its labels, latest first."""
        while True:
            yield tensor
            step = self.steps.get(id(tensor))
            if step is None or isinstance(step, Product) or not step.given:
                return
            tensor = step.given[0]


def z_labels(layout: Layout, z: Tensor) -> Tensor:
    """The labels of z: which entry of which head each is."""
    plain = z.as_subclass(Tensor)
    shape = layout.to_standard(plain).shape
    numbers = torch.arange(shape[1] * shape[-1]).view(1, shape[1], 1, shape[-1]).expand(shape)
    return layout.from_standard(numbers, plain) + Z * BASE


def _offset(weight: Any) -> int:
    """The first row of a part of a matrix (channel, d_model)."""
    return int(weight.labels.flatten()[0]) % BASE // weight.shape[1]


def _by_labels(axes: str, roles: dict[str, int], tensor: Tensor) -> tuple[dict[str, Roles], int]:
    labels = tensor.labels if isinstance(tensor, Labelled) else torch.zeros(tensor.shape, dtype=torch.long)
    return head_axes(axes, roles, labels)


def _single(found: dict[str, Roles], out: str) -> None:
    """With a single head no axis shows it: the last shared one, if its size may be 1, is taken."""
    shared = [c for c in out if found.get(c) == (BATCH,)]
    if len(shared) > 1:
        found[shared[-1]] = (HEAD,)
