"""The model card of an export: what was cut, where it is, and how the folder compares with the patched model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from surgery.export.bake import Baked
from surgery.export.fresh import Comparison
from surgery.spec import Spec


def card(model: Any, spec: Spec, baked: Baked, comparison: Comparison | None) -> str:
    """README.md of the folder, in Markdown with the front matter of model hubs."""
    source = getattr(model.config, "_name_or_path", "") or type(model).__name__
    if Path(source).exists():
        source = Path(source).name  # where it lies on this machine is nobody's business
    front = ["---", "library_name: transformers", "tags: [attention-surgery]", "---", ""]
    lines = [*front, f"# {source}, with surgery on its attention", "", "```", str(spec), "```", ""]
    if baked.folded:
        lines += ["These cuts are folded into the weights: plain transformers computes them.", ""]
        lines += [f"* {text}" for text in baked.folded] + [""]
    if len(baked.kept):
        lines += [
            "These cuts are in `surgery.json`: `load_checkpoint` applies them, plain `from_pretrained` leaves them out.",
            "",
            "```",
            str(baked.kept),
            "```",
            "",
        ]
        lines += [f"* not folded: {text}" for text in baked.refused] + ([""] if baked.refused else [])
    if comparison is not None:
        lines += [
            "Compared with the patched model after writing:",
            "",
            "| loaded by | largest difference | as a part of the largest entry | predicted tokens that differ |",
            "| --- | ---: | ---: | ---: |",
            f"| {comparison.by} | {comparison.difference:.3g} | {comparison.relative:.1e} "
            f"| {comparison.changed} of {comparison.positions} |",
            "",
        ]
    return "\n".join(lines)
