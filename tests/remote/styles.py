"""One attention, written inline in the ways that people write it: the same numbers from every class here.

All have `q`, `k`, `v` (or `qkv`) and `o`, three heads of four channels, and take hidden states and an additive mask.
"""

import functools
import math

import torch
import torch.nn.functional as F
from torch import nn

HEADS, WIDTH, D_MODEL, REACH = 3, 4, 12, 4


class Attention(nn.Module):
    """What the styles share. scales_q: whether q is scaled before the product; is_sequence_first: of the hidden states."""

    scales_q = is_sequence_first = is_fused = False
    kv_heads = HEADS

    def __init__(self):
        super().__init__()
        if self.is_fused:
            self.qkv = nn.Linear(D_MODEL, 3 * D_MODEL)
        else:
            self.q = nn.Linear(D_MODEL, D_MODEL)
            self.k = nn.Linear(D_MODEL, self.kv_heads * WIDTH)
            self.v = nn.Linear(D_MODEL, self.kv_heads * WIDTH)
        self.o = nn.Linear(D_MODEL, D_MODEL)
        self.scale = WIDTH**-0.5

    def by_head(self, states):
        return states.view(*states.shape[:2], -1, WIDTH).transpose(1, 2)

    def qkv_by_head(self, states):
        return self.by_head(self.q(states)), self.by_head(self.k(states)), self.by_head(self.v(states))

    def merge(self, z):
        return self.o(z.transpose(1, 2).flatten(2))


class Matmul(Attention):
    def forward(self, hidden_states, attention_mask=None):
        query, key, value = self.qkv_by_head(hidden_states)
        scores = torch.matmul(query, key.transpose(-1, -2)) * self.scale
        if attention_mask is not None:
            scores = scores + attention_mask
        probs = F.softmax(scores, dim=-1)
        context = torch.matmul(probs, value)
        return self.merge(context), probs


class Operators(Attention):
    def forward(self, hidden_states, attention_mask=None):
        query, key, value = self.qkv_by_head(hidden_states)
        mask = 0 if attention_mask is None else attention_mask
        return self.merge(torch.softmax(query @ key.mT / math.sqrt(WIDTH) + mask, -1) @ value)


class Scaled(nn.Linear):
    """A map that gives the scale of a quantisation beside its output; here there is none."""

    def forward(self, x, scale=None):
        return F.linear(x, self.weight, self.bias), scale


class ScaledSoftmax(nn.Module):
    def forward(self, scores, scale=None):
        return F.softmax(scores, dim=-1), scale


class Pairs(Attention):
    """Every part of it gives a pair."""

    def __init__(self):
        super().__init__()
        self.q, self.k, self.v, self.o = (Scaled(D_MODEL, D_MODEL) for _ in range(4))
        self.softmax, self.dropout = ScaledSoftmax(), nn.Dropout(0.1)

    def forward(self, hidden_states, attention_mask=None):
        query, q_scale = self.q(hidden_states)
        key, k_scale = self.k(hidden_states)
        value, v_scale = self.v(hidden_states, k_scale)
        query, key, value = (self.by_head(part) for part in (query, key, value))
        scores = torch.matmul(query, key.transpose(-1, -2)) * self.scale
        if attention_mask is not None:
            scores = scores + attention_mask
        probs, scale = self.softmax(scores, q_scale)
        probs = self.dropout(probs)
        output, scale = self.merge(torch.matmul(probs, value))
        return (output, probs), (scale, v_scale)


class Products(nn.Module):
    """Two terms of the scores, of which the second is zero."""

    def content(self, query, key):
        return torch.matmul(query, key.transpose(-1, -2))

    def forward(self, query, key):
        content = self.content(query, key)
        return content + torch.matmul(query, query.new_zeros(WIDTH, key.shape[-2]))


class Within(Attention):
    """The product stands in the code of a module within."""

    def __init__(self):
        super().__init__()
        self.products = Products()

    def forward(self, hidden_states, attention_mask=None):
        query, key, value = self.qkv_by_head(hidden_states)
        scores = self.products(query, key) * self.scale
        if attention_mask is not None:
            scores = scores + attention_mask
        return self.merge(torch.matmul(F.softmax(scores, dim=-1), value))


