"""A patched model behind a server: forwards in several threads at once."""

from __future__ import annotations

import asyncio
import inspect
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from families import FAMILIES, VOCAB
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from torch import Tensor
from transformers import (
    ContinuousBatchingConfig,
    DynamicCache,
    GenerationConfig,
    PreTrainedTokenizerFast,
    ViTConfig,
    ViTModel,
    pipeline,
)
from transformers.cli.serving.model_manager import ModelManager, TimedModel
from transformers.cli.serving.utils import GenerationState

from surgery import CacheError, Edit, Freeze, PatchError, capture, patch_model, patched, unpatch_model

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


# -- continuous batching ------------------------------------------------------------------------------------------------------

PROMPTS = [prompt(number) for number in range(6)]
PROMPTS += [PROMPTS[3] + [5, 9, 33], PROMPTS[3] + [5, 9, 34, 20], PROMPTS[3]]  # what pages may share

PAGED: dict[str, Any] = {
    "z": Freeze("ov", heads=[1]),
    "z by position": Freeze("ov", heads=[0, 2], positions=[1, 4, 7]),
    "noise": Freeze("both", to="noise", heads=[1], seed=2),
    "v": Edit("v", "scale", 0.2, heads=[0], positions=[1, 4]),
    "rot_k": Edit("rot_k", "scale", -1.0, positions=[0, 6], heads=[1, 2]),
    "shared": Freeze("both", heads=[1], gqa="shared", positions=[2, 3]),
    "k": Edit("k", "noise"),
    "q": Edit("q", "scale", -1.0, positions=[2, 3, 4, 5, 6]),
    "result": Edit("result", "zero", heads=[1], positions=[3, 6]),
    "previous": Edit("pattern", "previous", heads=[2]),
    "diagonal": Edit("pattern", "diagonal", positions=[2, 5]),
    "first": Edit("pattern", "first", heads=[0, 1]),
    "scores": Edit("scores", "add", torch.linspace(-9, 9, 20 * 20).sin().reshape(20, 20) * 9, heads=[0, 3]),
}


def paging(**options: Any) -> ContinuousBatchingConfig:
    """Small pages and small batches, so that prompts are cut up, wait for each other, and pages are full and shared."""
    names = inspect.signature(ContinuousBatchingConfig).parameters
    page = "page_size" if "page_size" in names else "block_size"
    return ContinuousBatchingConfig(**{"num_blocks": 64, "max_batch_tokens": 16, page: 4, **options})


def greedily(**options: Any) -> GenerationConfig:
    return GenerationConfig(max_new_tokens=6, do_sample=False, eos_token_id=-1, pad_token_id=0, **options)


def generate_batch(model: Any, prompts: list[list[int]], persistent: bool = False, **options: Any) -> list[Any]:
    found = model.generate_batch(
        prompts, generation_config=greedily(), continuous_batching_config=paging(**options), persistent_manager=persistent
    )
    assert all(one.error is None for one in found.values())
    return list(found.values())


def tokens_of(outputs: list[Any]) -> list[list[int]]:
    return [one.generated_tokens for one in outputs]


@pytest.mark.parametrize("kernel", ["auto", "eager"])
@pytest.mark.parametrize("cut", PAGED)
def test_continuous_batching_writes_what_generate_writes(cut: str, kernel: Any) -> None:
    model = build()
    plain = [generate(model, tokens) for tokens in PROMPTS]
    patch_model(model, PAGED[cut], kernel=kernel)
    expected = [generate(model, tokens) for tokens in PROMPTS]
    assert expected != plain, "the cut changes what is written"
    assert tokens_of(generate_batch(model, PROMPTS)) == expected


@pytest.mark.parametrize(
    ("name", "implementation"),
    [("llama", "eager"), ("gpt2", "sdpa"), ("gpt2", "eager"), ("mistral", "sdpa"), ("mistral", "eager"), ("gemma3", "eager")],
)
def test_continuous_batching_in_other_kernels_and_under_windows(name: str, implementation: str) -> None:
    """paged|eager takes the cache itself; GPT-2 hands no positions on; windows drop keys."""
    model = patch_model(build(name, implementation), [PAGED[cut] for cut in ("z by position", "v", "rot_k", "previous")])
    found = generate_batch(model, PROMPTS, return_logprobs=True)
    for tokens, one in zip(PROMPTS, found, strict=True):
        scores = scores_of(model, tokens).log_softmax(dim=-1)
        assert one.generated_tokens == scores.argmax(dim=-1).tolist()
        # Products over other lengths round differently.
        assert torch.allclose(torch.tensor(one.logprobs), scores.amax(dim=-1), atol=1e-4)


