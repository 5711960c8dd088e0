"""What each of several processes finds of a model that it holds a share of: `torchrun ... tests/parallel_worker.py FOLDER`.

FOLDER has checkpoints of tiny models, one for each family; each process writes its findings beside them, N.json: by family and
case, the largest difference from the same model in one process, and the largest number there.
"""

from __future__ import annotations

import json
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from families import FAMILIES
from torch import Tensor
from torch import distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from transformers import AutoModelForCausalLM

from surgery import (
    Edit,
    Freeze,
    PatchError,
    Spec,
    UnsupportedArchitectureError,
    capture,
    collect_reference,
    find_anatomy,
    patch_model,
    patched,
    self_test,
    unpatch_model,
    weights,
)
from surgery.analysis import (
    ablation_study,
    activation_patching,
    check_gradients,
    copying_scores,
    detect_heads,
    direct_logit_attribution,
    head_importance,
    path_patching,
)
from surgery.analysis.interference import collect
from surgery.analysis.workers import alone

IDS = torch.randint(1, 60, (2, 9), generator=torch.Generator().manual_seed(1))
SITES = ("q", "k", "rot_q", "rot_k", "v", "scores", "pattern", "z")


def cuts(model: Any) -> dict[str, Any]:
    """Of heads in either process, in both, and in one alone; by numbers, tensors, references and noise."""
    values = torch.randn(4, 16, generator=torch.Generator().manual_seed(2))[:, : find_anatomy(model)[0].d_head]
    means = collect_reference(model, [IDS], sites=["z", "k"])
    with torch.no_grad(), capture(model, ["z", "v"]) as run:
        model(IDS.flip(0))
    return {
        "z of all heads": Edit("z", "zero"),
        "both circuits of head 1": Freeze("both", [0], [1]),
        "both circuits of head 3": Freeze("both", [1], [3]),
        "pattern of heads 0 and 3": Edit("pattern", "uniform", heads=[0, 3]),
        "scores of head 2": Edit("scores", "scale", value=0.5, heads=[2]),
        "q by tensors": Edit("q", "add", value=values[:3], heads=[0, 2, 3]),
        "whole groups at k": Edit("k", "scale", value=0.1, heads=[2, 3]),
        "one of a group at rot_k": Edit("rot_k", "scale", value=0.1, heads=[3]),
        "v of a whole group": Edit("v", "scale", value=0.1, heads=[0], gqa="shared"),
        "noise": Edit("z", "noise", value=(0.0, 1.0), heads=[1, 2]),
        "noise of a group": Edit("rot_k", "noise", value=(0.0, 1.0), heads=[2], gqa="shared"),
        "mean": Edit("z", "mean", reference=means, heads=[1, 3]),
        "mean k": Edit("k", "mean", reference=means),
        "activation": Edit("z", "activation", reference=run, heads=[0, 3]),
        "v of a run": Edit("v", "activation", reference=run, heads=[2]),
        "a callable": Edit("z", lambda z: z.flip(1) + z.mean(2, keepdim=True), heads=[0, 1, 3]),
        "a callable of scores": Edit("scores", lambda scores: scores.flip(1) * 0.5, heads=[1, 2]),
        "a callable of one process": Edit("v", lambda v: v * 0.5, layers=[0], heads=[0]),
        "several": Spec([Freeze("qk", [0], [2]), Edit("z", "scale", value=2.0, heads=[0, 3]), Freeze("ov", [1], [1])]),
    }


def gap(found: Tensor, expected: Tensor) -> tuple[float, float]:
    """The largest difference, and the largest number; infinite for another shape."""
    found, expected = found.detach(), expected.detach()
    if found.shape != expected.shape:
        return float("inf"), 0.0
    # Masked scores are the lowest number there is, in both.
    found, expected = (t.masked_fill(t < -1e9, 0) for t in (found, expected))
    return float((found - expected).abs().max()), float(expected.abs().max())


