"""Per-sample gradients of every head's Q, K, V and O on one task, kept as factors."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from surgery.addresses import main_address
from surgery.analysis.interference.factors import Block, blocks_of, weight_gradient
from surgery.analysis.interference.folder import Folder
from surgery.analysis.interference.store import Part
from surgery.analysis.journal import weights_of
from surgery.errors import SpecError, describe
from surgery.patch import anatomy_of


class Gradients:
    """The gradients of samples of one task, of each sample's own loss, per block and head.

    task: a name. blocks: what there are gradients of. losses: (sample,) float64. about: what must be the same for two tasks
    to be compared: model, weights, cuts, loss, whether biases count.
    """

    def __init__(self, task: str, blocks: Sequence[Block], parts: Sequence[Part], about: dict[str, Any]) -> None:
        self.task, self.parts, self.about = task, list(parts), about
        self.blocks = {block.key: block for block in blocks}
        self.losses = torch.tensor([loss for part in parts for loss in part.about["losses"]], dtype=torch.float64)

    def __len__(self) -> int:
        """Samples."""
        return len(self.losses)

    @property
    def hypotheses(self) -> list[tuple[str, str, int]]:
        """(address, block, head) of every part that a number is given of, in the order of the model."""
        return [(block.address, block.name, head) for block in self.blocks.values() for head in range(block.heads)]

    def gradient(self, sample: int, layer: str | int, block: str, head: int) -> Tensor:
        """(d_in, channel) float32 of Q, K, V, (channel, d_model) of O: one sample's gradient of a head's part of a weight.

        layer: an address, or a number as elsewhere. For K and V head is a kv head. With biases=True the last row of Q, K and V
        is the bias's where there is one. Formed here alone, for looking: maps never hold it whole. Raises SpecError for what
        there is not.
        """
        found = self._block(layer, block)
        for what, number, count in (("sample", sample, len(self)), ("head", head, found.heads)):
            if not 0 <= number < count:
                raise SpecError(describe("gradient", f"{what} {number}", f"0 to {count - 1}", "They count from 0."))
        for part in self.parts:
            rows = len(part.about["losses"])
            if sample < rows:
                break
            sample -= rows
        wide, narrow = part.factor(found.key)
        formed = weight_gradient((wide[sample : sample + 1], narrow[sample : sample + 1]), found, head)[0]
        return formed.mT if block == "O" else formed

    @property
    def samples(self) -> list[str]:
        """A hash of each sample's inputs."""
        return [sample for part in self.parts for sample in part.about["rows"]]

    def norms(self) -> Tensor:
        """(sample,) float64: the L2 norm over all blocks."""
        return torch.stack([self.squared_norms(key) for key in self.blocks]).sum(0).sqrt()

    def squared_norms(self, key: str) -> Tensor:
        """(sample,) float64: of one block."""
        return torch.tensor([norm for part in self.parts for norm in part.about["squared_norms"][key]], dtype=torch.float64)

    def is_split(self, block: Block) -> bool:
        """Whether the gradients of a block's heads were kept apart by query head."""
        return all(block.split_key in part.names for part in self.parts)

    def factors(self, key: str) -> Iterator[tuple[Tensor, Tensor]]:
        """(wide, narrow) of a block, by its key or split_key, batch by batch."""
        return (part.factor(key) for part in self.parts)

    @property
    def content(self) -> dict[str, Any]:
        """What a folder says of them, plain data."""
        is_split = any(map(self.is_split, self.blocks.values()))
        return {"task": self.task, "about": self.about, "blocks": list(self.blocks), "query_heads": is_split}

    def save(self, path: str | Path) -> None:
        """Writes one safetensors file for each batch, and gradients.json. Raises SpecError for a folder of something else."""
        folder = Folder(path)
        folder.claim(self.content, [part.about["data"] for part in self.parts])
        for number, part in enumerate(self.parts):
            part.write(folder.file(number))

    @classmethod
    def load(cls, path: str | Path, model: Any) -> Gradients:
        """What `save` wrote, or `collect(resume=...)`; the numbers are read when they are needed.

        model: the one that they are of, for the places of its heads. Raises SpecError for another one, for another folder, and
        for a collection that was stopped.
        """
        folder = Folder(path)
        known = folder.known()
        for what, present in (("model", anatomy_of(model).fingerprint), ("weights", weights_of(model))):
            if known["about"][what] != present:
                raise folder.refuse(f"{what}: {known['about'][what]}", f"{what}: {present}")
        blocks, _ = blocks_of(list(anatomy_of(model)))
        chosen = [block for block in blocks if block.key in known["blocks"]]
        return cls(known["task"], chosen, folder.parts(), known["about"])

    def _block(self, layer: str | int, block: str) -> Block:
        addresses = [one.address for one in self.blocks.values()]
        key = f"{main_address(layer, addresses) if isinstance(layer, int) else layer}.{block}"
        if key not in self.blocks:
            raise SpecError(describe("block", repr(key), ", ".join(list(self.blocks)[:8]), "Name one that was collected."))
        return self.blocks[key]

    def __repr__(self) -> str:
        kept = "on disk" if self.parts and self.parts[0].path is not None else "in memory"
        heads = len(self.hypotheses)
        return f"Gradients of {self.task!r}: {len(self)} samples, {heads} parts of heads in {len(self.blocks)} blocks, {kept}"
