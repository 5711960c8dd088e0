"""A patched model behind a server: forwards in several threads at once."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from families import FAMILIES, VOCAB
from torch import Tensor

from surgery import Edit, Freeze, PatchError, capture, patch_model, patched, unpatch_model

THREADS = 6


@pytest.fixture(autouse=True)
def eager_switching() -> Iterator[None]:
    """Threads take turns far more often than they do by default, so that a shared state shows."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    yield
    sys.setswitchinterval(before)


def build(name: str = "llama", implementation: str = "sdpa", **options: Any) -> Any:
    return FAMILIES[name].build(implementation if FAMILIES[name].sdpa else "eager", **options)


def prompt(number: int, length: int | None = None) -> list[int]:
    generator = torch.Generator().manual_seed(number)
    return torch.randint(5, VOCAB, (length or 3 + number % 7,), generator=generator).tolist()


GREEDY = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}


def generate(model: Any, tokens: list[int], **more: Any) -> list[int]:
    """The tokens that a model adds, greedily, with a KV cache."""
    return model.generate(torch.tensor([tokens]), **{**GREEDY, **more})[0, len(tokens) :].tolist()


def scores_of(model: Any, tokens: list[int]) -> Tensor:
    """(step, token): the logits by which it chooses them."""
    found = model.generate(torch.tensor([tokens]), **GREEDY, output_logits=True, return_dict_in_generate=True)
    return torch.cat(found.logits)


def at_once(work: Callable[[int], Any], numbers: range, threads: int = THREADS) -> list[Any]:
    """What a function gives for each number, all begun in as many threads at once."""
    start = threading.Barrier(threads)

    def run(number: int) -> Any:
        if number < threads:
            start.wait(timeout=30)
        return work(number)

    with ThreadPoolExecutor(threads) as pool:
        return list(pool.map(run, numbers))


# Cuts whose result depends on where in its sequence a forward is, or on the mask that it was given.
CUTS: dict[str, list[Any]] = {
    "positions": [Freeze("ov", heads=[0, 3], positions=[2, 5, 8]), Edit("z", "add", 0.7, heads=[1], positions=[4])],
    "noise": [Freeze("both", to="noise", heads=[1], seed=3)],
    "keys": [Edit("v", "scale", 0.2, heads=[0], positions=[1, 4]), Edit("rot_k", "scale", -1.0, positions=[0, 6])],
    "pattern": [Edit("pattern", "previous", heads=[2]), Edit("scores", "scale", 0.5, heads=[0], positions=[3, 4, 7])],
    "projections": [Edit("q", "scale", 0.3, positions=[4]), Edit("result", "zero", heads=[1], positions=[3, 6])],
}


@pytest.mark.parametrize("kernel", ["auto", "eager"])
@pytest.mark.parametrize("cut", CUTS)
@pytest.mark.parametrize("name", ["llama", "gpt2", "gptj", "mpt", "bloom"])
def test_forwards_in_several_threads_do_not_disturb_each_other(name: str, cut: str, kernel: Any) -> None:
    model = patch_model(build(name), CUTS[cut], kernel=kernel)

    def scores(number: int) -> Tensor:
        tokens = torch.tensor([prompt(number)])
        mask = torch.ones_like(tokens)
        mask[:, : number % 3] = 0
        with torch.no_grad():
            return model(tokens, attention_mask=mask).logits

    expected = [scores(number) for number in range(18)]
    found = at_once(scores, range(18))
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    written = [scores_of(model, prompt(number)) for number in range(12)]
    found = at_once(lambda number: scores_of(model, prompt(number)), range(12))
    assert all(torch.equal(a, b) for a, b in zip(found, written, strict=True))
    assert not torch.equal(scores_of(build(name), prompt(6)), written[6]), "the cuts change what is written"


@pytest.mark.parametrize("name", ["bert", "t5", "bart"])
def test_models_with_blocks_beside_the_attention_and_two_stacks(name: str) -> None:
    """BERT's output projection lies in a module of its own, which asks the attention's forward where it is."""
    cuts = [Edit("result", "scale", 0.5, heads=[1], positions=[1, 3]), Freeze("both", to="noise", heads=[2])]
    model = patch_model(build(name), cuts)

    def run(number: int) -> Tensor:
        with torch.no_grad():
            output = model(**FAMILIES[name].inputs(length=7 + number % 5, seed=number))
        return output[0] if name == "bert" else output.logits

    expected = [run(number) for number in range(12)]
    assert all(torch.equal(a, b) for a, b in zip(at_once(run, range(12)), expected, strict=True))


def test_gradients_in_several_threads() -> None:
    model = patch_model(build(), [Freeze("both", heads=[1], positions=[2, 3], backward="ste"), Edit("pattern", "scale", 0.5)])

    def gradient(number: int) -> Tensor:
        states = model.get_input_embeddings()(torch.tensor([prompt(number)])).detach().requires_grad_()
        [found] = torch.autograd.grad(model(inputs_embeds=states).logits.square().sum(), states)
        return found

    expected = [gradient(number) for number in range(12)]
    assert all(torch.equal(a, b) for a, b in zip(at_once(gradient, range(12)), expected, strict=True))


# -- changes of cuts beside forwards ------------------------------------------------------------------------------------------


def test_blocks_of_two_threads_do_not_overlap() -> None:
    model = patch_model(build(), CUTS["keys"])
    with ThreadPoolExecutor(1) as pool:
        with capture(model, "z") as run:
            for change in (lambda: capture(model, "z").__enter__(), lambda: patch_model(model), lambda: unpatch_model(model)):
                with pytest.raises(PatchError, match=r"block .* that the thread 'MainThread' has open.*one block"):
                    pool.submit(change).result(timeout=30)
            with patched(model, CUTS["noise"]), capture(model, "v"):  # a thread's own blocks nest
                generate(model, prompt(5))
        pool.submit(patch_model, model, CUTS["noise"]).result(timeout=30)
    assert len(run.steps(0, "z")) == 6


def test_a_capture_sees_the_forwards_of_all_threads() -> None:
    """It is of the model, whoever runs it: each forward is whole, and they come in the order in which they reach a site."""
    model = patch_model(build(), CUTS["noise"])

    def forward(number: int) -> Tensor:
        with torch.no_grad():
            return model(torch.tensor([prompt(number)])).logits

    alone = []
    for number in range(24):
        with capture(model, ["z", "pattern"], layers=[1]) as run:
            forward(number)
        alone.append((run[1, "z"], run[1, "pattern"]))
    expected = [forward(number) for number in range(24)]
    with capture(model, ["z", "pattern"], layers=[1]) as run:
        found = at_once(forward, range(24))
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    for number, site in enumerate(("z", "pattern")):
        left = list(run.steps(1, site))
        assert len(left) == 24
        for one in alone:
            matching = [i for i, tensor in enumerate(left) if torch.equal(tensor, one[number])]
            assert matching, "what one forward alone shows is there"
            del left[matching[0]]