def compared(name: str, folder: Path) -> dict[str, Any]:
    whole = FAMILIES[name].build() if name in FAMILIES else AutoModelForCausalLM.from_pretrained(folder / name).eval()
    split = AutoModelForCausalLM.from_pretrained(folder / name, tp_plan="auto").eval()
    if find_anatomy(whole)[0].kv_heads % dist.get_world_size():
        try:
            patch_model(split, Freeze("ov", [0], [1]))
        except PatchError as error:
            return {"refused": str(error)}
    found: dict[str, Any] = {"no patch": gap(split(IDS).logits, whole(IDS).logits)}
    classes = [type(module) for module in split.modules()]
    for kernel in ("auto", "eager"):
        for what, spec in cuts(whole).items():
            with torch.no_grad(), patched(whole, spec, kernel=kernel), patched(split, spec, kernel=kernel):
                found[f"{what}, {kernel}"] = gap(split(IDS).logits, whole(IDS).logits)
                if what == "several":
                    tokens = (m.generate(IDS, max_new_tokens=5, do_sample=False, pad_token_id=0) for m in (split, whole))
                    found[f"generation, {kernel}"] = 0.0 if torch.equal(*tokens) else float("inf"), 1.0
    # Heads of a group have their own v only where one of them is cut, which may be in another process.
    freeze, lone = Freeze("ov", [0], [2]), Edit("v", "scale", value=0.5, heads=[0])
    for spec, heads in ((freeze, "all"), (freeze, [1, 2]), (lone, "all")):
        with (
            torch.no_grad(),
            patched(whole, spec),
            patched(split, spec),
            capture(whole, list(SITES), heads=heads) as expected,
            capture(split, list(SITES), heads=heads) as run,
        ):
            whole(IDS), split(IDS)
        for key in expected:
            found[f"capture of {key[0]} {key[1]}, heads {heads}, {spec}"] = gap(run[key], expected[key])
    flipped = Edit("z", lambda z: z.flip(1) * 2, layers=[0], heads=[0, 1, 3])
    for what, spec in (("none", None), ("ste", Freeze("both", [0], [1, 2], backward="ste")), ("a callable", flipped)):
        for model in (whole, split):
            model.zero_grad()
            patch_model(model, spec)
            model(IDS, labels=IDS).loss.backward()
            unpatch_model(model)
        for path, parameter in split.named_parameters():
            if "layers.0.self_attn" in path and "norm" not in path:  # transformers adds the norms' up over processes
                gradient, expected_gradient = parameter.grad, whole.get_parameter(path).grad
                assert gradient is not None and expected_gradient is not None
                found[f"gradient of {path}, {what}"] = gap(gradient.full_tensor(), expected_gradient)
    if name == "llama":
        found["heads that are split after patching"] = gap(
            *(m(IDS).logits for m in split_late(spec=Freeze("both", [0, 1], [3])))
        )
    slopes, values = [], find_anatomy(whole)[0].projections["v"]
    for model in (whole, split):
        with capture(model, ["z"], layers=[0, 1]) as run:
            model(IDS)
        leaf = run["self.0", "z"]
        [slope] = torch.autograd.grad((leaf * leaf).sum(), model.get_submodule(values.path).weight)
        slopes.append(slope.full_tensor() if hasattr(slope, "full_tensor") else slope)
    found["gradient of what is captured"] = gap(slopes[1], slopes[0])
    spec = Edit("result", "zero", heads=[3])
    try:
        with torch.no_grad(), patched(whole, spec), patched(split, spec):
            found["result of head 3"] = gap(split(IDS).logits, whole(IDS).logits)
    except PatchError as error:
        found["result"] = str(error)
    try:
        collect(split, IDS, progress=False)
    except UnsupportedArchitectureError as error:
        found["interference"] = str(error)
    for what in ("W_Q", "W_K", "W_V", "W_O"):
        own, expected_weight = (getattr(weights.head_weights(model, 1), what) for model in (split, whole))
        found[f"{what} of layer 1"] = gap(own, expected_weight)
    effects = [ablation_study(model, IDS, progress=False).frame for model in (split, whole)]
    found["ablation study"] = gap(*(torch.from_numpy(frame["effect"].to_numpy()) for frame in effects))
    for what, call in {"other cuts": other_cuts, "other captures": other_captures}.items():
        try:
            call(split)
        except PatchError as error:
            found[what] = str(error)
    found["print"] = str(patch_model(split, Freeze("ov", [0], [2])))
    unpatch_model(split)
    if name in ("llama", "three"):
        found |= {"studies": studied(whole, split, folder)}
    found["undone"] = classes == [type(module) for module in split.modules()]
    return found


