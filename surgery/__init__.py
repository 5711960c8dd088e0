"""Attention surgery: rewrite the attention of Hugging Face models and cut its QK and OV circuits, without hooks.

The public names are those of `surgery.public`. They are loaded when one is first used: torch and transformers take seconds,
which `surgery --help` need not.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from surgery.public import *  # noqa: F403 (the list of names is there)


def __getattr__(name: str) -> Any:
    public = vars(import_module("surgery.public"))
    names = [known for known in public if not known.startswith("_")]
    if name == "__all__":
        return names
    if name in names:
        return public[name]
    raise AttributeError(f"module 'surgery' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__getattr__("__all__")})
