"""Peak memory of attention with some heads unfused: `python -m benchmarks.memory CASE --length 8192` prints one as JSON.

Counted exactly: every allocation and release of torch's CPU allocator in one forward (the profiler's memory events), beside
the process's peak resident size as a check; on CUDA the caching allocator's peak. Each case in a process of its own.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import resource
from collections.abc import Callable, Collection, Iterator
from typing import Any

import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile

from benchmarks import models
from benchmarks.machine import available_bytes
from benchmarks.results import Row, child, row
from surgery import Edit, capture, patched

HEADS = 12

CASES: dict[str, tuple[str, Callable[[Any], Any]]] = {
    "fused": ("unpatched sdpa", lambda model: contextlib.nullcontext()),
    "no-op": ("patched, no cuts", patched),
    "capture-one": ("pattern of one head captured", lambda model: capture(model, "pattern", heads=[3])),
    "scores-one": ("scores of one head scaled", lambda model: patched(model, Edit("scores", "scale", value=0.5, heads=[3]))),
    "pattern-one": ("pattern of one head made uniform", lambda model: patched(model, Edit("pattern", "uniform", heads=[3]))),
    "scores-two": (
        "scores of two heads scaled",
        lambda model: patched(model, Edit("scores", "scale", value=0.5, heads=[3, 7])),
    ),
    "scores-all": ("scores of all 12 heads scaled", lambda model: patched(model, Edit("scores", "scale", value=0.5))),
    "eager": ("unpatched eager", lambda model: contextlib.nullcontext()),
}
"""What is run, in words, and the state of the model while it runs."""


def rows(
    length: int, device: str, threads: int, cases: Collection[str] = tuple(CASES), whole_model: bool = True
) -> Iterator[Row]:
    """Growth of the peak over the unpatched fused kernel, in matrices of one head (query × key).

    whole_model: also of a model of one layer, beside its attention module alone.
    """
    places = (("the attention module alone",), ("a model of one layer", "--whole-model"))
    for place, *more in places[: 2 if whole_model else 1]:
        group = f"growth of peak memory of {place} over unpatched sdpa, {length:,} tokens, in attention matrices of one head"

        def run(case: str, length: int, more: list[str] = more) -> dict[str, int]:
            return child("memory", case, f"--length={length}", f"--device={device}", f"--threads={threads}", *more)

        fused = {length: run("fused", length)}
        for case, (what, _) in CASES.items():
            if case == "fused" or case not in cases:
                continue
            at = length
            if case in ("scores-all", "eager") and device == "cpu" and 5 * HEADS * 4 * length**2 > available_bytes():
                at, what = length // 2, f"{what} ({length // 2:,} tokens)"  # multiples are the same, the matrix is smaller
                fused.setdefault(at, run("fused", at))
            found = run(case, at)
            grown = {name: (found[name] - fused[at][name]) / found["matrix"] for name in ("peak", "resident")}
            peak = grown["peak"]
            numbers = {"value": peak, "low": peak, "high": peak, "resident": grown["resident"], "matrix_bytes": found["matrix"]}
            # What is captured is one matrix; a cut alone keeps none. On top of that comes a block of rows.
            yield row(group, what, numbers, 1.05 if case.endswith("-one") else None)


def measure(case: str, length: int, *, whole_model: bool = False, device: str = "cpu") -> dict[str, int]:
    """Bytes: `peak` above what was there before one forward, peak `resident` size likewise, and one head's `matrix`.

    Of an attention module of GPT-2 small's shape, batch 1, float32 (CUDA: bfloat16); nothing else of a model hides its peak.
    whole_model: of a model of one layer, whose feed-forward part has a peak of its own.
    """
    model = models.gpt2(
        1, HEADS, positions=length, vocabulary=64, device=device, implementation="eager" if case == "eager" else "sdpa"
    )
    with torch.no_grad(), CASES[case][1](model):
        forward = _forward_of_model(model, device) if whole_model else _forward_of_attention(model, length, device)
        forward(4)  # code that is made on a first call is not what is measured
        before = _resident()
        peak = (peak_cuda if torch.device(device).type == "cuda" else peak_cpu)(lambda: forward(length))
        return {"peak": peak, "resident": _resident() - before, "matrix": length**2 * model.dtype.itemsize}


def _forward_of_model(model: Any, device: str) -> Callable[[int], Any]:
    return lambda length: model(models.tokens(1, length, device, vocabulary=64))


def _forward_of_attention(model: Any, length: int, device: str) -> Callable[[int], Any]:
    attention: nn.Module = model.h[0].attn
    states = torch.randn(1, length, model.config.n_embd, device=device, dtype=model.dtype)
    mask = None
    if model.config._attn_implementation == "eager":
        # Eager attention takes its causal mask from the model.
        lowest = torch.finfo(model.dtype).min
        mask = torch.full((1, 1, length, length), lowest, device=device, dtype=model.dtype).triu_(1)
    return lambda n: attention(states[:, :n], attention_mask=None if mask is None else mask[..., :n, :n])


def peak_cuda(forward: Callable[[], Any]) -> int:
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    forward()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def peak_cpu(forward: Callable[[], Any]) -> int:
    """Bytes that torch's CPU allocator held at most in a call, above what it held before."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as profiler:
        forward()
    assert profiler.profiler is not None and profiler.profiler.kineto_results is not None
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


def _resident() -> int:
    """The process's peak resident size so far."""
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("case", choices=list(CASES))
    parser.add_argument("--length", type=int, default=8192)
    parser.add_argument("--whole-model", action="store_true")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=1)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    print(json.dumps(measure(given.case, given.length, whole_model=given.whole_model, device=given.device)))


if __name__ == "__main__":
    main()
