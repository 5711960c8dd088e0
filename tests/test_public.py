"""The public names: all there, loaded late, and `capture` is the function whatever was imported before."""

from __future__ import annotations

import importlib

import pytest

import surgery
import surgery.public


def test_every_public_name_is_that_of_its_module() -> None:
    names = surgery.__all__
    assert {"Spec", "Freeze", "Edit", "patch_model", "unpatch_model", "patched", "inspect_model", "capture"} <= set(names)
    for name in names:
        assert getattr(surgery, name) is getattr(surgery.public, name)
        assert name in dir(surgery)


def test_the_function_capture_hides_the_module_of_its_name() -> None:
    module = importlib.import_module("surgery.capture")
    assert surgery.capture is module.capture
    from surgery import capture

    assert capture is module.capture


def test_what_does_not_exist_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = surgery.nothing  # type: ignore[attr-defined]
    with pytest.raises(ImportError):
        from surgery import nothing  # type: ignore[attr-defined]  # noqa: F401
