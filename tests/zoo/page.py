"""FAMILIES.md from the results of the checks."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable
from typing import Any

Row = dict[str, Any]

KINDS = {
    "causal_lm": "Causal language models",
    "seq2seq": "Sequence to sequence",
    "masked_lm": "Masked language models",
    "vision": "Vision",
    "vision_language": "Vision and language",
    "audio": "Audio",
    "classification": "Classification",
    "other": "Others",
}

_INTRO = """# Families

Every model type of transformers {transformers}, as a tiny random model that is built offline and patched (torch {torch}). The
tests are `pytest tests/test_zoo.py --zoo all`; this page comes from `python -m zoo.report all --json FILE`, then
`python -m zoo.report --merge FILE --write`, in `tests/`.

Of every type that is patched, but for what the table of failures says, holds:

* without cuts the forward equals the unpatched model's bit for bit, loaded as eager and, where the family has it, as sdpa; in
  training with dropout, too, and so do the gradients; `kernel="eager"` on the sdpa model equals the eager model bit for bit (to
  rounding where the family's eager classes call a fused kernel themselves);
* capturing every site changes no output, and leaves what the model returns as attentions and hidden states as it is;
* each site of each attention that runs is live: an edit there changes what the model, or at least the attention, gives;
* a QK and an OV freeze of one head equal zeroing that head's q and z by torch's own hooks in the unpatched model, where it has
  projections for that; pattern = softmax(scores) and z = pattern @ v by loops, and other heads keep theirs;
* derived W_Q, W_K, W_V and W_O give the captured q, k, v and result;
* no parameter is copied, deep copies work, unpatching is exact, and greedy decoding under cuts with a KV cache gives the tokens
  of decoding without one wherever the unpatched model does so.
"""


def page(results: dict[str, Any]) -> str:
    """The whole page."""
    rows: list[Row] = results["types"]
    parts = [_INTRO.format(**results["versions"]), _totals(rows)]
    for kind, title in KINDS.items():
        table = _supported([row for row in rows if row["kind"] == kind])
        if table:
            parts.append(f"## {title}\n\n{table}")
    parts += [_failures(rows), _sites(rows), _refused(rows), _others(rows), _without(rows), _unbuilt(rows)]
    return "\n".join(part for part in parts if part)


def _table(head: Iterable[str], lines: Iterable[Iterable[Any]]) -> str:
    head = list(head)
    cells = [[str(cell).replace("|", "\\|") for cell in line] for line in lines]
    return "\n".join(f"| {' | '.join(line)} |" for line in [head, ["---"] * len(head), *cells]) + "\n"


def classes(rows: Iterable[Row]) -> dict[str, set[str]]:
    """The attention classes by where their reconstruction comes from; "refused" for those that are left alone."""
    found: dict[str, set[str]] = defaultdict(set)
    for row in rows:
        for attention in row["attentions"]:
            how = "`patches/`" if attention["how"].startswith("`patches/") else attention["how"]
            found[how].add(attention["name"])
        found["refused"].update(row["refused"])
    return dict(found)


def _totals(rows: list[Row]) -> str:
    lines = []
    for kind, title in [*KINDS.items(), ("", "All")]:
        own = [row for row in rows if kind in ("", row["kind"])]
        whole = [row for row in own if row["status"] == "patched" and not row["refused"]]
        partly = [row for row in own if row["status"] == "patched" and row["refused"]]
        counts = [len(own), len(whole), len(partly)]
        counts += [
            sum(row["status"] in names for row in own) for names in (("refused",), ("no attention",), ("unbuildable", "failed"))
        ]
        lines.append([title, *counts])
    head = ["kind", "types", "patched", "patched in part", "refused", "no attention", "not built here"]
    by_how = classes(rows)
    order = ["its eager function", "its own code", "`patches/`", "refused"]
    words = {
        "its eager function": "behind transformers' attention interface, from the family's eager function",
        "its own code": "inline, from the class's own code",
        "`patches/`": "described by a file in `patches/`",
        "refused": "left as they are",
    }
    text = "\n".join(f"* {len(by_how.get(how, ()))} {words[how]}" for how in order)
    return f"{_table(head, lines)}\nAttention classes:\n\n{text}\n"


def _supported(rows: list[Row]) -> str:
    lines = []
    for row in rows:
        if row["status"] != "patched":
            continue
        groups: dict[tuple[str, str], list[str]] = defaultdict(list)
        missing: dict[str, None] = {}
        for attention in row["attentions"]:
            heads = f"{attention['heads']}/{attention['kv_heads']}"
            groups[attention["name"], attention["how"]].append(heads)
            missing |= dict.fromkeys(attention["missing"])
        names = ", ".join(f"{name} {' '.join(dict.fromkeys(heads))}" for (name, _), heads in groups.items())
        hows = ", ".join(dict.fromkeys(how for _, how in groups))
        left = ", ".join(row["refused"])
        lines.append([row["model_type"], names, hows, ", ".join(missing), left])
    head = ["type", "attention, heads/kv heads", "reconstruction from", "sites missing", "left as it is"]
    return _table(head, lines) if lines else ""


def _failures(rows: list[Row]) -> str:
    lines = [[row["model_type"], ", ".join(row["failures"])] for row in rows if row["failures"]]
    title = "## Failures\n\nWhat does not hold, by the name of the check.\n\n"
    return title + _table(["type", "checks that fail"], lines) if lines else ""


def _sites(rows: list[Row]) -> str:
    """Why sites are missing, by reason."""
    found: dict[tuple[str, str], dict[str, None]] = defaultdict(dict)
    for row in rows:
        for attention in row["attentions"]:
            for site, why in attention["missing"].items():
                found[site, why][attention["name"]] = None
    lines = [[site, why, _names(names)] for (site, why), names in sorted(found.items())]
    title = "## Sites that do not exist\n\nThe others do; `rot_q`, `rot_k` and `z` stand in for `q`, `k` and `result`.\n\n"
    return title + _table(["site", "because", "classes"], lines) if lines else ""


def _refused(rows: list[Row]) -> str:
    return _reasons(
        rows, "refused", "## Left as it is, and why", "`patch_model` refuses these; `strict=False` patches what is beside them."
    )


def _others(rows: list[Row]) -> str:
    return _reasons(rows, "others", "## A softmax that is no attention", "These are not patched and not refused.")


def _reasons(rows: list[Row], field: str, title: str, text: str) -> str:
    found: dict[tuple[str, str], dict[str, None]] = defaultdict(dict)
    for row in rows:
        for name, why in row[field].items():
            found[name, why][row["model_type"]] = None
    lines = [[name, why, _names(types)] for (name, why), types in sorted(found.items())]
    return f"{title}\n\n{text}\n\n{_table(['class', 'found', 'types'], lines)}" if lines else ""


def _without(rows: list[Row]) -> str:
    names = [row["model_type"] for row in rows if row["status"] == "no attention"]
    title = "## No softmax attention\n\nConvolutions, linear attention, state spaces, Fourier transforms and the like:\n"
    return f"{title}{', '.join(names)}.\n" if names else ""


def _unbuilt(rows: list[Row]) -> str:
    lines = [[row["model_type"], row["reason"]] for row in rows if row["status"] in ("unbuildable", "failed")]
    title = "## Not built here\n\nNothing is known of these types; they are patched or refused like any other.\n\n"
    return title + _table(["type", "because"], lines) if lines else ""


def _names(names: Iterable[str]) -> str:
    return ", ".join(names)


def short(reason: str) -> str:
    """A message without what to expect and do, and without what differs from one model to the next."""
    found = reason.removeprefix("found ").partition("; expected")[0]
    found = re.sub(r"'[\w.]*\.\d[\w.]*'", "it", found)
    return found if len(found) <= 200 else f"{found[:197]}..."
