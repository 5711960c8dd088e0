"""How a class computes attention: behind transformers' interface, by a file in `patches/`, or in a way we do not know.

Nothing here names an architecture. A class belongs to the interface if its code calls `get_interface(name, eager function)`;
that eager function is its specification. Classes that compute inline are described by patches, which register themselves.
"""

from __future__ import annotations

import dis
import functools
import importlib
import inspect
import types
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from importlib.metadata import entry_points
from typing import Any, TypeVar

from torch import Tensor, autograd, nn

IMPLEMENTATION = "attention_surgery"
"""The name under which a patched module sees its own attention implementation. No model's config ever holds it."""

ENTRY_POINTS = "surgery.patches"


@dataclass(frozen=True)
class Family:
    """One way of computing attention.

    eager(module, query, key, value, attention_mask, **kwargs) -> (output (batch, query, head, d_head), weights): the
      specification, traceable by torch.fx.
    members: what a patched module's view has in place of the class's own attributes (an inline class's forward).
    kernels: implementations of an inline class by name, called like `eager`; None: those of transformers' interface.
    allowed(module, query, key, attention_mask, kwargs): which keys a query may attend to, boolean (batch | 1, head | 1,
      query, key) or None for all; only where the mask argument alone does not say it.
    shows_name: the forward reads the implementation's name itself, and is shown the unpatched module's.
    inline: the class's own code with points in it (`surgery.inline.Inline`), where that is the reconstruction.
    """

    eager: Callable[..., Any]
    members: Mapping[str, Any] = field(default_factory=dict)
    kernels: Mapping[str, Callable[..., Any]] | None = None
    interface: Any = None
    allowed: Callable[..., Tensor | None] | None = None
    inline: Any = None
    shows_name: bool = False

    def kernel(self, implementation: str) -> Callable[..., Any]:
        """The function that the unpatched module calls under an implementation."""
        if implementation in ("eager", None):
            return self.eager
        if self.kernels is not None:
            return self.kernels.get(implementation, self.eager)
        return self.interface.get_interface(implementation, self.eager)

    def is_eager(self, implementation: str) -> bool:
        """Whether the unpatched module computes its attention matrix under an implementation."""
        return self.kernel(implementation) is self.eager


F = TypeVar("F", bound=Callable[..., Any])
Describe = Callable[..., Family | None]
Example = Callable[[Any, Tensor], dict[str, Any]]

_PATCHES: dict[str, Describe] = {}
_EXAMPLES: dict[str, Example] = {}


def register_patch(*classes: str) -> Callable[[Describe], Describe]:
    """Registers `describe(module, family) -> Family` for classes given as "package.module.Class".

    `family` is what the engine found by itself, or None. Third parties register through the entry point group
    "surgery.patches". Raises ValueError if a class is registered twice.
    """
    return _registration(_PATCHES, "register_patch", classes)


def register_example(*classes: str) -> Callable[[Example], Example]:
    """Registers `example(module, states) -> dict`: arguments, by name, that a class's forward cannot do without when recorded.

    states: hidden states, (batch, position, d_model), as the forward is given them in its recorded run. Classes and errors
    as in `register_patch`.
    """
    return _registration(_EXAMPLES, "register_example", classes)


def _registration(table: dict[str, F], what: str, classes: tuple[str, ...]) -> Callable[[F], F]:
    def decorate(function: F) -> F:
        for name in classes:
            if table.get(name, function) is not function:
                raise ValueError(f"{what}: {name} is already described by {table[name].__module__}.{table[name].__name__}")
            table[name] = function
        return function

    return decorate


def _registered(table: Mapping[str, F], module: nn.Module) -> F | None:
    """What is registered for a module's class, or else for the nearest of its bases."""
    load_patches()
    names = (f"{cls.__module__}.{cls.__qualname__}" for cls in type(module).__mro__)
    return next((table[name] for name in names if name in table), None)


