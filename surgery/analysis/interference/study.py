"""From collected gradients to findings: does task B disturb task A at a head, and do the two oppose each other there?"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pandas as pd

from surgery.analysis.interference.checks import FEWEST, out_of_reach, shared_samples, wrong_options
from surgery.analysis.interference.fisher import require_same
from surgery.analysis.interference.gradients import Gradients
from surgery.analysis.interference.kernels import kernel_of
from surgery.analysis.interference.randomised import Draws, enough, flips, labelings
from surgery.analysis.interference.scores import sample_scores
from surgery.analysis.interference.signed import sign_flip_test
from surgery.analysis.interference.statistics import Scores, permutation_test
from surgery.analysis.interference.tested import Tested
from surgery.analysis.interference.walk import MEMORY_MIB, RHO
from surgery.errors import SpecError, describe, listing


def overlap_test(
    a: Gradients,
    b: Gradients,
    control: Gradients,
    *,
    fisher: Any = None,
    kernel: str = "qkov",
    rho: float = RHO,
    memory_mib: float = MEMORY_MIB,
    device: Any = "cpu",
    n_permutations: int | None = None,
    alpha: float = 0.05,
    seed: int = 0,
    progress: bool = False,
) -> Tested:
    """Heads and blocks at which B disturbs A more than a control task does, and A more than the control is disturbed.

    control: a third task, of which nothing is asked but that it is neither A nor B: what any text does to any other is no
      finding. Samples have length one over all blocks, so that a difference of loss scale is none either.
    fisher: as in `heatmap`; None: the samples of all three tasks. A reference of other samples is as good; one of A's or B's
      own would tell them from the control where nothing else does (see `Scores`).
    kernel: "qkov", "whitened" or "ewc". Other options, and what p, p_fdr, p_maxt and the effects are: `permutation_test`.

    A sample's scores are compared with its median over a block's heads: of a task that raises more than half of them, few are
    found.
    Rows have address, block, head (kv head for K and V). Raises SpecError before any gradient is formed: too few samples, no
    control, tasks of another model, loss or layers, the same samples as two tasks.
    """
    tasks = {"a": a, "b": b, "control": control}
    problems = [*_wrong_tasks(tasks), *wrong_options(n_permutations, alpha, memory_mib, seed)]
    if kernel_of(kernel).is_unit:
        do = "Use conflict_test, which needs no control."
        problems.append(describe("kernel", f"{kernel!r}, whose numbers have signs", "one whose numbers have none", do))
    _check("overlap_test", tasks, problems, _labelings, n_permutations, alpha)
    hypotheses, scores = sample_scores(
        a, b, control, fisher, kernel, rho=rho, memory_mib=memory_mib, device=device, progress=progress
    )
    frame = _frame(hypotheses)
    return permutation_test(
        Scores(**scores),
        list(frame.block),
        hypotheses=frame,
        n_permutations=n_permutations,
        alpha=alpha,
        seed=seed,
        memory_mib=memory_mib,
        progress=progress,
    )


def conflict_test(
    a: Gradients,
    b: Gradients,
    *,
    memory_mib: float = MEMORY_MIB,
    device: Any = "cpu",
    n_permutations: int | None = None,
    alpha: float = 0.05,
    seed: int = 0,
    progress: bool = False,
) -> Tested:
    """Heads and blocks at which a step on B raises A's loss: the gradients of the two tasks point against each other.

    The scores are those of the "signed" kernel, of samples of length one over all blocks; they know no Fisher reference, and
    the test needs no control. Options, and what p, p_fdr, p_maxt and the effects are: `sign_flip_test`.

    Rows have address, block, head (kv head for K and V). Raises SpecError before any gradient is formed, as `overlap_test`.
    """
    tasks = {"a": a, "b": b}
    problems = [*_wrong_tasks(tasks), *wrong_options(n_permutations, alpha, memory_mib, seed)]
    _check("conflict_test", tasks, problems, _flips, n_permutations, alpha)
    hypotheses, scores = sample_scores(a, b, None, kernel="signed", memory_mib=memory_mib, device=device, progress=progress)
    return sign_flip_test(
        scores["rows_a"],
        scores["columns_b"],
        hypotheses=_frame(hypotheses),
        n_permutations=n_permutations,
        alpha=alpha,
        seed=seed,
        memory_mib=memory_mib,
        progress=progress,
    )


def require_reach(sizes: Sequence[int], n_permutations: int | None = None, alpha: float = 0.05) -> None:
    """Raises SpecError if with so many samples of A, B and the control the smallest p of a test cannot reach alpha."""
    most = enough(1, alpha) if n_permutations is None else n_permutations
    tests = {"overlap_test": _labelings(sizes, most), "conflict_test": _flips(sizes[:2], most)}
    if problems := [listing(name, wrong) for name, draws in tests.items() if (wrong := out_of_reach(name, draws, alpha))]:
        raise SpecError("\n".join(problems))


def _labelings(sizes: Sequence[int], most: int) -> dict[str, Draws]:
    """How many there are, of A, B and the control. They are never drawn: the tests draw their own."""
    a, b, control = sizes
    return {"row": labelings(a, control, most, 0), "col": labelings(b, control, most, 0)}


def _flips(sizes: Sequence[int], most: int) -> dict[str, Draws]:
    """The same of A and B."""
    return {way: flips(size, most, 0) for way, size in zip(("row", "col"), sizes, strict=True)}


def _frame(hypotheses: list[tuple[str, str, int]]) -> pd.DataFrame:
    return pd.DataFrame(hypotheses, columns=["address", "block", "head"])


def _wrong_tasks(tasks: dict[str, Any]) -> list[str]:
    """What are no gradients, too few samples, and tasks that have samples in common."""
    problems = []
    for name, task in tasks.items():
        if name == "control" and task is None:
            do = "Collect a third task: without it, what is special to A and B is not known."
            problems.append(describe(name, "no control", "gradients of a control task", do))
        elif not isinstance(task, Gradients):
            problems.append(describe(name, f"a {type(task).__name__}", "gradients", "Pass what collect returns."))
        elif len(task) < FEWEST:
            do = "Collect more; about 20 make a test that finds something."
            problems.append(describe(name, f"{len(task)} samples", f"at least {FEWEST}", do))
    return problems + shared_samples({name: task.samples for name, task in tasks.items() if isinstance(task, Gradients)})


def _check(
    what: str,
    tasks: dict[str, Gradients],
    problems: list[str],
    draws: Callable[[Sequence[int], int], dict[str, Draws]],
    n_permutations: int | None,
    alpha: float,
) -> None:
    """Raises SpecError, listing all. Good tasks alone are asked whether p can reach alpha."""
    if not problems:
        most = enough(len(tasks["a"].hypotheses), alpha) if n_permutations is None else int(n_permutations)
        problems = out_of_reach(what, draws([len(task) for task in tasks.values()], most), alpha)
    if all(isinstance(task, Gradients) for task in tasks.values()):
        try:
            require_same("tasks", *[task.about for task in tasks.values()])
        except SpecError as error:
            problems.append(str(error))
    if problems:
        raise SpecError(listing(what, problems))
