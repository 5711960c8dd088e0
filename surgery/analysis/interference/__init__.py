"""Fisher interference: which heads, and which of their blocks Q, K, V, O, learning one task disturbs for another.

    a, b, n = (collect(model, data, task=name) for name, data in tasks.items())
    print(heatmap(a, b))             # every pair of samples, head and block
    print(overlap_test(a, b, n))     # more than a control task's samples do?
    print(conflict_test(a, b))       # against each other?

The public names are those of `surgery.analysis.interference.public`, loaded when one is first used.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from surgery.analysis.interference.public import *  # noqa: F403 (the list of names is there)


def __getattr__(name: str) -> Any:
    if name.startswith("_") and name != "__all__":
        raise AttributeError(f"module 'surgery.analysis.interference' has no attribute {name!r}")
    public = vars(import_module("surgery.analysis.interference.public"))
    names = [known for known in public if not known.startswith("_")]
    if name == "__all__":
        return names
    if name in names:
        return public[name]
    raise AttributeError(f"module 'surgery.analysis.interference' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__getattr__("__all__")})