def example_of(module: nn.Module, states: Tensor) -> dict[str, Any]:
    """The arguments that are registered for a module's class."""
    example = _registered(_EXAMPLES, module)
    return {} if example is None else example(module, states)


_SOFTMAXES: dict[str, int] = {}


def register_softmax(number: int, *classes: str) -> None:
    """Of inline classes with several softmaxes over scores: which of them, counted from 0 as they run, is the attention.

    The others stay as the class has them; `inspect_model` says so. Classes and errors as in `register_patch`.
    """
    for name in classes:
        if _SOFTMAXES.setdefault(name, number) != number:
            raise ValueError(f"register_softmax: {name} is registered with softmax {_SOFTMAXES[name]} already")


def softmax_of(module: nn.Module) -> int | None:
    """The number of the softmax that is registered for a module's class."""
    load_patches()
    own: Any = type(module)
    return next(
        (_SOFTMAXES[name] for cls in own.__mro__ if (name := f"{cls.__module__}.{cls.__qualname__}") in _SOFTMAXES), None
    )


@functools.cache
def load_patches() -> tuple[str, ...]:
    """Imports every module of the entry point group, and `patches` of a checkout that is not installed."""
    names = dict.fromkeys(point.value for point in entry_points(group=ENTRY_POINTS))
    names.setdefault("patches")
    for name in names:
        importlib.import_module(name)
    return tuple(names)


def find_family(module: nn.Module) -> Family | None:
    """The family of a module, or None if it is not an attention that we can reconstruct."""
    own: Any = type(module)
    found = _interface_family(own)
    describe = _registered(_PATCHES, module)
    return found if describe is None else describe(module, found)


@functools.cache
def _interface_family(cls: Any) -> Family | None:
    for function in _functions(cls):
        instructions = list(dis.get_instructions(function))
        for start, instruction in enumerate(instructions):
            if instruction.argval != "get_interface":
                continue
            names = function.__globals__
            interface = next((i.argval for i in reversed(instructions[:start]) if _is_global(i)), None)
            eager = next((i.argval for i in instructions[start + 1 :] if _is_global(i)), None)
            if eager in names and interface in names:
                return Family(names[eager], interface=names[interface], shows_name=_reads_name(cls))
    return None


def _reads_name(cls: type) -> bool:
    """Whether a class reads the implementation's name elsewhere than to look its function up."""
    for function in _functions(cls):
        names = [i.argval for i in dis.get_instructions(function)]
        if names.count("_attn_implementation") > names.count("get_interface"):
            return True
        helpers = (helper.__code__.co_names for helper in _helpers(function))
        if any("_attn_implementation" in names and "get_interface" not in names for names in helpers):
            return True
    return False


def _is_global(instruction: dis.Instruction) -> bool:
    return instruction.opname in ("LOAD_GLOBAL", "LOAD_NAME")


def _functions(cls: type) -> Iterator[types.FunctionType]:
    """The functions that a class defines or inherits, decorators taken off; not torch's own, nor those that sample tokens."""
    for base in cls.__mro__:
        if base.__module__.startswith(("torch.", "transformers.generation.")) or base is object:
            continue
        for member in vars(base).values():
            member = getattr(member, "__func__", member)
            if callable(member) and isinstance(function := inspect.unwrap(member), types.FunctionType):
                yield function


_KERNELS = {"scaled_dot_product_attention", "multi_head_attention_forward"}
_PRODUCT = {"matmul", "bmm", "baddbmm", "einsum"} | _KERNELS


def computes_attention(module: nn.Module) -> bool:
    """Whether a module's own code, with the helpers it calls, holds a softmax over a product, and it owns projections.

    Projections: at least two linear maps or matrices of its own, alone or in lists, or one map to more channels than it
    reads (q, k and v in one). Static and deliberately broad: it decides what `patch_model` must not skip in silence.
    """
    if isinstance(module, nn.MultiheadAttention):
        return True
    own: Any = type(module)
    softmax, product = _uses(own)
    plain = [child for child in module.children() if next(child.parameters(), None) is None]
    softmax = softmax or any(isinstance(child, nn.Softmax) for child in plain)
    parts = [_uses(cls) for cls in map(type, plain) if not cls.__module__.startswith("torch.")]
    softmax, product = softmax or any(part[0] for part in parts), product or any(part[1] for part in parts)
    return softmax and product and _n_projections(module) >= 2


