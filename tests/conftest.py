"""One thread for each test process: the models are tiny, and several processes share the cores."""

from collections import Counter
from collections.abc import Iterator

import pytest
import torch

torch.set_num_threads(1)

LONG = ("divided", "parallel", "comparison", "program", "long_runs", "compiled", "serving", "benchmarks", "export")
"""Files of few tests that take long: they start processes, compile, or go round many times."""


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--zoo",
        default="quick",
        help='model types of tests/test_zoo.py: "quick" (some of each mechanism), "all", a shard "2/8", or names with commas',
    )
    parser.addoption("--rounds", default=100, type=int, help="of tests/test_long_runs.py")


@pytest.fixture
def dynamo() -> Iterator[None]:
    """torch's compiler as if nothing had been compiled, before and after."""
    from torch._dynamo.utils import counters  # which few tests need

    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


@pytest.fixture(scope="module")
def uncollected() -> Iterator[None]:
    """Timing collects no garbage, of which a process that has run hundreds of tests has much to look through."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("benchmarks.timing.gc.collect", lambda: 0)
        yield


@pytest.hookimpl(tryfirst=True)
def pytest_configure(config: pytest.Config) -> None:
    # By default a file's tests stay in one process; hundreds of types in one file need all of them.
    if config.getoption("--zoo") != "quick" and getattr(config.option, "dist", "no") == "loadfile":
        config.option.dist = "worksteal"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    # Processes take files in this order (--no-loadscope-reorder): what comes last, when others have no work left, is short.
    first = {f"test_{name}.py": place for place, name in enumerate(LONG)}
    tests = Counter(item.path.name for item in items)
    items.sort(key=lambda item: (first.get(item.path.name, len(first)), -tests[item.path.name]))
