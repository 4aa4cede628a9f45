"""AWS KMS by moto's server over TLS, whose disabled keys refuse, as those of AWS do. Run as a program, it serves.

Owns: the server's process, its certificate, and the variables by which the AWS libraries find it.
"""

import contextlib
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tests import needs
from tests.harness.certificates import SERVER, Authority
from tests.harness.ports import free_port
from tests.harness.waiting import wait_until

REGION = "eu-central-1"
START_S_MAX = 180.0


class AwsKms:
    """`environ`: for programs that are to use it. Their users can read `directory`."""

    def __init__(self, directory: Path) -> None:
        needs.library("moto")
        port, authority = free_port(), Authority("AWS")
        ca = directory / "aws-ca.pem"
        ca.write_bytes(authority.pem)
        ca.chmod(0o644)
        cert, key = authority.issue(dns=["localhost"], extended=[SERVER]).write(directory, "aws")
        self.environ = {
            "AWS_ACCESS_KEY_ID": "of-the-provider",
            "AWS_SECRET_ACCESS_KEY": "for-tests-only",
            "AWS_ENDPOINT_URL_KMS": f"https://localhost:{port}",
            "AWS_CA_BUNDLE": str(ca),
        }
        self._flags = ["-H", "127.0.0.1", "-p", str(port), "-c", str(cert), "-k", str(key)]
        self.start()

    def start(self) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.harness.aws_kms", *self._flags],
            cwd=Path(__file__).parents[2],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        wait_until(self._answers, seconds=START_S_MAX)

    def stop(self) -> None:
        """It loses its keys."""
        self.process.kill()
        self.process.wait()

    def client(self) -> Any:
        """Of the customer."""
        session = needs.library("botocore.session").get_session()
        return session.create_client(
            "kms",
            region_name=REGION,
            endpoint_url=self.environ["AWS_ENDPOINT_URL_KMS"],
            verify=self.environ["AWS_CA_BUNDLE"],
            aws_access_key_id="of-the-customer",
            aws_secret_access_key="for-tests-only",
        )

    def _answers(self) -> bool:
        with contextlib.suppress(Exception):  # whatever it is, the server is not ready
            self.client().list_keys()
            return True
        assert self.process.poll() is None
        return False

    def new_key(self, **members: str) -> str:
        """The ARN of a key, which wraps unless `members` say otherwise."""
        return str(self.client().create_key(**members)["KeyMetadata"]["Arn"])

    def enable(self, arn: str, yes: bool) -> None:
        """Or (False) disable a key."""
        key_id = arn.rpartition("/")[2]
        (self.client().enable_key if yes else self.client().disable_key)(KeyId=key_id)


@contextlib.contextmanager
def aws_kms(directory: Path) -> Iterator[AwsKms]:
    made = AwsKms(directory)
    try:
        yield made
    finally:
        made.stop()


def main() -> None:
    refused = needs.library("moto.core.exceptions").JsonRESTError
    backend = needs.library("moto.kms.models").KmsBackend
    decrypt = backend.decrypt

    def decrypt_if_enabled(self: Any, *args: Any, **named: Any) -> Any:
        opened, arn = decrypt(self, *args, **named)
        if not self.describe_key(arn).enabled:
            raise refused("DisabledException", f"{arn} is disabled.")
        return opened, arn

    backend.decrypt = decrypt_if_enabled  # moto never refuses a disabled key
    needs.library("moto.server").main()


if __name__ == "__main__":
    main()
