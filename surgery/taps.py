"""Points at projections: q and k where they leave theirs, `result` where z passes through the output projection."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from surgery.where import Heads

if TYPE_CHECKING:
    from surgery.own_code import Surgery


Replay = Callable[[], AbstractContextManager[None]]
Call = Callable[[Tensor], Tensor]


@dataclass
class Tap:
    """What happens around one projection.

    sites: site to channels (head, d): of the projection's output for q and k, of its input for result.
    """

    surgery: Surgery
    sites: dict[str, Tensor] = field(default_factory=dict)
    _held: dict[str, tuple[int, ...] | None] = field(default_factory=dict)
    _chosen: dict[str, Heads] = field(default_factory=dict)
    _batch_axes: dict[str, int] = field(default_factory=dict)

    def add(self, site: str, channels: Tensor, batch_axes: int = 1, held: tuple[int, ...] | None = None) -> None:
        """Sets the point of a site. Channels that are neighbours, as in most projections, are read and written as a view.

        batch_axes: how many of the projection's first axes are the batch; 0: they are position and batch. held: the heads
        that alone are of interest at q or k, so that no others are touched; None for all.
        """
        self.sites[site], self._held[site] = channels, held
        own = channels if held is None else channels[list(held)]
        self._chosen[site] = Heads(own.flatten().tolist())
        self._batch_axes[site] = batch_axes

    def __call__(self, projection: nn.Module, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        replay = _replay(projection, x.device) if "result" in self.sites else contextlib.nullcontext
        found = projection(x, *args, **kwargs)
        output, more = (found[0], found[1:]) if isinstance(found, tuple) else (found, None)
        call = functools.partial(answer, projection, args=args, kwargs=kwargs)
        for site, channels in self.sites.items():
            if site == "result":
                output = self._result(projection, x, output, channels, replay, call)
            else:
                output = self._rows(site, output, channels)
        return output if more is None else (output, *more)

    def _rows(self, site: str, output: Tensor, channels: Tensor) -> Tensor:
        """q or k: the projection's channels by head, changed where they stand."""
        chosen = self._chosen[site]
        if not chosen.are_among(output.shape[-1]):
            raise self.surgery.of_other_heads(f"{output.shape[-1]} channels of {site}, fewer than are cut or captured")
        by_head = chosen.take(output, -1).unflatten(-1, (-1, channels.shape[1]))
        edited = self.surgery.at(site, self._lead(site, by_head, 2).transpose(1, 2), self._held[site])
        if not self.surgery.plan.of(site):
            return output
        return chosen.put(output, self._unlead(site, edited.transpose(1, 2), by_head).flatten(-2), -1)

    def _lead(self, site: str, tensor: Tensor, tail: int) -> Tensor:
        """(batch, position, ..) of a tensor; axes before the last `tail` may be positions alone, a grid, or turned round."""
        lead, batch = tensor.dim() - tail, self._batch_axes[site]
        if lead == 2 and batch == 1:
            return tensor
        if lead == 1:
            return tensor[None]
        return tensor.flatten(batch, lead - 1).flatten(0, batch - 1) if batch else tensor.transpose(0, 1)

    def _unlead(self, site: str, tensor: Tensor, like: Tensor) -> Tensor:
        """Back to the axes of `like`."""
        return tensor.reshape(like.shape) if self._batch_axes[site] else tensor.transpose(0, 1)

    def _result(
        self,
        projection: nn.Module,
        x: Tensor,
        output: Tensor,
        channels: Tensor,
        replay: Replay,
        call: Call,
    ) -> Tensor:
        """result: what each head adds to the output. Where it changes, the output is the other heads' with the changed ones'.

        Not output - before + after: what rounding leaves of two terms that should cancel, a norm behind would blow up.
        """
        heads, cut = self.surgery.result_heads, self.surgery.edited_result_heads
        with at_hand(projection) if is_plain(projection) else contextlib.nullcontext():
            by_head = (head_result(projection, x, channels[head], replay, call) for head in heads)
            parts = torch.stack([self._lead("result", part, 1) for part in by_head], dim=1)
        edited = self.surgery.at("result", parts, heads)
        if not cut:
            return output
        own = Heads([heads.index(head) for head in cut])
        before, after = own.take(parts), own.take(edited)
        with replay():
            others = call(x.index_fill(-1, channels[list(cut)].flatten().to(x.device), 0))
        changed = self._unlead("result", (before != after).any(dim=1).any(dim=-1, keepdim=True), output[..., :1])
        after, change = (self._unlead("result", t.sum(dim=1), output) for t in (after, after - before))
        return torch.where(changed, others + after, output + change)


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


