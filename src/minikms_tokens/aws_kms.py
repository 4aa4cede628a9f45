"""A signing key in AWS KMS: ECC_NIST_P256 with ECDSA_SHA_256.

Owns: the ARN of a key, the client, and its time limits. Invariants: the key is named by its own ARN, never by an alias,
which could be moved to another key; credentials come from where the AWS libraries look for them (environment, files,
the instance), and are never read here. It must never log what the service answers.
"""

from __future__ import annotations

import re
from typing import Any, Final

from minikms_tokens.signing import Algorithm, TimedCalls, TokenError, check_p256, check_signature

try:
    import botocore.session
    from botocore.config import Config
    from botocore.exceptions import BotoCoreError, ClientError
except ImportError:
    raise TokenError(
        "aws-kms: keys need a library: install the wheel of progressdb-minikms with its extra `aws-kms`"
    ) from None

CONNECT_SECONDS_MAX: Final = 3
READ_SECONDS_MAX: Final = 5
MESSAGE_BYTES_MAX: Final = 4096
"""The bound of the service for a message that it hashes itself."""
ATTEMPTS_MAX: Final = 2
"""Of one request, within the limit of `minikms_tokens.signing.CALL_SECONDS_MAX`."""
_ARN: Final = re.compile(r"arn:aws(?:-cn|-us-gov)?:kms:([a-z0-9-]{1,32}):[0-9]{12}:key/[A-Za-z0-9-]{1,64}", re.ASCII)
_CODE: Final = re.compile(r"[A-Za-z0-9.]{1,64}", re.ASCII)
_ALGORITHM: Final = "ECDSA_SHA_256"


class AwsKmsSigner:
    """A key in AWS KMS."""

    algorithm: Algorithm = "ecdsa-p256-sha256"

    def __init__(self, uri: str) -> None:
        self._arn = uri.removeprefix("aws-kms:")
        found = _ARN.fullmatch(self._arn)
        if found is None:
            raise TokenError("aws-kms: is followed by the ARN of a key: arn:aws:kms:REGION:ACCOUNT:key/ID, no alias")
        self._region = found[1]
        self._calls = TimedCalls("AWS KMS")
        self._client: Any = None
        self._public_key = b""

    def public_key(self) -> bytes:
        return self._public_key or self._calls.call(self._learn)

    def sign(self, message: bytes) -> bytes:
        return self._calls.call(lambda: self._sign(message))

    def close(self) -> None:
        self._calls.call(self._drop)

    # --- in the thread of the call -----------------------------------------------------------------------------------

    def _learn(self) -> bytes:
        if not self._public_key:
            answer = self._ask("get_public_key")
            if _ALGORITHM not in answer.get("SigningAlgorithms", ()):
                raise TokenError("the key in AWS KMS is not one for signing with ECDSA_SHA_256")
            found = bytes(answer["PublicKey"])
            check_p256(found)
            self._public_key = found
        return self._public_key

    def _sign(self, message: bytes) -> bytes:
        public_key = self._learn()
        if len(message) > MESSAGE_BYTES_MAX:
            raise TokenError(f"AWS KMS signs messages of at most {MESSAGE_BYTES_MAX} bytes")
        answer = self._ask("sign", Message=message, MessageType="RAW", SigningAlgorithm=_ALGORITHM)
        signature = bytes(answer["Signature"])
        check_signature(self.algorithm, public_key, signature, message)
        return signature

    def _ask(self, operation: str, **parameters: object) -> dict[str, Any]:
        """Raises TokenError, which has the error code of the service and nothing else of its answer."""
        try:
            if self._client is None:
                limits = Config(
                    connect_timeout=CONNECT_SECONDS_MAX,
                    read_timeout=READ_SECONDS_MAX,
                    retries={"total_max_attempts": ATTEMPTS_MAX, "mode": "standard"},
                )
                session = botocore.session.get_session()
                self._client = session.create_client("kms", region_name=self._region, config=limits)
            answer: dict[str, Any] = getattr(self._client, operation)(KeyId=self._arn, **parameters)
            return answer
        except ClientError as error:
            code = str(error.response.get("Error", {}).get("Code", ""))
            why = code if _CODE.fullmatch(code) else "another error"
        except BotoCoreError as error:
            why = type(error).__name__
        self._drop()  # the next call reads credentials and settings again
        raise TokenError(f"AWS KMS does not answer: {why}")

    def _drop(self) -> None:
        client, self._client = self._client, None
        if client is not None:
            client.close()
