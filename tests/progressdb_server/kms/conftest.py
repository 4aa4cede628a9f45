"""Real processes for the kms room: the fake daemon as a program, and directories that a daemon would accept."""

import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from progressdb_server.kms.supervisor import ChildOptions
from tests.harness.scripts import python_program

FAKE = Path(__file__).with_name("fake_minikms.py")


@dataclass
class Place:
    """Where a test's daemon lives. Socket paths are short, so this is not under pytest's own directories."""

    directory: Path
    binary: str

    @property
    def socket(self) -> str:
        return str(self.directory / "run" / "s")

    @property
    def data(self) -> Path:
        return self.directory / "data"

    def options(self, **more: object) -> ChildOptions:
        given: dict[str, object] = {"socket_path": self.socket, "data_dir": str(self.data), "binary": self.binary}
        return ChildOptions(**{**given, **more})  # type: ignore[arg-type]  # keyword arguments of several types


@pytest.fixture
def directory() -> Iterator[Path]:
    """An empty one with a short path, since paths of sockets are bounded."""
    with tempfile.TemporaryDirectory(prefix="kms") as name:
        yield Path(name)


@pytest.fixture
def place(directory: Path) -> Place:
    binary = directory / "minikms"
    python_program(binary, f"import runpy\nrunpy.run_path({str(FAKE)!r}, run_name='__main__')\n")
    (directory / "run").mkdir(mode=0o700)
    (directory / "data").mkdir(mode=0o700)
    return Place(directory, str(binary))


@pytest.fixture
def alive() -> Callable[[int], bool]:
    """Whether a process runs; one that has ended and waits for its parent does not."""

    def check(pid: int) -> bool:
        try:
            status = Path(f"/proc/{pid}/stat").read_text()
        except (FileNotFoundError, ProcessLookupError):
            return False
        return status.rpartition(")")[2].split()[0] != "Z"

    return check
