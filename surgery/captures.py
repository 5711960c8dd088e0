"""Seeing activations at any site, without hooks: `with capture(model, ["pattern"], layers=[3]) as run: model(**inputs)`."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from surgery.anatomy import Anatomy, grouped
from surgery.errors import NoMatchError, SpecError, closest, describe, listing
from surgery.fields import listed
from surgery.patch import Kernel, anatomy_of, probed
from surgery.plan import Probe, outermost_call
from surgery.reference import Entry, Reference
from surgery.sites import SITES
from surgery.spec import Edit
from surgery.where import Where


class Run:
    """What `capture` saw. `run[address, site]` is the tensor of the last forward, with the shapes of `surgery.sites`.

    Addresses may be layer numbers, as in a spec. Usable as `Freeze(..., to=run)` and `Edit(..., "activation", reference=run)`.
    """

    def __init__(
        self, anatomy: Anatomy, wanted: Sequence[tuple[str, str, tuple[int, ...] | None]], detach: bool, keep: str = "all"
    ) -> None:
        self._anatomy, self._detach, self._keep = anatomy, detach, keep
        self._steps: dict[tuple[str, str], list[Tensor]] = {(address, site): [] for address, site, _ in wanted}
        self._where: dict[tuple[str, str], Where] = {}
        self._calls: dict[tuple[str, str], Any] = {}
        self._times: dict[tuple[str, str], int] = {}
        self._heads = {(address, site): heads for address, site, heads in wanted}

    def _take(self, key: tuple[str, str], tensor: Tensor, where: Where) -> None:
        if self._keep == "last":
            self._steps[key].clear()
        self._steps[key].append(tensor.detach() if self._detach else tensor)
        self._where[key] = replace(where, allowed=None)
        if not torch.compiler.is_compiling():
            call = outermost_call()
            self._times[key] = self._times.get(key, 0) + 1 if call is not None and call is self._calls.get(key) else 1
            self._calls[key] = call

    def __getitem__(self, key: tuple[str | int, str]) -> Tensor:
        """(batch, head, .., ..). Raises NoMatchError if that was not asked for, or has not run."""
        if not isinstance(key, tuple) or len(key) != 2:
            raise NoMatchError(
                describe(f"run[{key!r}]", "one key", "an address and a site", 'For example run["self.3", "pattern"].')
            )
        return self.steps(*key)[-1]

    def steps(self, address: str | int, site: str) -> list[Tensor]:
        """The tensors of every forward in the block, in order: one per decoding step, for example."""
        if not isinstance(address, str | int) or not isinstance(site, str):
            raise NoMatchError(
                describe(
                    f"run[{address!r}, {site!r}]",
                    "no address and site",
                    "for example 3 or 'self.3', and 'pattern'",
                    "Name one.",
                )
            )
        key = (self._anatomy[address].address, site)
        if not self._steps.get(key):
            found = ", ".join(f"{a} {s}" for a, s in self) or "nothing"
            state = "asked for, but no forward came there" if key in self._steps else "not asked for"
            raise NoMatchError(
                describe(
                    f"run[{address!r}, {site!r}]", f"it was {state}; captured: {found}", "a captured site", "Add it to capture."
                )
            )
        return self._steps[key]

    def __iter__(self) -> Iterator[tuple[str, str]]:
        return (key for key, tensors in self._steps.items() if tensors)

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def items(self) -> Iterator[tuple[tuple[str, str], Tensor]]:
        """((address, site), tensor of the last forward)."""
        return ((key, self._steps[key][-1]) for key in self)

    def taken(self) -> Iterator[tuple[tuple[str, str], Tensor]]:
        """((address, site), tensor) of all that has run since, each forgotten once it is handed out."""
        for key in list(self):
            while self._steps[key]:
                yield key, self._steps[key].pop(0)

    def reference(self) -> Reference:
        """The last forward's activations as replacement values for another run.

        Raises SpecError if that forward was a step with a KV cache, so that its first position is not the sequence's first, or
        came to a site several times.
        """
        if not len(self):
            raise SpecError(
                describe("Run.reference", "a capture in which no forward ran", "one forward", "Run the model within the block.")
            )
        offsets = {f"{a} {s}": int(self._where[a, s].offset(s)) for a, s in self}
        if late := [(where, offset) for where, offset in offsets.items() if offset > 0]:
            where, offset = late[0]
            raise SpecError(
                describe(
                    "Run.reference",
                    f"{where} captured from position {offset} on, in a step with a KV cache",
                    "activations of the whole sequence",
                    "Capture one forward without a cache: model(**inputs, use_cache=False).",
                )
            )
        if several := [f"{a} {s}: {n}" for (a, s), n in self._times.items() if n > 1]:
            raise SpecError(
                describe(
                    "Run.reference",
                    f"several tensors of one forward ({', '.join(several)})",
                    "one: a cut would put the last of them into all",
                    "Such an attention computes parts one after another, or layers share it. Cut a site that it comes to once.",
                )
            )
        entries = {key: self._entry(key, tensor.detach()) for key, tensor in self.items()}
        return Reference("activation", entries, self._anatomy.fingerprint)

    def _entry(self, key: tuple[str, str], tensor: Tensor) -> Entry:
        """Rows as a reference has them: at v one per query head, at k one per kv head."""
        attention, (_, site), heads = self._anatomy[key[0]], key, self._heads[key]
        if self._where[key].has_room(site):
            tensor = tensor[:, :, : int(self._where[key].filled)]  # the rest of a static cache is empty
        if site == "v" and heads is None:
            tensor = tensor.repeat_interleave(attention.heads // tensor.shape[1], 1)
        elif site == "k" and heads is not None:
            rows = {head // attention.group_size: row for row, head in enumerate(heads)}
            tensor, heads = tensor[:, list(rows.values())], tuple(rows)
        return Entry(tensor, None, heads)

    def __repr__(self) -> str:
        rows = [f"  {a} {s}: {tuple(t.shape)}" for (a, s), t in self.items()]
        return "\n".join([f"Run of {self._anatomy.model_class}, {len(rows)} captured", *rows])


@contextmanager
def capture(
    model: nn.Module,
    sites: Sequence[str] | str,
    layers: Any = "all",
    heads: Any = "all",
    *,
    detach: bool = False,
    keep: Literal["all", "last"] = "all",
    kernel: Kernel | None = None,
    strict: bool = True,
) -> Iterator[Run]:
    """Captures sites in every forward of the block, with whatever cuts the model has; the model is then as before.

    sites: names of `surgery.sites.SITES`, seen after the cuts made there. layers, heads: as in a spec; with heads given, rows
    are in their order, and k and v are what each of these query heads reads; with "all" k and v have one row per kv head.
    Only scores and pattern need the attention matrix: where the module's kernel is fused it is computed beside it for the
      wanted heads, and outputs stay equal bit for bit (beside a cut of the matrix of others, to rounding). All else is seen
      in the module's own kernel.
    detach: cut the captured tensors off from autograd; by default they are part of the graph.
    keep: "all" keeps every forward of the block, which `run.steps` gives; "last" one forward's tensors alone, for long loops.
    kernel: None leaves the kernel as it is; "eager" reconstructs every module, which puts rot_q, rot_k, scores, pattern and z
      on the path to the output: needed for gradients with respect to them. What is shown of other sites, or of some heads
      only, is a copy beside that path.
    Warns (NotFiredWarning) of attentions that the block's forwards never ran. Raises SpecError and NoMatchError for
    selections that do not exist, and what patch_model raises.
    """
    sites = (sites,) if isinstance(sites, str) else tuple(dict.fromkeys(sites))
    if unknown := [site for site in sites if site not in SITES]:
        hints = "".join(closest(site, SITES) for site in unknown)
        raise SpecError(
            describe("capture", f"sites {unknown}", f"sites of {', '.join(SITES)}", hints.strip() or "Choose of these.")
        )
    if keep not in ("all", "last"):
        raise SpecError(describe("capture", f"keep={keep!r}", "'all' or 'last'", "'last' keeps one forward's tensors only."))
    anatomy = anatomy_of(model, strict)
    # The same checks as an edit of the same selection.
    checked = [Edit(site, "identity", layers=layers, heads=heads) for site in sites]
    if not checked:
        raise SpecError(describe("capture", "no sites", "at least one", f"Choose from {', '.join(SITES)}."))
    attentions = anatomy.select(checked[0].layers, "capture")
    chosen = None if checked[0].heads == "all" else listed(heads)
    misfits = [(a, p) for a in attentions for p in (*a.beyond(checked[0].heads), *(q for s in sites for q in a.underived(s)))]
    if problems := grouped(misfits):
        raise SpecError(listing("capture", problems))
    wanted = [(a.address, site, chosen) for a in attentions for site in sites]
    run = Run(anatomy, wanted, detach, keep)
    probes: dict[str, list[Probe]] = {}
    for address, site, numbers in wanted:
        probes.setdefault(address, []).append(Probe(site, numbers, functools.partial(run._take, (address, site))))
    try:
        with probed(model, probes, kernel, strict):
            yield run
    finally:
        run._calls.clear()  # they hold the inputs