class BatchTimesHead(Attention):
    scales_q = True

    def _shape(self, states, batch):
        return states.view(batch, -1, HEADS, WIDTH).transpose(1, 2).contiguous().view(batch * HEADS, -1, WIDTH)

    def forward(self, hidden_states, attention_mask=None):
        batch, length, _ = hidden_states.size()
        query = self._shape(self.q(hidden_states) * self.scale, batch)
        key, value = self._shape(self.k(hidden_states), batch), self._shape(self.v(hidden_states), batch)
        weights = torch.bmm(query, key.transpose(1, 2))
        if attention_mask is not None:
            weights = weights.view(batch, HEADS, length, length) + attention_mask
            weights = weights.view(batch * HEADS, length, length)
        weights = nn.functional.softmax(weights, dim=-1)
        output = torch.bmm(weights, value)
        return self.merge(output.view(batch, HEADS, length, WIDTH))


class HeadMajor(Attention):
    def forward(self, hidden_states, attention_mask=None):
        query, key, value = (torch.cat(m(hidden_states).chunk(HEADS, -1)) for m in (self.q, self.k, self.v))
        scores = torch.bmm(query, key.mT) * self.scale
        if attention_mask is not None:
            scores = scores + attention_mask[:, 0].repeat(HEADS, 1, 1)
        z = torch.bmm(scores.softmax(-1), value)
        return self.o(torch.cat(z.chunk(HEADS), dim=-1))


class SequenceFirst(Attention):
    is_sequence_first = True

    def forward(self, hidden_states, attention_mask=None):
        q, k, v = (m(hidden_states).view(*hidden_states.shape[:2], HEADS, WIDTH) for m in (self.q, self.k, self.v))
        score = torch.einsum("ibnd,jbnd->bnij", q, k) * self.scale
        if attention_mask is not None:
            score = score + attention_mask
        prob = F.softmax(score, dim=3)
        vec = torch.einsum("bnij,jbnd->ibnd", prob, v)
        return self.o(vec.reshape(*hidden_states.shape[:2], D_MODEL))


