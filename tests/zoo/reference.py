"""The slow reference for cuts: torch's own hooks at projections that are found by their conventional names, and loops.

Nothing of `surgery` is imported here. A head's q is a slice of what the q projection gives, and a head's z a slice of what the
output projection reads, in the layout that a family's class is known for.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

_HEADS = (
    "num_heads", "num_attention_heads", "n_heads", "n_head", "num_local_heads", "attention_heads", "nhead",
    "encoder_attention_heads",
)  # fmt: skip
_WIDTHS = (
    "head_dim",
    "attention_head_size",
    "head_size",
    "dim_per_head",
    "d_kv",
    "key_value_proj_dim",
    "dim_head",
    "qk_head_dim",
)
_Q = (
    "q_proj", "query", "q_lin", "wq", "Wq", "query_proj", "to_q", "linear_q", "q_b_proj", "q", "queries", "proj_q", "q_linear",
    "attention.query", "in_proj_q",
)  # fmt: skip
_FUSED = ("qkv", "qkv_proj", "Wqkv", "c_attn", "query_key_value", "in_proj", "qkv_linear", "att_proj", "to_qkv", "wqkv")
_OUT = (
    "o_proj", "out_proj", "c_proj", "dense", "wo", "Wo", "o", "out", "proj", "out_lin", "to_out.0", "to_out", "linear_out",
    "out_linear", "projection", "output", "o", "linear_o", "wproj", "final_linear",
)  # fmt: skip
_OUT_BESIDE = ("output.dense", "output.out_proj", "output.proj", "out_proj", "o_proj", "proj", "dense", "output")
_NORMS = ("q_norm", "query_norm", "q_layernorm", "q_layer_norm", "qk_norm", "norm_q", "q_ln", "layer_norm_q", "query_layernorm")

_Z_NORMS = ("attn_sub_norm", "inner_attn_ln")

# A fused projection holds all of q first unless its class is here: q, k and v of one head after another.
_BY_HEAD = {
    "GPTNeoXAttention", "GPTNeoXJapaneseAttention", "BloomAttention", "PersimmonAttention", "FuyuAttention",
    "Blip2Attention_by_head",
}  # fmt: skip

# Where the hooks below say something else than the cut.
_NOT_BY_HOOKS = {
    "CodeGenAttention": "q, v and k lie in four blocks",
    "FalconAttention": "q, k and v are grouped",
    "PegasusXGlobalLocalAttention": "its projections serve the attention of global tokens, too",
    "ConvBertSelfAttention": "q makes the kernels of a convolution, too",
}


# The greatest score of all heads is subtracted from each, so that a cut of one head changes how others' scores round.
_SHIFTED_TOGETHER = {"GroundingDinoBiMultiHeadAttention", "MMGroundingDinoBiMultiHeadAttention"}


def rounds_with_others(module: nn.Module) -> bool:
    """Whether a head's pattern depends on other heads' scores in its last bits."""
    return any(cls.__name__ in _SHIFTED_TOGETHER for cls in type(module).__mro__)


class NoReference(Exception):
    """The hooks do not apply to a module, for the reason given."""


@dataclass(frozen=True)
class Slice:
    """Channels of a projection: of its output (q), or of its input (z)."""

    projection: nn.Module
    channels: slice


def heads_of(module: nn.Module) -> int:
    for holder in (module, getattr(module, "config", None)):
        for name in _HEADS:
            found = getattr(holder, name, None)
            if isinstance(found, int) and found > 0:
                return found
    raise NoReference("no number of heads under a conventional name")


def _child(module: nn.Module, names: tuple[str, ...]) -> nn.Module | None:
    for name in names:
        try:
            found = module.get_submodule(name)
        except AttributeError:
            continue
        if _sizes(found) is not None:
            return found
    return None


def _sizes(module: nn.Module) -> tuple[int, int] | None:
    """Input and output channels of a linear map."""
    if isinstance(getattr(module, "in_features", None), int):
        return module.in_features, module.out_features  # type: ignore[return-value]
    if isinstance(getattr(module, "nf", None), int):
        return module.weight.shape[0], module.nf  # type: ignore[return-value, union-attr, index]
    return None


def find_z(model: nn.Module, path: str, head: int) -> Slice:
    """A head's z: its columns of the output projection, in the module or beside it, or of the norm before that."""
    module = model.get_submodule(path)
    _refuse(module)
    found = _child(module, _OUT) or _child(model.get_submodule(path.rpartition(".")[0]), _OUT_BESIDE)
    if found is None:
        raise NoReference("no output projection under a conventional name")
    heads, (width, _) = heads_of(module), _sizes(found)  # type: ignore[misc]
    if width % heads:
        raise NoReference("an output projection that does not read the heads one after another")
    d = width // heads
    return Slice(norm_of_z(module) or found, slice(head * d, head * d + d))


def norm_of_z(module: nn.Module) -> nn.Module | None:
    """A norm over all heads between z and the output projection."""
    return next((norm for name in _Z_NORMS if isinstance(norm := getattr(module, name, None), nn.Module)), None)


