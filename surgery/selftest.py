"""Proof on one forward that a patched model is what it claims: equal without its cuts, changed at every cut."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from surgery.classes import SurgicalAttention
from surgery.errors import ParityError, PatchError, describe, listing
from surgery.interventions import Operation
from surgery.patch import patch_model, patched, session_of, unpatch_model
from surgery.taps import runs_on


def self_test(model: nn.Module, inputs: Mapping[str, Any] | None = None) -> list[str]:
    """Proves, on the model's dummy inputs or on those given, that patching is exact and that every cut acts.

    Without cuts the outputs must equal the unpatched model's bit for bit; with them, every edit at every attention must
    run and change the tensor at its site (identity must leave it equal). Random states and the model's cuts are restored.
    Returns what was proved, a sentence each. Raises ParityError, listing all that fails, and PatchError for a model that is
    not patched.
    """
    session = session_of(model)
    if session is None:
        raise PatchError(describe("self_test", "a model that is not patched", "a patched model", "Call patch_model first."))
    if inputs is not None and not isinstance(inputs, Mapping):
        found = f"inputs of type {type(inputs).__name__}"
        raise ParityError(describe("self_test", found, "a mapping of model inputs", "Pass {'input_ids': tokens}."))
    inputs = dict(dummy_inputs(model) if inputs is None else inputs)
    with patched(model, kernel="auto"):
        no_op = _outputs(model, inputs)
        unpatch_model(model)
        original = _outputs(model, inputs)
        patch_model(model)
    problems = [
        describe("without cuts", f"output {name} that differs by {_gap(a, b)}", "equality", "Please report this class.")
        for name, a, b in zip(original, original.values(), no_op.values(), strict=True)
        if not _is_equal(a, b)
    ]
    seen: dict[tuple[str, str, int], bool] = {}

    def watch(operation: Operation, before: Tensor, after: Tensor) -> None:
        key = (operation.address, operation.site, operation.number)
        seen[key] = seen.get(key, False) or not _is_equal(before, after)

    current = session_of(model)
    assert current is not None
    current.watch = watch
    try:
        _outputs(model, inputs)
    finally:
        current.watch = None
    for operation in _operations(model):
        changed = seen.get((operation.address, operation.site, operation.number))
        should = operation.edit.action != "identity" and operation.edit.strength > 0
        if changed is None or changed != should:
            found = (
                "an edit that never ran"
                if changed is None
                else f"a tensor that it {'changed' if changed else 'did not change'}"
            )
            what = f"cut {operation.number} at {operation.address} {operation.site}"
            do = "Pass inputs that it acts on; its positions may lie beyond these."
            problems.append(describe(what, found, "a change" if should else "equality", do))
    if problems:
        raise ParityError(listing("self_test", problems))
    split = any(m._surgery.share is not None for m in model.modules() if isinstance(m, SurgicalAttention))
    edits = f"{len(seen)} edits{' of heads in this process' if split else ''}"
    return [f"without cuts: {len(original)} outputs equal bit for bit", f"with cuts: {edits} ran and acted"]


def dummy_inputs(model: nn.Module) -> dict[str, Any]:
    """Small valid inputs of a transformers text model. Raises ParityError for models that need other inputs."""
    name = getattr(model, "main_input_name", "input_ids")
    if name != "input_ids":
        raise ParityError(
            describe("self_test", f"a model that takes {name}", "inputs to test on", f"Pass inputs={{{name!r}: ...}}.")
        )
    device = runs_on(model)
    config: Any = model.config
    tokens = (torch.arange(14, device=device) * 7 + 3).remainder(config.get_text_config().vocab_size).view(2, 7)
    inputs = {"input_ids": tokens}
    if getattr(config, "is_encoder_decoder", False):
        inputs["decoder_input_ids"] = tokens[:, :5]
    return inputs


def _outputs(model: nn.Module, inputs: Mapping[str, Any]) -> dict[str, Tensor]:
    with torch.no_grad(), torch.random.fork_rng():
        torch.manual_seed(0)
        output = model(**inputs)
    found = output if isinstance(output, Mapping) else {f"output {i}": value for i, value in enumerate(tree_leaves(output))}
    tensors = {name: value for name, value in found.items() if isinstance(value, Tensor)}
    if not tensors:
        found_type = type(output).__name__
        raise ParityError(describe("self_test", f"a {found_type} without tensors", "outputs to compare", "Pass other inputs."))
    return tensors


def _operations(model: nn.Module) -> list[Operation]:
    surgeries = [m._surgery for m in model.modules() if isinstance(m, SurgicalAttention)]
    return [operation for s in surgeries for site in s.plan.operations.values() for operation in site if operation.acts_here]


def _is_equal(a: Tensor, b: Tensor) -> bool:
    """Bit for bit, but that NaN equals NaN: kernels give it in rows where everything is masked."""
    return a.shape == b.shape and bool(((a == b) | ((a != a) & (b != b))).all())


def _gap(a: Tensor, b: Tensor) -> str:
    return f"{(a.double() - b.double()).abs().max():.3g}" if a.shape == b.shape else f"shape {tuple(b.shape)}"
