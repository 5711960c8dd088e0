"""The order of the files, and the habits that a reader may rely on. Every check is shown an example that it must reject."""

from __future__ import annotations

import ast
import inspect
import re
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import LONG
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

import surgery

ROOT = Path(__file__).parent.parent

# Files from the ground up: each imports only files above it. A new file goes where it belongs, with everything it needs above.
ORDER = [
    "surgery.errors", "surgery.threads", "surgery.launcher", "surgery.vocabulary", "surgery.sites", "surgery.family",
    "surgery.configs", "surgery.noise", "surgery.fields", "surgery.reference", "surgery.values", "surgery.cuts", "surgery.spec",
    "surgery.schema",
    "surgery.blocks", "surgery.where",
    "surgery.templates", "surgery.gradient",
    "surgery.interventions",                                                                              # what is cut
    "surgery.labels", "surgery.layout", "surgery.source", "surgery.steps", "surgery.witness", "surgery.arguments",
    "surgery.evaluation", "surgery.stubs", "surgery.record", "surgery.inline", "surgery.interface", "surgery.addresses",
    "surgery.anatomy", "surgery.derive",
    "surgery.reconstruction", "surgery.trace", "surgery.rewrite", "surgery.samples", "surgery.verify", "surgery.masks",
    "surgery.cache",                                                                                      # a model
    "surgery.running", "surgery.plan", "surgery.shares", "surgery.forward", "surgery.unfused", "surgery.own_keys",
    "surgery.paged", "surgery.core", "surgery.own_code", "surgery.taps", "surgery.classes", "surgery.lower", "surgery.swap",
    "surgery.patch",                                                                                      # its surgery
    "surgery.captures", "surgery.collect", "surgery.terminal", "surgery.inspection", "surgery.selftest",   # seeing
    "surgery.factored", "surgery.linear", "surgery.behind", "surgery.heads", "surgery.weights",           # its weights
    "surgery.pretrained",
    "surgery.export", "surgery.export.folder", "surgery.export.fit", "surgery.export.document", "surgery.export.offload",
    "surgery.export.types", "surgery.export.affine", "surgery.export.fold", "surgery.export.trial", "surgery.export.biases",
    "surgery.export.bake", "surgery.export.inputs", "surgery.export.load", "surgery.export.fresh", "surgery.export.card",
    "surgery.export.saving", "surgery.export.shrink", "surgery.export.save", "surgery.export.audit",      # files
    "surgery.export.forward", "surgery.export.sizes", "surgery.export.onnx_file", "surgery.export.program",   # programs
    "surgery.public", "surgery",                                                                          # the names
    "patches",
    "surgery.plots.style", "surgery.plots.curves", "surgery.plots.tokens", "surgery.plots.maps",
    "surgery.plots.interference", "surgery.plots.patterns", "surgery.plots.notebook", "surgery.plots",    # pictures
    "surgery.analysis.tables", "surgery.analysis.batches", "surgery.analysis.workers", "surgery.analysis.journal",
    "surgery.analysis.targets", "surgery.analysis.metrics", "surgery.analysis.agreement",
    "surgery.analysis.kept", "surgery.analysis.reading", "surgery.analysis.statistics", "surgery.analysis.ends",
    "surgery.analysis.replay",
    "surgery.analysis.narrow", "surgery.analysis.sweep",
    "surgery.analysis.ablation", "surgery.analysis.objective",
    "surgery.analysis.baselines", "surgery.analysis.attribution", "surgery.analysis.atpstar",
    "surgery.analysis.labelled", "surgery.analysis.foldable",
    "surgery.analysis.compatible", "surgery.analysis.looking", "surgery.analysis.repeats",
    "surgery.analysis.detectors", "surgery.analysis.edges", "surgery.analysis.forwards",
    "surgery.analysis.effects", "surgery.analysis.exact", "surgery.analysis.frozen",
    "surgery.analysis.promises", "surgery.analysis.weight_gradients", "surgery.analysis.gradients",
    "surgery.analysis.held", "surgery.analysis.integrated", "surgery.analysis.importance",
    "surgery.analysis.logit_attribution", "surgery.analysis.outcome", "surgery.analysis.pairs",
    "surgery.analysis.patching", "surgery.analysis.paths", "surgery.analysis.tokens",
    "surgery.analysis.vectors", "surgery.analysis.steering", "surgery.analysis.structure",
    "surgery.analysis.interference.files", "surgery.analysis.interference.store", "surgery.analysis.interference.factors",
    "surgery.analysis.interference.folder", "surgery.analysis.interference.identity",
    "surgery.analysis.interference.gradients", "surgery.analysis.interference.collecting",
    "surgery.analysis.interference.fisher",
    "surgery.analysis.interference.kernels", "surgery.analysis.interference.walk",
    "surgery.analysis.interference.randomised", "surgery.analysis.interference.checks",
    "surgery.analysis.interference.sizes", "surgery.analysis.interference.tested", "surgery.analysis.interference.intervals",
    "surgery.analysis.interference.signed", "surgery.analysis.interference.statistics",
    "surgery.analysis.interference.maps", "surgery.analysis.interference.scores",
    "surgery.analysis.interference.study", "surgery.analysis.interference.public", "surgery.analysis.interference",
    "surgery.analysis.public", "surgery.analysis",                                                        # findings
    "surgery.demo.data", "surgery.demo.train", "surgery.demo.subject", "surgery.demo.study",
    "surgery.demo.report", "surgery.demo",
    "surgery.commands", "surgery.commands.shared", "surgery.commands.data", "surgery.commands.pairs",
    "surgery.commands.report", "surgery.commands.ablate", "surgery.commands.importance", "surgery.commands.patching",
    "surgery.commands.lines", "surgery.commands.interference",
    "surgery.commands.demo",
    "surgery.commands.inspect", "surgery.commands.patch", "surgery.commands.verify", "surgery.commands.generate",
    "surgery.commands.families", "surgery.commands.schema", "surgery.commands.bench",
    "surgery.cli", "surgery.__main__",                                                                    # on top
]  # fmt: skip
ENGINE = ORDER[: ORDER.index("surgery") + 1]