def answer(projection: nn.Module, x: Tensor, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None) -> Tensor:
    """What a linear map makes of x: the first of what its forward gives, which may have scales of a quantisation beside it.

    Not projection(..): the user's hooks there fire once in a forward, for the whole output.
    """
    output = projection.forward(x, *args, **(kwargs or {}))
    return output[0] if isinstance(output, tuple) else output


def head_result(projection: nn.Module, x: Tensor, channels: Tensor, replay: Replay, call: Call) -> Tensor:
    """(batch, query, d_model): what some input channels add to a linear map's output, its bias left out.

    A plain map gives its own rows of the weight. Any other (quantised, adapted) computes it itself by `call`, on an input that
    is zero elsewhere.
    """
    weight: Any = projection.weight if is_plain(projection) else None
    if weight is not None and weight.device == x.device:
        channels = channels.to(x.device)
        return x.index_select(-1, channels) @ (weight[channels] if type(projection) is Conv1D else weight[:, channels].t())
    mask = torch.zeros(x.shape[-1], dtype=torch.bool, device=x.device).index_fill(0, channels.to(x.device), True)
    with replay():
        part = call(torch.where(mask, x, 0))
    with replay():
        return part - call(torch.zeros_like(x[:1, :1]))


def is_plain(projection: nn.Module) -> bool:
    """Whether a module computes as torch's Linear or transformers' Conv1D do, with a weight of numbers."""
    return type(projection) in (nn.Linear, Conv1D) and runs_own_forward(projection) and has_numbers(projection.weight)


def has_numbers(weight: Any) -> bool:
    """Whether the entries of a weight are its numbers. Those of 8-bit floats and of subclasses that pack or scale are not."""
    own = type(weight)
    is_wrapped = hasattr(own, "__tensor_flatten__") or own.dequantize is not Tensor.dequantize
    return not is_wrapped and weight.is_floating_point() and weight.dtype.itemsize > 1


def runs_own_forward(module: nn.Module) -> bool:
    """Whether a module's forward is its class's, but for a hook of accelerate's that only moves weights and inputs."""
    forward = module.__dict__.get("forward" if mover(module) is None else "_old_forward")
    # Such a hook leaves the class's own, bound, when it goes.
    return forward is None or getattr(forward, "__func__", None) is type(module).forward


def mover(module: nn.Module) -> Any:
    """The hook by which accelerate brings a module's weights and takes them away again, or None."""
    hook = module.__dict__.get("_hf_hook")
    return hook if type(hook).__module__ == "accelerate.hooks" and hasattr(hook, "weights_map") else None


def _is_away(module: nn.Module) -> bool:
    hook = mover(module)
    return hook is not None and hook.offload


def at_hand(module: nn.Module) -> AbstractContextManager[None]:
    """Within the block, a module has the weights that accelerate keeps on disk or elsewhere between forwards.

    A forward within the block takes them away again.
    """
    away = [part for part in module.modules() if _is_away(part)]
    return _loaded(away) if away else contextlib.nullcontext()


def runs_on(module: nn.Module) -> torch.device:
    """Where a module computes, though accelerate may keep its weights elsewhere."""
    for part in module.modules():
        if _is_away(part) and mover(part).execution_device is not None:
            return torch.device(mover(part).execution_device)
    return next((tensor.device for tensor in (*module.parameters(), *module.buffers())), torch.device("cpu"))


@contextlib.contextmanager
def _loaded(modules: list[nn.Module]) -> Iterator[None]:
    with contextlib.ExitStack() as stack:
        for module in modules:
            hook = mover(module)
            hook.pre_forward(module)
            stack.callback(hook.post_forward, module, None)
        yield


class Tapped:
    """A projection as the family's forward sees it: called through its tap, otherwise itself."""

    def __init__(self, projection: nn.Module, tap: Tap) -> None:
        self.projection, self.tap = projection, tap

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.tap(self.projection, *args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.projection, name)
