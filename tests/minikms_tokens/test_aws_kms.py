"""Keys in AWS KMS, by moto's server over TLS. What moto never answers is replayed, as its documentation has it."""

import base64
import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.ec import ECDSA, EllipticCurvePublicKey
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import load_der_public_key

from minikms_tokens import AwayError, TokenError, UnwrapRefusedError, open_signer, open_wrapper
from minikms_tokens.wrapping import ProviderCalls
from tests import needs
from tests.harness.aws_kms import REGION, AwsKms, aws_kms
from tests.harness.certificates import Authority
from tests.harness.ports import free_port
from tests.minikms_tokens.replay import Replay, reply, without_key
from tests.minikms_tokens.wrappers import CONTEXT, KEY, unwrapped, wrap

ARN = f"arn:aws:kms:{REGION}:123456789012:key/1234abcd-12ab-34cd-56ef-1234567890ab"
MESSAGE = b"a tree checkpoint"


def use(environ: pytest.MonkeyPatch, url: str, ca_file: Path | str) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        environ.setenv(name, "for-tests-only")
    environ.setenv("AWS_ENDPOINT_URL_KMS", url)
    environ.setenv("AWS_CA_BUNDLE", str(ca_file))


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[AwsKms]:
    """Each test makes keys of its own, and leaves it running."""
    with aws_kms(tmp_path_factory.mktemp("moto")) as running, pytest.MonkeyPatch.context() as environ:
        for name, value in running.environ.items():
            environ.setenv(name, value)
        yield running


def signing_key(service: AwsKms, spec: str = "ECC_NIST_P256") -> str:
    return service.new_key(KeySpec=spec, KeyUsage="SIGN_VERIFY")


def test_a_key_in_aws_kms_signs_and_its_signature_verifies(service: AwsKms) -> None:
    signer = open_signer(f"aws-kms:{signing_key(service)}")
    key = load_der_public_key(signer.public_key())
    assert isinstance(key, EllipticCurvePublicKey) and signer.algorithm == "ecdsa-p256-sha256"
    for _ in range(2):
        key.verify(signer.sign(MESSAGE), MESSAGE, ECDSA(SHA256()))
        signer.close()
    with pytest.raises(TokenError, match="at most 4096 bytes"):
        signer.sign(bytes(4097))


def test_another_kind_of_key_is_refused(service: AwsKms) -> None:
    for spec in ("ECC_NIST_P384", "RSA_2048"):
        with pytest.raises(TokenError, match="not one for signing"):
            open_signer(f"aws-kms:{signing_key(service, spec)}").sign(MESSAGE)
    missing = signing_key(service)[:-4] + "0000"
    with pytest.raises(TokenError, match="AWS KMS does not answer: NotFoundException"):
        open_signer(f"aws-kms:{missing}").public_key()


def test_while_the_service_is_away_calls_fail_and_later_ones_work(service: AwsKms) -> None:
    """Another key under the same ARN, as the service has after it lost its own, is never taken."""
    arn = signing_key(service)
    signer = open_signer(f"aws-kms:{arn}")
    signer.sign(MESSAGE)
    service.stop()
    for _ in range(2):
        with pytest.raises(TokenError, match="does not answer: EndpointConnectionError"):
            signer.sign(MESSAGE)
    service.start()
    with pytest.raises(TokenError, match="NotFoundException"):
        signer.sign(MESSAGE)
    again = open_signer(f"aws-kms:{signing_key(service)}")
    again.sign(MESSAGE)


# --- a root key ------------------------------------------------------------------------------------------------------


@pytest.fixture
def replay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Replay]:
    needs.library("botocore")
    with Replay(tmp_path) as made:
        use(monkeypatch, f"https://localhost:{made.port}", made.ca_file)
        yield made


def test_a_root_key_opens_under_its_key_and_context_only(service: AwsKms) -> None:
    arn, other = (service.new_key() for _ in range(2))
    wrapper = open_wrapper(f"aws-kms:{arn}")
    blob = wrap(wrapper)
    assert blob[:1] == b"\x01" and KEY not in blob
    assert unwrapped(open_wrapper(f"aws-kms:{arn}"), blob) == KEY
    assert service.client().decrypt(CiphertextBlob=blob[1:], EncryptionContext={"minikms": CONTEXT})["KeyId"] == arn
    for context, changed in (("kr_other", blob), (CONTEXT, blob[:-1] + bytes([blob[-1] ^ 1]))):
        with pytest.raises(UnwrapRefusedError, match="AWS KMS refuses the key: InvalidCiphertextException"):
            unwrapped(wrapper, changed, context)
    with pytest.raises(UnwrapRefusedError, match="AccessDeniedException"):
        unwrapped(open_wrapper(f"aws-kms:{other}"), blob)
    with pytest.raises(UnwrapRefusedError, match="NotFoundException"):
        unwrapped(open_wrapper(f"aws-kms:{arn[:-4]}0000"), blob)
    for wrong in (b"", b"\x01", b"\x02" + blob[1:], b"\x01" + bytes(16 * 1024)):
        with pytest.raises(AwayError, match="no wrapped key of AWS KMS"):
            unwrapped(wrapper, wrong)


