"""Where attention modules stand in a model: [stack.]kind.layer, derived from their paths."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable
from typing import Literal

from torch import nn


def find_addresses(paths: dict[nn.Module, list[str]]) -> dict[nn.Module, tuple[tuple[str, ...], Literal["self", "cross"], int]]:
    """Addresses by module. A module that is shared by several layers has several; the first is its own."""
    places = [(path, module) for module, all_paths in paths.items() for path in all_paths]
    prefixes = dict.fromkeys(_stack_path(path) for path, _ in places)
    stacks = _stack_names(list(prefixes))
    groups: dict[tuple[str, str], list[tuple[str, nn.Module]]] = defaultdict(list)
    for path, module in places:
        kind = "cross" if _is_cross(path, module) else "self"
        groups[stacks[_stack_path(path)], kind].append((path, module))
    found: dict[nn.Module, list[tuple[str, Literal["self", "cross"], int]]] = defaultdict(list)
    for (stack, kind), members in groups.items():
        numbers = [int(n.group(1)) if (n := re.search(r"\.(\d+)(?:\.|$)", f".{path}")) else -1 for path, _ in members]
        if len(set(numbers)) < len(numbers) or -1 in numbers:
            numbers = list(range(len(members)))
        for (_, module), number in zip(members, numbers, strict=True):
            found[module].append((f"{stack}{kind}.{number}", kind, number))  # type: ignore[arg-type]
    return {m: (tuple(a for a, _, _ in found[m]), found[m][0][1], found[m][0][2]) for m in paths}


def main_address(layer: int, addresses: Iterable[str]) -> str:
    """The self-attention that a plain number means: the only stack's, or the decoder's beside others."""
    return f"self.{layer}" if any(address.startswith("self.") for address in addresses) else f"decoder.self.{layer}"


def _stack_path(path: str) -> str:
    return re.split(r"(?:^|\.)\d+(?:\.|$)", path)[0]


_STACKS = ("vision", "visual", "image", "audio", "speech", "encoder", "decoder")


def _stack_names(prefixes: list[str]) -> dict[str, str]:
    """A short name with a dot for every stack of layers; "" where there is only one, and for the text model beside others."""
    if len(prefixes) == 1:
        return {prefixes[0]: ""}
    names: dict[str, str] = {}
    for prefix in prefixes:
        word = next((w for w in _STACKS if w in prefix.lower()), "")
        word = {"visual": "vision", "image": "vision", "speech": "audio"}.get(word, word)
        names[prefix] = f"{word}." if word else ""
        if names[prefix] in [n for p, n in names.items() if p != prefix]:
            names[prefix] = f"{prefix}."
    return names


_CROSS = ("encoder_attn", "encdecattention", "fusion_layer")


def _is_cross(path: str, module: nn.Module) -> bool:
    """Whether an attention reads another sequence: by its own flag, or by the name that its block gives it."""
    flag = getattr(module, "is_cross_attention", None)
    if isinstance(flag, bool) and flag:
        return True
    tail = path.lower().rsplit(".", 3)[-3:]
    is_named = any("cross" in part or part in _CROSS for part in tail)
    return is_named or "Cross" in type(module).__name__
