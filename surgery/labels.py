"""Tensors that carry channel numbers through a forward: structure acts on the labels as on the values.

Views, splits, permutations and joins move labels; elementwise arithmetic (positions, norms, scaling) hands on those of its
first labelled operand; products and sums of two projections lose them, and so does whatever is not known to be one of these.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, Literal, Protocol

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map


def _names(text: str) -> frozenset[str]:
    return frozenset(text.split())


BASE = 1 << 32  # label = owner * BASE + channel; -1 is "not from a projection"
WEIGHT, SCORES, PATTERN, Z = 1 << 17, 1 << 18, 1 << 19, 1 << 20
"""The first owner numbers of matrices that are parameters (channel: entry), of products q k^T (channel: entry of the
product), of what a softmax makes of them, and z's."""


def owner_of(labels: Tensor) -> int:
    """The owner of what is labelled; -1 if nothing is."""
    return int(labels.max()) // BASE if labels.numel() else -1


_STRUCTURAL = _names(
    "view reshape transpose permute contiguous split split_with_sizes chunk unbind __getitem__ cat concat stack flatten "
    "unflatten squeeze unsqueeze expand broadcast_to movedim swapaxes narrow select repeat repeat_interleave tile clone "
    "expand_as view_as reshape_as unfold t flip roll index_select tensor_split hsplit swapdims moveaxis copy_ __setitem__"
)
_CHOOSING = _names("gather take_along_dim")
"""Structural, if which entries they take is not itself made of labelled tensors."""
_RESHAPED = _names("unsqueeze_ squeeze_ transpose_ t_ swapaxes_ swapdims_")
"""Those that give a tensor other axes in place."""
_SUMS = _names("add add_ sub sub_ __add__ __radd__ __iadd__ __sub__ __rsub__ __isub__")
_ADDITIONS = _names("add add_ __add__ __radd__ __iadd__")
_REDUCING = _names("mean sum amax")
"""Over axes of one entry these are views."""

_CASTS = _names("to type type_as float double half bfloat16 cfloat cdouble cpu cuda detach detach_ data requires_grad_ __get__")
_PLACED = _CASTS | _names(
    "dropout dropout_ feature_dropout alpha_dropout dropout1d dropout2d dropout3d softmax softmax_ _softmax log_softmax "
    "normalize layer_norm rms_norm batch_norm group_norm instance_norm divide multiply subtract truediv rtruediv itruediv "
    "rdiv idiv rpow tril tril_ triu triu_ hardswish float_power index_fill index_fill_ apply_"
)
"""Norms, and elementwise functions under other names than the ones in which torch says that they are: each entry stays in its
place."""


@functools.cache
def stays_in_place(name: str) -> bool:
    """Whether a function of one tensor and numbers, or of several by their entries, gives every entry where it was given."""
    bare = name.removeprefix("__").removesuffix("__") if name.startswith("__") else name
    if bare in _PLACED:
        return True
    for known in (bare, bare.rstrip("_"), *([bare[1:]] if name.startswith("__") and bare[0] in "ri" else [])):
        packet = getattr(torch.ops.aten, known, None)
        if packet is not None and any(torch.Tag.pointwise in getattr(packet, form).tags for form in packet.overloads()):
            return True
    return False


def _first_of_pairs(labels: Tensor) -> Tensor:
    """A complex number bears the first label of its two channels, if they are neighbours."""
    first, second = labels.unbind(-1)
    return torch.where((first >= 0) & (second == first + 1), first, -1)


def _both_of_pairs(labels: Tensor) -> Tensor:
    return torch.stack([labels, torch.where(labels >= 0, labels + 1, -1)], dim=-1)


_PAIRS = {"view_as_complex": _first_of_pairs, "view_as_real": _both_of_pairs}


Fate = Literal["given", "added", "changed"]


class Watcher(Protocol):
    """Sees every function of labelled tensors, and may give its result other labels."""

    def see(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any], given: list[Labelled], out: Any) -> None:
        """name: the function; given: its labelled arguments; out: its result, labelled by the rules of this file."""
        ...


