"""What a surgery must share with a model that it is applied to: the architecture, and every attention's heads and widths."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field
from torch import nn

from surgery.anatomy import Anatomy, Attention
from surgery.errors import SpecError, describe, listing

Count = Annotated[int, Field(ge=1)]


class AttentionShape(BaseModel):
    """One attention: its address and class, its numbers of heads, and the widths of q, of v and of the residual stream."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    address: str
    attention: str
    heads: Count
    kv_heads: Count
    d_head: Count
    d_value: Count
    d_model: Count

    @classmethod
    def of(cls, attention: Attention) -> AttentionShape:
        """Of a derived attention."""
        return cls(
            address=attention.address,
            attention=attention.class_name,
            heads=attention.heads,
            kv_heads=attention.kv_heads,
            d_head=attention.d_head,
            d_value=attention.d_value,
            d_model=attention.recording.shapes["output"][-1],
        )

    def __str__(self) -> str:
        widths = f"d_head {self.d_head}, d_value {self.d_value}, d_model {self.d_model}"
        return f"{self.attention} with {self.heads} heads over {self.kv_heads} kv heads, {widths}"


class Fingerprint(BaseModel):
    """The shape of a model as surgery sees it; weights are not part of it. architecture: the config's model_type."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    architecture: str
    attentions: list[AttentionShape]

    @classmethod
    def of(cls, model: nn.Module, anatomy: Anatomy) -> Fingerprint:
        """Of a model and its derived anatomy."""
        config: Any = getattr(model, "config", None)
        architecture = getattr(config, "model_type", None) or anatomy.model_class
        return cls(architecture=architecture, attentions=[AttentionShape.of(attention) for attention in anatomy])

    def require(self, other: Fingerprint, what: str) -> None:
        """Raises SpecError, listing every difference, unless another model has the same shape."""
        do = "Apply it to the model that it was made for."
        problems = []
        if self.architecture != other.architecture:
            problems.append(describe(what, f"a {other.architecture!r} model", f"{self.architecture!r}", do))
        mine, theirs = ({shape.address: shape for shape in one.attentions} for one in (self, other))
        for address in dict.fromkeys([*mine, *theirs]):
            if mine.get(address) != theirs.get(address):
                found, expected = (str(one.get(address, "no attention")) for one in (theirs, mine))
                problems.append(describe(f"{what} at {address}", found, expected, do))
        if problems:
            raise SpecError(listing("the surgery does not fit the model", problems[:8]))
