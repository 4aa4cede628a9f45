"""A real provider for the unlock service: an AES key in a SoftHSM token that the service's user may use."""

import contextlib
import os
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Protocol

import pytest

from minikms_tokens import open_wrapper
from tests import needs
from tests.harness.activated_unlock import UID
from tests.harness.hsm import Token

KEYRING_ID = "kr_" + "a1" * 8


class AnyProvider(Protocol):
    """`environ`: for its library. `restore`: after `refuse`, and after `go_away`."""

    @property
    def source(self) -> str: ...

    @property
    def environ(self) -> Mapping[str, str]: ...

    def give_to_service(self) -> None: ...

    def refuse(self) -> None: ...

    def go_away(self) -> None: ...

    def restore(self) -> None: ...


class Provider:
    """The token, below a directory that every user can enter."""

    def __init__(self, base: Path) -> None:
        self.token = Token(base)
        self.environ = self.token.environ
        self.source = self.token.uri("object=wrap")
        self._pin = self.token.pin_file.read_text()
        with self.loaded():
            self.token.make_secret("wrap")
        self.give_to_service()

    @contextlib.contextmanager
    def loaded(self) -> Iterator[None]:
        """In the block this process uses the token."""
        with pytest.MonkeyPatch.context() as environ:
            environ.setenv("SOFTHSM2_CONF", str(self.token.conf))
            try:
                yield
            finally:
                needs.library("pkcs11").unload(self.token.module)

    def wrap(self, root: bytes, keyring_id: str = KEYRING_ID) -> bytes:
        with self.loaded():
            return open_wrapper(self.source).wrap(memoryview(root), keyring_id)

    def give_to_service(self, uid: int = UID) -> None:
        """A use by root can leave files of root."""
        for path in (self.token.base, *self.token.base.rglob("*")):
            os.chown(path, uid, uid)
        self.token.base.chmod(0o755)

    def refuse(self) -> None:
        self.token.write_pin("9" * len(self._pin))
        self.give_to_service()

    def go_away(self) -> None:
        self.token.pin_file.unlink()

    def restore(self) -> None:
        self.token.write_pin(self._pin)
        self.give_to_service()


@pytest.fixture(scope="session")
def hsm() -> Iterator[Provider]:
    needs.library("pkcs11")
    needs.interpreter_for(UID)
    with tempfile.TemporaryDirectory(prefix="minikms-test-") as name:
        yield Provider(Path(name))
