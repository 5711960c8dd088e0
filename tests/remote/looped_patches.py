"""What somebody else says of a class of theirs: the forward that a patched module has, and what it computes."""

from surgery.family import Family, register_patch
from surgery.interface import attend


def eager(module, query, key, value, attention_mask):
    weights = (query @ key.mT / 2).softmax(-1)
    return (weights @ value).transpose(1, 2), weights


def forward(self, hidden_states):
    q, k, v = (m(hidden_states).unflatten(-1, (2, 4)).transpose(1, 2) for m in (self.q, self.k, self.v))
    output, _ = attend(self, q, k, v, None)
    return self.o(output.flatten(2))


LOOPED = Family(eager, members={"forward": forward}, kernels={})


@register_patch("looped_attention.LoopedAttention")
def describe(module, family):
    assert family is None
    return LOOPED
