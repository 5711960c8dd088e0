"""The tokens that a model knows."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from surgery.errors import SpecError, describe


def vocabulary_of(model: Any) -> int | None:
    """How many tokens a model has embeddings of; None where transformers does not say, or they are none of tokens."""
    try:
        embedding = model.get_input_embeddings()
    except (AttributeError, NotImplementedError):
        return None
    return getattr(embedding, "num_embeddings", None)


def require_known(what: str, ids: Tensor, model: Any) -> None:
    """Raises SpecError for tokens that a model does not know: on a GPU these end the process. what: where they are from."""
    known = vocabulary_of(model)
    if known is None:
        return
    least, most = (int(value) for value in ids.aminmax())
    if least < 0 or most >= known:
        found = f"token {least if least < 0 else most}"
        expected = f"numbers below the model's {known} tokens, from 0 on"
        raise SpecError(describe(what, found, expected, "Take the tokenizer of this model."))
