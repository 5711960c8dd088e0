"""What a library has to offer to be compared: the abilities of which all work is made."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, ClassVar

import torch
from torch import Tensor

from benchmarks import models
from benchmarks.comparison.task import Task

Place = tuple[int, int]
"""Layer and head."""


class NotOffered(Exception):
    """A way has no means for some work; says why, in a few words."""


class Way:
    """One way to work with a model; `unpatched` by itself.

    Tensors are given back as the library has them; `read_everything` brings them to (batch, head, position, d_head)
    after the clock has stopped. name: of the column; key: the same on the command line; package: what has to be installed.
    """

    name: ClassVar[str]
    key: ClassVar[str]
    package: ClassVar[str | None] = None
    implementation: ClassVar[str] = "sdpa"
    whole_layers: ClassVar[float] = 0
    """Of how many layers it holds the patterns of all heads at a time when it gives those of some."""
    remark: ClassVar[str | None] = None
    """What has to be known of its numbers, in a few words."""

    def __init__(self, task: Task) -> None:
        self.task = task
        self.model = task.twin(self.implementation)

    def cut(self, site: str, layers: Sequence[int], heads: Sequence[int], ste: bool = False) -> AbstractContextManager[Any]:
        """Within it, `site` ("z" or "q") of these heads is zero. ste: and gradients pass as if it were not."""
        raise NotOffered("nothing is cut")

    def logits(self, ids: Tensor, past: Any = None) -> Tensor:
        """(batch, position, vocabulary). past: a cache of what came before, which grows."""
        return self.model(ids, **{models.CACHE: past}, use_cache=past is not None).logits

    def cache(self, ids: Tensor) -> Any:
        """A cache that holds these tokens."""
        return self.model(ids, use_cache=True)[models.CACHE]

    def generate(self, ids: Tensor, steps: int) -> Tensor:
        """Greedy, with a cache: prompt and `steps` tokens more."""
        return self.model.generate(ids, attention_mask=torch.ones_like(ids), **models.greedy(steps))

    def patterns(self, heads: Sequence[int] | None) -> list[Tensor]:
        """Of every layer, (batch, head, query, key) of these heads, or of all."""
        raise NotOffered("a fused kernel has no pattern")

    def everything(self) -> Any:
        """q, k, v, pattern and z of every layer, whatever it is kept in; see `read_everything`."""
        raise NotOffered("nothing is captured")

    def read_everything(self, found: Any) -> list[Tensor]:
        """Of what `everything` gave: q, k, v, pattern, z of the first layer, then of the next, (batch, head, position, ..)."""
        raise NotImplementedError

    def sweep(self, places: Sequence[Place]) -> Tensor:
        """The log probability of a token at the last position, with z of each (layer, head) cut in turn: here, a loop."""
        found = []
        for layer, head in places:
            with self.cut("z", [layer], [head]):
                found.append(log_probability(self.logits(self.task.ids), self.task))
        return torch.stack(found)

    def importance(self) -> Tensor:
        """(layer, head): minus z times the gradient of the logit difference, summed; what a cut changes, to first order."""
        raise NotOffered("no gradients of activations")

    def for_importance(self) -> AbstractContextManager[Any]:
        """Open, off the clock, while `importance` is called."""
        return nullcontext()

    def install(self, model: Any) -> None:
        """Puts what cuts need into a fresh model; and takes it out again, where that can be done."""
        raise NotOffered("nothing is put into the model")


@contextmanager
def frozen(model: Any) -> Iterator[None]:
    """No weight has a gradient, and the graph starts at the embedding's output: a backward pass is one of activations alone.

    For libraries that have `backward` and nothing like `torch.autograd.grad`, which leaves weights out by itself.
    """
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]

    def start(module: Any, args: Any, output: Tensor) -> None:
        if torch.is_grad_enabled():
            output.requires_grad_(True)

    hook = model.get_input_embeddings().register_forward_hook(start)
    for parameter in trainable:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        hook.remove()
        for parameter in trainable:
            parameter.requires_grad_(True)


def log_probability(logits: Tensor, task: Task) -> Tensor:
    return logits[:, -1].float().log_softmax(-1)[:, task.wanted]
