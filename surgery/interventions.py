"""What one edit does to one tensor: the arithmetic of replacing, transforming, strength, positions and gradients.

Everything here is a function of (edit, tensor, where in the sequence); it knows neither models nor kernels. Tensors are
(batch, head, position, d), with d = key positions at scores and pattern.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from surgery.cuts import TRANSFORMING, Edit
from surgery.errors import CacheError, SpecError, describe
from surgery.gradient import with_gradient
from surgery.noise import gaussian
from surgery.reference import Entry
from surgery.sites import SITES
from surgery.templates import TEMPLATES
from surgery.where import Heads, Where, positions_of


@dataclass
class Operation:
    """One edit at one attention. number: of the cut in the spec; heads: along the site's own head axis.

    address and noise_heads go into the noise: kv head numbers where a whole group is changed alike.
    block: the number of the block of the batch that changes, and of how many equal ones; None for the whole batch.
    """

    number: int
    edit: Edit
    site: str
    address: str
    heads: tuple[int, ...]
    noise_heads: tuple[int, ...]
    entry: Entry | None = None
    block: tuple[int, int] | None = None
    axis: Heads = field(init=False)
    rows: Heads = field(init=False)
    stream: int = field(init=False)

    def __post_init__(self) -> None:
        self.axis = Heads(self.heads)
        held = None if self.entry is None else self.entry.heads
        # Made now: beside a step of one token, the making of an index would be seen.
        self.rows = self.axis if held is None else Heads([held.index(head) for head in self.heads])
        name = f"{self.edit.seed}/{self.address}/{self.site}"
        self.stream = int.from_bytes(hashlib.sha256(name.encode()).digest()[:7], "big")

    @property
    def needs_position(self) -> bool:
        """Whether the result depends on the absolute position, so that the length of the cache must be known."""
        edit = self.edit
        values = [edit.value] if self.entry is None else [self.entry.value]
        # At scores and pattern the last axis counts keys, and two axes are query and key.
        most = 0 if SITES[self.site].is_matrix else 2
        by_position = any(isinstance(value, Tensor) and value.dim() > most for value in values)
        by_action = edit.action in ("noise", "previous", "diagonal") or self.is_current_mean
        return edit.positions is not None or by_action or by_position

    @property
    def acts_by_row(self) -> bool:
        """Whether each row of the result depends on that row alone, so that blocks of rows may be edited one by one."""
        return not (callable(self.edit.action) or self.is_current_mean)

    @property
    def acts_here(self) -> bool:
        """Whether it concerns a head that is in this process."""
        return True

    @property
    def is_current_mean(self) -> bool:
        """Whether it replaces by the mean of the very activations at hand."""
        return self.edit.action == "mean" and self.entry is None

    def apply(self, x: Tensor, where: Where, held: Sequence[int] | None = None) -> Tensor:
        """The edited tensor. held: the head numbers that axis 1 of x holds, None for all of them."""
        if self.block is None:
            return self._apply(x, where, held)
        number, count = self.block
        size, rest = divmod(x.shape[0], count)
        if rest:
            what = f"cut {self.number} at {self.address} {self.site}"
            do = "Give each block as many rows as the others."
            raise SpecError(describe(what, f"{x.shape[0]} rows", f"{count} blocks of rows", do))
        first, last = number * size, (number + 1) * size
        new = self._apply(x[first:last], where.of_rows(first, last), held)
        return torch.slice_scatter(x, new, 0, first, last)

    def _apply(self, x: Tensor, where: Where, held: Sequence[int] | None) -> Tensor:
        axis = self.axis
        if held is not None:
            if tuple(held) == self.heads:
                return self._edit(x, where)
            axis = Heads([i for i, head in enumerate(held) if head in self.heads])
        original = axis.take(x)
        edited = self._edit(original, where)
        return axis.put(x, edited)

    def _edit(self, original: Tensor, where: Where) -> Tensor:
        edit = self.edit
        transforms = edit.action in TRANSFORMING or callable(edit.action)
        value = self._value(original, where)
        if not transforms or edit.backward != "natural":
            value = value.detach()
        if edit.action == "identity":
            # Not a mixture in arithmetic: the forward is unchanged to the last bit.
            value = with_gradient(original, original, 1.0 - edit.strength)
        elif edit.strength != 1.0:
            value = (1.0 - edit.strength) * original + edit.strength * value
        keep = self._where(original, where)
        if keep is not None:
            value = torch.where(keep, value, original)
        if edit.backward == "ste":
            value = with_gradient(original, value, 1.0)
        return value

    def _where(self, original: Tensor, where: Where) -> Tensor | None:
        """Which entries change: the edit's positions, and at scores and pattern what the mask allows."""
        keep = None
        if self.edit.positions is not None:
            positions = positions_of(original, where.offset(self.site))
            chosen = torch.tensor(self.edit.positions, device=original.device)
            keep = (positions[:, None] == chosen[None, :]).any(dim=1)[:, None]
        allowed = self._allowed(where)
        # A pattern to zero is zero also in rows where everything is masked: then it is the same as z = 0.
        everywhere = callable(self.edit.action) or (self.edit.action == "zero" and self.site == "pattern")
        if allowed is not None and not everywhere:
            keep = allowed if keep is None else keep & allowed
        return keep

    def _allowed(self, where: Where) -> Tensor | None:
        """At scores and pattern, what the mask allows these heads; None for everything."""
        if not SITES[self.site].is_matrix or where.allowed is None or where.allowed.shape[1] == 1:
            return where.allowed if SITES[self.site].is_matrix else None
        return self.axis.take(where.allowed)

    def _value(self, original: Tensor, where: Where) -> Tensor:
        action = self.edit.action
        if callable(action):
            return self._call(original)
        return getattr(self, "_by_template" if action in TEMPLATES else f"_by_{action}")(original, where)

    def _by_zero(self, original: Tensor, where: Where) -> Tensor:
        return torch.zeros_like(original)

    def _by_identity(self, original: Tensor, where: Where) -> Tensor:
        return original

    def _given(self, original: Tensor, where: Where) -> Tensor:
        value = self.edit.value
        if not isinstance(value, Tensor):
            return original.new_full((), value)
        return self._broadcast(value, original, where)

    def _by_value(self, original: Tensor, where: Where) -> Tensor:
        if not isinstance(self.edit.value, Tensor):
            return torch.full_like(original, self.edit.value)
        return self._given(original, where).expand_as(original)

    def _by_scale(self, original: Tensor, where: Where) -> Tensor:
        return original * self._given(original, where)

    def _by_add(self, original: Tensor, where: Where) -> Tensor:
        return original + self._given(original, where)

    def _by_mean(self, original: Tensor, where: Where) -> Tensor:
        if self.entry is not None:
            return self._broadcast(self._rows(self.entry.value), original, where).expand_as(original)
        return self._unless_decoding(self._mean(original, where), where)

    def _mean(self, original: Tensor, where: Where) -> Tensor:
        """The mean over batch and positions of what is at hand, as far as the mask allows it and the cache has it."""
        allowed = self._allowed(where)
        if allowed is None and where.has_room(self.site):
            allowed = (positions_of(original, where.offset(self.site)) < where.filled)[:, None]
        if allowed is None:
            return original.mean(dim=(0, 2), keepdim=True).expand_as(original)
        allowed = allowed.expand_as(original)
        total = torch.where(allowed, original, 0).sum(dim=(0, 2), keepdim=True)
        return (total / allowed.sum(dim=(0, 2), keepdim=True).clamp(min=1)).expand_as(original)

    def _by_noise(self, original: Tensor, where: Where) -> Tensor:
        positions = positions_of(original, where.offset(self.site))
        columns = torch.arange(original.shape[3], device=original.device)
        if SITES[self.site].is_matrix:
            columns = columns + where.key_offset
        numbers = [self.stream + (1 << 40) * head for head in self.noise_heads]
        noise = torch.stack([gaussian(number, positions, columns) for number in numbers]).to(original.dtype)[None]
        mean, spread = self._moments(original, where)
        return (mean + spread * noise).expand_as(original)

    def _moments(self, original: Tensor, where: Where) -> tuple[Any, Any]:
        """Mean and spread of the noise: given, of the reference, or of each vector that it replaces."""
        if self.edit.value is not None:
            return self.edit.value
        if self.entry is not None:
            assert self.entry.spread is not None
            mean, spread = self._rows(self.entry.value), self._rows(self.entry.spread)
            return self._broadcast(mean, original, where), self._broadcast(spread, original, where)
        if (allowed := self._allowed(where)) is not None:
            # Masked entries hold the dtype's minimum and would drown the others.
            allowed = allowed.expand_as(original)
            count = allowed.sum(dim=-1, keepdim=True).clamp(min=1)
            mean = torch.where(allowed, original, 0).sum(dim=-1, keepdim=True) / count
            square = torch.where(allowed, (original - mean) ** 2, 0).sum(dim=-1, keepdim=True) / count
            return mean, square.sqrt()
        return original.mean(dim=-1, keepdim=True), original.std(dim=-1, keepdim=True, correction=0)

    def _by_activation(self, original: Tensor, where: Where) -> Tensor:
        assert self.entry is not None
        value = self._rows(self.entry.value, dim=1)
        return self._broadcast(value, original, where).expand_as(original)

    def _by_resample(self, original: Tensor, where: Where) -> Tensor:
        batch = original.shape[0]
        if batch < 2:
            raise SpecError(
                describe(
                    f"cut {self.number} at {self.address} {self.site}",
                    "a batch of 1 row",
                    "at least 2 rows to resample from",
                    "Run a larger batch, or cut to a captured run or a mean.",
                )
            )
        # A rotation of the batch: the same at every decoding step, and no row stays where it is.
        return original.roll(1 + self.edit.seed % (batch - 1), dims=0)

    def _by_template(self, original: Tensor, where: Where) -> Tensor:
        return TEMPLATES[self.edit.action](original, self._allowed(where), where)

    def _call(self, original: Tensor) -> Tensor:
        name = getattr(self.edit.action, "__name__", repr(self.edit.action))
        try:
            new = self.edit.action(original.clone())  # it may work in place; what it is given may be a view of a cache
        except Exception as error:
            error.add_note(
                f"in cut {self.number}: callable {name} at {self.address} {self.site}, given {tuple(original.shape)}"
            )
            raise

        if not _is_like(new, original):
            raise SpecError(
                describe(
                    f"cut {self.number}: callable {name} at {self.address} {self.site}",
                    _form(new),
                    _form(original),
                    "Return a tensor like the one it is given.",
                )
            )
        return new

    def _rows(self, value: Tensor, dim: int = 0) -> Tensor:
        """The rows of a reference that belong to this operation's heads."""
        taken = self.rows.take(value, dim)
        return taken if taken.dim() > 2 else taken[:, None, :]

    def _broadcast(self, value: Tensor, original: Tensor, where: Where) -> Tensor:
        """A value of 0 to 4 axes, aligned with (batch, head, position, d) and cut to the positions of this call.

        (d,), (head, d) [(query, key) at scores and pattern], (head, position, d), (batch, head, position, d).
        """
        value = value.to(device=original.device, dtype=original.dtype)
        site = SITES[self.site]
        wrong_width = not site.is_matrix and value.dim() and value.shape[-1] not in (1, original.shape[-1])
        if wrong_width or (value.dim() == 4 and value.shape[0] not in (1, original.shape[0])):
            raise SpecError(
                describe(
                    f"cut {self.number} at {self.address} {self.site}",
                    f"values of shape {tuple(value.shape)}",
                    f"batch {original.shape[0]} (or 1) and width {original.shape[-1]}",
                    "Give values for inputs of the same shape.",
                )
            )
        if value.dim() == 2 and not site.is_matrix:
            value = value[:, None, :]
        if value.dim() > 2 or (value.dim() == 2 and site.is_matrix):
            value = self._along(value, -2, positions_of(original, where.offset(self.site)), original, where)
        if value.dim() and site.is_matrix:
            keys = torch.arange(original.shape[-1], device=original.device) + where.key_offset
            value = self._along(value, -1, keys, original, where)
        return value

    def _along(self, value: Tensor, dim: int, positions: Tensor, original: Tensor, where: Where) -> Tensor:
        """The entries of a value for these absolute positions. Raises SpecError if it has none for one that is used.

        A compiled graph cannot raise: there such an entry is NaN, and so is what follows.
        """
        available = value.shape[dim]
        if available == 1 and (self.entry is None or self.entry.value.dim() == 2):
            return value  # one for all positions
        found = value.index_select(value.dim() + dim, positions.clamp(max=available - 1))
        missing = positions >= available
        if dim == -2 and self.edit.positions is not None:
            missing = missing & torch.isin(positions, torch.tensor(self.edit.positions, device=positions.device))
        if dim == -1 and (used := self._where(original, where)) is not None:
            missing = missing & used.expand_as(original).flatten(0, 2).any(dim=0)
        if where.has_room(self.site) or (dim == -1 and where.filled is not None):
            missing = missing & (positions < where.filled)
        if torch.compiler.is_compiling():
            return torch.where(missing.view(-1, *[1] * (-1 - dim)), torch.nan, found)
        if bool(missing.any()):
            last = int(positions[missing].max())
            raise SpecError(
                describe(
                    f"cut {self.number} at {self.address} {self.site}",
                    f"values for {available} positions, used at position {last}",
                    "a value for every position that is cut",
                    f"Restrict the cut, for example positions=range({available}).",
                )
            )
        return found

    def _unless_decoding(self, mean: Tensor, where: Where) -> Tensor:
        """The mean, unless it is of a step with a KV cache. Raises CacheError; a compiled graph, which cannot, gives NaN."""
        offset = where.query_offset
        if isinstance(offset, Tensor) and torch.compiler.is_compiling():
            return torch.where(offset > 0, torch.nan, mean)
        if bool(offset > 0):
            raise CacheError(
                describe(
                    f"cut {self.number} at {self.address} {self.site}: mean of the current activations",
                    f"a KV cache of {int(offset)} positions",
                    "the whole sequence at once, for the mean is over all positions",
                    "Pass reference=collect_reference(model, data), or use_cache=False.",
                )
            )
        return mean


def _is_like(new: Any, original: Tensor) -> bool:
    # No words are made of sizes here: a compiled graph may not know them.
    return isinstance(new, Tensor) and (new.shape, new.dtype, new.device) == (original.shape, original.dtype, original.device)


def _form(tensor: Any) -> str:
    if not isinstance(tensor, Tensor):
        return f"a {type(tensor).__name__}"
    return f"shape {tuple(tensor.shape)}, {tensor.dtype}, {tensor.device}"
