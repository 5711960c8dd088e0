"""Models over several devices: analyses of a model that is partly away, and cuts whose tensors are elsewhere than its layers.

Where there is no GPU, a tensor that does not follow is found by torch's fake tensors, which have devices without numbers, and
refuse to mix these; what GPUs compute is tested on one, and on two.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import dispatch_model, infer_auto_device_map
from families import FAMILIES
from test_placed import is_away, last
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from surgery import Edit, Freeze, Spec, capture, collect_reference, patch_model, patched, self_test
from surgery.analysis import (
    Sweep,
    ablation_study,
    activation_patching,
    composition,
    copying_scores,
    detect_heads,
    direct_logit_attribution,
    head_importance,
    path_patching,
)
from surgery.analysis.interference import collect
from surgery.analysis.journal import weights_of
from surgery.interventions import Operation
from surgery.reference import Entry, Reference
from surgery.where import Where

IDS = torch.randint(1, 60, (2, 9), generator=torch.Generator().manual_seed(1))
QUIET: dict[str, Any] = {"progress": False}
NAMES = ("llama", "gpt2")

# -- a model that is partly away ----------------------------------------------------------------------------------------


def build(name: str) -> Any:
    return FAMILIES[name].build("sdpa")


def placed(name: str, folder: Path) -> Any:
    """As much in memory as accelerate finds room for, the rest on disk."""
    model = build(name)
    size = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    layer = type(model.base_model.get_submodule("layers.0" if name == "llama" else "h.0")).__name__
    places = infer_auto_device_map(model, max_memory={"cpu": int(0.75 * size)}, no_split_module_classes=[layer])
    assert {"cpu", "disk"} == set(places.values())
    return dispatch_model(model, device_map=places, main_device="cpu", offload_dir=str(folder), force_hooks=True)


def numbers(frame: Any) -> np.ndarray:
    return frame.select_dtypes("number").astype(float).to_numpy()


def factors(model: Any) -> list[np.ndarray]:
    found = collect(model, IDS, **QUIET)
    return [tensor.numpy() for key in found.blocks for pair in found.factors(key) for tensor in pair]


def swept(model: Any) -> list[np.ndarray]:
    specs = [Spec(Freeze("ov", [layer], [head])) for layer in range(2) for head in range(4)]
    return [found.numpy() for found in Sweep(model, {"input_ids": IDS}).run(specs, lambda _, output: output.logits)]


WORK: dict[str, Callable[[Any], Any]] = {
    "study": lambda model: ablation_study(model, IDS, **QUIET).examples,
    "sweep": swept,
    **{
        f"importance by {m}": (lambda model, m=m: numbers(head_importance(model, IDS, IDS.flip(0), method=m, sample=3).frame))
        for m in ("atp", "atp*", "ig", "ablation")
    },
    "activation patching": lambda model: activation_patching(
        model, IDS, IDS.flip(0), over=("layer", "head"), sites="pattern", **QUIET
    ).examples["pattern"].values,
    "path patching": lambda model: path_patching(
        model, IDS, IDS.flip(0), receivers=[(1, 2, "q")], freeze_mlps=True, **QUIET
    ).value().values,
    "detected heads": lambda model: numbers(detect_heads(model).frame),
    "logit attribution": lambda model: direct_logit_attribution(model, IDS, tokens=IDS[:, -1]).heads,
    "copying": lambda model: numbers(copying_scores(model).frame),
    "composition": lambda model: numbers(composition(model).frame()),
    "interference": factors,
    "the hash of weights": lambda model: np.frombuffer(weights_of(model).encode(), dtype=np.uint8),
}  # fmt: skip


@pytest.mark.parametrize("work", WORK)
@pytest.mark.parametrize("name", NAMES)
def test_analyses_of_a_model_that_is_partly_away(name: str, work: str, tmp_path: Path) -> None:
    """Bit for bit; weights are away again afterwards."""
    plain, model = build(name), placed(name, tmp_path)
    if work == "study":
        patch_model(model), patch_model(plain)
    expected, found = (WORK[work](one) for one in (plain, model))
    expected, found = (one if isinstance(one, list) else [one] for one in (expected, found))
    assert all(np.array_equal(a, b, equal_nan=True) for a, b in zip(found, expected, strict=True))
    assert all(np.isfinite(one.astype(float)).any() for one in expected) and is_away(last(model, name))


# -- cuts whose tensors are elsewhere -----------------------------------------------------------------------------------

SHAPE = (2, 4, 3, 5)
SQUARE = (2, 4, 3, 3)


def drawn(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(len(shape)))


def operation(site: str, action: Any, heads: tuple[int, ...] = (0, 2), **options: Any) -> Operation:
    entry = options.pop("entry", None)
    kind = "activation" if action == "activation" else "mean"
    reference = None if entry is None else Reference(kind, {("self.0", site): entry})
    return Operation(0, Edit(site, action, reference=reference, **options), site, "self.0", heads, heads, entry)


FOLLOWING: dict[str, tuple[Operation, tuple[int, ...]]] = {
    "value": (operation("z", "value", value=drawn(5)), SHAPE),
    "value of heads": (operation("z", "value", value=drawn(2, 5)), SHAPE),
    "value of positions": (operation("z", "value", value=drawn(2, 3, 5), positions=[0, 2]), SHAPE),
    "value of rows": (operation("z", "value", value=drawn(2, 2, 3, 5), strength=0.5), SHAPE),
    "add": (operation("q", "add", value=drawn(5), backward="ste"), SHAPE),
    "scale": (operation("z", "scale", value=drawn(5)), SHAPE),
    "add to scores": (operation("scores", "add", value=drawn(3, 3)), SQUARE),
    "mean": (operation("z", "mean", entry=Entry(drawn(4, 5))), SHAPE),
    "mean of positions": (operation("z", "mean", entry=Entry(drawn(4, 3, 5))), SHAPE),
    "mean of some heads": (operation("z", "mean", entry=Entry(drawn(3, 5), None, (0, 1, 2))), SHAPE),
    "activation": (operation("z", "activation", entry=Entry(drawn(2, 4, 3, 5))), SHAPE),
    "activation of scores": (operation("scores", "activation", entry=Entry(drawn(2, 4, 3, 3))), SQUARE),
    "noise of a reference": (operation("z", "noise", entry=Entry(drawn(4, 5), drawn(4, 5).abs())), SHAPE),
    "noise": (operation("z", "noise"), SHAPE),
    "noise of given size": (operation("pattern", "noise", value=(0.0, 1.0)), SQUARE),
    "resample": (operation("z", "resample"), SHAPE),
    "current mean": (operation("z", "mean", strength=0.5), SHAPE),
    "template": (operation("pattern", "uniform"), SQUARE),
}


@pytest.mark.parametrize("case", FOLLOWING)
def test_tensors_of_cuts_follow_the_layer(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    done, shape = FOLLOWING[case]
    # What looks at numbers to raise is left out, as in a graph: fake tensors have none.
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        mode.allow_meta = True  # the one device besides the CPU whose tensors can be indexed on every machine
        for device in ("meta", "cpu", "meta"):
            allowed = torch.ones(1, 1, 3, 3, dtype=torch.bool, device=device)
            x = torch.empty(shape, device=device)
            found = done.apply(x, Where(allowed=allowed))
            assert str(found.device) == device and tuple(found.shape) == shape


def test_fake_tensors_find_what_does_not_follow() -> None:
    with FakeTensorMode() as mode, pytest.raises(RuntimeError, match="same device"):
        mode.allow_meta = True
        torch.empty(3, device="meta") + torch.empty(3)


# -- on GPUs ------------------------------------------------------------------------------------------------------------

GPUS = torch.cuda.device_count()
one_gpu = pytest.mark.skipif(GPUS < 1, reason="needs a GPU")
two_gpus = pytest.mark.skipif(GPUS < 2, reason="needs two GPUs")


def mapped(name: str, second: str, folder: Path) -> Any:
    """The first layer on the first GPU, the second elsewhere."""
    model = build(name)
    stem = "model.layers" if name == "llama" else "transformer.h"
    places: dict[str, Any] = {path: 0 for path, part in model.named_modules() if part._parameters and stem not in path}
    places |= {f"{stem}.0": 0, f"{stem}.1": second}
    if name == "llama":
        places["model.rotary_emb"] = 0
    return dispatch_model(model, device_map=places, main_device=0, offload_dir=str(folder))


CUTS = ("mean", "noise", "activation", "value", "add", "pattern", "result", "resample")


def spec_of(cut: str) -> Any:
    """A spec whose tensors are on the CPU."""
    model = build("llama")
    means = collect_reference(model, [IDS], **QUIET)
    with torch.no_grad(), capture(model, ["z", "v"]) as run:
        model(IDS.flip(0))
    return {
        "mean": Freeze("ov", heads=[1], to="mean", reference=means),
        "noise": Freeze("both", heads=[1], to="noise", reference=means),
        "activation": Edit("z", "activation", heads=[2], reference=run.reference()),
        "value": Edit("z", "value", heads=[0], value=torch.ones(16)),
        "add": Edit("q", "add", heads=[0], value=torch.ones(16)),
        "pattern": Edit("pattern", "uniform", heads=[1]),
        "result": Edit("result", "scale", heads=[1], value=0.5),
        "resample": Freeze("ov", heads=[3], to="resample"),
    }[cut]


@one_gpu
@pytest.mark.parametrize("second", ["cpu", "disk", pytest.param(1, marks=two_gpus)])
@pytest.mark.parametrize("name", NAMES)
def test_outputs_over_devices(name: str, second: Any, tmp_path: Path) -> None:
    """The same kernels run wherever weights lie: bit for bit what one GPU alone gives."""
    plain, model = build(name).cuda(), mapped(name, second, tmp_path)
    given = {key: value.cuda() for key, value in FAMILIES[name].inputs().items()}
    for cut in (Freeze("both", heads=[1]), Edit("pattern", "uniform", heads=[2]), Edit("result", "scale", value=0.5)):
        with torch.no_grad(), patched(plain, cut), patched(model, cut):
            assert torch.equal(model(**given).logits.cpu(), plain(**given).logits.cpu())
            assert len(self_test(model, given)) == 2


@one_gpu
@pytest.mark.parametrize("second", ["cpu", "disk", pytest.param(1, marks=two_gpus)])
@pytest.mark.parametrize("cut", CUTS)
def test_tensors_of_cuts_on_the_cpu(cut: str, second: Any, tmp_path: Path) -> None:
    plain, model = build("llama").cuda(), mapped("llama", second, tmp_path)
    spec = spec_of(cut)
    with torch.no_grad(), patched(plain, spec), patched(model, spec):
        found = model(IDS.cuda()).logits.cpu()
        assert torch.equal(found, plain(IDS.cuda()).logits.cpu())
    with torch.no_grad():
        assert not torch.equal(found, model(IDS.cuda()).logits.cpu())


@one_gpu
@pytest.mark.parametrize("second", ["cpu", "disk", pytest.param(1, marks=two_gpus)])
@pytest.mark.parametrize("work", WORK)
def test_analyses_over_devices(work: str, second: Any, tmp_path: Path) -> None:
    plain, model = build("llama").cuda(), mapped("llama", second, tmp_path)
    expected, found = (WORK[work](one) for one in (plain, model))
    expected, found = (one if isinstance(one, list) else [one] for one in (expected, found))
    # Sums over layers are made where the last of them is.
    assert all(np.allclose(a, b, rtol=1e-5, atol=1e-6, equal_nan=True) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("cut", CUTS)
def test_tensors_of_cuts_in_a_model_that_is_partly_away(cut: str, tmp_path: Path) -> None:
    """The same without a GPU."""
    plain, model, spec = build("llama"), placed("llama", tmp_path), spec_of(cut)
    with torch.no_grad(), patched(plain, spec), patched(model, spec):
        found = model(IDS).logits
        assert torch.equal(found, plain(IDS).logits)
    with torch.no_grad():
        assert not torch.equal(found, model(IDS).logits)
