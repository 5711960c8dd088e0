"""Points at projections: q and k where they leave theirs, `result` where z passes through the output projection."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from surgery.where import Heads

if TYPE_CHECKING:
    from surgery.core import Surgery


Replay = Callable[[], AbstractContextManager[None]]


@dataclass
class Tap:
    """What happens around one projection.

    sites: site to channels (head, d): of the projection's output for q and k, of its input for result.
    """

    surgery: Surgery
    sites: dict[str, Tensor] = field(default_factory=dict)
    _chosen: dict[str, Heads] = field(default_factory=dict)

    def add(self, site: str, channels: Tensor) -> None:
        """Sets the point of a site. Channels that are neighbours, as in most projections, are read and written as a view."""
        self.sites[site], self._chosen[site] = channels, Heads(channels.flatten().tolist())

    def __call__(self, projection: nn.Module, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        replay = _replay(projection, x.device) if "result" in self.sites else contextlib.nullcontext
        output = projection(x, *args, **kwargs)
        for site, channels in self.sites.items():
            if site == "result":
                output = self._result(projection, x, output, channels, replay)
            else:
                output = self._rows(site, output, channels)
        return output

    def _rows(self, site: str, output: Tensor, channels: Tensor) -> Tensor:
        """q or k: the projection's channels by head, changed where they stand."""
        chosen = self._chosen[site]
        by_head = chosen.take(output, -1).unflatten(-1, tuple(channels.shape))
        shape = by_head.shape  # (batch, position, head, d), with more axes before head in some families
        edited = self.surgery.at(site, by_head.flatten(1, -3).transpose(1, 2))
        if not self.surgery.plan.of(site):
            return output
        return chosen.put(output, edited.transpose(1, 2).reshape(shape).flatten(-2), -1)

    def _result(self, projection: nn.Module, x: Tensor, output: Tensor, channels: Tensor, replay: Replay) -> Tensor:
        """result: what each head adds to the output. Where it changes, the output is the other heads' with the changed ones'.

        Not output - before + after: what rounding leaves of two terms that should cancel, a norm behind would blow up.
        """
        heads, cut = self.surgery.result_heads, self.surgery.edited_result_heads
        parts = torch.stack([head_result(projection, x, channels[head], replay) for head in heads], dim=1)
        edited = self.surgery.at("result", parts, heads)
        if not cut:
            return output
        own = Heads([heads.index(head) for head in cut])
        before, after = own.take(parts), own.take(edited)
        with replay():
            others = projection.forward(x.index_fill(-1, channels[list(cut)].flatten().to(x.device), 0))
        changed = (before != after).any(dim=1).any(dim=-1, keepdim=True)
        return torch.where(changed, others + after.sum(dim=1), output + (after - before).sum(dim=1))


def _replay(projection: nn.Module, device: torch.device) -> Replay:
    """Contexts in which a projection with active dropout (an adapter's) draws what it draws in the call that follows now.

    The parts of its output are parts only under one draw, and watching them must not move the user's random numbers on.
    """
    if not any(isinstance(m, nn.Dropout) and m.training and m.p > 0 for m in projection.modules()):
        return contextlib.nullcontext
    is_cpu = device.type == "cpu"
    generator, where = (torch, ()) if is_cpu else (torch.get_device_module(device), (device,))
    state = generator.get_rng_state(*where)

    @contextlib.contextmanager
    def context() -> Iterator[None]:
        with torch.random.fork_rng([] if is_cpu else [device], device_type="cuda" if is_cpu else device.type):
            generator.set_rng_state(state, *where)
            yield

    return context


def head_result(projection: nn.Module, x: Tensor, channels: Tensor, replay: Replay = contextlib.nullcontext) -> Tensor:
    """(batch, query, d_model): what some input channels add to a linear map's output, its bias left out.

    A plain map gives its own rows of the weight. Any other (quantised, adapted, offloaded) computes it itself, on an input
    that is zero elsewhere.
    """
    if type(projection) in (nn.Linear, Conv1D) and "forward" not in projection.__dict__:
        weight: Any = projection.weight
        channels = channels.to(x.device)
        return x.index_select(-1, channels) @ (weight[channels] if type(projection) is Conv1D else weight[:, channels].t())
    mask = torch.zeros(x.shape[-1], dtype=torch.bool, device=x.device).index_fill(0, channels.to(x.device), True)
    # Not projection(..): the user's hooks there fire once in a forward, for the whole output.
    with replay():
        part = projection.forward(torch.where(mask, x, 0))
    with replay():
        return part - projection.forward(torch.zeros_like(x[:1, :1]))


class Tapped:
    """A projection as the family's forward sees it: called through its tap, otherwise itself."""

    def __init__(self, projection: nn.Module, tap: Tap) -> None:
        self.projection, self.tap = projection, tap

    def __call__(self, *args: Any, **kwargs: Any) -> Tensor:
        return self.tap(self.projection, *args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.projection, name)
