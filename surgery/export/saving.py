"""What save_pretrained of transformers is given to write, and what it could not write so that it loads again."""

from __future__ import annotations

import copy
import inspect
import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from surgery.errors import ExportError, closest, describe
from surgery.export.offload import SHARD, is_offloaded, told, without_ties

OURS = {
    "state_dict": "the weights are the model's own",
    "push_to_hub": "the folder gets its surgery after its weights; upload it as a whole (huggingface_hub.upload_folder)",
    "is_main_process": "a folder without weights is none; call it in one process only",
    "distributed_checkpoint": "its files are no safetensors by the names of the model",
}
"""Options of save_pretrained that are not passed on, and why."""


def require_savable(model: Any, options: Collection[str]) -> None:
    """Raises ExportError for what would not load again: a model that is not transformers' or has adapters on it."""
    what = "export_checkpoint"
    if not isinstance(model, PreTrainedModel):
        do = "Merge its adapters (merge_and_unload) and export the result; or export the base model without them, and beside it"
        do = f"{do} the adapters alone by their own save_pretrained."
        raise ExportError(describe(what, f"a {type(model).__name__}", "a model of transformers", do))
    adapted = next((name for name, part in model.named_modules() if hasattr(part, "base_layer")), None)
    if adapted is not None or getattr(model, "_hf_peft_config_loaded", False):
        do = "Merge the adapters (merge_and_unload of the PEFT model), or export before they are added."
        raise ExportError(describe(what, f"adapters on the model ({adapted})", "weights of the model's own names", do))
    if why := _why_not_quantised(model):
        do = "Export before quantising, and give load_checkpoint the quantization_config; or export_spec the surgery alone."
        raise ExportError(describe(what, f"a quantised model, {why}", "weights that transformers can save", do))
    known = set(inspect.signature(PreTrainedModel.save_pretrained).parameters) - {"self", "save_directory", "kwargs"}
    for name in sorted(set(options) - known - set(OURS)):
        do = closest(name, {*known, "bake", "shrink", "tokenizer", "example_inputs", "verify", "progress"}) or "Leave it out."
        raise ExportError(describe(what, f"the option {name!r}", f"options of save_pretrained: {', '.join(sorted(known))}", do))
    for name in sorted(set(options) & set(OURS)):
        raise ExportError(describe(what, f"the option {name}", "options of the files alone", f"Leave it out: {OURS[name]}."))


def _why_not_quantised(model: Any) -> str | None:
    """Why transformers cannot save a quantised model, if it cannot. Before its state dict is asked for."""
    quantizer = getattr(model, "hf_quantizer", None)
    if quantizer is None:
        return None
    for name, parameter in model.named_parameters():
        # bitsandbytes packs 4 bits for a CPU's kernel in the first forward, and unpacks them in state_dict(), in place: it
        # does not get its scales back (they come rounded, or in another order).
        if getattr(getattr(parameter, "quant_state", None), "packing_format_for_cpu", False):
            return f"{name!r} packed for this CPU, which bitsandbytes does not undo exactly"
    try:
        quantizer.get_state_dict_and_metadata(model)
    except (ValueError, TypeError, NotImplementedError) as error:
        return str(error)
    return None if quantizer.is_serializable() else "which its quantiser cannot save"


def save(model: Any, folder: Path, tensors: dict[str, Tensor] | None, options: Mapping[str, Any]) -> None:
    """save_pretrained, with other tensors if given; an offloaded model is written file by file, of no more than SHARD each."""
    if is_offloaded(model):
        options = {"max_shard_size": SHARD, **options}
        tensors = without_ties(model, tensors or model.state_dict())
    with told(model):
        model.save_pretrained(folder, state_dict=tensors, **options)


def require_complete(model: Any) -> None:
    """Raises ExportError if a model lacks weights, by their names, that its class would make up when the folder is loaded."""
    if getattr(model, "hf_quantizer", None) is not None:
        return  # its names are those of packed weights, of which its quantiser knows
    try:
        with torch.device("meta"):
            wanted = type(model)(copy.deepcopy(model.config)).state_dict().keys()
    except Exception:  # a class that needs numbers when it is made; load_checkpoint finds out
        return
    ignored = getattr(model, "_keys_to_ignore_on_load_missing", None) or ()
    missing = sorted(n for n in set(wanted) - set(model.state_dict()) if not any(re.search(pattern, n) for pattern in ignored))
    if missing:
        found = f"no {', '.join(missing[:3])} among what was written" + (f", and {len(missing) - 3} more" * (len(missing) > 3))
        do = "Give parameters the names that the class has (remove parametrisations, put back modules that were replaced)."
        raise ExportError(describe(f"a {type(model).__name__}", found, "all weights under their own names", do))


def replaced(model: Any, changed: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The state dict with other tensors in it, also under the other names of a parameter that stands at several places."""
    own = model.state_dict(keep_vars=True)
    new = {id(own[name]): tensor for name, tensor in changed.items() if name in own}
    kept = {name: new.get(id(t), t.detach() if isinstance(t, Tensor) else t) for name, t in own.items()}
    return {**kept, **changed}
