"""A model whose circuit is known: weights set by hand, so that every finding has a number that algebra gives.

A GPT-2 of two layers of four heads, without MLPs, in float64. The residual stream holds one-hot vectors, each in channels of
its own: TOKEN (the token here), POSITION, PREVIOUS (what the previous-token head writes), OUT (the logits), and ONE (1 at each
position). The unembedding reads OUT alone, and no head reads it.

Norms do nothing: their epsilon is 2^80 and their gain 2^40, so that (x - mean) / sqrt(variance + 2^80) · 2^40 = x - mean, and a
channel of its own keeps the mean at 0 (BALANCE: minus the sum of all others, which nothing reads). The derivative of such a
norm is the identity, too. Scores are q·k, as W_Q has the factor sqrt(d_head) in it.

With x_t the token at t, queries t and keys s <= t, from 0:

* PREVIOUS_TOKEN: scores PREVIOUS_SCORE where s = t - 1, else 0. At e^-60 of the weight elsewhere, the pattern is one-hot in
  float64 (at t = 0 there is BOS alone). It writes onehot(x_(t-1)) to PREVIOUS.
* MOVER: scores ln(SINK) at BOS, else 0; its v is 1 at BOS, else 0. So z_t = SINK / (SINK + t) for t > 0, and MOVED times
  that is added to the logit of MARK, whatever the tokens.
* LOOKER: scores ln(TWIN) where x_s = x_t, else 0. Its v is onehot(x_s), and its W_O is 0: it looks and moves nothing.
* INDUCTION: scores `match` (by default ln(HIT)) where PREVIOUS at s is x_t, else 0; v is onehot(x_s), which it writes to OUT
  times COPIED. With one such s, its weight is HIT / (HIT + t), that of all other keys 1 / (HIT + t).
* All others: weights of 0, so uniform attention that moves nothing.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import transformers
from torch import Tensor

LAYERS, HEADS, D_HEAD = 2, 4, 16
D_MODEL = HEADS * D_HEAD
VOCAB, LENGTH = 12, 13
"""Tokens with BOS; positions: room for BOS and two copies of six tokens."""
BOS, MARK = 0, 11

PREVIOUS_TOKEN, MOVER, LOOKER = ("self.0", 0), ("self.0", 1), ("self.0", 2)
INDUCTION = ("self.1", 2)
PREVIOUS_SCORE = 60.0
SINK, MOVED = 22.0, 6.0
TWIN = 30.0
HIT, COPIED = 9.0, 20.0

TOKEN = range(VOCAB)
POSITION = range(VOCAB, VOCAB + LENGTH)
PREVIOUS = range(POSITION.stop, POSITION.stop + VOCAB)
OUT = range(PREVIOUS.stop, PREVIOUS.stop + VOCAB)
ONE, BALANCE = OUT.stop, OUT.stop + 1

EPSILON, GAIN = 2.0**80, 2.0**40


def planted(match: float = math.log(HIT), implementation: str = "eager") -> Any:
    """The model. match: the score of an induction head's match; large, and its pattern is saturated."""
    config = transformers.GPT2Config(
        vocab_size=VOCAB,
        n_positions=LENGTH,
        n_embd=D_MODEL,
        n_layer=LAYERS,
        n_head=HEADS,
        n_inner=1,
        layer_norm_epsilon=EPSILON,
        tie_word_embeddings=False,
        bos_token_id=BOS,
        eos_token_id=BOS,
        attn_implementation=implementation,
    )
    model = transformers.GPT2LMHeadModel(config).double().eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            is_gain = "ln_" in name and name.endswith("weight")
            parameter.fill_(GAIN if is_gain else 0.0)
        embed, places = model.transformer.wte.weight, model.transformer.wpe.weight
        for token in range(VOCAB):
            _write(embed[token], TOKEN[token], 1.0)
            _write(embed[token], ONE, 1.0)
            model.lm_head.weight[token, OUT[token]] = 1.0
        for position in range(LENGTH):
            _write(places[position], POSITION[position], 1.0)

        head = _Head(model, PREVIOUS_TOKEN)
        for channel in range(LENGTH - 1):
            head.q(POSITION[channel + 1], channel, PREVIOUS_SCORE)
            head.k(POSITION[channel], channel)
        for token in range(VOCAB):
            head.v(TOKEN[token], token)
            head.o(token, PREVIOUS[token], 1.0)

        head = _Head(model, MOVER)
        head.q(ONE, 0, math.log(SINK))
        head.k(TOKEN[BOS], 0)
        head.v(TOKEN[BOS], 0)
        head.o(0, OUT[MARK], MOVED)

        head = _Head(model, LOOKER)
        for token in range(VOCAB):
            head.q(TOKEN[token], token, math.log(TWIN))
            head.k(TOKEN[token], token)
            head.v(TOKEN[token], token)

        head = _Head(model, INDUCTION)
        for token in range(VOCAB):
            head.q(TOKEN[token], token, match)
            head.k(PREVIOUS[token], token)
            head.v(TOKEN[token], token)
            head.o(token, OUT[token], COPIED)
    return model


def prompts(rows: int = 6, seed: int = 0) -> Tensor:
    """(rows, 12): BOS, six different tokens, and the first five of them again; neither BOS nor MARK among the six.

    At the last position, t = 11, the induction head finds one match, the last token of the first copy, which is at 6 alone.
    """
    generator = torch.Generator().manual_seed(seed)
    segments = torch.stack([1 + torch.randperm(VOCAB - 2, generator=generator)[:6] for _ in range(rows)])
    return torch.cat([torch.full((rows, 1), BOS), segments, segments[:, :5]], 1)


def unused(ids: Tensor) -> Tensor:
    """(rows,): for each prompt a token that is not in it, and neither BOS nor MARK."""
    return torch.tensor([next(token for token in range(1, VOCAB - 1) if token not in row) for row in ids.tolist()])


class _Head:
    """Sets single entries of one head's weights: from a channel of the stream to one of the head, or the other way."""

    def __init__(self, model: Any, where: tuple[str, int]) -> None:
        address, head = where
        attention = model.transformer.h[int(address.rpartition(".")[2])].attn
        self.qkv, self.out, self.first = attention.c_attn.weight, attention.c_proj.weight, head * D_HEAD

    def q(self, read: int, channel: int, score: float) -> None:
        self.qkv[read, self.first + channel] = score * math.sqrt(D_HEAD)  # by which scores are divided

    def k(self, read: int, channel: int) -> None:
        self.qkv[read, D_MODEL + self.first + channel] = 1.0

    def v(self, read: int, channel: int) -> None:
        self.qkv[read, 2 * D_MODEL + self.first + channel] = 1.0

    def o(self, channel: int, written: int, value: float) -> None:
        _write(self.out[self.first + channel], written, value)


def _write(row: Tensor, channel: int, value: float) -> None:
    """Adds to a channel, and takes the same from BALANCE."""
    row[channel] += value
    row[BALANCE] -= value
