"""Attention surgery: rewrite the attention of Hugging Face models and cut its QK and OV circuits, without hooks.

The public names are listed in `surgery.public`.
"""

import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from surgery.public import *  # noqa: F403 (the list of names is there)


class _Package(ModuleType):
    """Loads the public names when one is first used: torch and transformers take seconds, which `surgery --help` need not."""

    def __getattr__(self, name: str) -> Any:
        if name == "__all__":
            return [public for public in vars(import_module("surgery.public")) if not public.startswith("_")]
        if not name.startswith("_"):
            public = import_module("surgery.public")
            if name in vars(public) or name in vars(self):
                return vars(public).get(name, vars(self).get(name))
        raise AttributeError(f"module {self.__name__!r} has no attribute {name!r}")

    def __dir__(self) -> list[str]:
        return sorted({*super().__dir__(), *self.__all__})

    @property
    def capture(self) -> Any:
        """The function. Importing the module of the same name would put that in its place."""
        return vars(import_module("surgery.public"))["capture"]

    @capture.setter
    def capture(self, module: ModuleType) -> None:
        pass


sys.modules[__name__].__class__ = _Package
