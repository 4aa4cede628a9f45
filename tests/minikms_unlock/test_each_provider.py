"""A root key from a real provider of each kind: `configure`, the unlock service, a daemon with a lease."""

import contextlib
import functools
import json
import os
import shutil
import signal
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import pytest

from minikms.processes.handover import KEY
from tests import needs
from tests.harness.activated_unlock import UID
from tests.harness.aws_kms import aws_kms
from tests.harness.gateways import POLICY, Pair
from tests.harness.tpm import Tpm
from tests.harness.unlocking import TRIED
from tests.harness.waiting import wait_until
from tests.minikms.memory.test_no_key_in_memory import assert_unreachable
from tests.minikms_daemon.seal.test_unlocking import serves, why
from tests.minikms_gateway.transit.vault import transit_pair
from tests.minikms_tokens import test_clevis, test_vault_transit
from tests.minikms_unlock.conftest import AnyProvider, Provider
from tests.minikms_unlock.test_setup import Place

LEASE = ("--root-lease", "60")
"""6 s: see tests.harness.unlocking."""


class PluggedToken(Provider):
    """Its files are away while it is not plugged in. Its key can be removed, and come back from a copy of the files."""

    def __init__(self, base: Path) -> None:
        super().__init__(base)
        self._files, self._away = base / "tokens", base / "away"
        shutil.copytree(self._files, base / "copy")

    def refuse(self) -> None:
        with self.loaded(), self.token.session() as session:
            for key in session.get_objects():
                key.destroy()
        self.give_to_service()

    def go_away(self) -> None:
        self._files.rename(self._away)

    def restore(self) -> None:
        shutil.rmtree(self._files, ignore_errors=True)
        shutil.rmtree(self._away, ignore_errors=True)
        shutil.copytree(self.token.base / "copy", self._files)
        self.give_to_service()


class Measured:
    """A TPM that opens the key under the value that PCR 16 has after a start."""

    def __init__(self, tpm: Tpm) -> None:
        self._tpm = tpm
        self.source, self.environ = tpm.source("pcrs=sha256:16"), dict[str, str]()
        self.give_to_service()

    def give_to_service(self) -> None:
        for path in (self._tpm.socket, f"{self._tpm.socket}.ctrl"):
            os.chmod(path, 0o666)

    def refuse(self) -> None:
        self._tpm.tool("pcrextend", f"16:sha256={'11' * 32}")

    def go_away(self) -> None:
        self._tpm.stop()

    def restore(self) -> None:
        self._tpm.stop()
        self._tpm.start()
        self.give_to_service()


class Reached:
    """One that this user reaches as the service does."""

    def __init__(
        self,
        source: str,
        environ: Mapping[str, str],
        *,
        go_away: Callable[[], object],
        come_back: Callable[[], object],
        refuse: Callable[[], object] | None = None,
        grant: Callable[[], object] | None = None,
    ) -> None:
        self.source, self.environ = source, environ
        self._go_away, self._come_back, self._refuse, self._grant = go_away, come_back, refuse, grant
        self._undo: Callable[[], object] | None = None

    def give_to_service(self) -> None:
        pass

    def refuse(self) -> None:
        assert self._refuse is not None
        self._undo = self._grant
        self._refuse()

    def go_away(self) -> None:
        self._undo = self._come_back
        self._go_away()

    def restore(self) -> None:
        if self._undo is not None:
            self._undo()


@contextlib.contextmanager
def pkcs11(base: Path) -> Iterator[AnyProvider]:
    needs.library("pkcs11")
    yield PluggedToken(base)


@contextlib.contextmanager
def tpm2(base: Path) -> Iterator[AnyProvider]:
    tpm = Tpm(base)
    try:
        yield Measured(tpm)
    finally:
        tpm.stop()


@contextlib.contextmanager
def aws(base: Path) -> Iterator[AnyProvider]:
    with aws_kms(base) as kms:
        arn = kms.new_key()
        yield Reached(
            f"aws-kms:{arn}",
            kms.environ,
            go_away=lambda: kms.process.send_signal(signal.SIGSTOP),
            come_back=lambda: kms.process.send_signal(signal.SIGCONT),
            refuse=lambda: kms.enable(arn, False),
            grant=lambda: kms.enable(arn, True),
        )


