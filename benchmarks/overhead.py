"""What surgery costs, as ratios to the unpatched model: `python -m benchmarks.overhead [--quick] [--json FILE]`.

Every ratio of times is of two models that share their weights, run alternately (`benchmarks.timing`), after a check that
they compute what they should. The first row times the unpatched model against itself: what it shows is noise.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks import arguments, machine, memory, models, patching, results
from benchmarks.results import Row, row
from benchmarks.timing import interleave
from surgery import Edit, Freeze, Spec, capture, collect_reference, patched


@dataclass(frozen=True)
class Settings(arguments.Common):
    """Sizes of the measurement. The defaults are those that the targets are stated for."""

    rounds: int = 20
    layers: int = 12
    heads: int = 12
    kv_heads: int = 4
    d_head: int = 64
    batch: int = 4
    length: int = 128
    prompt: int = 16
    steps: int = 64
    memory_length: int = 8192
    patch_layers: tuple[int, ...] = (6, 12, 24, 48)
    patch_rounds: int = 5

    @property
    def two(self) -> list[int]:
        """Two heads that are not neighbours: neighbours are cut without index tensors, and would look cheaper."""
        return [self.heads // 4, self.heads // 2 + 1]

    @property
    def shape(self) -> str:
        return f"{self.batch} × {self.length} tokens"

    def build(self, make: Callable[..., Any] = models.gpt2, **options: Any) -> tuple[Any, Any, Tensor]:
        """A model, its twin, and token ids for both."""
        plain = make(self.layers, self.heads, width=self.heads * self.d_head, device=self.device, seed=self.seed, **options)
        return plain, models.twin(plain), models.tokens(self.batch, self.length, self.device, self.seed)

    def time(self, group: str, what: str, over: Callable[[], Any], run: Callable[[], Any], target: float | None = None) -> Row:
        """Times `run` over `over`. The targets are stated for the CPU; elsewhere they are left out."""
        pairs = interleave(over, run, rounds=self.rounds, seed=self.seed, device=self.device)
        return row(group, what, pairs.to_dict(), target if self.device == "cpu" else None)


QUICK = Settings(rounds=3, batch=1, length=32, steps=4, memory_length=512, patch_layers=(6, 12), patch_rounds=1)


def forward(s: Settings) -> Iterator[Row]:
    """Forward passes over unpatched sdpa."""
    plain, twin, ids = s.build()
    group = f"forward of GPT-2 small, {s.shape}, over unpatched sdpa"
    expected = states(plain, ids)

    def time(what: str, target: float | None, run: Callable[[], Any] = lambda: twin(ids)) -> Row:
        return s.time(group, what, lambda: plain(ids), run, target)

    yield time("unpatched itself (noise)", None)
    with patched(twin):
        agree("no cuts", states(twin, ids), expected)
        yield time("patched, no cuts", 1.02)
    for what, spec in cuts(s, twin, ids).items():
        with patched(twin, spec):
            check_cut(what, twin, spec, ids, expected)
            yield time(what, 1.05)
    watched: Any = {"sites": "pattern", "layers": sorted({s.layers // 4, s.layers // 2}), "heads": s.two[:1]}
    with capture(twin, **watched):
        agree("capture", states(twin, ids), expected)
        yield time("pattern of one head captured in two layers", 1.10)
    with patched(twin):

        def block() -> None:
            with capture(twin, **watched):
                twin(ids)

        yield time("… with entering and leaving `capture`, model patched", 1.10, block)


def cuts(s: Settings, model: Any, ids: Tensor) -> dict[str, Spec]:
    """Cuts that never need the attention matrix, in words."""
    means = collect_reference(model, [ids], sites="z", progress=False)
    sites = ("q", "k", "v", "z")
    return {
        "QK of two heads to zero, every layer": Spec(Freeze("qk", heads=s.two)),
        "OV of two heads to zero, every layer": Spec(Freeze("ov", heads=s.two)),
        "OV of two heads to a reference's mean, every layer": Spec(Freeze("ov", heads=s.two, to="mean", reference=means)),
        "OV of all heads to zero, one layer": Spec(Freeze("ov", layers=[s.layers // 2])),
        **{f"{site} of two heads scaled, every layer": Spec(Edit(site, "scale", value=0.5, heads=s.two)) for site in sites},
        **{f"{site} of all heads scaled, every layer": Spec(Edit(site, "scale", value=0.5)) for site in sites},
    }


def eager(s: Settings) -> Iterator[Row]:
    """The reconstruction over the family's own eager attention."""
    plain, twin, ids = s.build(implementation="eager")
    with patched(twin, kernel="eager"):
        agree('kernel="eager"', states(twin, ids), states(plain, ids))
        group = f"forward of GPT-2 small, {s.shape}, over unpatched eager"
        yield s.time(group, 'patched, no cuts, kernel="eager"', lambda: plain(ids), lambda: twin(ids), 1.03)