class Blocks(Attention):
    """Blocks of three positions attend to themselves."""

    def forward(self, hidden_states):
        batch, length, _ = hidden_states.shape
        q, k, v = (m(hidden_states).view(batch, length // 3, 3, HEADS, WIDTH) for m in (self.q, self.k, self.v))
        scores = torch.einsum("...qhd,...khd->...hqk", q, k) * self.scale
        z = torch.einsum("...hqk,...khd->...qhd", scores.softmax(-1), v)
        return self.o(z.reshape(batch, length, D_MODEL))


class KeysFirst(Attention):
    def forward(self, hidden_states, attention_mask=None):
        query, key, value = self.qkv_by_head(hidden_states)
        scores = torch.matmul(key, query.transpose(2, 3)) * self.scale
        if attention_mask is not None:
            scores = scores + attention_mask.mT
        weights = torch.softmax(scores, dim=-2)
        return self.merge(torch.matmul(value.transpose(2, 3), weights).transpose(2, 3))


class MultiQuery(Attention):
    kv_heads = 1

    def forward(self, hidden_states, attention_mask=None):
        query, key, value = self.by_head(self.q(hidden_states)), self.k(hidden_states), self.v(hidden_states)
        scores = torch.matmul(query, key[:, None].mT) * self.scale
        if attention_mask is not None:
            scores = scores + attention_mask
        return self.merge(torch.matmul(scores.softmax(dim=-1), value[:, None]))


class MultiQueryEinsum(Attention):
    kv_heads = 1

    def forward(self, hidden_states, attention_mask=None):
        query = self.q(hidden_states).view(*hidden_states.shape[:2], HEADS, WIDTH)
        scores = torch.einsum("bihd,bjd->bhij", query, self.k(hidden_states)) * self.scale
        if attention_mask is not None:
            scores = scores + attention_mask
        z = torch.einsum("bhij,bjd->bihd", scores.softmax(dim=-1), self.v(hidden_states))
        return self.o(z.flatten(2))


class Added(Attention):
    def forward(self, hidden_states, attention_mask=None):
        batch, length, _ = hidden_states.shape
        query, key, value = (t.reshape(batch * HEADS, length, WIDTH) for t in self.qkv_by_head(hidden_states))
        bias = torch.zeros(batch * HEADS, length, length, dtype=query.dtype)
        if attention_mask is not None:
            bias = bias + attention_mask.expand(batch, HEADS, length, length).reshape(bias.shape)
        scores = torch.baddbmm(bias, query, key.mT, beta=1.0, alpha=self.scale)
        context = torch.bmm(scores.softmax(-1), value)
        return self.merge(context.view(batch, HEADS, length, WIDTH))


class AddedMethod(Attention):
    def forward(self, hidden_states, attention_mask=None):
        batch, length, _ = hidden_states.shape
        query, key, value = (t.reshape(batch * HEADS, length, WIDTH) for t in self.qkv_by_head(hidden_states))
        bias = torch.zeros(batch * HEADS, length, length, dtype=query.dtype)
        if attention_mask is not None:
            bias = bias + attention_mask.expand(batch, HEADS, length, length).reshape(bias.shape)
        scores = bias.baddbmm(batch1=query, batch2=key.mT, beta=1.0, alpha=self.scale)
        context = scores.softmax(-1).bmm(mat2=value)
        return self.merge(context.view(batch, HEADS, length, WIDTH))


class Methods(Attention):
    def forward(self, hidden_states, attention_mask=None):
        query, key, value = self.qkv_by_head(hidden_states)
        mask = torch.zeros(1) if attention_mask is None else attention_mask
        return self.merge(query.matmul(key.mT).mul(self.scale).add(mask).softmax(-1).matmul(value))


class SoftmaxModule(Attention):
    def __init__(self):
        super().__init__()
        self.softmax = nn.Softmax(dim=-1)

    def forward(self, hidden_states, attention_mask=None):
        query, key, value = self.qkv_by_head(hidden_states)
        scores = (query * self.scale) @ key.mT
        if attention_mask is not None:
            scores += attention_mask
        probs = self.softmax(scores)
        return self.merge(probs @ value)

    scales_q = True


class Keywords(Attention):
    def forward(self, hidden_states, attention_mask=None):
        query, key, value = self.qkv_by_head(hidden_states)
        scores = torch.matmul(input=query, other=key.mT) * self.scale
        if attention_mask is not None:
            scores = scores + attention_mask
        probs = F.softmax(input=scores, dim=-1)
        return self.merge(torch.matmul(input=probs, other=value))


class EinsumList(Attention):
    def forward(self, hidden_states, attention_mask=None):
        query, key, value = self.qkv_by_head(hidden_states)
        scores = torch.einsum("bhqd,bhkd->bhqk", [query, key]) * self.scale
        if attention_mask is not None:
            scores = scores + attention_mask
        return self.merge(torch.einsum("bhqk,bhkd->bhqd", (scores.softmax(dim=-1), value)))


def weigh(query, key, mask, scale):
    scores = torch.matmul(query, key.mT) * scale
    return torch.softmax(scores if mask is None else scores + mask, dim=-1)


def attend_by_hand(query, key, value, mask=None, *, scale):
    probs = weigh(query, key, mask, scale)
    return torch.matmul(probs, value)


def attend_at_once(query, key, value, mask, **options):
    scores = torch.matmul(query, key.mT) * options["scale"]
    return torch.matmul(torch.softmax(scores if mask is None else scores + mask, dim=-1), value)


class Helper(Attention):
    def forward(self, hidden_states, attention_mask=None):
        query, key, value = self.qkv_by_head(hidden_states)
        return self.merge(attend_at_once(query, key, value, attention_mask, scale=self.scale))


class HelperInHelper(Attention):
    def forward(self, hidden_states, attention_mask=None):
        return self.merge(attend_by_hand(*self.qkv_by_head(hidden_states), attention_mask, scale=self.scale))


class Static(Attention):
    @staticmethod
    def attend(query, key, value, mask, scale):
        scores = torch.matmul(query, key.mT) * scale
        if mask is not None:
            scores = scores + mask
        return torch.matmul(scores.softmax(-1), value)

    def forward(self, hidden_states, attention_mask=None):
        return self.merge(self.attend(*self.qkv_by_head(hidden_states), attention_mask, self.scale))


class Aliased(Attention):
    def _attend(self, query, key, value, mask):
        scores = torch.matmul(query, key.mT) * self.scale
        if mask is not None:
            scores = scores + mask
        return torch.matmul(scores.softmax(-1), value)

    attend = _attend

    def forward(self, hidden_states, attention_mask=None):
        return self.merge(self.attend(*self.qkv_by_head(hidden_states), attention_mask))


class OfClass(Attention):
    @classmethod
    def attend(cls, query, key, value, mask, scale):
        scores = torch.matmul(query, key.mT) * scale
        if mask is not None:
            scores = scores + mask
        return torch.matmul(scores.softmax(-1), value)

    forward = Static.forward


class Inherited(Matmul):
    def __init__(self):
        super().__init__()
        self.norm = nn.Identity()


class Extended(Operators):
    """Its own forward goes through that of its base, and does something more before and after."""

    def forward(self, hidden_states, attention_mask=None):
        return super().forward(-hidden_states, attention_mask).clone()


def logged(forward):
    @functools.wraps(forward)
    def wrapper(self, *args, **kwargs):
        self.calls = getattr(self, "calls", 0) + 1
        return forward(self, *args, **kwargs)

    return wrapper


class Decorated(Attention):
    @logged
    def forward(self, hidden_states, attention_mask=None):
        query, key, value = self.qkv_by_head(hidden_states)
        scores = query @ key.mT * self.scale
        if attention_mask is not None:
            scores = scores + attention_mask
        return self.merge(scores.softmax(-1) @ value)


def enclosed(scale, zero):
    class Enclosed(Attention):
        def forward(self, hidden_states, attention_mask=None):
            query, key, value = self.qkv_by_head(hidden_states)
            scores = query @ key.mT * scale + zero
            if attention_mask is not None:
                scores = scores + attention_mask
            return self.merge(scores.softmax(-1) @ value)

    return Enclosed


Enclosed = enclosed(WIDTH**-0.5, 0.0)


class Unbound(Attention):
    is_fused = True

    def forward(self, hidden_states, attention_mask=None):
        batch, length, _ = hidden_states.shape
        q, k, v = self.qkv(hidden_states).view(batch, length, 3, HEADS, WIDTH).permute(2, 0, 3, 1, 4).unbind(0)
        attn = (q * self.scale) @ k.transpose(-2, -1)
        if attention_mask is not None:
            attn = attn + attention_mask
        attn = attn.softmax(dim=-1)
        return self.o((attn @ v).transpose(1, 2).reshape(batch, length, D_MODEL))

    scales_q = True


class Relative(Attention):
    """The scores are of two terms, both of q: keys, and how far away they are."""

    def __init__(self):
        super().__init__()
        self.distance = nn.Embedding(2 * REACH + 1, WIDTH)

    def far(self, length):
        steps = torch.arange(length)
        return self.distance((steps - steps[:, None]).clamp(-REACH, REACH) + REACH)

    def forward(self, hidden_states, attention_mask=None):
        query, key, value = self.qkv_by_head(hidden_states)
        scores = torch.matmul(query, key.mT)
        scores = scores + torch.einsum("bhqd,qkd->bhqk", query, self.far(query.shape[2]))
        scores = scores * self.scale
        if attention_mask is not None:
            scores = scores + attention_mask
        return self.merge(torch.matmul(F.softmax(scores, dim=-1), value))


class UnboundRelative(Relative):
    is_fused = True

    def forward(self, hidden_states, attention_mask=None):
        batch, length, _ = hidden_states.shape
        q, k, v = self.qkv(hidden_states).reshape(batch, length, 3, HEADS, WIDTH).permute(2, 0, 3, 1, 4).unbind(0)
        attn = q @ k.mT + torch.einsum("bhqd,qkd->bhqk", q, self.far(length))
        attn = attn * self.scale
        if attention_mask is not None:
            attn = attn + attention_mask
        return self.merge(attn.softmax(-1) @ v)


class Dropped(Attention):
    def __init__(self):
        super().__init__()
        self.dropout = nn.Dropout(0.5)

    def forward(self, hidden_states, attention_mask=None):
        query, key, value = self.qkv_by_head(hidden_states)
        scores = query @ key.mT * self.scale
        if attention_mask is not None:
            scores = scores + attention_mask
        probs = nn.functional.softmax(scores, dim=-1, dtype=torch.float32).to(value.dtype)
        dropped = self.dropout(probs)
        return self.merge(dropped @ value)


class Branches(Attention):
    def forward(self, hidden_states, attention_mask=None):
        query, key, value = self.qkv_by_head(hidden_states)
        if attention_mask is None:
            probs = torch.softmax(query @ key.mT * self.scale, dim=-1)
            return self.merge(probs @ value)
        scores = torch.matmul(query, key.transpose(2, 3)) * self.scale + attention_mask
        probs = F.softmax(scores, dim=-1)
        return self.merge(torch.matmul(probs, value))


class Fused(Attention):
    def forward(self, hidden_states, attention_mask=None, is_causal=False):
        query, key, value = self.qkv_by_head(hidden_states)
        z = F.scaled_dot_product_attention(query, key, value, attn_mask=attention_mask, is_causal=is_causal)
        return self.merge(z)


class FusedFlat(BatchTimesHead):
    scales_q = False

    def forward(self, hidden_states, attention_mask=None, is_causal=False):
        batch, length, _ = hidden_states.shape
        query, key, value = (self._shape(m(hidden_states), batch) for m in (self.q, self.k, self.v))
        if attention_mask is not None:
            attention_mask = attention_mask.expand(batch, HEADS, length, length).reshape(batch * HEADS, length, length)
        z = F.scaled_dot_product_attention(query, key, value, attention_mask, 0.0, is_causal)
        return self.merge(z.view(batch, HEADS, length, WIDTH))


class FusedGrouped(Attention):
    kv_heads = 1

    def forward(self, hidden_states, attention_mask=None, is_causal=False):
        query, key, value = self.qkv_by_head(hidden_states)
        z = F.scaled_dot_product_attention(
            query=query,
            key=key,
            value=value,
            attn_mask=attention_mask,
            is_causal=is_causal,
            scale=self.scale,
            enable_gqa=True,
        )
        return self.merge(z)


class FusedRelative(Relative):
    """The mask is made of q, too, where batch and heads are one axis."""

    def forward(self, hidden_states, attention_mask=None, is_causal=False):
        batch, length, _ = hidden_states.shape
        query, key, value = self.qkv_by_head(hidden_states)
        query = query.reshape(batch * HEADS, length, WIDTH)
        far = torch.einsum("nqd,qkd->nqk", query, self.far(length)).view(batch, HEADS, length, length) * self.scale
        query = query.view(batch, HEADS, length, WIDTH)
        if attention_mask is not None and attention_mask.dtype == torch.bool:
            far = far.masked_fill(~attention_mask, -torch.inf)
        elif attention_mask is not None:
            far = far + attention_mask
        if is_causal:
            far = far + torch.full((length, length), -torch.inf).triu(1)
        return self.merge(F.scaled_dot_product_attention(query, key, value, attn_mask=far))


WRITTEN_OUT = (
    Matmul, Operators, BatchTimesHead, HeadMajor, SequenceFirst, Blocks, KeysFirst, MultiQuery, Added, AddedMethod, Methods,
    SoftmaxModule, Keywords, EinsumList, Helper, HelperInHelper, Static, Aliased, Inherited, Extended, Decorated, Enclosed,
    Unbound, Relative, UnboundRelative, Dropped, Branches, Pairs, Within,
)  # fmt: skip
FUSED = (Fused, FusedFlat, FusedGrouped, FusedRelative)
