"""A PKCS#11 token in software, with keys to sign with.

Owns: a SoftHSM token in a directory of the test, its keys and its PIN file, and a server before it. It asserts nothing
by itself.
"""

import contextlib
import os
import shutil
import signal
import subprocess
from pathlib import Path
from typing import Any

from tests import needs
from tests.harness.waiting import listens, wait_until

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

    def __init__(self, base: Path, like: "Token | None" = None) -> None:
        """like: a copy of this one is made, which is faster."""
        needs.library("pkcs11")
        self.module = needs.pkcs11_module("softhsm/libsofthsm2.so")
        self.base = base
        shutil.copytree(like.base / "tokens", base / "tokens") if like else (base / "tokens").mkdir()
        self.conf = base / "softhsm2.conf"
        self.conf.write_text(f"directories.tokendir = {base}/tokens\nobjectstore.backend = file\nlog.level = ERROR\n")
        self.environ = {"SOFTHSM2_CONF": str(self.conf)}
        self.pin_file = base / "pin"
        self.write_pin(PIN)
        if like:
            return
        pins = ("--so-pin", "so-pin-123", "--pin", PIN)
        run(needs.program("softhsm2-util"), "--init-token", "--free", "--label", "log", *pins, **self.environ)
        for kind, number, label in (("EC:edwards25519", "01", "tree"), ("EC:prime256v1", "02", "second")):
            self.make_key(kind, number, label)

    def make_key(self, kind: str, number: str, label: str) -> None:
        tool = (needs.program("pkcs11-tool"), "--module", self.module, "--token-label", "log", "--login", "--pin", PIN)
        run(*tool, "--keypairgen", "--key-type", kind, "--id", number, "--label", label, **self.environ)

    def make_secret(self, label: str, **attributes: object) -> None:
        """An AES-256 key of this process, with the attributes that a wrapping key needs, and these."""
        pkcs11 = needs.library("pkcs11")

        names = {"SENSITIVE": True, "EXTRACTABLE": False, "ENCRYPT": True, "DECRYPT": True, **attributes}
        template = {pkcs11.Attribute[name]: value for name, value in names.items()}
        with self.session() as session:
            session.generate_key(pkcs11.KeyType.AES, 256, store=True, label=label, template=template)

    def session(self) -> Any:
        """One that may write, of this process."""
        pkcs11 = needs.library("pkcs11")
        return pkcs11.lib(self.module).get_token(token_label="log").open(rw=True, user_pin=PIN)

    def end_sessions(self) -> None:
        """Those of this process, as at its end."""
        pkcs11 = needs.library("pkcs11")
        with contextlib.suppress(pkcs11.PKCS11Error):  # the token is away
            pkcs11.lib(self.module).reinitialize()

    def write_pin(self, pin: str) -> None:
        new = self.pin_file.with_name("new")
        new.touch(0o600)
        new.write_text(pin + "\n")
        new.rename(self.pin_file)

    def uri(self, key: str = "object=tree", module: str = "") -> str:
        return f"pkcs11:token=log;{key}?module-path={module or self.module}&pin-source=file:{self.pin_file}"


class Remote:
    """The token behind p11-kit's server, as a token of another machine is reached. It passes no CKM_EDDSA on."""

    def __init__(self, token: Token) -> None:
        self.module = needs.pkcs11_module("pkcs11/p11-kit-client.so")
        self._token = token
        self.socket = token.base / "server"
        self.start()

    def start(self) -> None:
        self.socket.unlink(missing_ok=True)
        provider = ("--provider", self._token.module, "--name", str(self.socket), "--foreground")
        self.process = subprocess.Popen(
            [needs.program("p11-kit"), "server", *provider, "pkcs11:token=log"],
            env={**os.environ, **self._token.environ},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        wait_until(lambda: listens(self.socket))

    def signal(self, number: int) -> None:
        """To the server, and to its child for each connection."""
        os.killpg(self.process.pid, number)

    def kill(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            self.signal(signal.SIGKILL)
        self.process.wait()