@pytest.mark.parametrize("sharing", [True, False])
def test_requests_that_come_late(sharing: bool) -> None:
    model = patch_model(build(), [PAGED["noise"], PAGED["v"], PAGED["previous"]])
    expected = {f"r{number}": generate(model, tokens) for number, tokens in enumerate(PROMPTS)}
    manager = model.init_continuous_batching(greedily(), paging(allow_block_sharing=sharing))
    manager.start()
    try:
        found = {}
        for name, tokens in zip(expected, PROMPTS, strict=True):
            manager.add_request(tokens, request_id=name, max_new_tokens=6)
            if name in ("r1", "r4"):  # those before have begun, or are done
                while not found:
                    found |= {one.request_id: one for one in [manager.get_result(timeout=0.05)] if one is not None}
        while len(found) < len(PROMPTS):
            one = manager.get_result(timeout=30)
            found[one.request_id] = one
    finally:
        manager.stop(block=True)
    assert {name: one.generated_tokens for name, one in found.items()} == expected


# Refused before anything runs.
MIXING = {
    "a callable at z": Edit("z", lambda z: z * 0.5),
    "a mean of the current activations at z": Freeze("ov", to="mean"),
    "'resample' at z, by rows": Freeze("ov", to="resample"),
    "values by row of the batch at z": Edit("z", "add", torch.ones(2, 1, 1, 16)),
}


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("found", MIXING)
def test_cuts_that_would_mix_sequences_are_refused_where_they_are_asked_for(found: str, implementation: str) -> None:
    model = patch_model(build("llama", implementation), MIXING[found]).train()
    with pytest.raises(CacheError, match=rf"self_attn' in continuous batching.*{found}.*model.generate"):
        model.generate_batch(PROMPTS, generation_config=greedily(), continuous_batching_config=paging())
    with pytest.raises(CacheError, match=found):
        model.init_continuous_batching(greedily(), paging())
    assert model.config._attn_implementation == implementation, "nothing was changed"
    assert all(module.training for module in model.modules())
    last = model.model.layers[1].eval()
    with pytest.raises(CacheError, match=found):
        model.init_continuous_batching(greedily(), paging())
    asleep = {module for module in model.modules() if not module.training}
    assert asleep == set(last.modules()), "what the refusal came before is as it was"
    patch_model(model.eval(), PAGED["z"])
    assert tokens_of(generate_batch(model, PROMPTS)) == [generate(model, tokens) for tokens in PROMPTS]


def test_captures_and_attention_that_never_asks_the_cache_are_refused() -> None:
    model = build()
    with capture(model, "z"), pytest.raises(CacheError, match="a capture of z"):
        generate_batch(model, PROMPTS)
    with pytest.raises(CacheError, match="does not go through transformers' attention interface"):
        generate_batch(patch_model(build("gpt_neo"), PAGED["z"]), PROMPTS)


def test_an_ordinary_cache_of_the_same_name_is_no_paged_one() -> None:
    """Both kinds are called `cache` since transformers 5.24; a forward that knows nothing of caches hands it to its kernel."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 40}
    model, pixels = ViTModel(ViTConfig(**sizes, image_size=12, patch_size=4)).eval(), torch.randn(2, 3, 12, 12)
    for cut in (PAGED["z"], Edit("v", "scale", 0.5, positions=[1]), Edit("pattern", "previous", heads=[1])):
        patch_model(model, cut)
        with torch.no_grad(), capture(model, ["pattern"]):
            expected = model(pixels).last_hidden_state
            assert torch.equal(model(pixels, cache=DynamicCache()).last_hidden_state, expected)


def test_what_is_refused_in_the_managers_thread_is_an_error_of_each_request(monkeypatch: pytest.MonkeyPatch) -> None:
    """Should a version of transformers begin otherwise, the forward itself still refuses."""
    monkeypatch.setattr("surgery.classes.beginning", lambda module: nullcontext(False))
    model = patch_model(build(), Freeze("ov", to="resample"))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = model.generate_batch(PROMPTS[:2], generation_config=greedily(), continuous_batching_config=paging())
    assert all("'resample' at z" in one.error for one in found.values())


def test_cuts_that_need_the_keys_are_refused_in_flash_attention() -> None:
    model = patch_model(build(), PAGED["v"])
    surgery = model.model.layers[0].self_attn._surgery
    model.config._attn_implementation = "flash_attention_2"  # which is not installed; nothing runs
    with pytest.raises(CacheError, match="work at v, whose keys flash attention reads"):
        surgery.check_paged()
    patch_model(model, PAGED["z by position"])
    surgery.check_paged()


def test_pages_that_were_filled_under_other_cuts_are_not_read() -> None:
    model, long = build(), [prompt(number, 20) for number in range(3)]
    plain = [generate(model, tokens) for tokens in long]
    for spec in (None, PAGED["v"], PAGED["z"], None):
        patch_model(model, spec)
        expected = [generate(model, tokens) for tokens in long]
        assert (expected == plain) == (spec is None)
        for _ in range(2):  # with what the first has left in the pages
            assert tokens_of(generate_batch(model, long, persistent=True)) == expected
    manager = model._cached_continuous_batching_manager
    unpatch_model(model)
    assert not hasattr(model, "_cached_continuous_batching_manager") and manager.batch_processor is None
    assert tokens_of(generate_batch(model, long, persistent=True)) == plain
    patch_model(model, PAGED["z"])
    assert not hasattr(model, "_cached_continuous_batching_manager")


def test_cuts_do_not_change_while_a_manager_serves_the_model() -> None:
    model = patch_model(build(), PAGED["z"])
    expected = generate(model, PROMPTS[0])
    manager = model.init_continuous_batching(greedily(), paging())
    manager.start()
    try:
        for change in (
            lambda: patch_model(model, PAGED["v"]),
            lambda: patch_model(torch.nn.ModuleDict({"wrapped": model}), PAGED["v"]),
            lambda: unpatch_model(model),
            lambda: patched(model, None).__enter__(),
            lambda: capture(model, "z").__enter__(),
        ):
            with pytest.raises(PatchError, match=r"continuous batching that serves this model.*manager.stop\(\)"):
                change()
        patch_model(build(), PAGED["v"])  # another model of the class is free
        manager.add_request(PROMPTS[0], max_new_tokens=6)
        assert manager.get_result(timeout=30).generated_tokens == expected
    finally:
        manager.stop(block=True)
    patch_model(model, PAGED["v"])


def test_a_block_that_ends_while_a_manager_serves_the_model_says_so() -> None:
    model = build()
    with pytest.raises(PatchError, match="the block has ended"), patched(model, PAGED["z"]):
        manager = model.init_continuous_batching(greedily(), paging())
        manager.start()
    manager.stop(block=True)
    assert type(model.model.layers[0].self_attn).__name__ == "LlamaAttention"


# -- pipelines and transformers serve -----------------------------------------------------------------------------------------


def words() -> PreTrainedTokenizerFast:
    """A tokenizer of the tiny models' numbers."""
    names = ["pad", "unknown", *(f"w{number}" for number in range(2, VOCAB))]
    inner = Tokenizer(WordLevel({name: number for number, name in enumerate(names)}, unk_token="unknown"))
    inner.pre_tokenizer = Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="unknown", pad_token="pad", padding_side="left")


