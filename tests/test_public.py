"""The public names: all there, loaded late, each with a docstring of its own."""

from __future__ import annotations

import subprocess
import sys
from types import ModuleType

import pytest

import surgery
import surgery.analysis
import surgery.analysis.interference
import surgery.analysis.interference.public
import surgery.analysis.public
import surgery.public


def test_every_public_name_is_that_of_its_module() -> None:
    names = surgery.__all__
    assert {"Spec", "Freeze", "Edit", "patch_model", "unpatch_model", "patched", "inspect_model", "capture"} <= set(names)
    for name in names:
        assert getattr(surgery, name) is getattr(surgery.public, name)
        assert name in dir(surgery)


@pytest.mark.parametrize("package", [surgery, surgery.analysis, surgery.analysis.interference])
def test_no_module_hides_a_public_name(package: ModuleType) -> None:
    names = package.__all__  # loads every module that they come from
    assert len(names) > 10
    for name in names:
        module = sys.modules.get(f"{package.__name__}.{name}")
        value = getattr(package, name)
        assert value is getattr(package.public, name), "a module of that name takes the name's place once it is imported"
        assert module is None or value is module, "likewise; unless the module is what the name stands for"


def test_importing_the_package_does_not_import_torch() -> None:
    code = "import surgery, sys; assert 'torch' not in sys.modules; surgery.Spec; assert 'torch' in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_what_does_not_exist_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = surgery.nothing  # type: ignore[attr-defined]
    with pytest.raises(ImportError):
        from surgery import nothing  # type: ignore[attr-defined]  # noqa: F401
