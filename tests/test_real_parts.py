"""Exports beside what they are used with: PEFT, transformers' pipelines and Trainer, a process without this package."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from families import FAMILIES
from packaging.version import Version
from peft import LoraConfig, PeftModel, get_peft_model, inject_adapter_in_model
from test_export_loading import plain_class, tokenizer
from test_export_sizes import logits
from torch import Tensor
from training import two_steps
from transformers import Trainer, pipeline
from transformers.integrations.peft import MIN_PEFT_VERSION

from surgery import Edit, Freeze, Spec, export_checkpoint, export_spec, load_checkpoint, load_spec, patch_model, unpatch_model
from surgery.errors import ExportError

pytestmark = pytest.mark.filterwarnings(
    # An older name that PEFT uses.
    "ignore:`(gradient_checkpointing|is_gradient_checkpointing):FutureWarning",
)

FOLDED = Spec([Freeze("qk", layers=[0], heads=[1]), Freeze("ov", layers=[1], heads=[2])])
"""Cuts that are changes of weights."""
CUTS = Spec([*FOLDED, Edit("pattern", "previous", layers=[1], heads=[0], backward="ste")])


# -- PEFT ---------------------------------------------------------------------------------------------------------------------

TARGETS = {"llama": ["q_proj", "v_proj"], "gpt2": ["c_attn"]}


def lora(name: str) -> LoraConfig:
    return LoraConfig(r=2, target_modules=TARGETS[name], task_type="CAUSAL_LM", fan_in_fan_out=name == "gpt2")


def train(model: Any, steps: int = 2) -> list[float]:
    """Steps of AdamW on what asks for gradients."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.05)
    given, losses = FAMILIES["llama"].inputs(padding=0), []
    for _ in range(steps):
        loss = model.train()(**given, labels=given["input_ids"]).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    model.eval()
    return losses