def grouped(s: Settings) -> Iterator[Row]:
    """Forward passes of a Llama shape, whose heads share keys and values; for information."""
    plain, twin, ids = s.build(models.llama, kv_heads=s.kv_heads)
    group = f"forward of a Llama shape, {s.heads} heads on {s.kv_heads}, {s.shape}, over unpatched sdpa"
    expected = states(plain, ids)

    def time(what: str) -> Row:
        return s.time(group, what, lambda: plain(ids), lambda: twin(ids))

    with patched(twin):
        agree("no cuts, grouped", states(twin, ids), expected)
        yield time("patched, no cuts")
    for what, spec in {
        "OV of two heads to zero, every layer": Spec(Freeze("ov", heads=s.two)),
        "rot_k of two heads scaled, every layer": Spec(Edit("rot_k", "scale", value=0.5, heads=s.two)),
    }.items():
        with patched(twin, spec):
            check_cut(what, twin, spec, ids, expected)
            yield time(what)


def decoding(s: Settings) -> Iterator[Row]:
    """Greedy decoding with a cache; for information."""
    plain, twin, ids = s.build(head=True)
    ids = ids[:1, : s.prompt]

    def generate(model: Any) -> Tensor:
        steps: Any = {"min_new_tokens": s.steps, "max_new_tokens": s.steps}
        return model.generate(
            ids, attention_mask=torch.ones_like(ids), do_sample=False, use_cache=True, pad_token_id=0, **steps
        )

    group = f"decoding {s.steps} tokens with a cache, GPT-2 small, batch 1, over unpatched sdpa"
    with patched(twin):
        agree("decoding", generate(twin), generate(plain))
        yield s.time(group, "patched, no cuts", lambda: generate(plain), lambda: generate(twin))
    with patched(twin, Freeze("ov", heads=s.two)):
        yield s.time(group, "OV of two heads to zero, every layer", lambda: generate(plain), lambda: generate(twin))


PARTS: dict[str, Callable[[Settings], Iterator[Row]]] = {
    "forward": forward,
    "eager": eager,
    "memory": lambda s: memory.rows(s.memory_length, s.device, s.threads),
    "patching": lambda s: patching.rows(s.patch_layers, s.patch_rounds, s.device, s.threads),
    "grouped": grouped,
    "decoding": decoding,
}


def states(model: Any, ids: Tensor) -> Tensor:
    return model(ids).last_hidden_state


def agree(what: str, found: Tensor, expected: Tensor) -> None:
    """Raises RuntimeError unless equal bit for bit: nothing is timed that does not compute what it should."""
    if not torch.equal(found, expected):
        raise RuntimeError(f"{what}: differs from the unpatched model by {(found - expected).abs().max():.3g}")


def check_cut(what: str, model: Any, spec: Spec, ids: Tensor, uncut: Tensor) -> None:
    """Raises RuntimeError unless the cut changes the output, and as kernel="eager" changes it, up to rounding."""
    found = states(model, ids)
    with patched(model, spec, kernel="eager"):
        reference = states(model, ids)
    if torch.equal(found, uncut):
        raise RuntimeError(f"{what}: the cut changes nothing")
    tolerance = 1e-3 if found.dtype == torch.float32 else 0.1
    if not torch.allclose(found, reference, rtol=tolerance, atol=tolerance):
        raise RuntimeError(f"{what}: the kernels differ by {(found - reference).abs().max():.3g}")


def run(s: Settings, parts: list[str], path: Path | None) -> dict[str, Any]:
    """Measures parts and, row by row, writes what README's tables are made of to `path`.

    Rows of other parts that are there already stay, if they were taken on the same machine at the same settings.
    """
    found = {"benchmark": "overhead", "machine": machine.describe(s.device), "settings": asdict(s), "load": {}, "rows": []}
    found = json.loads(json.dumps(found))  # as it is read back
    if path is not None and path.exists():
        before = json.loads(path.read_text(encoding="utf-8"))
        if all(before[name] == found[name] for name in ("machine", "settings")):
            found |= {"load": before["load"], "rows": [row for row in before["rows"] if row["part"] not in parts]}
    with torch.no_grad():
        for part in parts:
            load = os.getloadavg()[0]
            for new in PARTS[part](s):
                print(f"{part}: {new['what']}: {new['value']:.3f}", flush=True)
                found["rows"] = sorted([*found["rows"], {"part": part, **new}], key=lambda row: list(PARTS).index(row["part"]))
                if path is not None:
                    results.save(path, found)
            # How busy the machine was: a part without an entry was interrupted.
            found["load"][part] = [round(load, 2), round(os.getloadavg()[0], 2)]
            if path is not None:
                results.save(path, found)
    return found


def main() -> None:
    quick, json = "few rounds and short sequences, to see that it runs", "(results/overhead-DEVICE.json is README's)"
    parser = arguments.parser(__doc__, quick, f"where to write the results {json}")
    parser.add_argument("--parts", nargs="+", choices=list(PARTS), default=list(PARTS))
    given = parser.parse_args()
    found = run(arguments.settings(given, Settings(), QUICK), given.parts, given.json)
    results.show(found["rows"])
    print(machine.sentence(found["machine"]))


if __name__ == "__main__":
    main()