def split_late(spec: Any) -> list[Any]:
    """A model whose heads are split when it is patched already, and one that keeps them, both under cuts that come then."""
    late, whole = (patch_model(FAMILIES["llama"].build()) for _ in range(2))
    columns = dict.fromkeys(("q_proj", "k_proj", "v_proj"), ColwiseParallel())
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for layer in late.model.layers:
        parallelize_module(layer.self_attn, mesh, {**columns, "o_proj": RowwiseParallel()})
    return [patch_model(model, spec) for model in (late, whole)]


def other_cuts(split: Any) -> None:
    patch_model(split, Freeze("ov", [1], [dist.get_rank()]))


def other_captures(split: Any) -> None:
    with capture(split, ["z", "q"][: 1 + dist.get_rank()]):
        pass


def studied(whole: Any, split: Any, folder: Path) -> dict[str, Any]:
    """What analyses find of every head, and what they refuse."""
    tokens, circuits = {"input_ids": IDS}, ("qk", "k", "ov", "v")
    cuts = Spec([Freeze("qk", [0], [2], backward="stopgrad"), Freeze("ov", [1], [1])])

    def importance(model: Any, method: str, **options: Any) -> dict[str, Any]:
        options = {"circuits": circuits, "sample": 99, **options}
        frame = head_importance(model, IDS, IDS.flip(0), method=method, **options).frame
        return {name: frame[name] for name in ("score", "exact")}

    def proved(model: Any) -> dict[str, Any]:
        with patched(model, cuts):
            return {"proofs": torch.tensor([float(line[-1] == "d") for line in self_test(model, tokens)])}

    work: dict[str, Any] = {
        **{f"importance {m}": (lambda model, m=m: importance(model, m)) for m in ("atp", "ig", "ablation", "atp*")},
        "atp* of the layers together": lambda model: importance(model, "atp*", drop_layers=False),
        "to zero": lambda model: importance(model, "atp", to="zero"),
        "edges": lambda model: {"edges": head_importance(model, IDS, IDS.flip(0), edges=True, sample=0).edges["score"]},
        "activation patching": lambda model: examples_of(
            activation_patching(model, IDS, IDS.flip(0), sites=SITES[2:], over=("layer", "head"), progress=False)
        ),
        "path patching": lambda model: examples_of(
            path_patching(model, IDS, IDS.flip(0), receivers=["logits", (1, 2, "q"), (1, 3, "v")], progress=False)
        ),
        "detected heads": lambda model: {"kinds": detect_heads(model).frame.select_dtypes("number").to_numpy()},
        "composition": lambda model: {kind: weights.composition_scores(model, 0, 1, kind=kind).detach() for kind in "qkv"},
        "copying": lambda model: {"copying": copying_scores(model).frame.select_dtypes("number").to_numpy()},
        "a study that is kept": lambda model: {
            "effect": ablation_study(
                model, IDS, "ov", progress=False, resume=folder / f"{'split' if model is split else 'divided'}.jsonl"
            ).frame["effect"]
        },
        "self-test": proved,
        "gradients": lambda model: {"norm": check_gradients(model, cuts, IDS).weights["norm"]},
        "logit attribution": lambda model: {"direct": direct_logit_attribution(model, IDS, tokens=IDS[:, -1]).heads},
    }
    found: dict[str, Any] = {}
    for what, do in work.items():
        expected = do(whole)
        try:
            here = do(split)
        except (PatchError, UnsupportedArchitectureError) as error:
            found[what] = str(error)
            continue
        for key, value in expected.items():
            own, other = (torch.as_tensor(np.asarray(one, dtype=float)) for one in (here[key], value))
            found[f"{what}: {key}"] = gap(own.nan_to_num(), other.nan_to_num())
    heads = find_anatomy(whole)[0].heads
    found["kept"] = kept_once(folder / "split.jsonl", 2 * heads)
    return found


