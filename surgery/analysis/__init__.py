"""From cuts to findings: effects, ablation studies, importance of heads, patching, steering, structure.

The public names are those of `surgery.analysis.public`, loaded when one is first used; they need the extra "analysis" (pandas,
scipy), which nothing else of the package does.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from surgery.analysis.public import *  # noqa: F403 (the list of names is there)


def __getattr__(name: str) -> Any:
    if name.startswith("_") and name != "__all__":
        raise AttributeError(f"module 'surgery.analysis' has no attribute {name!r}")
    public = vars(import_module("surgery.analysis.public"))
    names = [known for known in public if not known.startswith("_")]
    if name == "__all__":
        return names
    if name in names:
        return public[name]
    raise AttributeError(f"module 'surgery.analysis' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__getattr__("__all__")})
