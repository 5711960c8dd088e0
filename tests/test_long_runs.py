"""Long runs leave nothing behind: models that are patched, changed, captured, copied and restored again and again.

By default some hundred rounds, in which a single object, class or table entry per round shows; `--rounds 10000` runs for long.
"""

from __future__ import annotations

import copy
import gc
import itertools
import linecache
import pickle
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from cached import CACHE
from families import FAMILIES, VOCAB
from torch import Tensor, fx, nn
from torch._dynamo.exc import FailOnRecompileLimitHit
from torch._dynamo.utils import counters
from transformers import AttentionInterface, DynamicCache, RoFormerConfig, RoFormerForMaskedLM
from transformers.masking_utils import AttentionMaskInterface

import surgery.classes
from surgery import (
    Edit,
    Freeze,
    PatchError,
    Spec,
    SurgeryError,
    capture,
    collect_reference,
    find_anatomy,
    patch_model,
    patched,
    unpatch_model,
)
from surgery.classes import SurgicalAttention

LAYERS = {"gpt2": "n_layer", "gptj": "n_layer", "mpt": "n_layers"}


def build(name: str = "llama", implementation: str = "sdpa", **options: Any) -> Any:
    """One layer."""
    if name == "roformer":
        config = RoFormerConfig(
            vocab_size=VOCAB, hidden_size=32, num_hidden_layers=1, num_attention_heads=4, intermediate_size=40
        )
        return RoFormerForMaskedLM(config).eval()
    one: dict[str, Any] = {LAYERS.get(name, "num_hidden_layers"): 1}
    return FAMILIES[name].build(implementation if FAMILIES[name].sdpa else "eager", **one, **options)


def inputs(name: str = "llama", **options: Any) -> dict[str, Tensor]:
    return FAMILIES["bert" if name == "roformer" else name].inputs(**options)


def run(model: Any, name: str, **more: Any) -> Tensor:
    with torch.no_grad():
        output = model(**inputs(name), **more)
    return output[0] if name == "bert" else output.logits


# -- what there is ------------------------------------------------------------------------------------------------------------


def subclasses(cls: type) -> set[type]:
    return {cls}.union(*(subclasses(one) for one in type.__subclasses__(cls)))


def tables() -> dict[str, int]:
    """Everything of ours, of transformers' and of Python's that keeps what it is given: how many entries it has."""
    found = {"modules": len(sys.modules), "lines": len(linecache.cache), "threads": threading.active_count()}
    for registry in (AttentionInterface, AttentionMaskInterface):
        found[registry.__name__] = len(registry._global_mapping)
    for name, module in list(sys.modules.items()):
        if name.partition(".")[0] not in ("surgery", "patches"):
            continue
        for key, value in vars(module).items():
            if hasattr(value, "cache_info"):
                found[f"{name}.{key}"] = value.cache_info().currsize
            elif isinstance(value, dict | list | set) and not key.startswith("__"):
                inner = [part for part in value.values() if isinstance(part, list)] if isinstance(value, dict) else []
                found[f"{name}.{key}"] = len(value) + sum(map(len, inner))
    return found


def kept(model: nn.Module) -> list[Any]:
    """Per module: its class, the names that it has, buffers, parameters and hooks; of the tensors, which they are."""
    return [
        (
            type(module),
            sorted(module.__dict__),
            [(name, id(tensor)) for name, tensor in (*module._buffers.items(), *module._parameters.items())],
            [len(value) for key, value in sorted(module.__dict__.items()) if "hooks" in key],
        )
        for module in model.modules()
    ]


class Census:
    """Counts of what lives: objects, tensors, classes of modules, traced graphs, and the tables."""

    def __init__(self) -> None:
        gc.collect()
        objects = gc.get_objects()
        self.objects = len(objects)
        self.tensors = sum(issubclass(type(one), Tensor) for one in objects)  # isinstance would ask proxies
        self.graphs = sum(type(one) is fx.Graph or issubclass(type(one), fx.GraphModule) for one in objects)
        self.classes = len(subclasses(nn.Module))
        self.tables = tables()
        self.bytes = int(Path("/proc/self/statm").read_text().split()[1]) * 4096 if Path("/proc/self/statm").exists() else 0

    def grown(self, before: Census) -> dict[str, int]:
        found = {name: getattr(self, name) - getattr(before, name) for name in ("tensors", "graphs", "classes")}
        found |= {name: count - before.tables.get(name, 0) for name, count in self.tables.items()}
        return {name: more for name, more in found.items() if more}


