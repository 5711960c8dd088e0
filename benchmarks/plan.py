"""What surgery on a large model would take, on paper: sizes by formula, constants as measured (`results/`).

`python -m benchmarks.table` puts it into benchmarks/README.md between <!-- plan --> markers. Nothing of it was run.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.results import made_by
from surgery.unfused import BLOCK_ENTRIES

GPU_FLOPS, GPUS, SHARE = 989e12, 8, 0.4
"""An H100's dense bfloat16 peak (data sheet), how many of them, and what part of the peak a prefill is taken to reach."""


@dataclass(frozen=True)
class Shape:
    """A decoder with gated feed-forward parts, in bfloat16. Lengths in tokens."""

    name: str
    layers: int
    heads: int
    kv_heads: int
    d_head: int
    d_model: int
    d_ff: int
    vocabulary: int
    length: int
    size: int = 2

    @property
    def parameters(self) -> int:
        attention = 2 * self.d_model * self.d_head * (self.heads + self.kv_heads)
        return self.layers * (attention + 3 * self.d_model * self.d_ff) + 2 * self.vocabulary * self.d_model

    @property
    def matrix(self) -> int:
        """Bytes of one head's attention matrix."""
        return self.length**2 * self.size

    @property
    def forward(self) -> float:
        """Floating point operations: two for each parameter and token, and the causal half of the attention products."""
        return 2 * self.parameters * self.length + 2 * self.layers * self.heads * self.d_head * self.length**2


LARGE = Shape("70B", 80, 64, 8, 128, 8192, 28672, 128256, 131072)


@dataclass(frozen=True)
class Constants:
    """Measured. blocks: memory of a cut head, in blocks of the matrix. captured: of a captured one, in matrices.

    sweep: of a sweep's time, over its share of layers in forwards. attribution: of all heads, in forwards.
    """

    blocks: float
    captured: float
    sweep: float
    attribution: float

    @classmethod
    def of(cls, results: Path) -> Constants:
        """From the committed results. Raises FileNotFoundError or ValueError, which say what to run, where they lack it."""

        def read(name: str) -> dict[str, Any]:
            path = results / f"{name}-cpu.json"
            if not path.exists():
                raise FileNotFoundError(f"the plan of a large model needs {path}: {made_by(name)}")
            found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
            return found

        def rows(name: str) -> list[dict[str, Any]]:
            found: list[dict[str, Any]] = read(name)["rows"]
            return found

        def only(name: str, words: str, fits: Callable[[dict[str, Any]], bool]) -> dict[str, Any]:
            found = [row for row in rows(name) if fits(row)]
            if len(found) != 1:
                raise ValueError(f"{results / name}-cpu.json has {len(found)} rows of {words}, not one; {made_by(name)}")
            return found[0]

        def of_attention(what: str) -> dict[str, Any]:
            def fits(row: dict[str, Any]) -> bool:
                return row["part"] == "memory" and "attention module alone" in row["group"] and row["what"] == what

            return only("overhead", what, fits)

        cut, captured = of_attention("scores of one head scaled"), of_attention("pattern of one head captured")
        layers = read("sweep")["settings"]["layers"]
        swept = only("sweep", "one position's logits", lambda row: row["what"].endswith("logits of one position"))
        scored = only(
            "compare-gpt2-128",
            "attribution by this library",
            lambda row: (row["work"], row["way"]) == ("importance", "attention-surgery") and "cpu_value" in row,
        )
        return cls(
            cut["value"] * cut["matrix_bytes"] / (4 * BLOCK_ENTRIES["cpu"]),
            captured["value"],
            swept["value"] / part_of_layers(layers),
            scored["cpu_value"],
        )


def part_of_layers(layers: int) -> float:
    """Of a forward, what runs from a cut's layer on, on average over the layers."""
    return (layers + 1) / (2 * layers)


def lines(results: Path, s: Shape = LARGE) -> Iterator[str]:
    """A Markdown table."""
    c = Constants.of(results)
    heads, seconds = s.layers * s.heads, s.forward / (GPUS * SHARE * GPU_FLOPS)
    forwards = heads * part_of_layers(s.layers) * c.sweep
    block = c.blocks * BLOCK_ENTRIES["other"] * 4
    kept = s.layers * s.length * s.d_model * s.size
    cache = 2 * s.layers * s.kv_heads * s.d_head * s.length * s.size
    yield f"| {s.name}: {s.layers} layers, {s.heads} heads on {s.kv_heads}, {s.length:,} tokens, bfloat16 | how | |"
    yield "| --- | --- | ---: |"
    table = [
        ("weights", f"{s.parameters / 1e9:.1f} billion parameters", _bytes(s.parameters * s.size)),
        ("keys and values in a cache", "2 × layers × kv heads × d_head × tokens", _bytes(cache)),
        ("q, k, v or z cut", "within the fused kernel", "nothing"),
        (
            "scores or pattern of a head cut",
            f"{c.blocks:.1f} blocks of {BLOCK_ENTRIES['other']:,} entries, float32",
            _bytes(block),
        ),
        ("pattern of a head captured, one layer", f"{c.captured:.2f} matrices of tokens²", _bytes(c.captured * s.matrix)),
        (
            "… of all heads, one layer",
            f"{s.heads} of them: name heads, or cut and read what it changes",
            _bytes(s.heads * s.matrix),
        ),
        (
            "one forward",
            f"2 × parameters × tokens + attention, on {GPUS} × H100 at {SHARE:.0%} of their peak",
            f"{seconds:.0f} s",
        ),
        (
            f"sweep over all {heads:,} heads",
            f"{c.sweep:.2f} × ({s.layers} + 1) / (2 × {s.layers}) of a forward each: {forwards:,.0f} forwards",
            f"{forwards * seconds / 3600:.1f} h",
        ),
        ("… which keeps the outputs of layers", "layers × tokens × d_model", _bytes(kept)),
        ("attribution of all heads (AtP)", f"{c.attribution:.1f} forwards", f"{c.attribution * seconds:.0f} s"),
    ]
    yield from (f"| {' | '.join(row)} |" for row in table)


def _bytes(count: float) -> str:
    """In GiB or what else is readable."""
    for unit, size in (("TiB", 2**40), ("GiB", 2**30)):
        if count >= size:
            return f"{count / size:.1f} {unit}"
    return f"{count / 2**20:.0f} MiB"