def find_q(model: nn.Module, path: str, head: int) -> Slice:
    """A head's q, where a q of zero is one after norm and positions, too."""
    module = model.get_submodule(path)
    _refuse(module)
    heads = heads_of(module)
    separate, fused = _child(module, _Q), _child(module, _FUSED)
    if separate is not None:
        d, start = _sizes(separate)[1] // heads, None  # type: ignore[index]
    elif fused is not None:
        width = _sizes(fused)[1]  # type: ignore[index]
        d = next((n for name in _WIDTHS if isinstance(n := getattr(module, name, None), int)), width // 3 // heads)
        start = 3 * d * head if type(module).__name__ in _BY_HEAD else None
    else:
        raise NoReference("no q projection under a conventional name")
    _refuse_norms(module, d)
    if any(name.endswith(("bias_u", "q_bias")) for name, _ in module.named_parameters()):
        raise NoReference("a vector is added to q behind its projection")
    start = head * d if start is None else start
    return Slice(separate or fused, slice(start, start + d))  # type: ignore[arg-type]


def _refuse(module: nn.Module) -> None:
    if reason := _NOT_BY_HOOKS.get(type(module).__name__):
        raise NoReference(reason)


def spans_heads(module: nn.Module) -> bool:
    """Whether q or k is normed over all heads together."""
    names = (*_NORMS, *(name.replace("q", "k", 1).replace("kuery", "key") for name in _NORMS))
    norms = [norm for name in names if isinstance(norm := getattr(module, name, None), nn.Module)]
    if not any(True for norm in norms for _ in norm.parameters()):
        return False
    widths = [_sizes(p)[1] // heads_of(module) for name in _Q if (p := _child(module, (name,))) is not None]  # type: ignore[index]
    return any(parameter.shape[-1] not in (1, *widths) for norm in norms for parameter in norm.parameters())


def _refuse_norms(module: nn.Module, d: int) -> None:
    for name in _NORMS:
        norm = getattr(module, name, None)
        if not isinstance(norm, nn.Module) or isinstance(norm, nn.Identity):
            continue
        if any(parameter.shape[-1] != d for parameter in norm.parameters()):
            raise NoReference(f"{name} spans all heads")
        if any("bias" in key for key, _ in norm.named_parameters()):
            raise NoReference(f"{name} has a bias, so that a q of zero does not stay zero")


@contextmanager
def without_z(found: Slice, put: Callable[[Tensor], Any] | None = None) -> Iterator[list[Tensor]]:
    """In the unpatched model, what W_O (or the norm before it) reads of a head is zero, or what `put` makes of it.

    Yields what it read in each call.
    """
    read: list[Tensor] = []

    def hook(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        x = args[0].clone()
        read.append(args[0])
        x[..., found.channels] = 0 if put is None else put(x[..., found.channels])
        return (x, *args[1:])

    handle = found.projection.register_forward_pre_hook(hook)
    try:
        yield read
    finally:
        handle.remove()


@contextmanager
def without_q(found: Slice) -> Iterator[list[nn.Module]]:
    """In the unpatched model, a head's slice of the q projection's output is zero. Yields the projection, once a call."""
    calls: list[nn.Module] = []

    def hook(module: nn.Module, args: Any, output: Any) -> Any:
        calls.append(module)
        first, *others = output if isinstance(output, tuple) else (output,)
        first = first.clone()
        first[..., found.channels] = 0
        return (first, *others) if isinstance(output, tuple) else first

    handle = found.projection.register_forward_hook(hook)
    try:
        yield calls
    finally:
        handle.remove()


def softmax_by_rows(scores: Tensor) -> Tensor:
    """(query, key) to (query, key), one row after another; rows where nothing is allowed are left as NaN."""
    rows = []
    for row in scores.double():
        numbers = (row - row.max()).exp()
        rows.append(numbers / numbers.sum())
    return torch.stack(rows)


def weighted_sums(pattern: Tensor, v: Tensor) -> Tensor:
    """(query, key) and (key, d) to (query, d), one key after another."""
    z = torch.zeros(pattern.shape[0], v.shape[1], dtype=torch.float64)
    for key in range(pattern.shape[1]):
        z += pattern[:, key, None].double() * v[key].double()
    return z


MASKED = -5000.0
"""Scores below this are those of keys that a query may not see."""


def product(scores: Tensor, cut_scores: Tensor, rot_q: Tensor, rot_k: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """What a cut took out of the scores of one head, q k^T times the one factor that fits best, and that factor.

    Only where keys may be seen.
    """
    allowed = (scores > MASKED) & (cut_scores > MASKED) & scores.isfinite()
    taken = (scores.double() - cut_scores.double())[allowed]
    dots = (rot_q.double() @ rot_k.double().mT)[allowed]
    factor = (taken @ dots) / (dots @ dots).clamp_min(1e-30)
    return taken, factor * dots, factor
