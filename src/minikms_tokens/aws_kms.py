"""A key in AWS KMS: ECC_NIST_P256 signs with ECDSA_SHA_256, SYMMETRIC_DEFAULT wraps a root key.

Owns: the ARN of a key, the client, its time limits, and which errors of the service are a refusal. Invariants: the key
is named by its own ARN, never by an alias, which could be moved to another key, and every answer about a wrapped key
names it too; a root key is asked for over https only, with the service's certificate verified; credentials come from
where the AWS libraries look for them (environment, files, the instance), and are never read here. While it wraps or
opens a root key, the library has it in `bytes` and text, which stay in memory until the process ends. It must never log
what the service answers.
"""

from __future__ import annotations

import re
from typing import Any, Final

from minikms_tokens.signing import Algorithm, TimedCalls, TokenError, check_p256, check_signature
from minikms_tokens.wrapping import BLOB_BYTES_MAX, AwayError, ProviderCalls, UnwrapRefusedError, give

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
"""The attempts for one request, within the limit of `minikms_tokens.signing.CALL_SECONDS_MAX`."""
BLOB_VERSION: Final = b"\x01"
REFUSALS: Final = frozenset(
    f"{name}Exception"
    for name in ("AccessDenied", "Disabled", "IncorrectKey", "InvalidCiphertext", "InvalidGrantToken", "NotFound")
) | {"KMSInvalidStateException"}
"""What the service says about the key; the last: its deletion is pending, or its material is gone. Everything else is
AwayError: errors of the service itself and its throttling; and credentials that are missing, wrong or expired, because
these run out and are replaced without the key's owner.
"""
_ARN: Final = re.compile(r"arn:aws(?:-cn|-us-gov)?:kms:([a-z0-9-]{1,32}):[0-9]{12}:key/[A-Za-z0-9-]{1,64}", re.ASCII)
_CODE: Final = re.compile(r"[A-Za-z0-9.]{1,64}", re.ASCII)
_ALGORITHM: Final = "ECDSA_SHA_256"


class _AwsKmsKey:
    """A key in AWS KMS, and the client that asks for it."""

    calls: type[TimedCalls] = TimedCalls
    refusals: frozenset[str] = frozenset()
    """The error codes that are RefusedError; others are the error of `calls`."""

    def __init__(self, uri: str) -> None:
        self._arn = uri.removeprefix("aws-kms:")
        match = _ARN.fullmatch(self._arn)
        if match is None:
            raise TokenError("aws-kms: is followed by the ARN of a key: arn:aws:kms:REGION:ACCOUNT:key/ID, no alias")
        self._region = match[1]
        self._calls = self.calls("AWS KMS")
        self._client: Any = None

    # --- in the thread of the call -----------------------------------------------------------------------------------

    def _connected(self) -> Any:
        if self._client is None:
            limits = Config(
                connect_timeout=CONNECT_SECONDS_MAX,
                read_timeout=READ_SECONDS_MAX,
                retries={"total_max_attempts": ATTEMPTS_MAX, "mode": "standard"},
            )
            session = botocore.session.get_session()
            # An empty AWS_CA_BUNDLE would end the verification in some versions of the library.
            bundle = session.get_config_variable("ca_bundle") or True
            self._client = session.create_client("kms", region_name=self._region, config=limits, verify=bundle)
        return self._client

    def _ask(self, operation: str, **parameters: object) -> dict[str, Any]:
        """Makes one request. A refusal is a TokenError with the error code of the service, and nothing else of its
        answer.
        """
        refuses = False
        try:
            answer: dict[str, Any] = getattr(self._connected(), operation)(KeyId=self._arn, **parameters)
            return answer
        except ClientError as error:
            code = str(error.response.get("Error", {}).get("Code", ""))
            why = code if _CODE.fullmatch(code) else "another error"
            # A service that gives credentials has errors of the same names, and may be asked over plain HTTP.
            refuses = code in self.refusals and error.operation_name == operation.capitalize()
        except BotoCoreError as error:
            why = type(error).__name__
        self._drop()  # the next call reads credentials and settings again
        if refuses:
            raise UnwrapRefusedError(f"AWS KMS refuses the key: {why}")
        raise self.calls.error(f"AWS KMS does not answer: {why}")

    def _drop(self) -> None:
        client, self._client = self._client, None
        if client is not None:
            client.close()


class AwsKmsSigner(_AwsKmsKey):
    """A key that signs."""

    algorithm: Algorithm = "ecdsa-p256-sha256"
    _public_key = b""

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
            public_key = bytes(answer["PublicKey"])
            check_p256(public_key)
            self._public_key = public_key
        return self._public_key

    def _sign(self, message: bytes) -> bytes:
        public_key = self._learn()
        if len(message) > MESSAGE_BYTES_MAX:
            raise TokenError(f"AWS KMS signs messages of at most {MESSAGE_BYTES_MAX} bytes")
        answer = self._ask("sign", Message=message, MessageType="RAW", SigningAlgorithm=_ALGORITHM)
        signature = bytes(answer["Signature"])
        check_signature(self.algorithm, public_key, signature, message)
        return signature


class AwsKmsWrapper(_AwsKmsKey):
    """A key that wraps a root key, with the context as encryption context. A wrapped key is BLOB_VERSION and the
    ciphertext of the service.
    """

    calls = ProviderCalls
    refusals = REFUSALS

    def wrap(self, key: memoryview, context: str) -> bytes:
        how = {"Plaintext": bytes(key)}
        return BLOB_VERSION + self._calls.call(lambda: self._convert("encrypt", "CiphertextBlob", context, **how))

    def unwrap(self, blob: bytes, context: str, into: memoryview) -> None:
        if not (blob.startswith(BLOB_VERSION) and 1 < len(blob) <= BLOB_BYTES_MAX):
            raise AwayError("this is no wrapped key of AWS KMS, or one of another version")
        ciphertext = blob[1:]
        opened = self._calls.call(lambda: self._convert("decrypt", "Plaintext", context, CiphertextBlob=ciphertext))
        give(opened, into, "AWS KMS")

    # --- in the thread of the call -----------------------------------------------------------------------------------

    def _convert(self, operation: str, member: str, context: str, **parameters: bytes) -> bytes:
        if not self._connected().meta.endpoint_url.startswith("https://"):
            raise AwayError("AWS KMS is asked for a root key over https only, and its endpoint URL is another")
        answer = self._ask(operation, EncryptionContext={"minikms": context}, **parameters)
        if answer.get("KeyId") != self._arn:
            raise AwayError("AWS KMS answers with another key than the one that it was asked for")
        return bytes(answer[member])
