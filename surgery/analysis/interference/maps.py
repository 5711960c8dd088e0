"""Interference between two tasks: a map over pairs of samples for every head's Q, K, V and O, or its means alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pandas as pd
import torch
from matplotlib.figure import Figure
from torch import Tensor

from surgery.addresses import main_address
from surgery.analysis.interference.files import read_about, read_tensors, write_tensors
from surgery.analysis.interference.gradients import Gradients
from surgery.analysis.interference.intervals import two_way_bootstrap
from surgery.analysis.interference.kernels import kernel_of
from surgery.analysis.interference.tested import Tested
from surgery.analysis.interference.walk import MEMORY_MIB, RHO, Walk
from surgery.errors import SpecError, describe
from surgery.plots.interference import block_bars, block_maps

KIND = "an interference map"
MEASURED = {
    "qkov": "interference (gradient units)",
    "whitened": "interference (whitened)",
    "signed": "conflict (part of −cosine)",
    "ewc": "interference (EWC)",
}
"""What the numbers of each kernel are, for labels."""


class Interference:
    """What `heatmap` found. Heads are kv heads for K and V, or query heads where it was asked for these.

    hypotheses: (address, block, head) of each number. rows (hypothesis, sample of A), columns (hypothesis, sample of B): means
    over the other task, float64. maps: (hypothesis, sample of A, sample of B) float32; None if means alone were asked for.
    """

    def __init__(
        self, about: dict[str, Any], hypotheses: list[tuple[str, str, int]], rows: Tensor, columns: Tensor, maps: Tensor | None
    ) -> None:
        self.about, self.hypotheses, self.rows, self.columns, self.maps = about, hypotheses, rows, columns, maps
        self._numbers = {hypothesis: number for number, hypothesis in enumerate(hypotheses)}

    @property
    def means(self) -> Tensor:
        """(hypothesis,) float64: over all pairs of samples."""
        return self.rows.mean(1)

    def map(self, layer: str | int, block: str, head: int) -> Tensor:
        """(sample of A, sample of B) of one head's block. layer: an address, or a number as elsewhere.

        Raises SpecError without maps, or for what there is not.
        """
        if self.maps is None:
            raise SpecError(describe("map", "means alone", "maps over pairs", "Pass keep_maps=True to heatmap."))
        return self.maps[self._number(layer, block, head)]

    def sample_pair(self, i: int, j: int, layer: str | int, head: int) -> dict[str, float]:
        """By block, the number of one pair of samples at a head (of K and V mostly a kv head). layer: as of `map`."""
        address = self._address(layer)
        for what, number, count in (("i", i, self.rows.shape[1]), ("j", j, self.columns.shape[1])):
            if not 0 <= number < count:
                raise SpecError(describe("sample_pair", f"{what}={number}", f"0 to {count - 1}", "Samples count from 0."))
        blocks = [block for place, block, number in self.hypotheses if place == address and number == head]
        if not blocks:
            self._number(address, "Q", head)
        return {block: float(self.map(address, block, head)[i, j]) for block in blocks}

    def by_head(self) -> dict[str, pd.DataFrame]:
        """By block, means over all pairs, addresses × heads."""
        frame = self.to_frame()
        return {
            block: rows.pivot(index="address", columns="head", values="mean").reindex(rows.address.unique())
            for block, rows in frame.groupby("block", sort=False)
        }

    def to_frame(self) -> pd.DataFrame:
        """A row for each hypothesis: address, block, head, mean."""
        frame = pd.DataFrame(self.hypotheses, columns=["address", "block", "head"])
        return frame.assign(mean=self.means.numpy())

    def top(self, count: int = 10) -> pd.DataFrame:
        """The largest means."""
        return self.to_frame().sort_values("mean", ascending=False, kind="stable").head(count)

    def blocks(self, confidence: float = 0.95, seed: int = 0) -> pd.DataFrame:
        """Sums over heads, of every layer and (address "all") of all layers, a row each: address, block, mean, low, high.

        Intervals are of the samples of both tasks (`two_way_bootstrap`). Raises SpecError without maps over pairs.
        """
        if self.maps is None:
            raise SpecError(describe("blocks", "means alone", "maps over pairs", "Pass keep_maps=True to heatmap."))
        frame = self.to_frame()
        single = list(frame.groupby(["address", "block"], sort=False).indices.items())
        whole = [(("all", block), rows) for block, rows in frame.groupby("block", sort=False).indices.items()]
        sums = torch.stack([self.maps[torch.from_numpy(rows)].sum(0) for _, rows in [*single, *whole]])
        found = two_way_bootstrap(sums.numpy(), confidence=confidence, seed=seed)
        names = pd.DataFrame([name for name, _ in [*single, *whole]], columns=["address", "block"])
        return names.assign(mean=found.mean, low=found.low, high=found.high)

    def picture(self, tested: Tested | None = None, title: str = "") -> Figure:
        """Heat maps of the means over layer × head, a panel for each block. tested: marks what it found (FDR)."""
        return block_maps({MEASURED[self.about["kernel"]]: self._marked(tested)}, title=title, subtitle=_legend(tested))

    def beside(
        self, other: Interference, tested: Tested | None = None, other_tested: Tested | None = None, title: str = ""
    ) -> Figure:
        """The same with those of another kernel below, such as "signed". tested: of this one, and of the other."""
        if self.about["kernel"] == other.about["kernel"]:
            twice = f"{self.about['kernel']!r} twice"
            raise SpecError(describe("beside", twice, "maps of two kernels", 'Pass heatmap(a, b, kernel="signed").'))
        if self.hypotheses != other.hypotheses:
            found = f"maps of {len(self.hypotheses)} and {len(other.hypotheses)} heads and blocks, which are not the same"
            do = "Pass maps of the same layers, both by query head or neither."
            raise SpecError(describe("beside", found, "maps of the same heads", do))
        pairs = ((self, tested), (other, other_tested))
        frames = {MEASURED[one.about["kernel"]]: one._marked(found) for one, found in pairs}
        return block_maps(frames, title=title, subtitle=_legend(tested, other_tested))

    def blocks_picture(self, confidence: float = 0.95, seed: int = 0, title: str = "") -> Figure:
        """`blocks` as bars and points with their intervals."""
        unit = f"{MEASURED[self.about['kernel']]}, sum over heads"
        subtitle = f"{confidence:.0%} intervals: samples of both tasks drawn again"
        return block_bars(self.blocks(confidence, seed), unit=unit, title=title, subtitle=subtitle)

    def _marked(self, tested: Tested | None) -> pd.DataFrame:
        """As plots take it: value, and found where something was tested."""
        frame = self.to_frame().rename(columns={"mean": "value"})
        if tested is None:
            return frame
        names = ["address", "block", "head"]
        if list(tested.frame[names].itertuples(index=False, name=None)) != self.hypotheses:
            expected = f"those {len(self.hypotheses)} of the map, in their order"
            do = "Pass a test of the same gradients."
            raise SpecError(describe("tested", f"{len(tested.frame)} other heads and blocks", expected, do))
        return frame.assign(found=(tested.frame["p_fdr"] <= tested.alpha).to_numpy())

    def save(self, path: str | Path) -> None:
        """Writes a safetensors file, whole or not at all."""
        tensors = {"rows": self.rows, "columns": self.columns} | ({} if self.maps is None else {"maps": self.maps})
        write_tensors(path, KIND, {"about": self.about, "hypotheses": self.hypotheses}, tensors)

    @classmethod
    def load(cls, path: str | Path) -> Interference:
        """What `save` wrote. Raises SpecError for another file."""
        known, tensors = read_about(path, KIND), read_tensors(path)
        hypotheses = [(address, block, head) for address, block, head in known["hypotheses"]]
        return cls(known["about"], hypotheses, tensors["rows"], tensors["columns"], tensors.get("maps"))

    def _address(self, layer: str | int) -> str:
        return main_address(layer, (address for address, _, _ in self.hypotheses)) if isinstance(layer, int) else layer

    def _number(self, layer: str | int, block: str, head: int) -> int:
        hypothesis = (self._address(layer), block, head)
        if hypothesis not in self._numbers:
            expected = f"one of {len(self.hypotheses)}, such as {' '.join(map(str, self.hypotheses[0]))}"
            found = f"{hypothesis[0]} {block} head {head}"
            raise SpecError(describe("interference", found, expected, "See .to_frame()."))
        return self._numbers[hypothesis]

    def __str__(self) -> str:
        about = self.about
        head = (
            f"{about['kernel']} of {about['a']!r} ({self.rows.shape[1]} samples) and {about['b']!r} ({self.columns.shape[1]})"
        )
        return f"{head}; largest means:\n{self.top().to_string(index=False, float_format=lambda x: f'{x:.4g}')}"

    __repr__ = __str__

    def _repr_html_(self) -> str:
        return self.top().to_html(index=False)


def _legend(*tested: Tested | None) -> str:
    """What a mark says, if there are any."""
    levels = sorted({f"{one.alpha:g}" for one in tested if one is not None})
    return f"marked: found at a false discovery rate of {' or '.join(levels)}" if levels else ""


def heatmap(
    a: Gradients,
    b: Gradients,
    fisher: Any = None,
    kernel: str = "qkov",
    *,
    rho: float = RHO,
    is_unit: bool = False,
    query_heads: bool = False,
    keep_maps: bool = True,
    memory_mib: float = MEMORY_MIB,
    device: Any = "cpu",
    progress: bool = False,
) -> Interference:
    """M_ij for every pair of samples, head and block; see `surgery.analysis.interference.kernels`.

    fisher: a Fisher, Gradients whose samples are pooled, or None: those of a and b. rho: r over the mean of I in a block.
      "signed" and "ewc" look at neither.
    is_unit: samples of length one over all blocks ("signed" always), those of the reference, too. keep_maps=False keeps means
      over either task alone.
    query_heads: K and V by query head: the part of g_j that came through each (b collected with query_heads=True), such as
      ⟨g_i² / (I + r), sign(g_j) ⊙ g_j^(h)⟩ of "qkov"; those of a kv head's query heads add up to its number, and may be
      negative. "ewc" and the others likewise.
    memory_mib: of the workspace, beside the factors of one block and the maps. device: where products are computed, in float32.
    Raises SpecError for gradients of another model, loss or cuts, and unknown kernels.
    """
    chosen = kernel_of(kernel)
    walk = Walk(
        (a, b),
        fisher,
        rho=rho,
        is_unit=is_unit or chosen.is_unit,
        needs_fisher=chosen.needs_fisher,
        memory_mib=memory_mib,
        device=device,
        query_heads=query_heads,
        progress=progress,
    )
    hypotheses = walk.hypotheses
    numbers = {hypothesis: number for number, hypothesis in enumerate(hypotheses)}
    rows, columns = (torch.zeros(len(hypotheses), len(task), dtype=torch.float64) for task in (a, b))
    maps = torch.zeros(len(hypotheses), len(a), len(b)) if keep_maps else None
    for stretch in walk:
        number = numbers[stretch.block.address, stretch.block.name, stretch.head]
        left = chosen.left(stretch.gradients[0], stretch.fisher)
        right = chosen.right(stretch.gradients[1], stretch.part, stretch.fisher)
        unit = stretch.unit**chosen.degree
        if maps is not None:
            maps[number] += (left @ right.mT).cpu() * unit
        else:
            rows[number] += (left @ right.mean(0)).cpu().double() * unit
            columns[number] += (right @ left.mean(0)).cpu().double() * unit
    if maps is not None:
        for number, table in enumerate(maps.unbind()):  # one at a time: all of them in float64 take twice their memory
            rows[number], columns[number] = table.double().mean(1), table.double().mean(0)
    about = {"kernel": kernel, "a": a.task, "b": b.task, "rho": float(rho), "is_unit": is_unit or chosen.is_unit, **a.about}
    about["query_heads"] = query_heads
    return Interference(about, hypotheses, rows, columns, maps)