def kept_once(file: Path, cuts: int) -> bool:
    """Whether a study of so many cuts was written by one process alone."""
    dist.barrier()
    keys = [json.loads(line).get("key") for line in file.read_text(encoding="utf-8").splitlines()]
    return len(keys) == len(set(keys)) == 1 + 1 + cuts and not list(file.parent.glob(f"{file.name}.*"))


def examples_of(patching: Any) -> dict[str, Any]:
    return {key: patching.examples[key].values for key in patching.keys}


def factors(model: Any) -> Tensor:
    gradients = collect(model, IDS, progress=False)
    return torch.cat([tensor.flatten() for key in gradients.blocks for pair in gradients.factors(key) for tensor in pair])


def whys(model: Any) -> list[str]:
    """Why check_gradients has no gradients of a model whose weights come together before a forward."""
    found = check_gradients(model, [], IDS).weights["why"]
    return ["one" if "is spread over processes" in why else why for why in found]


SHARDED: dict[str, Any] = {
    "study": lambda model: torch.from_numpy(ablation_study(model, IDS, progress=False).examples),
    "importance": lambda model: torch.tensor(
        head_importance(model, IDS, IDS.flip(0), verify_top=3).frame["exact"]
    ).nan_to_num(),
    "interference": factors,
}


@contextmanager
def without_accelerate() -> Iterator[None]:
    """It divides work, and here all processes do the same."""
    known = sys.modules.get("accelerate")
    sys.modules["accelerate"] = None  # type: ignore[assignment]
    try:
        yield
    finally:
        del sys.modules["accelerate"]
        if known is not None:
            sys.modules["accelerate"] = known


def trained() -> dict[str, Any]:
    """Gradients of a straight-through cut, each process with its part of the batch, against one process with all of it."""
    spec, ids = Freeze("both", [1], [2], backward="ste"), torch.cat([IDS, IDS.flip(0)])
    whole = patch_model(FAMILIES["llama"].build(), spec)
    whole(ids, labels=ids).loss.backward()
    own = ids.chunk(dist.get_world_size())[dist.get_rank()]
    found: dict[str, Any] = {}

    def compare(what: str, model: Any, forward: Any) -> None:
        output = forward(own, labels=own)
        found[f"{what}: logits"] = gap(output.logits, whole(own).logits)
        output.loss.backward()
        for path, parameter in model.named_parameters():
            gradient = parameter.grad
            gradient = gradient.full_tensor() if hasattr(gradient, "full_tensor") else gradient
            found[f"{what}: {path}"] = gap(gradient, whole.get_parameter(path).grad)

    model = patch_model(FAMILIES["llama"].build(), spec)
    compare("DistributedDataParallel", model, torch.nn.parallel.DistributedDataParallel(model))
    for order in ("patched, then sharded", "sharded, then patched"):
        model = FAMILIES["llama"].build()
        if order.startswith("patched"):
            patch_model(model, spec)
        for layer in model.model.layers:
            fully_shard(layer)
        fully_shard(model)
        if order.startswith("sharded"):
            patch_model(model, spec)
        compare(order, model, model)
        whole_too = FAMILIES["llama"].build()
        unpatch_model(model)
        for what, do in SHARDED.items():
            with alone():
                expected = do(whole_too)
            with without_accelerate():
                found[f"{order}: {what}"] = gap(do(model), expected)
        found[f"{order}: weights that are elsewhere"] = gap(*(torch.tensor([len(set(w))]) for w in (whys(model), ["one"])))
    return found


def main() -> None:
    folder = Path(sys.argv[1])
    warnings.simplefilter("ignore", FutureWarning)
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    names: list[str] = sorted(path.name for path in folder.iterdir() if path.is_dir())
    found = {"training": trained() if dist.get_world_size() == 2 else {}, **{name: compared(name, folder) for name in names}}
    (folder / f"{dist.get_rank()}.json").write_text(json.dumps(found), encoding="utf-8")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