class Labelled(Tensor):
    """A tensor with a label for each entry. Values do not matter; shapes and labels do.

    fate: what has been done with what a projection gave: "given" (as it was, but for views and dropout); "added" to something
    that bears no labels, and whatever after that; "changed" (scaled, gated, normed), before anything was added.
    """

    labels: Tensor
    fate: Fate = "given"
    watcher: Watcher | None = None

    @staticmethod
    def make(value: Tensor, labels: Tensor, watcher: Watcher | None = None) -> Labelled:
        new = value.detach().as_subclass(Labelled)
        new.labels = labels
        new.watcher = watcher
        return new

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        with torch._C.DisableTorchFunctionSubclass():
            given = [a for a in (*_flat(args), *_flat(kwargs)) if isinstance(a, Labelled)]
            out = cls._run(func, name, args, kwargs, given)
            fate = _fate(name, kwargs, given)
            # Also of what is changed in place.
            is_in_place = name.startswith("__i") if name.endswith("__") else name.endswith("_")
            for result in (*_flat(out), *(args[:1] if is_in_place else ())):
                if isinstance(result, Labelled):
                    result.fate = fate
            watcher = next((a.watcher for a in given if a.watcher is not None), None)
            if watcher is not None:
                # Also what bears no labels must be known to the watcher by what it was made of.
                out = _map(lambda o: Labelled.make(o, torch.full(o.shape, -1)) if type(o) is Tensor else o, out)
                for result in _flat(out):
                    if isinstance(result, Labelled):
                        result.watcher = watcher
                watcher.see(name, args, kwargs, given, out)
        return out

    @staticmethod
    def _run(func: Any, name: str, args: Any, kwargs: Any, given: list[Labelled]) -> Any:
        """The function's result, and its labels."""
        if name in _RESHAPED:
            labels = args[0].labels.detach()  # an object of its own, for others may have the same labels
            func(args[0], *args[1:], **kwargs)
            func(labels, *args[1:], **kwargs)
            args[0].labels = labels
            return Labelled.make(args[0].as_subclass(Tensor), labels)
        device = given[0].device if given else None
        plain = functools.partial(_plain, device=device)
        out = func(*_map(plain, args), **_map(plain, kwargs))
        is_structural = name in _STRUCTURAL and func is not torch.nn.functional.unfold
        is_structural |= name in _CHOOSING and len(given) == 1 and given[0] is args[0]
        if is_structural or (name == "__get__" and isinstance(out, Tensor)):
            return _attach(out, func(*_map(_labels, args), **_map(_labels, kwargs)))
        if name == "pad":
            sizes = args[1] if len(args) > 1 else kwargs["pad"]
            return Labelled.make(out, torch.nn.functional.pad(given[0].labels, sizes, value=-1))
        if name in _PAIRS:
            return Labelled.make(out, _PAIRS[name](args[0].labels))
        if name in _REDUCING and isinstance(out, Tensor) and out.numel() == given[0].numel():
            return Labelled.make(out, given[0].labels.reshape(out.shape))
        if not stays_in_place(name):
            # Indices stay what they are: labels are moved by them.
            return _map(lambda o: Labelled.make(o, torch.full(o.shape, -1)) if _is_float(o) else o, out)
        return _map(lambda o: _hand_on(o, given, name in _SUMS), out)


def _fate(name: str, kwargs: dict[str, Any], given: list[Labelled]) -> Fate:
    fates = {tensor.fate for tensor in given if tensor.fate != "given" and owner_of(tensor.labels) >= 0}
    before = next((fate for fate in ("changed", "added") if fate in fates), "given")
    if before != "given" or name in _CASTS | _STRUCTURAL | _RESHAPED | _REDUCING | {"pad"} | _CHOOSING or "dropout" in name:
        return before  # type: ignore[return-value]
    return "added" if name in _ADDITIONS and kwargs.get("alpha", 1) == 1 else "changed"


def _is_float(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()


def _flat(tree: Any) -> list[Any]:
    """The leaves of arguments, or of a result. Most hold no containers, and asking torch's pytree for each would take long."""
    if isinstance(tree, Tensor):
        return [tree]
    return list(tree) if _holds_leaves(tree) else tree_leaves(tree)


def _map(change: Callable[[Any], Any], tree: Any) -> Any:
    """The same tree of changed leaves."""
    if isinstance(tree, Tensor):
        return change(tree)
    if _holds_leaves(tree):
        return tuple(map(change, tree))
    return tree_map(change, tree) if tree else tree


def _holds_leaves(tree: Any) -> bool:
    return type(tree) is tuple and not any(isinstance(part, tuple | list | dict) for part in tree)


def _plain(value: Any, device: torch.device | None) -> Any:
    if isinstance(value, Tensor):
        value = value.as_subclass(Tensor)
        return value.to(device) if device is not None and value.device != device else value
    return value


def _labels(value: Any) -> Any:
    if isinstance(value, Labelled):
        return value.labels
    if isinstance(value, Tensor) and value.dtype != torch.bool and value.is_floating_point():
        return torch.full(value.shape, -1)
    return value


def _attach(out: Any, labels: Any) -> Any:
    if isinstance(out, Tensor):
        return Labelled.make(out, labels)
    if isinstance(out, list | tuple):
        return type(out)(_attach(o, lab) for o, lab in zip(out, labels, strict=True))
    return out


def _hand_on(out: Any, given: list[Labelled], is_sum: bool) -> Any:
    if isinstance(out, Tensor):
        values = [source for source in given if not WEIGHT <= owner_of(source.labels) < SCORES]
        given = values or given  # a bias or a table beside values hands on nothing
        given = sorted(given, key=lambda source: owner_of(source.labels) < Z)  # a gate that comes first leaves z what it is
        fitting = [source.labels for source in given if source.labels.shape == out.shape]
        if is_sum and len(fitting) > 1 and bool(((fitting[0] // BASE) != (fitting[1] // BASE)).any()):
            owners = [owner_of(labels) for labels in fitting]
            if SCORES <= max(owners) < Z and all(owner < 0 or owner >= SCORES for owner in owners):
                # Terms of the scores, which share their axes; also those that come from elsewhere.
                return Labelled.make(out, fitting[next(n for n, owner in enumerate(owners) if owner >= SCORES)])
            return Labelled.make(out, torch.full(out.shape, -1))  # of two projections: neither alone made it
        if fitting:
            return Labelled.make(out, fitting[0])
    return out
