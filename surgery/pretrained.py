"""Models and tokenizers by the name of a folder or of a model on the hub. Code beside a model runs only if allowed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from transformers import AutoConfig, PreTrainedModel
from transformers.dynamic_module_utils import get_class_from_dynamic_module

from surgery.errors import SurgeryError, describe

TOKENIZER_FILES = ("tokenizer*", "vocab*", "*.model", "tekken*")
"""Without any of these beside a model, transformers may make up a tokenizer that knows special tokens only."""
PROCESSOR_FILES = ("processor_config.json", "preprocessor_config.json", "video_preprocessor_config.json")


def existing(name: str) -> str:
    """The name, if it is a folder or can be a name on the hub. Raises SurgeryError before anything asks the network."""
    path = Path(name).expanduser()
    if path.is_dir():
        return str(path)
    if path.is_absolute() or name.startswith((".", "~")) or name.endswith("/") or name.count("/") > 1 or path.exists():
        found = "a file" if path.exists() else "no such folder"
        expected = "a folder with config.json and weights, or a name on the hub"
        raise SurgeryError(describe(f"model {name!r}", found, expected, "Check the path."))
    return name


def class_of(path: str | Path, trust_remote_code: bool = False) -> tuple[type[Any] | None, Any]:
    """The class that a model's config names, and the config: a class of transformers or, if that is allowed, of the model's own
    code; None if it names none of these. Raises what transformers raises for a config that it cannot read."""
    config = AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code)
    [name, *_] = getattr(config, "architectures", None) or [""]
    targets = getattr(config, "auto_map", None) or {}
    own = next((target for target in targets.values() if str(target).endswith(f".{name}")), None)
    if trust_remote_code and own is not None:
        return get_class_from_dynamic_module(own, path), config
    found = getattr(transformers, name, None)
    return found if isinstance(found, type) and issubclass(found, PreTrainedModel) else None, config


def load_any(name: str, *, trust_remote_code: bool = False, **options: Any) -> Any:
    """A model of any kind with its weights, in the class that its config names, in evaluation mode.

    options: of from_pretrained; dtype is that of the checkpoint if none is given. Raises SurgeryError for whatever is no model,
    and for a checkpoint that lacks weights, which would be random.
    """
    path = existing(name)
    _require_uncut(path)
    try:
        cls, _ = class_of(path, trust_remote_code)
        options = {"dtype": "auto", "trust_remote_code": trust_remote_code, **options}
        model, notes = (cls or transformers.AutoModel).from_pretrained(path, output_loading_info=True, **options)
    except Exception as error:  # whatever a foreign loader raises, there is no model
        raise unreadable(name, "a transformers model", error) from error
    require_weights(name, model, notes)
    return model.eval()


def _require_uncut(path: str) -> None:
    """Raises SurgeryError for a folder whose surgery.json has cuts: plain loading would leave them out without a word."""
    try:
        cuts = json.loads((Path(path) / "surgery.json").read_text(encoding="utf-8"))["spec"]["cuts"]
    except (OSError, ValueError, TypeError, KeyError):
        return
    if cuts:
        do = "Give the model that it was made from, and a spec with all cuts; or use load_checkpoint from Python."
        raise SurgeryError(describe(f"model {path!r}", f"an export with {len(cuts)} cuts of its own", "a model without", do))


def require_weights(name: str, model: nn.Module, notes: dict[str, Any]) -> None:
    """Raises SurgeryError if a checkpoint lacks weights of its model. notes: from_pretrained's output_loading_info."""
    if missing := sorted(notes["missing_keys"]):
        found = f"no weights for {', '.join(missing[:3])}" + (f" and {len(missing) - 3} more" if len(missing) > 3 else "")
        do = "These would be random: pass a checkpoint of the whole model."
        raise SurgeryError(describe(f"model {name!r}", found, f"all weights of {type(model).__name__}", do))


def skeleton(name: str, *, trust_remote_code: bool = False) -> nn.Module:
    """A model of any kind without its weights, from its configuration alone. Raises SurgeryError."""
    try:
        cls, config = class_of(existing(name), trust_remote_code)
        with torch.device("meta"):
            if cls is not None:
                return cls(config)
            return transformers.AutoModel.from_config(config, trust_remote_code=trust_remote_code)
    except Exception as error:
        raise unreadable(name, "a transformers model", error) from error


def tokenizer_of(name: str, *, trust_remote_code: bool = False) -> tuple[Any, str]:
    """The tokenizer beside a model and "", or None and the reason why there is none."""
    folder = Path(name).expanduser()
    if folder.is_dir() and not any(file for pattern in TOKENIZER_FILES for file in folder.glob(pattern)):
        return None, "no files of a tokenizer"
    try:
        return transformers.AutoTokenizer.from_pretrained(existing(name), trust_remote_code=trust_remote_code), ""
    except Exception as error:  # many models have no use for one
        return None, first_line(error)


def processor_of(name: str, *, trust_remote_code: bool = False) -> Any:
    """What makes inputs for a model: its processor (with its tokenizer), or its tokenizer alone; None if there is neither."""
    folder = Path(name).expanduser()
    if not folder.is_dir() or any(file for pattern in PROCESSOR_FILES for file in folder.glob(pattern)):
        try:
            return transformers.AutoProcessor.from_pretrained(existing(name), trust_remote_code=trust_remote_code)
        except Exception:  # of whatever kind; many models have a tokenizer alone
            pass
    return tokenizer_of(name, trust_remote_code=trust_remote_code)[0]


def unreadable(name: str, expected: str, error: Exception) -> SurgeryError:
    """The error for a model that does not load, with the first line of the loader's."""
    if isinstance(error, SurgeryError):
        return error
    text = first_line(error)
    do = (
        "Pass --trust-remote-code (trust_remote_code=True) if you trust the code beside the model."
        if "trust_remote_code" in str(error)
        else "Check the name and the files of the folder."
    )
    return SurgeryError(describe(f"model {name!r}", text, expected, do))


def first_line(error: Exception) -> str:
    """The kind of an error and the first line of its text."""
    return f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}"