def assert_flat(work: Callable[[int], Any], rounds: int, warm: int = 5) -> None:
    """Nothing grows over so many rounds, of which the first few may fill what is kept once for all."""
    for number in range(warm):
        work(number)
    work(0)  # what the last round still holds is of the same kind at both ends
    before = Census()
    for number in range(rounds):
        work(number)
    work(0)
    after = Census()
    assert after.grown(before) == {}
    # Interned strings, free lists and the like come and go; one object in two rounds would be more.
    assert after.objects - before.objects < max(100, rounds // 2)
    # Allocators keep pages; a leak of one tiny tensor or dictionary a round would come to 0.5 MB in 1,000 rounds.
    assert after.bytes - before.bytes < 4e6 + 500 * rounds


@pytest.fixture
def rounds(request: pytest.FixtureRequest) -> int:
    return request.config.getoption("--rounds")


# -- cycles -------------------------------------------------------------------------------------------------------------------

CUTS = {
    "z": Freeze("ov", heads=[1]),
    "several": [Edit("q", "scale", 0.5, heads=[0]), Edit("result", "scale", 0.5, heads=[2, 3]), Freeze("qk", heads=[1])],
    "matrix": [Edit("pattern", "scale", 0.5, heads=[1]), Freeze("both", to="noise", heads=[2], positions=[1, 2])],
}


@pytest.mark.parametrize("kernel", ["auto", "eager"])
@pytest.mark.parametrize("name", ["llama", "gpt2", "gptj", "mpt", "bert", "roformer"])
def test_patching_and_unpatching(name: str, kernel: Any, rounds: int) -> None:
    """Fused kernel, fused projection, written-out forwards, an output block beside the attention, code compiled again."""
    model = build(name)
    before, plain = kept(model), run(model, name)

    def cycle(number: int) -> None:
        patch_model(model, list(CUTS.values())[number % 3], kernel=kernel)
        if number % 10 == 0:
            run(model, name)
        unpatch_model(model)

    assert_flat(cycle, rounds if name != "roformer" else rounds // 5)  # each round finds its attention in code anew
    assert kept(model) == before and torch.equal(run(model, name), plain)


def test_changing_the_cuts(rounds: int, tmp_path: Path) -> None:
    """Of a model that stays patched: with tensors and references, loaded from files, and by way of every kernel."""
    model, given = build(), inputs()
    means = collect_reference(model, [given], sites=["z", "rot_q", "rot_k"], progress=False)
    vector = torch.linspace(-1, 1, 16)
    Spec([Freeze("ov", to="mean", reference=means, heads=[0]), Edit("z", "add", vector, heads=[3])]).save(tmp_path / "cut.json")
    specs: list[Callable[[int], Any]] = [
        lambda number: Freeze("both", to="mean", reference=means, heads=[1]),
        lambda number: Edit("z", "add", vector * number, heads=[number % 4]),
        lambda number: Spec.load(tmp_path / "cut.json"),
        lambda number: CUTS["several"],
        lambda number: CUTS["matrix"],
        lambda number: Edit("scores", lambda scores: scores * number, heads=[2]),
        lambda number: None,
    ]

    def change(number: int) -> None:
        patch_model(model, specs[number % len(specs)](number), kernel="eager" if number % 3 == 2 else "auto")
        if number % 5 == 0:
            run(model, "llama")

    before = kept(model)
    patch_model(model)
    assert_flat(change, 10 * rounds, warm=2 * len(specs) * 3)
    unpatch_model(model)
    assert kept(model) == before


def test_blocks_errors_copies_and_generation(rounds: int) -> None:
    model = patch_model(build(), CUTS["z"])
    tokens, before = inputs()["input_ids"], kept(model)

    def work(number: int) -> None:
        with capture(model, ["z", "pattern"], heads=[number % 4]) as seen, patched(model, CUTS["matrix"]):
            run(model, "llama")
        assert len(seen.steps(0, "z")) == 1
        with pytest.raises(ZeroDivisionError), patched(model, CUTS["several"]):
            run(model, "llama")
            number / 0
        with pytest.raises(SurgeryError), patched(model, Edit("z", "add", torch.ones(2, 1, 3, 16))):
            run(model, "llama")
        with pytest.raises(SurgeryError):
            patch_model(model, Freeze("ov", layers=[7]))
        if number % 5 == 0:
            other = copy.deepcopy(model)
            patch_model(other, CUTS["several"])
            assert not torch.equal(run(other, "llama"), run(model, "llama"))
            model.generate(tokens, max_new_tokens=3, do_sample=False, eos_token_id=None)

    assert_flat(work, rounds, warm=10)
    assert kept(model) == before


# -- compiled models ----------------------------------------------------------------------------------------------------------


HEADS = [heads for count in range(1, 5) for heads in itertools.combinations(range(4), count)]


def every_cut(number: int) -> Edit:
    """Cuts at several sites and heads: a graph is of one of these, but numbers of all sizes may share one."""
    site = ("z", "v", "rot_q", "rot_k")[number % 4]
    return Edit(site, "scale" if number % 2 else "add", 1.0 + number / 10, heads=HEADS[number % len(HEADS)])


def test_changing_the_cuts_of_a_compiled_model(dynamo: None, rounds: int) -> None:
    """Graphs come to torch's limit and no further; beyond it torch runs the model without them, and always with its cuts."""
    model = patch_model(build())
    compiled = torch.compile(model, backend="eager")
    limit = torch._dynamo.config.recompile_limit

    def change(number: int) -> None:
        patch_model(model, every_cut(number))
        assert torch.equal(run(compiled, "llama"), run(model, "llama"))

    assert_flat(change, rounds, warm=4 * limit)
    assert counters["stats"]["unique_graphs"] <= limit
    torch.compiler.reset()
    counters.clear()
    for number in range(3, 3 + 10 * limit):  # other numbers at one site and head, and no cache to mark
        patch_model(model, Edit("z", "scale", number / 3, heads=[1]))
        assert torch.equal(run(compiled, "llama", use_cache=False), run(model, "llama", use_cache=False))
    assert counters["stats"]["unique_graphs"] <= 3


def test_a_whole_graph_says_when_torch_will_not_compile_again(dynamo: None) -> None:
    model = patch_model(build())
    compiled = torch.compile(model, fullgraph=True, backend="eager")

    def change(number: int) -> None:
        patch_model(model, every_cut(number))
        assert torch.equal(run(compiled, "llama"), run(model, "llama"))

    with pytest.raises(FailOnRecompileLimitHit):
        for number in range(4 * torch._dynamo.config.recompile_limit):
            change(number)
    torch.compiler.reset()
    change(7)


def test_two_compiled_models_of_one_class_keep_their_cuts(dynamo: None) -> None:
    models = [patch_model(build(), every_cut(number)) for number in range(3)]
    compiled = [torch.compile(model, fullgraph=True, backend="eager") for model in models]
    expected = [run(model, "llama") for model in models]
    assert not torch.equal(expected[0], expected[1])
    for _ in range(2):
        for one, found in zip(compiled, expected, strict=True):
            assert torch.equal(run(one, "llama"), found)


# -- threads ------------------------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("error")
def test_threads_patch_different_models_at_once(rounds: int) -> None:
    """Models of one class, copies of one model and models of other classes: bit for bit as when they are alone."""
    names = ["llama", "llama", "llama", "gpt2", "gptj", "roformer"]
    models = [build(name) for name in names]
    models[1] = copy.deepcopy(models[0])
    before = [kept(model) for model in models]
    specs = [CUTS["z"], CUTS["several"], CUTS["matrix"], CUTS["matrix"], CUTS["several"], CUTS["matrix"]]
    plain = [run(model, name) for model, name in zip(models, names, strict=True)]
    expected, seen = [], []
    for model, name, spec in zip(models, names, specs, strict=True):
        with patched(model, spec), capture(model, "z") as found:
            expected.append(run(model, name))
        seen.append(found[0, "z"])
    assert not torch.equal(expected[0], expected[1])
    start = threading.Barrier(len(models))

    def work(number: int) -> None:
        model, name = models[number], names[number]
        start.wait(timeout=30)
        for _ in range(max(5, rounds // 5)):
            with patched(model, specs[number]), capture(model, "z") as found:
                assert torch.equal(run(model, name), expected[number])
            assert torch.equal(found[0, "z"], seen[number])
            assert torch.equal(run(model, name), plain[number])
            patch_model(model, specs[number])
            other = copy.deepcopy(model)
            assert type(other.get_submodule(path_of(model))) is type(model.get_submodule(path_of(model)))
            assert torch.equal(run(unpatch_model(other), name), plain[number])
            unpatch_model(model)

    with eager_switching(), ThreadPoolExecutor(len(models)) as pool:
        list(pool.map(work, range(len(models))))
    assert [kept(model) for model in models] == before


def test_threads_that_are_first_to_patch_a_class_get_one_class(monkeypatch: pytest.MonkeyPatch) -> None:
    make = surgery.classes._subclass

    def slowly(*args: Any, **members: Any) -> Any:
        time.sleep(0.05)
        return make(*args, **members)

    monkeypatch.setattr("surgery.classes._subclass", slowly)
    models = [build() for _ in range(4)]
    own = type("FirstAttention", (type(models[0].model.layers[0].self_attn),), {})
    for model in models:
        model.model.layers[0].self_attn.__class__ = own
        find_anatomy(model)
    with ThreadPoolExecutor(len(models)) as pool:
        list(pool.map(lambda model: patch_model(model, CUTS["z"]), models))
    assert len({type(model.model.layers[0].self_attn) for model in models}) == 1
    for model in models:
        unpatch_model(model)
        assert type(model.model.layers[0].self_attn) is own


def path_of(model: nn.Module) -> str:
    """Where a patched model's attention is."""
    return next(path for path, module in model.named_modules() if isinstance(module, SurgicalAttention))


@contextmanager
def eager_switching() -> Iterator[None]:
    """Threads take turns far more often than they do by default, so that what they share shows."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        yield
    finally:
        sys.setswitchinterval(before)


def test_blocks_of_several_threads_on_one_model_are_refused_whole() -> None:
    """A block that is refused leaves the other's cuts alone, wherever the two meet; in the end the model is as it was."""
    model, given = FAMILIES["llama"].build(), FAMILIES["llama"].inputs()
    amounts, wrong, done = (0.1, 0.4, 0.8), [], []

    @torch.no_grad()
    def logits() -> Tensor:
        found: Tensor = model(**given).logits
        return found

    plain, expected = logits(), {}
    for amount in amounts:
        with patched(model, Edit("z", "scale", amount)):
            expected[amount] = logits()

    def work(amount: float) -> None:
        for _ in range(30):
            try:
                with patched(model, Edit("z", "scale", amount)):
                    if not all(torch.equal(logits(), expected[amount]) for _ in range(2)):
                        wrong.append(amount)
                    done.append(amount)
            except PatchError as error:
                if "has open on this model" not in str(error):
                    wrong.append(error)
            except Exception as error:
                wrong.append(error)

    threads = [threading.Thread(target=work, args=(amount,)) for amount in amounts]
    switch = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(switch)
    assert not wrong and done
    assert torch.equal(logits(), plain) and type(model.model.layers[0].self_attn).__name__ == "LlamaAttention"


def test_a_copy_made_in_a_block_is_of_no_block() -> None:
    model, given = FAMILIES["llama"].build(), FAMILIES["llama"].inputs()
    with capture(model, "z") as run, torch.no_grad():
        copied, loaded = copy.deepcopy(model), pickle.loads(pickle.dumps(model))
        model(**given)
        copied(**given)
    assert len(run.steps("self.0", "z")) == 1
    failed: list[Exception] = []

    def elsewhere() -> None:
        for other in (copied, loaded):
            try:
                patch_model(other, Edit("z", "zero"))
            except PatchError as error:
                failed.append(error)

    thread = threading.Thread(target=elsewhere)
    thread.start()
    thread.join()
    assert not failed
    for other in (copied, loaded):
        assert not any(module._surgery.plan.probes for module in other.modules() if isinstance(module, SurgicalAttention))


@pytest.mark.parametrize("kernel", ["auto", "eager"])
def test_a_forward_leaves_nothing_of_its_inputs_behind(kernel: Any) -> None:
    model, ids = FAMILIES["llama"].build(), FAMILIES["llama"].inputs()["input_ids"]
    patch_model(model, [Freeze("ov", heads=[1], positions=range(2, 4)), Edit("pattern", "uniform", heads=[0])], kernel=kernel)
    cache = DynamicCache()
    with torch.no_grad():
        model(ids, **{CACHE: cache})
    gone = weakref.ref(cache)
    del cache
    gc.collect()
    assert gone() is None
    assert all(m._surgery.now.where.allowed is None for m in model.modules() if isinstance(m, SurgicalAttention))


def test_replicas_of_data_parallel_are_refused() -> None:
    model = patch_model(FAMILIES["llama"].build())
    with pytest.raises(SurgeryError, match=r"DataParallel: found a patched LlamaAttention.*DistributedDataParallel"):
        model.model.layers[0].self_attn._replicate_for_data_parallel()  # which DataParallel calls in each forward
