"""A PKCS#11 token in software, with keys to sign with.

Owns: a SoftHSM token in a directory of the test, its keys and its PIN file. It asserts nothing by itself.
"""

import os
import subprocess
from pathlib import Path

from tests import needs

PIN = "78931-pin"
RUN_S_MAX = 60.0


def run(*command: str, **environ: str) -> str:
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=RUN_S_MAX, check=False, env={**os.environ, **environ}
    )
    assert done.returncode == 0, done
    return done.stdout


class Token:
    """A SoftHSM token with a key of each kind, in `base`. Its PIN file is `pin_file`."""

    def __init__(self, base: Path) -> None:
        needs.library("pkcs11")
        self.module = needs.pkcs11_module("softhsm/libsofthsm2.so")
        self.base = base
        (base / "tokens").mkdir()
        self.conf = base / "softhsm2.conf"
        self.conf.write_text(f"directories.tokendir = {base}/tokens\nobjectstore.backend = file\nlog.level = ERROR\n")
        self.environ = {"SOFTHSM2_CONF": str(self.conf)}
        self.pin_file = base / "pin"
        self.write_pin(PIN)
        pins = ("--so-pin", "so-pin-123", "--pin", PIN)
        run(needs.program("softhsm2-util"), "--init-token", "--free", "--label", "log", *pins, **self.environ)
        for kind, number, label in (("EC:edwards25519", "01", "tree"), ("EC:prime256v1", "02", "second")):
            self.make_key(kind, number, label)

    def make_key(self, kind: str, number: str, label: str) -> None:
        tool = (needs.program("pkcs11-tool"), "--module", self.module, "--token-label", "log", "--login", "--pin", PIN)
        run(*tool, "--keypairgen", "--key-type", kind, "--id", number, "--label", label, **self.environ)

    def write_pin(self, pin: str) -> None:
        new = self.pin_file.with_name("new")
        new.touch(0o600)
        new.write_text(pin + "\n")
        new.rename(self.pin_file)

    def uri(self, key: str = "object=tree", module: str = "") -> str:
        return f"pkcs11:token=log;{key}?module-path={module or self.module}&pin-source=file:{self.pin_file}"
