"""Train the demo model: a two-layer transformer that copies in context by an induction circuit.

Run as `python -m surgery.demo.train --out DIR --seed N`. With the default arguments this is the recipe of the
model stored in `surgery/demo/model`. It runs on one CPU thread with its own random generators, so the same
seed and library versions give the same weights on the same kind of machine.

The task is to predict the second copy of a random segment (see `surgery.demo.data`). Its length differs between
the sequences of a batch, so that no fixed distance solves it. Left alone, the training spreads each of the two
jobs (previous token, induction) over several heads. Three things concentrate it into one head per layer:

* a penalty on the effective number of heads that write to the residual stream in each layer (`spare_heads`);
* a penalty on the entropy of the patterns of the heads that do write (`attention_entropy`), without which the
  previous-token head also looks at the tokens next to the previous one;
* strong weight decay, which takes their patterns from the heads that write nothing.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import logging
import math
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import transformers
from tqdm import tqdm
from transformers import LlamaConfig, LlamaForCausalLM

if __package__ in (None, ""):  # run as a file: make the package importable
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from surgery.demo.data import (
    BOS_TOKEN_ID,
    first_copy_positions,
    mixed_sequences,
    repeated_sequences,
    scored_positions,
)

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Recipe:
    """Everything that decides the trained weights, the library versions aside."""

    seed: int = 0
    steps: int = 2500
    batch: int = 32  # sequences per step
    learning_rate: float = 2e-3  # peak, after the warm-up; falls to 0 along a cosine
    warmup: int = 200  # steps
    weight_decay: float = 0.5  # AdamW's, on the weight matrices
    adam_eps: float = 1e-5  # large, so that heads with nearly no gradient decay instead of drifting
    head_penalty: float = 0.4  # nats per spare head, see `spare_heads`
    entropy_penalty: float = 0.05  # nats per nat of mean entropy, see `attention_entropy`
    penalty_from: float = 0.08  # share of the steps after which both penalties start to rise
    penalty_full: float = 0.4  # share of the steps after which they have their full size
    first_copy_weight: float = 0.1  # of an unpredictable position in the loss; a predictable one counts 1
    min_segment: int = 8  # tokens
    max_segment: int = 30  # tokens
    vocab: int = 64  # ids, BOS included
    n_positions: int = 64  # at least 1 + 2 * max_segment
    n_layer: int = 2
    n_head: int = 4
    d_model: int = 64
    d_mlp: int = 64  # width of the gated MLP
    initializer_range: float = 0.08


def build_model(recipe: Recipe) -> LlamaForCausalLM:
    """An untrained Llama of the recipe's size, its weights drawn from torch's global generator.

    Rotary positions leave no position in the residual stream. With learned position embeddings, as in GPT-2,
    several trial runs solved the task without a previous-token head, presumably by fetching the position of the
    token's earlier occurrence and then looking up the position after it.
    """
    config = LlamaConfig(
        vocab_size=recipe.vocab,
        max_position_embeddings=recipe.n_positions,
        hidden_size=recipe.d_model,
        intermediate_size=recipe.d_mlp,
        num_hidden_layers=recipe.n_layer,
        num_attention_heads=recipe.n_head,
        attention_bias=False,
        attention_dropout=0.0,
        tie_word_embeddings=False,
        initializer_range=recipe.initializer_range,
        bos_token_id=BOS_TOKEN_ID,
        eos_token_id=None,
    )
    return LlamaForCausalLM._from_config(config, attn_implementation="eager")


class HeadSizes:
    """Measures how much each head writes to the residual stream, in the forward pass it is attached to.

    The size of head h is the root mean square over batch and positions of the norm of z_h W_O[h], where z_h
    (d_head) is its attention-weighted value and W_O[h] (d_head, d_model) its rows of the output projection.
    """

    def __init__(self, model: LlamaForCausalLM) -> None:
        self.n_head: int = model.config.num_attention_heads
        self.sizes: list[torch.Tensor] = []  # per layer, of shape (n_head,)
        self.handles = [layer.self_attn.o_proj.register_forward_pre_hook(self._measure) for layer in model.model.layers]

    def _measure(self, o_proj: torch.nn.Linear, args: tuple[torch.Tensor, ...]) -> None:
        z = args[0]  # (batch, positions, d_model): the heads side by side
        z = z.unflatten(-1, (self.n_head, -1)).flatten(0, 1)  # (batch * positions, n_head, d_head)
        w_o = o_proj.weight.T.unflatten(0, (self.n_head, -1))  # (n_head, d_head, d_model)
        # mean |z W|^2 = sum of (z^T z / rows) * (W W^T): (d_head, d_head) products, no d_model-sized outputs.
        second_moment = torch.einsum("nhi,nhj->hij", z, z) / z.shape[0]
        mean_square = (second_moment * (w_o @ w_o.transpose(1, 2))).sum((1, 2))
        self.sizes.append((mean_square.clamp_min(0) + 1e-8).sqrt())

    def detach(self) -> None:
        """Remove the hooks."""
        for handle in self.handles:
            handle.remove()

    def take(self) -> torch.Tensor:
        """The sizes measured in the last forward pass, (n_layer, n_head); forgets them."""
        sizes = torch.stack(self.sizes)
        self.sizes.clear()
        return sizes


def spare_heads(sizes: torch.Tensor) -> torch.Tensor:
    """Effective number of heads beyond one, summed over layers (a scalar).

    The effective number of a layer's heads is (sum of sizes)^2 / (sum of squared sizes): n_head if all are
    of one size, 1 if a single head writes. It does not change with the overall size.

    Args:
        sizes: (n_layer, n_head), from `HeadSizes`.
    """
    return (sizes.sum(1).square() / sizes.square().sum(1) - 1).sum()


def attention_entropy(attentions: tuple[torch.Tensor, ...], sizes: torch.Tensor, used: torch.Tensor) -> torch.Tensor:
    """Mean entropy of the attention patterns, in nats per layer (a scalar).

    The heads of a layer count by their share of its output, so that heads which write nothing are left alone
    and lose their patterns to the weight decay.

    Args:
        attentions: per layer, probabilities of shape (batch, n_head, positions, positions), keys last.
        sizes: (n_layer, n_head) head sizes; no gradient flows into them.
        used: (batch, positions), False at the query positions to leave out.
    """
    shares = sizes.detach() / sizes.detach().sum(1, keepdim=True)
    entropy = torch.special.entr(torch.stack(attentions) + 1e-9).sum(-1)  # (n_layer, batch, n_head, positions)
    return (torch.einsum("lbhq,lh->lbq", entropy, shares) * used).sum() / (used.sum() * len(attentions))


def token_losses(logits: torch.Tensor, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Next-token losses in nats and whether the top token is right, both (batch, positions - 1)."""
    logits, targets = logits[:, :-1], ids[:, 1:]
    losses = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none")
    return losses.view_as(targets), logits.argmax(-1) == targets


