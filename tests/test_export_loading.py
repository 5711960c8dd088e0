"""An exported folder under every way of loading: equal, bit for bit, to plain transformers with the same arguments and cuts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from families import FAMILIES
from test_export_sizes import MORE, check_files, logits, places
from test_quantised import KINDS, SIZES
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, PreTrainedTokenizerFast

from surgery import Freeze, Spec, export_checkpoint, load_checkpoint, patch_model
from surgery.errors import ExportError

pytestmark = [
    # Of transformers' save_pretrained, for every model that from_pretrained gave a device map.
    pytest.mark.filterwarnings("ignore:Attempting to save a model with offloaded modules:UserWarning"),
    # Of torch, when the libraries of quantisation are first imported.
    pytest.mark.filterwarnings("ignore:`torch.jit.script:DeprecationWarning"),
]

NAMES = ("gpt2", "llama", "bert")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Exports of float models, by family; of sizes that quantisation takes."""
    found = {}
    for name in NAMES:
        found[name] = tmp_path_factory.mktemp(name) / "out"
        model = FAMILIES[name].build("sdpa", **SIZES.get(name, {}))
        export_checkpoint(patch_model(model, MORE), found[name], max_shard_size="40KB")
        check_files(found[name], model)
    return found


def plain_class(name: str) -> Any:
    import transformers

    return getattr(transformers, FAMILIES[name].architecture)


OPTIONS: dict[str, dict[str, Any]] = {
    "nothing": {},
    "bfloat16": {"dtype": torch.bfloat16},
    "float16, eager": {"dtype": "float16", "attn_implementation": "eager"},
    "sdpa": {"attn_implementation": "sdpa"},
    "device_map auto": {"device_map": "auto"},
    "device_map cpu": {"device_map": "cpu", "dtype": torch.bfloat16},
    "device_map of everything": {"device_map": {"": "cpu"}},
    "on a disk": {"device_map": "disk"},
    "on a disk, bfloat16": {"device_map": "disk", "dtype": torch.bfloat16},
    "not for cuts": {"low_cpu_mem_usage": True, "output_loading_info": True},
}


@pytest.mark.parametrize("case", OPTIONS)
@pytest.mark.parametrize("name", NAMES)
def test_options_are_those_of_from_pretrained(name: str, case: str, folders: dict[str, Path], tmp_path: Path) -> None:
    options = dict(OPTIONS[case])
    loaded, plain = (
        _load(load, name, options, folders, tmp_path) for load in (load_checkpoint, plain_class(name).from_pretrained)
    )
    uncut = logits(plain, name)
    assert torch.equal(logits(patch_model(plain, MORE), name), logits(loaded, name))
    assert not torch.equal(logits(loaded, name), uncut)
    assert [(p.dtype, p.device) for p in loaded.parameters()] == [(p.dtype, p.device) for p in plain.parameters()]
    assert loaded.config._attn_implementation == plain.config._attn_implementation
    assert any(p.is_meta for p in loaded.parameters()) == ("disk" in case)
    if case == "nothing":
        assert torch.equal(uncut, logits(FAMILIES[name].build("sdpa", **SIZES.get(name, {})), name))


def _load(load: Any, name: str, options: dict[str, Any], folders: dict[str, Path], tmp_path: Path) -> Any:
    options = dict(options)
    if options.get("device_map") == "disk":
        options |= {"device_map": places(FAMILIES[name].build()), "offload_folder": tmp_path / load.__qualname__}
    if load is not load_checkpoint and "attn_implementation" not in options:
        options["attn_implementation"] = "sdpa"  # that of the exported model
    found = load(folders[name], **options)
    if "output_loading_info" in options:
        found, info = found
        assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    return found


# -- quantised ----------------------------------------------------------------------------------------------------------------

# torchao quantises torch's Linear alone: not transformers' Conv1D.
by_case = pytest.mark.parametrize(
    ("name", "kind"), [(n, k) for n in ("llama", "gpt2") for k in KINDS if n != "gpt2" or k.startswith("bnb")]
)
SAVED = {"bnb_int8", "torchao_int8", "torchao_int4"}