@pytest.fixture(params=TARGETS)
def adapted(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[str, Any]:
    """A family, and its export under a trained adapter, in `adapter`."""
    name = request.param
    model = FAMILIES[name].build("sdpa", **{"attn_pdrop": 0, "resid_pdrop": 0, "embd_pdrop": 0} if name == "gpt2" else {})
    export_checkpoint(patch_model(model, CUTS), tmp_path / "base")
    torch.manual_seed(0)
    peft_model = get_peft_model(load_checkpoint(tmp_path / "base"), lora(name))
    first, second = train(peft_model)
    assert second < first
    return name, peft_model


def test_an_adapter_on_a_patched_model_is_saved_and_loaded(adapted: tuple[str, Any], tmp_path: Path) -> None:
    name, peft_model = adapted
    expected = logits(peft_model, name)
    assert not torch.equal(expected, logits(load_checkpoint(tmp_path / "base"), name))
    peft_model.save_pretrained(tmp_path / "adapter")
    again = PeftModel.from_pretrained(load_checkpoint(tmp_path / "base"), tmp_path / "adapter")
    assert torch.equal(logits(again, name), expected)
    uncut = PeftModel.from_pretrained(plain_class(name).from_pretrained(tmp_path / "base"), tmp_path / "adapter")
    assert not torch.allclose(logits(uncut, name), expected, atol=1e-3), "the cuts act under the adapter"


@pytest.mark.parametrize("bake", [False, True], ids=["kept", "baked"])
def test_a_merged_adapter_is_exported(adapted: tuple[str, Any], bake: bool, tmp_path: Path) -> None:
    name, peft_model = adapted
    if bake:
        patch_model(peft_model, FOLDED)
    expected = logits(peft_model, name)
    merged = peft_model.merge_and_unload()
    # W x + B A x against (W + B A) x, and folded weights are rounded once more.
    kept = FAMILIES[name].inputs()["attention_mask"].bool()
    torch.testing.assert_close(logits(merged, name)[kept], expected[kept], rtol=1e-4, atol=1e-4)
    export_checkpoint(merged, tmp_path / "out", bake=bake, example_inputs=FAMILIES[name].inputs(), verify=False)
    if bake:
        plain = plain_class(name).from_pretrained(tmp_path / "out", attn_implementation="sdpa")
        torch.testing.assert_close(logits(plain, name)[kept], expected[kept], rtol=1e-4, atol=1e-4)
    else:
        assert torch.equal(logits(load_checkpoint(tmp_path / "out"), name), logits(merged, name))


def by_get_peft_model(model: Any) -> Any:
    return get_peft_model(model, lora("llama"))


def by_add_adapter(model: Any) -> Any:
    if Version(peft.__version__) < Version(MIN_PEFT_VERSION):  # 5.24 came out before the PEFT that it asks for
        pytest.skip(f"transformers itself refuses adapters of PEFT {peft.__version__}")
    model.add_adapter(lora("llama"))
    return model


def by_injection(model: Any) -> Any:
    return inject_adapter_in_model(lora("llama"), model)


@pytest.mark.parametrize("way", [by_get_peft_model, by_add_adapter, by_injection])
def test_adapters_that_are_not_merged_are_refused(way: Callable[[Any], Any], tmp_path: Path) -> None:
    """save_pretrained would write the adapter alone, or weights under names that no plain model has."""
    model = way(patch_model(FAMILIES["llama"].build("sdpa"), CUTS))
    for bake in (False, True, "where_possible"):
        with pytest.raises(ExportError, match=r"export_checkpoint: found (a Peft|adapters on).*merge_and_unload"):
            export_checkpoint(model, tmp_path / "out", bake=bake)  # type: ignore[arg-type]
    assert not list(tmp_path.iterdir())
    export_spec(model, tmp_path / "alone")  # the surgery alone is that of the base
    assert load_spec(tmp_path / "alone", FAMILIES["llama"].build()) == CUTS


# -- pipelines ----------------------------------------------------------------------------------------------------------------


def test_text_generation_by_a_pipeline(tmp_path: Path) -> None:
    own, prompt = tokenizer(), "w4 w9 w33 w7"
    model = patch_model(FAMILIES["llama"].build("sdpa"), CUTS)
    export_checkpoint(model, tmp_path / "out", tokenizer=own)
    loaded = load_checkpoint(tmp_path / "out")
    options = {"max_new_tokens": 8, "do_sample": False, "return_full_text": False}
    [found] = pipeline("text-generation", model=loaded, tokenizer=own)(prompt, **options)
    ids = own(prompt, return_tensors="pt")
    expected = model.generate(**ids, max_new_tokens=8, do_sample=False)[0, 4:]
    assert found["generated_text"] == own.decode(expected, skip_special_tokens=True) != ""
    # By its path, a pipeline loads plainly: the cuts are in the weights, or they are not there.
    [uncut] = pipeline("text-generation", model=str(tmp_path / "out"))(prompt, **options)
    assert uncut["generated_text"] != found["generated_text"]
    patch_model(model, FOLDED)
    export_checkpoint(model, tmp_path / "baked", bake=True, tokenizer=own, verify=False)
    [baked] = pipeline("text-generation", model=str(tmp_path / "baked"))(prompt, **options)
    expected = model.generate(**ids, max_new_tokens=8, do_sample=False)[0, 4:]
    assert baked["generated_text"] == own.decode(expected, skip_special_tokens=True)


def test_a_mask_filled_by_a_pipeline(tmp_path: Path) -> None:
    own = tokenizer()
    own.mask_token = "w66"
    model = patch_model(FAMILIES["bert"].build("sdpa"), CUTS)
    export_checkpoint(model, tmp_path / "out", tokenizer=own)
    loaded = load_checkpoint(tmp_path / "out")
    found = pipeline("fill-mask", model=loaded, tokenizer=own, top_k=3)("w4 w66 w33 w7")
    with torch.no_grad():
        expected = model(**own("w4 w66 w33 w7", return_tensors="pt")).logits[0, 1].softmax(-1).topk(3)
    assert [one["token"] for one in found] == expected.indices.tolist()
    assert [one["score"] for one in found] == expected.values.tolist()


# -- Trainer ------------------------------------------------------------------------------------------------------------------


class Watched(Trainer):
    """Keeps, of every step, the inputs and the weights that it starts from, and its gradients."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.steps: list[tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Tensor]]] = []

    def training_step(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Tensor:
        before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        given = {name: tensor.clone() for name, tensor in inputs.items()}
        loss = super().training_step(model, inputs, *args, **kwargs)
        self.steps.append((given, before, gradients(model)))
        return loss


def gradients(model: Any) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def trainer(model: Any, folder: Path, **options: Any) -> Watched:
    return Watched(model, **two_steps(folder, save_strategy="steps", save_steps=1, **options))


STE = Spec([Freeze("both", layers=[0], heads=[1], backward="ste"), Freeze("ov", layers=[1], heads=[0], backward="ste")])


def rows_of_head(tensors: dict[str, Tensor], site: str, head: int) -> Tensor:
    """Of layer 0's projection to a site, in a Llama with heads of 16."""
    return tensors[f"model.layers.0.self_attn.{site}_proj.weight"][16 * head : 16 * head + 16]


def test_trainer_trains_through_cuts(tmp_path: Path) -> None:
    export_checkpoint(patch_model(FAMILIES["llama"].build("sdpa"), STE), tmp_path / "start")
    model = load_checkpoint(tmp_path / "start")
    done = trainer(model, tmp_path / "run")
    done.train()
    assert len(done.steps) == 2
    for given, before, found in done.steps:
        manual = load_checkpoint(tmp_path / "start")
        manual.load_state_dict(before)
        manual.train()(**given).loss.backward()
        expected = gradients(manual)
        assert found.keys() == expected.keys() and all(torch.equal(found[n], expected[n]) for n in found)
        # The head is cut, and yet its q learns: backward is straight through.
        assert bool(rows_of_head(found, "q", 1).abs().sum() > 0)
        stopped = patch_model(load_checkpoint(tmp_path / "start"), Freeze("both", layers=[0], heads=[1]))
        stopped.load_state_dict(before)
        stopped.train()(**given).loss.backward()
        assert not bool(rows_of_head(gradients(stopped), "q", 1).any())
    start, end = (load_checkpoint(tmp_path / "start").state_dict(), model.state_dict())
    assert not any(torch.equal(start[name], end[name]) for name in start if name.endswith("proj.weight"))

    # What Trainer wrote is a plain checkpoint; the surgery is applied to it again.
    expected = logits(model, "llama")
    plain = plain_class("llama").from_pretrained(tmp_path / "run" / "checkpoint-2", attn_implementation="sdpa")
    uncut = logits(plain, "llama")
    patch_model(plain, load_spec(tmp_path / "start", plain))
    assert torch.equal(logits(plain, "llama"), expected) and not torch.equal(uncut, expected)
    export_checkpoint(model, tmp_path / "end")
    assert torch.equal(logits(load_checkpoint(tmp_path / "end"), "llama"), expected)
    assert torch.equal(logits(unpatch_model(model), "llama"), uncut)

    # And a run that is taken up again ends where the first one did.
    resumed = trainer(load_checkpoint(tmp_path / "start"), tmp_path / "again")
    resumed.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-1"))
    assert len(resumed.steps) == 1 and torch.equal(logits(resumed.model, "llama"), expected)


# -- a process without this package -------------------------------------------------------------------------------------------

SERVED = """
import json, sys

class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("surgery", "patches"):
            raise ImportError(f"{name} is not here")

sys.meta_path.insert(0, Blocked())
try:
    import surgery
except ImportError:
    pass
else:
    sys.exit("the package is there")

import torch, transformers
from safetensors.torch import load_file

for job in json.loads(sys.argv[1]):
    model = getattr(transformers, job["class"]).from_pretrained(job["folder"], dtype="auto").eval()
    tokens = model.generate(**load_file(job["inputs"]), max_new_tokens=12, do_sample=False, min_new_tokens=12)
    print(json.dumps(tokens.tolist()))
"""

MANY = Spec([Freeze("qk", layers=[0]), Freeze("ov", layers=[1], heads=[0, 1, 2])])
SERVINGS: dict[str, tuple[str, torch.dtype, Any, dict[str, Any]]] = {
    "gpt2": ("gpt2", torch.float32, MANY, {}),
    "gpt2 in files, by constants": (
        "gpt2",
        torch.float32,
        [Edit("z", "value", 0.5, layers=[0], heads=[1]), Edit("result", "add", 0.3, layers=[1], heads=[2])],
        {"max_shard_size": "20KB"},
    ),
    "gpt2 in bfloat16": ("gpt2", torch.bfloat16, MANY, {}),
    "llama, heads removed": ("llama", torch.float32, Freeze("ov", heads=[2, 3]), {"shrink": True}),
    "llama, with new biases": ("llama", torch.float32, Edit("z", "add", 0.5, layers=[1], heads=[1]), {}),
    "t5": ("t5", torch.float32, Freeze("ov", layers=["decoder.self.0", "encoder.self.1"], heads=[1]), {}),
}


def test_a_process_without_this_package_generates_the_same_tokens(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    jobs, expected = [], []
    for number, (name, dtype, cut, options) in enumerate(SERVINGS.values()):
        # With tied embeddings a random GPT-2 says one word for ever, whatever its heads do.
        model = FAMILIES[name].build("sdpa", dtype=dtype, tie_word_embeddings=name == "t5")
        given = {n: t for n, t in FAMILIES[name].inputs(padding=0).items() if not n.startswith("decoder")}
        save_file(given, tmp_path / f"{number}.safetensors")
        generate: dict[str, Any] = {"max_new_tokens": 12, "do_sample": False, "min_new_tokens": 12}
        uncut = model.generate(**given, **generate)
        expected.append(patch_model(model, cut).generate(**given, **generate).tolist())
        assert expected[-1] != uncut.tolist(), f"{name}: the cut must show, or this shows nothing"
        export_checkpoint(model, tmp_path / f"out{number}", bake=True, verify=False, **options)
        jobs.append(
            {
                "class": type(unpatch_model(model)).__name__,
                "folder": str(tmp_path / f"out{number}"),
                "inputs": str(tmp_path / f"{number}.safetensors"),
            }
        )
    command = [sys.executable, "-I", "-c", SERVED, json.dumps(jobs)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    found = [json.loads(line) for line in done.stdout.splitlines()]
    assert dict(zip(SERVINGS, found, strict=True)) == dict(zip(SERVINGS, expected, strict=True))