def _n_projections(module: nn.Module) -> int:
    """The number of maps that could make q, k, v or read z."""
    children: list[nn.Module] = []
    for child in module.children():
        children += child.children() if isinstance(child, nn.ModuleList | nn.ModuleDict | nn.Sequential) else [child]
    count = sum(parameter is not None and parameter.dim() >= 2 for parameter in module._parameters.values())
    for child in children:
        inner = [part for part in child.modules() if is_projection(part) or is_pointwise(part)]
        if len(inner) != 1:
            continue  # a network of its own, or none; a single map may be wrapped (clipped, normed)
        if is_pointwise(inner[0]):
            count += 1
            continue
        width, inputs = projection_width(inner[0]), input_width(inner[0])
        count += 2 if width is not None and inputs is not None and width > inputs else 1
    return count


@functools.cache
def _uses(cls: Any) -> tuple[bool, bool]:
    """Whether a class's functions, or functions of its module that they name, use a softmax, and a product."""
    softmax = product = False
    for function in _functions(cls):
        for part in (function, *_helpers(function)):
            names = _all_names(part.__code__)
            softmax = softmax or bool(names & _KERNELS) or any(_is_softmax(name) for name in names)
            product = product or bool(names & (_PRODUCT | {"@", "@="}))
    return softmax, product


def _is_softmax(name: str) -> bool:
    """A function, also one that takes its logarithm, or a module of whatever name; a loss is a module that does so."""
    return name in ("softmax", "_softmax", "log_softmax", "logsumexp") or (
        name.endswith("Softmax") and not name.endswith("LogSoftmax")
    )


def _helpers(function: types.FunctionType) -> Iterator[types.FunctionType]:
    """The functions of the same package that a function names, and those that these name; of autograd functions the forward."""
    package, seen, left = function.__module__.partition(".")[0], {function}, [function]
    while left:
        caller = left.pop()
        for name in caller.__code__.co_names:
            found = caller.__globals__.get(name)
            if isinstance(found, type) and issubclass(found, autograd.Function):
                found = found.forward
            helper = inspect.unwrap(found) if callable(found) else None
            if not isinstance(helper, types.FunctionType) or helper in seen:
                continue
            if helper.__module__.partition(".")[0] == package:
                seen.add(helper)
                left.append(helper)
                yield helper


@functools.cache
def _all_names(code: types.CodeType) -> frozenset[str]:
    """The names that a code uses, in the functions written inside it too, and its matrix products as operators."""
    names = set(code.co_names) | {i.argrepr for i in dis.get_instructions(code) if i.opname == "BINARY_OP"}
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            names |= _all_names(constant)
    return frozenset(names)


def is_projection(module: nn.Module) -> bool:
    """Whether a module is a linear map of its last axis: torch's, transformers' Conv1D, quantised or with an adapter."""
    return projection_width(module) is not None


def is_pointwise(module: nn.Module) -> bool:
    """Whether a module is a linear map of its second axis: a convolution over single positions."""
    return isinstance(module, nn.Conv1d | nn.Conv2d) and set(module.kernel_size) == {1} and set(module.stride) == {1}


def projection_width(module: nn.Module) -> int | None:
    """The number of output channels of a linear map, or None if the module is not one."""
    width = getattr(module, "out_features", None)
    if not isinstance(width, int):
        width = getattr(module, "nf", None)
    return width if isinstance(width, int) else None


def input_width(module: nn.Module) -> int | None:
    """The number of input channels of a linear map, or None if it does not say."""
    width = getattr(module, "in_features", None)
    if isinstance(width, int):
        return width
    return getattr(module, "nx", None)