def quantised(name: str, kind: str, folders: dict[str, Path]) -> Any:
    """By plain transformers, from the exported floats."""
    return AutoModelForCausalLM.from_pretrained(
        folders[name], quantization_config=KINDS[kind](), dtype=torch.float32, attn_implementation="sdpa"
    ).eval()


@by_case
def test_quantised_while_loading(name: str, kind: str, folders: dict[str, Path]) -> None:
    plain = quantised(name, kind, folders)
    uncut = logits(plain, name)
    loaded = load_checkpoint(folders[name], quantization_config=KINDS[kind](), dtype=torch.float32)
    assert torch.equal(logits(loaded, name), logits(patch_model(plain, MORE), name))
    assert not torch.equal(logits(loaded, name), uncut)


@by_case
def test_a_quantised_model_is_saved_or_refused(name: str, kind: str, folders: dict[str, Path], tmp_path: Path) -> None:
    model = quantised(name, kind, folders)
    uncut = logits(model, name)
    patch_model(model, MORE)
    expected = logits(model, name)
    packed = any(getattr(getattr(p, "quant_state", None), "packing_format_for_cpu", False) for p in model.parameters())
    if kind == "torchao_int4_packed" or packed:
        # 4-bit layers of bitsandbytes are packed for some CPUs alone; where they are not, they are saved as they are.
        reason = r"packed for this CPU" if packed else r"Unsupported tensor type"
        with pytest.raises(
            ExportError, match=f"found a quantised model, .*{reason}.*give load_checkpoint the quantization_config"
        ):
            export_checkpoint(model, tmp_path / "out")
        assert not list(tmp_path.iterdir()) and torch.equal(logits(model, name), expected)
        return
    assert kind in SAVED or kind.startswith("bnb")
    export_checkpoint(model, tmp_path / "out")
    loaded = load_checkpoint(tmp_path / "out")
    assert torch.equal(logits(loaded, name), expected)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "out", attn_implementation="sdpa")
    assert torch.equal(logits(plain, name), uncut)
    assert [type(p.data) for p in loaded.parameters()] == [type(p.data) for p in model.parameters()]


@pytest.mark.parametrize("kind", ["bnb_nf4", "bnb_fp4", "bnb_nf4_twice"])
def test_four_bits_that_have_not_run_are_saved(kind: str, folders: dict[str, Path], tmp_path: Path) -> None:
    """Before their first forward in evaluation mode, which packs them."""
    model = quantised("llama", kind, folders)
    model.save_pretrained(tmp_path / "plain")
    model.train()
    patch_model(model, Freeze("ov", layers=[1], heads=[2]))
    export_checkpoint(model, tmp_path / "out")
    assert torch.equal(logits(load_checkpoint(tmp_path / "out"), "llama"), logits(model, "llama"))


@pytest.mark.parametrize("kind", sorted(SAVED))
def test_quantised_weights_are_not_baked(kind: str, folders: dict[str, Path], tmp_path: Path) -> None:
    """save_pretrained writes what the quantiser has, whatever state dict it is given."""
    model = patch_model(quantised("llama", kind, folders), Freeze("ov", layers=[1], heads=[2]))
    with pytest.raises(ExportError, match=r"cut 0 \(.*\): the model is quantised.*load it without quantisation"):
        export_checkpoint(model, tmp_path / "out", bake=True)
    assert not list(tmp_path.iterdir())
    done = export_checkpoint(model, tmp_path / "out", bake="where_possible", verify=False)
    assert not done.folded and len(done.kept) == 1
    assert torch.equal(logits(load_checkpoint(tmp_path / "out"), "llama"), logits(model, "llama"))


# -- what lies beside the weights ---------------------------------------------------------------------------------------------

TEMPLATE = "{% for message in messages %}<{{ message['role'] }}> {{ message['content'] }} {% endfor %}"


def tokenizer() -> PreTrainedTokenizerFast:
    """Of the words w0 .. w66, with a chat template."""
    words = {f"w{i}": i for i in range(3, 67)} | {"<pad>": 0, "<s>": 1, "</s>": 2}
    own = Tokenizer(WordLevel(words, unk_token="<pad>"))
    own.pre_tokenizer = Whitespace()
    found = PreTrainedTokenizerFast(tokenizer_object=own, pad_token="<pad>", bos_token="<s>", eos_token="</s>")
    found.chat_template = TEMPLATE
    return found


