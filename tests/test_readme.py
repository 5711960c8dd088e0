"""README: every Python block runs, on the demo model, in order; its tables are those that the tests generate."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, cast

import pytest
from family_table import TABLES

from surgery.demo import load_model

README = Path(__file__).parents[1] / "README.md"


def blocks(text: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)


def test_every_example_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    namespace: dict[str, object] = {"model": load_model()}
    found = blocks(README.read_text(encoding="utf-8"))
    assert len(found) >= 8
    for number, block in enumerate(found):
        exec(compile(block, f"README block {number}", "exec"), namespace)
    printed = capsys.readouterr().out
    assert "self.0" in printed and "point(at, 'scores'" in printed
    intact, qk, ov = (
        float(re.search(rf"{name}: ([\d.]+)", printed)[1]) for name in ("intact", "QK of head 3 frozen", "OV of head 3 frozen")
    )  # type: ignore[index]
    assert qk > intact + 1 and ov > intact + 1, "the head that the page cuts is the one that matters"
    shown = re.findall(r"```text\n(.*?)```", README.read_text(encoding="utf-8"), flags=re.DOTALL)
    assert shown and all(text in printed for text in shown), "what the page shows is what its examples print"
    tested, signed, copying = (cast(Any, namespace[name]) for name in ("tested", "signed", "copying"))
    count = int((tested.frame.p_fdr <= 0.05).sum())
    stated = [f"Of {len(tested.frame)} blocks of heads, {count} are found at a false discovery rate of 5 %"]
    stated += [f"(−cos {float(frame['mean'].sum()):.2f})".replace("-", "−") for frame in (signed, copying)]
    page = " ".join(README.read_text(encoding="utf-8").split())
    assert not [text for text in stated if text not in page]


@pytest.mark.parametrize("name", TABLES)
def test_tables_are_current(name: str) -> None:
    text = README.read_text(encoding="utf-8")
    inside = re.search(rf"<!-- {name} -->\n(.*?)<!-- /{name} -->", text, flags=re.DOTALL)
    assert inside is not None and inside[1].strip() == TABLES[name]().strip(), "run: python tests/family_table.py"
