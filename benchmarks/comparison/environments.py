"""A virtual environment for each other library, so that none has to agree with what another one, or this one, requires."""

from __future__ import annotations

import subprocess
import sys
import venv
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from zlib import crc32

from benchmarks.results import ROOT

REQUIREMENTS = {
    "transformer-lens": "transformer-lens>=4.3,<5",
    "nnsight": "nnsight>=0.8,<1",
    "pyvene": "pyvene>=0.1.8,<1",
}
BESIDE = {"transformer-lens": ["transformers<5.24"]}
"""What must be beside a package: TransformerLens 4.3 does not know the name that a KV cache has since transformers 5.24."""
FOLDER = Path.home() / ".cache" / "attention-surgery" / "peers" / f"{ROOT.name}-{crc32(str(ROOT).encode()):08x}"
"""One for each checkout, which its environments have installed."""
STAMP = "installed"
MINUTES = 20


class NotInstalled(Exception):
    """Says in a line why an environment could not be made."""


def here(package: str) -> Path:
    """The interpreter that runs, if it has the package. Raises NotInstalled otherwise."""
    if not is_here(package):
        raise NotInstalled(
            f"not in this environment; pip install '{REQUIREMENTS.get(package, package)}' into it, or leave out --here"
        )
    return Path(sys.executable)


def is_here(package: str) -> bool:
    """Whether this environment has it."""
    try:
        version(package)
    except PackageNotFoundError:
        return False
    return True


def python_of(package: str, folder: Path = FOLDER, say: Callable[[str], None] = print) -> Path:
    """The interpreter of a package's environment, which is made if need be: with this library, and this version of torch.

    Raises NotInstalled with pip's last word.
    """
    place = folder / package
    python = place / ("Scripts" if sys.platform == "win32" else "bin") / "python"
    torch = f"torch=={version('torch').partition('+')[0]}"
    wanted = ["-e", f"{ROOT}[analysis]", REQUIREMENTS[package], *BESIDE.get(package, ()), torch]
    stamp = place / STAMP
    if stamp.exists() and stamp.read_text(encoding="utf-8") == "\n".join(wanted):
        return python
    say(f"{package}: makes an environment in {place}, which takes minutes")
    try:
        venv.create(place, with_pip=True, clear=True)
        command = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *wanted]
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60 * MINUTES)
    except (OSError, subprocess.SubprocessError) as error:
        raise NotInstalled(f"{type(error).__name__}: {error}") from None
    if done.returncode:
        raise NotInstalled((done.stderr.strip().splitlines() or [f"pip exits with {done.returncode}"])[-1])
    stamp.write_text("\n".join(wanted), encoding="utf-8")
    return python
