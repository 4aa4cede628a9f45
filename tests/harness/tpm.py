"""A TPM 2.0 in software.

Owns: a swtpm in a directory of the test, reached over a Unix socket, and tools that ask it. It asserts nothing by
itself.
"""

import os
import signal
import subprocess
from pathlib import Path

from tests import needs
from tests.harness.waiting import listens, wait_until

RUN_S_MAX = 60.0


class Tpm:
    """Its state is in `base`. It has no resource manager: whoever leaves three objects in it has filled it."""

    def __init__(self, base: Path) -> None:
        needs.program("tpm2_unseal")
        self._base = base
        self.socket = base / "tpm"
        self._sockets = (self.socket, base / "tpm.ctrl")
        self.tcti = f"swtpm:path={self.socket}"
        self.start()

    def start(self) -> None:
        command = [needs.program("swtpm"), "socket", "--tpm2", "--flags", "not-need-init,startup-clear"]
        command += ["--server", f"type=unixio,path={self.socket}", "--ctrl", f"type=unixio,path={self.socket}.ctrl"]
        quiet = subprocess.DEVNULL
        self.process = subprocess.Popen([*command, "--tpmstate", f"dir={self._base}"], stdout=quiet, stderr=quiet)
        wait_until(lambda: all(map(listens, self._sockets)))

    def stop(self) -> None:
        self.process.send_signal(signal.SIGCONT)
        self.process.kill()
        self.process.wait()
        for name in self._sockets:
            name.unlink(missing_ok=True)

    def source(self, *parameters: str) -> str:
        return "tpm2:?" + "&".join((f"tcti={self.tcti}", *parameters))

    def tool(self, name: str, *arguments: str, data: bytes = b"") -> bytes:
        command = [needs.program(f"tpm2_{name}"), "-T", self.tcti, *arguments]
        done = subprocess.run(command, input=data, capture_output=True, timeout=RUN_S_MAX, check=True, env=os.environ)
        if name != "flushcontext":
            self.tool("flushcontext", "-t")
        return done.stdout

    def left(self) -> bytes:
        """Handles of objects and sessions in it."""
        kinds = ("transient", "loaded-session", "saved-session")
        return b"".join(self.tool("getcap", f"handles-{kind}") for kind in kinds)