def position_weights(lengths: torch.Tensor, n_predictions: int, first_copy_weight: float) -> torch.Tensor:
    """Weight of each prediction in the training loss.

    Args:
        lengths: (batch,) segment lengths in tokens.
        n_predictions: positions with a next token.
        first_copy_weight: weight where the next token is random.

    Returns:
        (batch, n_predictions): 1 where the first copy determines the next token, `first_copy_weight` before
        that, 0 in the fill behind the second copy.
    """
    position = torch.arange(n_predictions)
    segment = lengths[:, None]
    weights = torch.where(position > segment, 1.0, first_copy_weight)
    return weights * (position < 2 * segment)


def penalty_share(recipe: Recipe, step: int) -> float:
    """Share of the penalties that counts at a step: 0 at first, then rising linearly, then 1.

    They come in late so that the task, not they, decides which circuit forms.
    """
    rise = (step / recipe.steps - recipe.penalty_from) / (recipe.penalty_full - recipe.penalty_from)
    return min(max(rise, 0.0), 1.0)


def train(recipe: Recipe) -> LlamaForCausalLM:
    """Train a model from scratch; deterministic by `recipe.seed`."""
    torch.manual_seed(recipe.seed)
    model = build_model(recipe).train()
    head_sizes = HeadSizes(model)
    matrices = [p for p in model.parameters() if p.dim() > 1]
    vectors = [p for p in model.parameters() if p.dim() <= 1]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": recipe.weight_decay}, {"params": vectors, "weight_decay": 0.0}],
        lr=recipe.learning_rate,
        betas=(0.9, 0.98),
        eps=recipe.adam_eps,
    )

    def rate(step: int) -> float:
        return min((step + 1) / recipe.warmup, 0.5 * (1 + math.cos(math.pi * step / recipe.steps)))

    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
    generator = torch.Generator().manual_seed(recipe.seed)
    bar = tqdm(range(recipe.steps), desc="train", unit="step", mininterval=1.0)
    for step in bar:
        ids, lengths = mixed_sequences(recipe.batch, recipe.min_segment, recipe.max_segment, recipe.vocab, generator)
        output = model(ids, use_cache=False, output_attentions=True)
        losses, _ = token_losses(output.logits, ids)
        weights = position_weights(lengths, losses.shape[1], recipe.first_copy_weight)
        sizes = head_sizes.take()
        spare = spare_heads(sizes)
        entropy = attention_entropy(output.attentions, sizes, torch.arange(ids.shape[1]) <= 2 * lengths[:, None])
        penalty = recipe.head_penalty * spare + recipe.entropy_penalty * entropy
        loss = (losses * weights).sum() / weights.sum()
        loss = loss + penalty_share(recipe, step) * penalty
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
        if step % 100 == 0:
            second = losses.detach()[weights == 1].mean().item()
            bar.set_postfix(second_copy_nats=f"{second:.3f}", spare_heads=f"{spare.item():.2f}")
    head_sizes.detach()
    return model.eval()


