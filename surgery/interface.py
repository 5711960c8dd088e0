"""What a patched module's forward calls: attention in place of a kernel, or its points where a patch writes the forward out."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any, NoReturn, Protocol

from torch import Tensor, nn
from transformers.modeling_utils import AttentionInterface

from surgery.errors import SurgeryError, describe
from surgery.family import IMPLEMENTATION, Family
from surgery.inline import Inline
from surgery.layout import BATCH, COLUMN, HEAD, ROW, STANDARD, Layout
from surgery.sites import SITES


def attend(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any = None, **kwargs: Any) -> Any:
    """Attention with the module's cuts. Inline classes described in `patches/` call it from their rewritten forward.

    query: (batch, head, query, d_head), key and value: (batch, kv_head, key, d_head), attention_mask and kwargs as the
    module's own implementation takes them; the keyword `implementation` names it where a call does not run the config's.
    Returns output (batch, query, head, d_head) and attention weights or None.
    """
    surgery: Any = module._surgery
    return surgery.attend(query, key, value, attention_mask, **kwargs)


def implementation_of(module: nn.Module) -> str:
    """The implementation that a patched module computes as: "eager" under kernel="eager", otherwise the config's."""
    surgery: Any = module._surgery
    return surgery.computes_as


class Arrangement(Protocol):
    """A way to hold the tensor of a site, and the way to the axes of `surgery.sites` and back."""

    def to_standard(self, tensor: Any) -> Tensor:
        """(batch, head, row, column)."""
        ...

    def from_standard(self, tensor: Tensor, like: Any) -> Any:
        """Back to what `like` is."""
        ...


def point(module: nn.Module, site: str, tensor: Any, arrangement: Arrangement | None = None) -> Any:
    """An intervention point in a forward that a patch writes out; returns what to go on with.

    tensor: with the axes of `surgery.sites`, or held as the arrangement has it, which is asked only where there is work to do.
    Where a forward comes to a site several times, cuts act each time, and captures have the tensors in that order.
    """
    surgery: Any = module._surgery
    return surgery.spot(site, tensor, arrangement)


def take_cache(kwargs: dict[str, Any]) -> Any:
    """Takes the KV cache out of the keywords of a forward that a patch writes out, by the name that its callers give it.

    That is past_key_values up to transformers 5.23, where a `cache` beside it is a paged one, for the kernel to fill; since
    5.24 it is cache, of whatever kind, for the forward itself: `cache.update(key, value, layer, kwargs=kwargs)`.
    """
    return kwargs.pop("past_key_values" if "past_key_values" in kwargs else "cache", None)


_ROLES = {"b": BATCH, "h": HEAD, "r": ROW, "c": COLUMN}


def arranged(axes: str, heads: int) -> Arrangement:
    """The arrangement of a tensor whose axes are those of `surgery.sites` in another order, or several of them together.

    axes: b batch (windows and blocks are others), h head, r row (query or key), c column (key or channel), two letters for an
    axis that holds both, the outer first: "bh r c".
    """
    return Layout(tuple(tuple(_ROLES[letter] for letter in axis) for axis in axes.split()), heads)


def written_out(methods: Mapping[str, Callable[..., Any]], beside: str = "") -> Family:
    """The family of a class of which a patch writes methods out, with `point` at rot_q, rot_k, scores, pattern, v and z.

    methods: the forward, or a method that it calls, by name. They must compute what the class's own do, bit for bit:
    `patch_model` compares the forwards on random numbers. beside: what else of the kind the class computes, which stays as
    it is, in words.
    """
    code = "\n\n".join(inspect.getsource(method) for method in methods.values())
    inline = Inline(methods, dict.fromkeys(SITES, STANDARD), code, beside=beside, is_written=True)
    return Family(next(iter(methods.values())), members=methods, kernels={}, inline=inline)


def without_points(module: Any) -> Any:
    """The module as it is without cuts at its projections, for what a forward uses them for besides q and k."""
    return getattr(module._surgery, "module", module)


def needs_position(module: nn.Module, *sites: str) -> list[str]:
    """Those of the sites that are cut by position: there it counts which number a query or a key has."""
    surgery: Any = module._surgery
    return [site for site in sites if any(operation.needs_position for operation in surgery.plan.of(site))]


def refuse(module: nn.Module, found: str, expected: str, do: str) -> NoReturn:
    """Raises SurgeryError: what a patched module cannot do in this forward."""
    surgery: Any = module._surgery
    raise SurgeryError(describe(f"{surgery.path!r}", found, expected, do))


AttentionInterface.register(IMPLEMENTATION, attend)