@pytest.mark.parametrize(
    ("status", "code", "kind"),
    [
        (400, "DisabledException", UnwrapRefusedError),
        (400, "IncorrectKeyException", UnwrapRefusedError),
        (400, "InvalidGrantTokenException", UnwrapRefusedError),
        (400, "KMSInvalidStateException", UnwrapRefusedError),
        (400, "ExpiredTokenException", AwayError),
        (400, "UnrecognizedClientException", AwayError),
        (400, "ThrottlingException", AwayError),
        (500, "KeyUnavailableException", AwayError),
    ],
)
def test_an_error_code_says_whether_the_key_was_taken_back(
    replay: Replay, monkeypatch: pytest.MonkeyPatch, status: int, code: str, kind: type[TokenError]
) -> None:
    monkeypatch.setattr("minikms_tokens.aws_kms.ATTEMPTS_MAX", 1)
    replay.answer = [reply(status, json.dumps({"__type": code, "message": "secret text"}))]
    with pytest.raises(kind, match=rf"AWS KMS (refuses the key|does not answer): {code}$"):
        unwrapped(open_wrapper(f"aws-kms:{ARN}"), b"\x01blob")
    [request] = replay.requests
    asked = json.loads(request.partition(b"\r\n\r\n")[2])
    assert (asked["KeyId"], asked["EncryptionContext"]) == (ARN, {"minikms": CONTEXT})


def answer(key: bytes, arn: str = ARN) -> bytes:
    return reply(200, json.dumps({"KeyId": arn, "Plaintext": base64.b64encode(key).decode()}))


WITHOUT_KEY = {
    **without_key(answer),
    "another key": ([answer(KEY, ARN[:-1] + "c")], "with another key than"),
    "redirect": ([reply(307, "", "Location: https://localhost/")], "does not answer"),
}


@pytest.mark.parametrize("name", WITHOUT_KEY)
def test_an_answer_that_holds_no_root_key_is_away(replay: Replay, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    replay.answer, why = WITHOUT_KEY[name]
    monkeypatch.setattr("minikms_tokens.aws_kms.ATTEMPTS_MAX", 1)
    if why == "did not answer in":
        monkeypatch.setattr(ProviderCalls, "seconds_max", 0.5)
    with pytest.raises(AwayError, match=f"^AWS KMS .*{why}"):
        unwrapped(open_wrapper(f"aws-kms:{ARN}"), b"\x01blob")


def test_only_a_verified_service_can_refuse(replay: Replay, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor does an empty AWS_CA_BUNDLE end the verification."""
    replay.answer = [reply(400, '{"__type": "DisabledException"}')]
    other = tmp_path / "other.pem"
    other.write_bytes(Authority("other").pem)
    for ca_file in ("", other):
        use(monkeypatch, f"https://localhost:{replay.port}", ca_file)
        with pytest.raises(AwayError, match="does not answer: SSLError"):
            unwrapped(open_wrapper(f"aws-kms:{ARN}"), b"\x01blob")
    with Replay(tmp_path, tls=False) as plain:
        plain.answer = replay.answer
        use(monkeypatch, f"http://localhost:{plain.port}", "")
        for act in (lambda w: unwrapped(w, b"\x01blob"), wrap):
            with pytest.raises(AwayError, match="over https only"):
                act(open_wrapper(f"aws-kms:{ARN}"))
        assert plain.requests == replay.requests == []


def test_without_credentials_or_a_service_it_is_away(replay: Replay, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    with pytest.raises(AwayError, match="does not answer: NoCredentialsError"):
        wrap(open_wrapper(f"aws-kms:{ARN}"))
    use(monkeypatch, f"https://localhost:{free_port()}", replay.ca_file)
    with pytest.raises(AwayError, match="does not answer: EndpointConnectionError"):
        wrap(open_wrapper(f"aws-kms:{ARN}"))
    for name in ("aws-kms:alias/x", f"aws-kms:{ARN.replace('key/', 'alias/')}", f"aws-kms:{ARN}\n"):
        with pytest.raises(TokenError, match="no alias"):
            open_wrapper(name)


def test_a_service_that_gives_credentials_refuses_no_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its errors can have the same codes, and nothing says that it was asked over TLS."""
    needs.library("botocore.session")
    (tmp_path / "token").write_text("a token")
    code = "<ErrorResponse><Error><Code>AccessDeniedException</Code></Error></ErrorResponse>"
    with Replay(tmp_path, tls=False) as given:
        given.answer = [reply(403, code, "Content-Type: text/xml")]
        for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
            monkeypatch.delenv(name, raising=False)
        for name, value in {
            "AWS_ENDPOINT_URL_STS": f"http://127.0.0.1:{given.port}",
            "AWS_WEB_IDENTITY_TOKEN_FILE": str(tmp_path / "token"),
            "AWS_ROLE_ARN": "arn:aws:iam::123456789012:role/unlock",
        }.items():
            monkeypatch.setenv(name, value)
        with pytest.raises(AwayError, match="AWS KMS does not answer: AccessDeniedException"):
            unwrapped(open_wrapper(f"aws-kms:{ARN}"), b"\x01x")
        assert given.requests