@torch.no_grad()
def evaluate(model: LlamaForCausalLM, recipe: Recipe, seed: int, batch: int = 128) -> dict[str, float]:
    """Losses and accuracy on freshly drawn sequences, `batch` of every segment length of the recipe.

    Returns:
        `loss_nats_second_copy`, `loss_nats_first_copy`: mean loss in nats per token where the first copy
        determines the next token, and where it is random; `accuracy_second_copy`: share of right top tokens.
    """
    generator = torch.Generator().manual_seed(seed)
    first, second, right = [], [], []
    for segment in range(recipe.min_segment, recipe.max_segment + 1):
        ids = repeated_sequences(batch, segment, recipe.vocab, generator)
        losses, hits = token_losses(model(ids, use_cache=False).logits, ids)
        first.append(losses[:, first_copy_positions(segment)].flatten())
        second.append(losses[:, scored_positions(segment)].flatten())
        right.append(hits[:, scored_positions(segment)].flatten())
    return {
        "loss_nats_second_copy": torch.cat(second).mean().item(),
        "loss_nats_first_copy": torch.cat(first).mean().item(),
        "accuracy_second_copy": torch.cat(right).float().mean().item(),
    }


def main(argv: list[str] | None = None) -> None:
    """Train, evaluate and save: the model's files, and `training.json` with the recipe and the measurements."""
    parser = argparse.ArgumentParser(prog="python -m surgery.demo.train", description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder for the model and training.json")
    parser.add_argument("--seed", type=int, default=Recipe.seed, help="seed of weights and data (default %(default)s)")
    parser.add_argument("--steps", type=int, default=Recipe.steps, help="optimizer steps (default %(default)s)")
    args = parser.parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(name)s: %(message)s")
    torch.set_num_threads(1)  # sums in one order
    torch.use_deterministic_algorithms(True)

    recipe = Recipe(seed=args.seed, steps=args.steps)
    model = train(recipe)
    held_out_seed = recipe.seed + 1_000_000
    measured = evaluate(model, recipe, held_out_seed)
    model.save_pretrained(args.out)
    weights_file = args.out / "model.safetensors"
    record = {
        "command": f"python -m surgery.demo.train --out DIR --seed {recipe.seed} --steps {recipe.steps}",
        **asdict(recipe),
        "held_out_seed": held_out_seed,
        **measured,
        "loss_nats_uniform": math.log(recipe.vocab),
        "parameters": model.num_parameters(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "sha256": hashlib.sha256(weights_file.read_bytes()).hexdigest(),
    }
    (args.out / "training.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    logger.info("saved %s: %s", args.out, measured)


if __name__ == "__main__":
    main()