def text(tokens: list[int]) -> str:
    return " ".join(f"w{token}" for token in tokens)


def test_a_pipeline_under_requests_from_several_threads() -> None:
    model = patch_model(build(), [PAGED["noise"], PAGED["v"], PAGED["previous"]])
    pipe = pipeline("text-generation", model=model, tokenizer=words())

    def ask(number: int) -> list[int]:
        [answer] = pipe(text(prompt(number)), return_tensors=True, generation_config=greedily())
        return answer["generated_token_ids"]

    expected = [ask(number) for number in range(18)]
    assert expected == [prompt(number) + generate(model, prompt(number)) for number in range(18)]
    assert at_once(ask, range(18)) == expected
    unpatch_model(model)
    assert [ask(number) for number in range(18)] != expected


@pytest.mark.parametrize("batching", [False, True])
def test_requests_through_transformers_serve_have_the_cuts(batching: bool) -> None:
    """What `transformers serve` does for a request, but the web server in front: its cache of models and its managers."""
    model, tokenizer = patch_model(build(), [PAGED["noise"], PAGED["v"], PAGED["previous"]]), words()
    expected = [generate(model, tokens) for tokens in PROMPTS]
    models, state = ModelManager(model_timeout=-1), GenerationState(continuous_batching=batching, cb_config=paging())
    name = models.process_model_name("cut")
    models.loaded_models[name] = TimedModel(model, -1, tokenizer)

    async def ask(number: int) -> list[int]:
        served, processor = models.load_model_and_processor(name)
        is_paged = state.use_continuous_batching(served, models.get_model_modality(served, processor))
        manager = state.get_manager(name, use_cb=is_paged)
        if is_paged:
            manager.init_cb(served, greedily())
            given: Any = {"input_ids": PROMPTS[number]}
        else:
            given = {"input_ids": torch.tensor([PROMPTS[number]])}
        _, length, tokens = await manager.generate_non_streaming(served, processor, given, greedily(), f"r{number}")
        assert length == len(PROMPTS[number])
        return list(map(int, tokens))

    async def ask_all() -> list[list[int]]:
        return await asyncio.gather(*(ask(number) for number in range(len(PROMPTS))))

    try:
        assert asyncio.run(ask_all()) == expected
    finally:
        state.shutdown()
        models.loaded_models[name]._timer.cancel()


def test_what_serve_cannot_do_is_an_error_of_the_request() -> None:
    model = patch_model(build(), Freeze("ov", to="resample"))
    manager = GenerationState(continuous_batching=True, cb_config=paging()).get_manager("cut", use_cb=True)
    with pytest.raises(CacheError, match="'resample' at z"):
        manager.init_cb(model, greedily())