@pytest.mark.parametrize("bake", [False, True], ids=["kept", "baked"])
def test_tokenizer_and_generation_config_come_along(bake: bool, tmp_path: Path) -> None:
    model = FAMILIES["gpt2"].build("sdpa")
    model.generation_config = GenerationConfig(
        do_sample=True, temperature=0.7, top_k=5, eos_token_id=[2, 66], bos_token_id=1, pad_token_id=0, max_new_tokens=7
    )
    expected = model.generation_config.to_dict()
    patch_model(model, Freeze("ov", layers=[1], heads=[2]))
    own = tokenizer()
    export_checkpoint(model, tmp_path / "out", bake=bake, tokenizer=own, verify=False)
    assert load_checkpoint(tmp_path / "out").generation_config.to_dict() == expected
    found = AutoTokenizer.from_pretrained(tmp_path / "out")
    chat = [{"role": "w3", "content": "w4 w5"}, {"role": "w6", "content": "w7"}]
    assert found.apply_chat_template(chat, tokenize=False) == own.apply_chat_template(chat, tokenize=False) != ""
    assert found("w4 w5 w66 nothing").input_ids == own("w4 w5 w66 nothing").input_ids == [4, 5, 66, 0]
    ids = found("w4 w5 w9", return_tensors="pt").input_ids
    drawn = []
    for one in (model, load_checkpoint(tmp_path / "out")):
        torch.manual_seed(0)
        drawn.append(one.generate(ids))
    assert torch.equal(drawn[0], drawn[1]) and drawn[0].shape[1] > 3


def test_a_variant_is_loaded_by_its_name(tmp_path: Path) -> None:
    model = patch_model(FAMILIES["gpt2"].build("sdpa"), Freeze("ov", layers=[1], heads=[2]))
    given = FAMILIES["gpt2"].inputs()
    done = export_checkpoint(model, tmp_path / "out", bake=True, example_inputs=given, variant="cut")
    assert done.comparison is not None and done.comparison.changed == 0
    assert (tmp_path / "out" / "model.cut.safetensors").exists() and not (tmp_path / "out" / "model.safetensors").exists()
    export_checkpoint(model, tmp_path / "out", variant="cut")
    assert torch.equal(logits(load_checkpoint(tmp_path / "out", variant="cut"), "gpt2"), logits(model, "gpt2"))
    with pytest.raises(ExportError, match=r"safetensors"):
        load_checkpoint(tmp_path / "out")


@pytest.mark.parametrize(
    ("option", "value", "reason"),
    [
        ("push_to_hub", True, "upload it as a whole"),
        ("state_dict", {}, "the weights are the model's own"),
        ("distributed_checkpoint", True, "no safetensors by the names of the model"),
    ],
)
def test_options_that_are_not_of_the_files(option: str, value: Any, reason: str, tmp_path: Path) -> None:
    model = patch_model(FAMILIES["gpt2"].build())
    with pytest.raises(ExportError, match=f"found the option {option}.*Leave it out: .*{reason}"):
        export_checkpoint(model, tmp_path / "out", **{option: value})
    assert not list(tmp_path.iterdir())


def test_nothing_of_an_earlier_export_stays(tmp_path: Path) -> None:
    """Shards, tensors of the spec and a tokenizer that the new export does not have."""
    model = patch_model(FAMILIES["llama"].build("sdpa"), Freeze("ov", layers=[0], heads=[1]))
    out = tmp_path / "out"
    export_checkpoint(model, out, max_shard_size="20KB", tokenizer=tokenizer())
    first = {file.name for file in out.iterdir()}
    assert "tokenizer.json" in first and "model.safetensors.index.json" in first
    patch_model(model, Spec(Freeze("ov", layers=[1], heads=[0])))
    export_checkpoint(model, out)
    assert {file.name for file in out.iterdir()} == {
        "README.md",
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "surgery.json",
    }
    assert torch.equal(logits(load_checkpoint(out), "llama"), logits(model, "llama"))
    assert [file.name for file in tmp_path.iterdir()] == ["out"]
