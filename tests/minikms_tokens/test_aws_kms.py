"""Keys in AWS KMS, by moto's server."""

import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.ec import ECDSA, EllipticCurvePublicKey
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import load_der_public_key

from minikms_tokens import TokenError, open_signer
from tests import needs
from tests.harness.ports import free_port
from tests.harness.waiting import wait_until

REGION = "eu-central-1"
MESSAGE = b"a tree checkpoint"


class Service:
    """moto's server on a port of this machine. It loses its keys when it ends."""

    def __init__(self, port: int) -> None:
        self._port = port
        self.start()

    def start(self) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(self._port)],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        wait_until(self._answers)

    def _answers(self) -> bool:
        try:
            self.client().list_keys()
        except Exception as error:  # noqa: BLE001  whatever it is, the server is not ready
            assert self.process.poll() is None, error
            return False
        return True

    def client(self) -> Any:
        session = needs.library("botocore.session")
        return session.get_session().create_client("kms", region_name=REGION)

    def new_key(self, **members: str) -> str:
        asked = {"KeySpec": "ECC_NIST_P256", "KeyUsage": "SIGN_VERIFY"} | members
        return str(self.client().create_key(**asked)["KeyMetadata"]["Arn"])

    def stop(self) -> None:
        self.process.kill()
        self.process.wait()


@pytest.fixture(scope="module")
def service() -> Iterator[Service]:
    """Each test makes keys of its own, and leaves it running."""
    needs.library("moto")
    port = free_port()
    with pytest.MonkeyPatch.context() as environ:
        for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
            environ.setenv(name, "for-tests-only")
        environ.setenv("AWS_ENDPOINT_URL_KMS", f"http://127.0.0.1:{port}")
        running = Service(port)
        yield running
        running.stop()


def test_a_key_in_aws_kms_signs_and_its_signature_verifies(service: Service) -> None:
    signer = open_signer(f"aws-kms:{service.new_key()}")
    key = load_der_public_key(signer.public_key())
    assert isinstance(key, EllipticCurvePublicKey) and signer.algorithm == "ecdsa-p256-sha256"
    for _ in range(2):
        key.verify(signer.sign(MESSAGE), MESSAGE, ECDSA(SHA256()))
        signer.close()
    with pytest.raises(TokenError, match="at most 4096 bytes"):
        signer.sign(bytes(4097))


def test_another_kind_of_key_is_refused(service: Service) -> None:
    for members in ({"KeySpec": "ECC_NIST_P384"}, {"KeySpec": "RSA_2048"}):
        with pytest.raises(TokenError, match="not one for signing"):
            open_signer(f"aws-kms:{service.new_key(**members)}").sign(MESSAGE)
    missing = service.new_key()[:-4] + "0000"
    with pytest.raises(TokenError, match="AWS KMS does not answer: NotFoundException"):
        open_signer(f"aws-kms:{missing}").public_key()


def test_while_the_service_is_away_calls_fail_and_later_ones_work(service: Service) -> None:
    """Another key under the same ARN, as the service has after it lost its own, is never taken."""
    arn = service.new_key()
    signer = open_signer(f"aws-kms:{arn}")
    signer.sign(MESSAGE)
    service.stop()
    for _ in range(2):
        with pytest.raises(TokenError, match="does not answer: EndpointConnectionError"):
            signer.sign(MESSAGE)
    service.start()
    with pytest.raises(TokenError, match="NotFoundException"):
        signer.sign(MESSAGE)
    again = open_signer(f"aws-kms:{service.new_key()}")
    again.sign(MESSAGE)
