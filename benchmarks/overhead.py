"""What surgery costs, as ratios to the unpatched model: `python -m benchmarks.overhead [--quick] [--json FILE]`.

Every ratio of times is of two models that share their weights, run alternately (`benchmarks.timing`), after a check that
they compute what they should. The first row times the unpatched model against itself: what it shows is noise.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks import arguments, compiled, machine, memory, models, patching, results, steps, unfused
from benchmarks.results import Row
from benchmarks.setting import QUICK, Settings, agree, check_cut, states
from surgery import Edit, Freeze, Spec, capture, collect_reference, patched


def forward(s: Settings) -> Iterator[Row]:
    """Forward passes over unpatched sdpa."""
    plain, twin, ids = s.build()
    group = f"time of a forward of GPT-2 small, {s.shape}, over unpatched sdpa"
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
        group = f"time of a forward of GPT-2 small, {s.shape}, over unpatched eager"
        yield s.time(group, 'patched, no cuts, kernel="eager"', lambda: plain(ids), lambda: twin(ids), 1.03)


def grouped(s: Settings) -> Iterator[Row]:
    """Forward passes of a Llama shape, whose heads share keys and values; for information."""
    plain, twin, ids = s.build(models.llama, kv_heads=s.kv_heads)
    group = f"time of a forward of a Llama shape, {s.heads} heads on {s.kv_heads}, {s.shape}, over unpatched sdpa"
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


PARTS: dict[str, Callable[[Settings], Iterator[Row]]] = {
    "forward": forward,
    "eager": eager,
    "memory": lambda s: memory.rows(s.memory_length, s.device, s.threads),
    "patching": lambda s: patching.rows(s.patch_layers, s.patch_rounds, s.device, s.threads),
    "grouped": grouped,
    "steps": steps.one_token,
    "decoding": steps.decoding,
    "compiled": compiled.rows,
    "unfused": unfused.rows,
}


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