MOST_LINES = 420

MAY_BE_NAMED = {
    "encoderdecoder": "transformers' word for models and caches of two stacks",
    "clip": "matplotlib's clip_on",
}

Sources = dict[str, str]
"""Module name to its text."""


def sources(*folders: str) -> Sources:
    found = {}
    for path in sorted(p for folder in folders for p in (ROOT / folder).rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path.read_text(encoding="utf-8")
    return found


OURS = sources("surgery", "patches")


# -- imports ------------------------------------------------------------------------------------------------------------


def imported(text: str) -> set[str]:
    """Our modules that a text imports anywhere, also inside functions and for type checkers alone."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
    return {name for name in found if re.match(r"(surgery|patches)(\.|$)", name)}


def wrong_imports(modules: Sources, order: list[str]) -> list[str]:
    place = {name: number for number, name in enumerate(order)}
    problems = []
    for name, text in modules.items():
        own = name if name in place else name.partition(".")[0] if name.startswith("patches.") else None
        if own is None:
            problems.append(f"{name} has no place in ORDER (tests/test_layout.py)")
            continue
        for other in sorted(imported(text) & (set(place) | set(modules))):
            target = other if other in place else "patches"
            if place[target] > place[own] or (target == own and other != name and own != "patches"):
                problems.append(f"{name} imports {other}, which stands below it")
    return problems


def test_imports_run_one_way() -> None:
    assert wrong_imports(OURS, ORDER) == []
    missing = [name for name in ORDER if name not in OURS]
    assert missing == [], "ORDER names files that are gone"


def test_patches_know_the_interface_only() -> None:
    for name, text in OURS.items():
        if name.startswith("patches."):
            assert {m for m in imported(text) if m in OURS} <= {"surgery.family", "surgery.interface"}, name


def test_the_engine_stands_alone() -> None:
    """Neither patches nor what stands on top is imported by the engine; and the plain import loads no plotting, no commands."""
    for name in ENGINE:
        assert not {m for m in imported(OURS[name]) if m in OURS and m not in ENGINE}, name
    code = "import surgery, sys; surgery.patch_model; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT).stdout.split()
    assert "surgery.patch" in loaded
    assert not set(loaded) & {"matplotlib", "typer", "surgery.plots", "surgery.cli", "surgery.demo", "peft", "hypothesis"}


def test_the_order_of_imports_can_be_violated() -> None:
    order = ["a.low", "surgery.low", "surgery.high", "patches"]
    good = {
        "surgery.low": "import torch",
        "surgery.high": "from surgery.low import x",
        "patches.p": "from surgery.high import y",
    }
    assert wrong_imports(good, order) == []
    for text in (
        "from surgery.high import x",
        "import surgery.high",
        "def f():\n    from surgery import high",
        "if TYPE_CHECKING:\n    from surgery.high import x",
        "import patches",
        "from patches.p import x",
    ):
        assert wrong_imports({**good, "surgery.low": text}, order), text
    assert wrong_imports({**good, "surgery.new": ""}, order) == ["surgery.new has no place in ORDER (tests/test_layout.py)"]


# -- names of architectures ---------------------------------------------------------------------------------------------


def _loosely(model_type: str) -> str:
    """A model type with or without separators: "gpt_neox" also as GPT-NeoX and GPTNeoX."""
    words = re.sub(r"(?<=[a-z])(?=\d)|(?<=\d)(?=[a-z])", " ", re.sub(r"[-_]+", " ", model_type)).split()
    return r"[-_ ]?".join(map(re.escape, words))


_TYPES = "|".join(sorted((_loosely(name) for name in CONFIG_MAPPING if len(name) > 3), key=len, reverse=True))
# Whole words, or the beginning of a class name: LlamaAttention.
_NAMED = re.compile(rf"(?<![A-Za-z0-9])(?i:{_TYPES})(?![a-z0-9])")


def named_architectures(modules: Sources) -> list[str]:
    return [
        f"{name}, line {number}: {found}"
        for name, text in modules.items()
        for number, line in enumerate(text.splitlines(), 1)
        for found in _NAMED.findall(line)
        if re.sub(r"[-_ ]", "", found).lower() not in MAY_BE_NAMED
    ]


def test_the_engine_names_no_architecture() -> None:
    """Code, comments and docstrings alike; patches/ and demo/ are where models have names."""
    modules = {n: text for n, text in OURS.items() if n.startswith("surgery") and not n.startswith("surgery.demo")}
    assert named_architectures(modules) == []
    everything = " ".join(modules.values())
    unused = [word for word in MAY_BE_NAMED if word not in re.sub(r"[-_ ]", "", everything).lower()]
    assert unused == [], "exceptions that nothing needs"


@pytest.mark.parametrize(
    "line",
    [
        'if config.model_type == "llama":',
        "from transformers import LlamaAttention",
        "# as in GPT-2",
        "# as in gpt2 and others",
        '"""GPTNeoX stores q, k, v per head."""',
        "isinstance(module, Gemma2Attention)",
        "# BERT-style blocks",
        "name = 'deepseek_v3'",
    ],
)
def test_names_of_architectures_are_found(line: str) -> None:
    assert named_architectures({"surgery.new": f"x = 1\n{line}\n"})


@pytest.mark.parametrize("line", ["aligned values", "clipped", "a flamingo", "robertas", "is_encoder_decoder", "self.cross.2"])
def test_other_words_are_no_architectures(line: str) -> None:
    assert named_architectures({"surgery.new": line}) == []


# -- habits -------------------------------------------------------------------------------------------------------------


def prints(modules: Sources) -> list[str]:
    return [
        f"{name}, line {node.lineno}"
        for name, text in modules.items()
        for node in ast.walk(ast.parse(text))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in ("print", "breakpoint")
    ]


def test_the_library_prints_nothing() -> None:
    assert prints({n: text for n, text in OURS.items() if n != "surgery.demo.train"}) == []


def test_prints_are_found() -> None:
    assert prints({"a": "def f():\n    print(3)"}) == ["a, line 2"]
    assert prints({"a": "console.print(3)\n'print(3)'\n# print(3)"}) == []


def undocumented(modules: Sources) -> list[str]:
    """Modules, and public classes and functions at the top of a module, without a docstring."""
    problems = []
    for name, text in modules.items():
        tree = ast.parse(text)
        if ast.get_docstring(tree) is None:
            problems.append(name)
        for node in tree.body:
            is_definition = isinstance(node, ast.FunctionDef | ast.ClassDef)
            if is_definition and not node.name.startswith("_") and ast.get_docstring(node) is None:  # type: ignore[union-attr]
                problems.append(f"{name}.{node.name}")  # type: ignore[union-attr]
    return problems


def test_modules_and_public_definitions_say_what_they_are() -> None:
    assert undocumented({n: text for n, text in OURS.items() if n.startswith("surgery")}) == []
    assert [n for n in OURS if ast.get_docstring(ast.parse(OURS[n])) is None] == []


def test_missing_docstrings_are_found() -> None:
    assert undocumented({"a": "def f(): ...\nclass C: ...\ndef _g(): ..."}) == ["a", "a.f", "a.C"]
    assert undocumented({"a": '"""A."""\ndef f():\n    """F."""'}) == []


def test_every_public_name_is_documented() -> None:
    assert {"patch_model", "unpatch_model", "patched", "inspect_model", "capture", "Spec", "Freeze", "Edit"} <= set(
        surgery.__all__
    )
    assert {"freeze_qk_circuit", "freeze_ov_circuit", "collect_reference", "self_test", "Reference"} <= set(surgery.__all__)
    for name in surgery.__all__:
        value = getattr(surgery, name)
        if inspect.isclass(value) or inspect.isfunction(value):
            assert vars(value).get("__doc__") if inspect.isclass(value) else value.__doc__, name
            assert value.__module__.startswith("surgery."), "our own names only"
        else:
            assert isinstance(value, dict), "data"
    assert set(surgery.__all__) <= set(dir(surgery))
    with pytest.raises(AttributeError, match="no attribute 'no_such_name'"):
        _ = surgery.no_such_name


def too_long(modules: Sources) -> list[str]:
    return [f"{name}: {n} lines" for name, text in modules.items() if (n := len(text.splitlines())) > MOST_LINES]


def test_files_are_short() -> None:
    assert too_long(OURS) == []
    assert too_long({"a": "\n" * (MOST_LINES + 1)}) == [f"a: {MOST_LINES + 1} lines"]


def test_files_that_are_begun_first_exist() -> None:
    assert [name for name in LONG if not (ROOT / "tests" / f"test_{name}.py").exists()] == []
