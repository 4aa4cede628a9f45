"""Writes docs/demo.svg, the README's picture: `python tools/picture.py` runs examples/keys.sh and draws what it prints.

Owns: the picture's size and which part of the tour it shows. Nothing in it is made up: each line was printed by a real
command on a real daemon.
"""

from __future__ import annotations

import io
import os
import re
import subprocess
import sys
from pathlib import Path

from rich.console import Console
from rich.text import Text

PROJECT = Path(__file__).resolve().parents[1]
PICTURE = PROJECT / "docs" / "demo.svg"
COLUMNS = 112
TITLE = "minikms"
FIRST = "# Encrypt a file"
"""The picture begins here: what comes before is how the daemon is set up."""


def drawn(said: str) -> str:
    """The SVG of a tour's output."""
    console = Console(record=True, width=COLUMNS, file=io.StringIO(), highlight=False)
    for line in said[said.index(FIRST) :].splitlines():
        style = "bold" if line.startswith("# ") else "cyan" if line.startswith("$ ") else ""
        console.print(Text(line, style=style, overflow="ellipsis", no_wrap=True))
    svg = console.export_svg(title=TITLE, unique_id="demo")
    # Fonts come from the reader's own machine: a picture in a README must not call another host.
    return re.sub(r"@font-face \{.*?\}\s*", "", svg, flags=re.DOTALL)


if __name__ == "__main__":
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    words = ["sh", str(PROJECT / "examples" / "keys.sh")]
    done = subprocess.run(  # noqa: S603 - our own script
        words, env=os.environ | {"PATH": path}, capture_output=True, text=True, check=True, timeout=120
    )
    PICTURE.write_text(drawn(done.stdout), "utf-8")
    sys.stdout.write(f"wrote {PICTURE}\n")