@contextlib.contextmanager
def vault_transit(base: Path) -> Iterator[AnyProvider]:
    pair: Pair
    with transit_pair() as pair:
        test_vault_transit.make_key(pair, "root")
        source = test_vault_transit.source(pair, base, "root")
        for path in base.iterdir():
            os.chown(path, 0, UID)
            path.chmod(0o640)
        yield Reached(
            source,
            {},
            go_away=pair.gateway.stop,
            come_back=pair.gateway.start,
            refuse=lambda: pair.daemon.use_policy(POLICY.replace('"decrypt", "data_key", "mon', '"data_key", "mon')),
            grant=lambda: pair.daemon.use_policy(POLICY),
        )


@contextlib.contextmanager
def clevis(base: Path) -> Iterator[AnyProvider]:
    """It never refuses: an answer of tang proves nothing."""
    needs.program("clevis")
    tang = test_clevis.Tang(base)
    source = test_clevis.source(base, "tang", tang.config)
    try:
        yield Reached(source, {}, go_away=tang.stop, come_back=tang.start)
    finally:
        tang.stop()


PROVIDERS = {"pkcs11": pkcs11, "tpm2": tpm2, "aws-kms": aws, "vault-transit": vault_transit, "clevis": clevis}


SLOW = {"aws-kms"}
"""To start. tests.documents.test_runbook_of_root_keys has a shorter way with it."""


@pytest.fixture(params=[pytest.param(name, marks=[pytest.mark.torture] if name in SLOW else []) for name in PROVIDERS])
def place(request: pytest.FixtureRequest) -> Iterator[Place]:
    needs.interpreter_for(UID)
    with contextlib.ExitStack() as stack:
        provided, base = (
            Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="minikms-test-"))) for _ in range(2)
        )
        provided.chmod(0o755)
        provider = stack.enter_context(PROVIDERS[request.param](provided))
        made = Place(base, provider, launcher=("-m", "tests.harness.unlocking"), forked=False)
        stack.enter_context(made.daemon)
        stack.enter_context(made.service)
        yield made


def lapse(place: Place, change: Callable[[], None], how: str) -> None:
    """The daemon seals itself after `change` for the reason `how`, and serves after `restore`; then it logs both.

    On a slow machine the lease can end before the refusal is known: then all starts again.
    """
    found = ""
    while found != how:
        change()
        wait_until(lambda: not serves(place.daemon))
        place.hsm.restore()
        wait_until(functools.partial(serves, place.daemon))
        *_, before, line, after = place.daemon.events("seal", "unseal")
        assert [event["type"] for event in (before, line, after)] == ["unseal", "seal", "unseal"]
        assert line["actor"] == "minikms"
        found = line["facts"]["lease"]
        assert found in (how, "ended")


def test_a_daemon_lives_by_its_provider(place: Place) -> None:
    """It starts after its provider, and again after a kill, and serves only while the provider grants."""
    daemon = place.daemon
    made = place.configure()
    with daemon.client() as client:
        restrictions = client.status().hardening
    daemon.stop()
    place.use_service(*LEASE)

    place.hsm.go_away()
    daemon.start()
    wait_until(lambda: "waits for the unlock service" in why(daemon))
    assert not serves(daemon)
    place.hsm.restore()
    wait_until(lambda: serves(daemon))
    daemon.kill()
    daemon.start()
    wait_until(lambda: serves(daemon))

    with daemon.client() as client:
        status = client.status()
        assert (status.root.fingerprint, status.root.provider) == (made["fingerprint"], "unlock")
        assert status.hardening == restrictions
        key_id = client.create_dek_for_thread("t").key_id
        sealed = client.encrypt(key_id, b"text")
    tries = [line for line in daemon.log.read_text().splitlines() if line.startswith("tried: ")]
    assert set(tries) == {TRIED}
    kind, root = place.service.ask(place.keyring_id, "renew")
    assert kind == KEY
    assert_unreachable(daemon, daemon.keys(root))
    wait_until(lambda: not left(place))

    lapse(place, place.hsm.go_away, "ended")
    if not place.hsm.source.startswith("clevis:"):
        lapse(place, place.hsm.refuse, "refused")
    with daemon.client() as client:
        assert client.decrypt(key_id, sealed) == b"text"
    assert "internal error" not in daemon.log.read_text()
    assert root.hex() not in json.dumps(place.service.events())


def left(place: Place) -> list[str]:
    """Processes of the service's user."""
    return [path.name for path in Path("/proc").glob("[0-9]*") if path.exists() and path.stat().st_uid == UID]
