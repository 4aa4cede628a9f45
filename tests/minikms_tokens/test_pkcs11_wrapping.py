"""Root keys wrapped by keys of a real PKCS#11 token, and which of its answers are refusals."""

import contextlib
import signal
from collections.abc import Callable

import pytest

from minikms_tokens import AwayError, TokenError, UnwrapRefusedError, Wrapper, open_wrapper
from minikms_tokens.wrapping import ProviderCalls
from tests import needs
from tests.harness.hsm import PIN, Remote, Token, run
from tests.harness.waiting import wait_until
from tests.minikms_tokens.wrappers import CONTEXT, KEY, unwrapped, wrap

SAMPLE = "5c66f9917490a97a4f4351c3edf13e4cec32201119ab4e8d317b3190568650bf723d72cc87b303717ebcd57d861116b5"


@pytest.fixture
def wrapper(token: Token) -> Wrapper:
    token.make_secret("wrap")
    return open_wrapper(token.uri("object=wrap"))


@pytest.fixture
def rsa(token: Token, monkeypatch: pytest.MonkeyPatch) -> Wrapper:
    """SoftHSM 2.6 does RSA-OAEP with SHA-1 only, which stands for SHA-256 here."""
    pkcs11 = needs.library("pkcs11")
    from cryptography.hazmat.primitives.asymmetric.padding import MGF1, OAEP
    from cryptography.hazmat.primitives.hashes import SHA1

    from minikms_tokens import pkcs11_token

    monkeypatch.setattr(pkcs11_token, "_OAEP_PADDING", OAEP(MGF1(SHA1()), SHA1(), None))
    monkeypatch.setattr(pkcs11_token, "_OAEP_PARAMETERS", (pkcs11.Mechanism.SHA_1, pkcs11.MGF.SHA1, None))
    token.make_key("rsa:2048", "05", "rsa")
    return open_wrapper(token.uri("object=rsa;type=private"))


def test_a_key_wrapped_by_aes_opens_only_with_its_context(token: Token, wrapper: Wrapper) -> None:
    blobs = [wrap(wrapper) for _ in range(2)]
    assert [unwrapped(wrapper, blob) for blob in blobs] == [KEY, KEY]
    assert blobs[0][2:14] != blobs[1][2:14] and KEY not in blobs[0]
    with pytest.raises(TokenError, match="does not decrypt"):
        unwrapped(wrapper, blobs[0], CONTEXT[:-1] + "0")
    token.end_sessions()
    assert unwrapped(open_wrapper(token.uri("object=wrap;type=secret-key")), blobs[0]) == KEY


def test_a_key_wrapped_by_rsa_opens(token: Token, rsa: Wrapper) -> None:
    blob = wrap(rsa)
    assert (blob[:2], len(blob)) == (b"\x01\x02", 2 + 256) and unwrapped(rsa, blob) == KEY
    with pytest.raises(TokenError, match="does not decrypt"):
        unwrapped(rsa, blob[:-1] + bytes([blob[-1] ^ 1]))


def test_a_wrapped_key_has_the_layout_of_the_specification(token: Token) -> None:
    """Version, kind, IV, ciphertext and tag, as another library has made them under a key that is imported here."""
    pkcs11 = needs.library("pkcs11")
    from minikms_tokens import pkcs11_token

    name = pkcs11.Attribute
    template = {name.CLASS: pkcs11.ObjectClass.SECRET_KEY, name.KEY_TYPE: pkcs11.KeyType.AES}
    with token.session() as session:
        secret = session.create_object({**template, name.VALUE: bytes(range(100, 132)), name.DECRYPT: True})
        blob = bytes.fromhex("0101" + 12 * "00" + SAMPLE)
        assert pkcs11_token.open_blob(pkcs11_token.WrappingKey(secret, 1), blob, CONTEXT) == KEY


def test_no_cut_or_changed_blob_opens(wrapper: Wrapper) -> None:
    blob = wrap(wrapper)
    changed = [blob[:at] + bytes([blob[at] ^ 1 << at % 8]) + blob[at + 1 :] for at in range(0, len(blob), 3)]
    for wrong in (
        *changed,
        blob[:1] + b"\2" + blob[2:],
        *(blob[:size] for size in range(len(blob))),
        blob + b"\0",
        bytes(16 * 1024),
    ):
        with pytest.raises(TokenError):
            unwrapped(wrapper, wrong)
    assert unwrapped(wrapper, blob) == KEY


@pytest.mark.parametrize(
    ("attributes", "sentence"),
    [
        ({"EXTRACTABLE": True}, "is extractable"),
        ({"SENSITIVE": False}, "is not sensitive"),
        ({"EXTRACTABLE": True, "then": "EXTRACTABLE"}, "was extractable once"),
        ({"DECRYPT": False}, "not permitted to decrypt"),
    ],
)
def test_a_key_that_could_leave_its_token_is_refused(
    token: Token, wrapper: Wrapper, attributes: dict[str, object], sentence: str
) -> None:
    """When it wraps, and when it unwraps."""
    pkcs11 = needs.library("pkcs11")

    then = attributes.get("then")
    token.make_secret("bad", **{name: value for name, value in attributes.items() if name != "then"})
    if then is not None:
        with token.session() as session:
            session.get_key(label="bad")[pkcs11.Attribute[str(then)]] = False
    bad, blob = open_wrapper(token.uri("object=bad")), wrap(wrapper)
    with pytest.raises(TokenError, match=sentence):
        wrap(bad)
    with pytest.raises(TokenError, match=sentence):
        unwrapped(bad, blob)


def test_a_key_of_another_type_or_length_is_refused(token: Token) -> None:
    pkcs11 = needs.library("pkcs11")

    with token.session() as session:
        session.generate_key(pkcs11.KeyType.AES, 128, store=True, label="short")
    token.make_key("rsa:1024", "06", "small")
    for label in ("short", "small", "tree"):
        with pytest.raises(AwayError, match="neither AES-256 nor RSA of 2048 bits or more"):
            wrap(open_wrapper(token.uri(f"object={label}")))


# --- which outcomes are refusals -------------------------------------------------------------------------------------


def delete_key(token: Token) -> None:
    with token.session() as session:
        session.get_key(label="wrap").destroy()


def forbid_decrypting(token: Token) -> None:
    pkcs11 = needs.library("pkcs11")
    with token.session() as session:
        session.get_key(label="wrap")[pkcs11.Attribute.DECRYPT] = False


def replace_key(token: Token) -> None:
    delete_key(token)
    token.make_secret("wrap")


OUTCOMES: list[tuple[Callable[[Token], object], type[TokenError], str]] = [
    (lambda token: token.write_pin("wrong-pin-1"), UnwrapRefusedError, "refused the PIN"),
    (delete_key, UnwrapRefusedError, "no keys"),
    (forbid_decrypting, UnwrapRefusedError, "not permitted to decrypt"),
    (replace_key, AwayError, "does not decrypt this wrapped key: GeneralError"),
    (lambda token: token.make_secret("wrap"), AwayError, "2 keys"),
    (lambda token: token.pin_file.unlink(), AwayError, "the PIN file"),
    (lambda token: (token.base / "tokens").rename(token.base / "taken"), AwayError, "no PKCS#11 tokens|is away"),
    (lambda token: token.conf.unlink(), AwayError, "is away"),
]


@pytest.mark.parametrize(("act", "error", "sentence"), OUTCOMES, ids=[f"{e.__name__}-{s}" for _, e, s in OUTCOMES])
def test_what_the_token_itself_says_is_a_refusal_and_nothing_else(
    token: Token, wrapper: Wrapper, act: Callable[[Token], object], error: type[TokenError], sentence: str
) -> None:
    """A GeneralError, which SoftHSM gives for a wrong tag, can be that of a module without its token too."""
    blob = wrap(wrapper)
    token.end_sessions()
    act(token)
    token.end_sessions()
    for _ in range(2):
        with pytest.raises(error, match=sentence) as caught:
            unwrapped(wrapper, blob)
    assert type(caught.value) is error and PIN not in str(caught.value) + repr(wrapper)


@pytest.mark.parametrize(
    ("name", "error"),
    [
        ("EncryptedDataInvalid", UnwrapRefusedError),
        ("EncryptedDataLenRange", UnwrapRefusedError),
        ("FunctionRejected", UnwrapRefusedError),
        ("DeviceRemoved", AwayError),
        ("DeviceError", AwayError),
        ("GeneralError", AwayError),
        ("MechanismInvalid", AwayError),
        ("PKCS11Error", AwayError),
    ],
)
def test_a_return_code_is_a_refusal_if_only_a_token_gives_it(
    wrapper: Wrapper, monkeypatch: pytest.MonkeyPatch, name: str, error: type[TokenError]
) -> None:
    needs.library("pkcs11")
    from minikms_tokens import pkcs11_token

    def fail(*_: object) -> bytes:
        raise getattr(needs.library("pkcs11.exceptions"), name)(PIN)

    monkeypatch.setattr(pkcs11_token, "open_blob", fail)
    with pytest.raises(error, match=f"this wrapped key: {name}$") as caught:
        unwrapped(wrapper, b"")
    assert type(caught.value) is error


def test_a_wrong_pin_is_tried_once_and_the_last_try_is_no_refusal(
    token: Token, wrapper: Wrapper, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SoftHSM sets the flag of the first wrong PIN, which stands for that of the last here."""
    pkcs11 = needs.library("pkcs11")
    from minikms_tokens import pkcs11_token

    blob = wrap(wrapper)
    token.end_sessions()
    monkeypatch.setattr(pkcs11_token, "_LAST_TRY", pkcs11.TokenFlag.USER_PIN_COUNT_LOW)
    token.write_pin("wrong-pin-1")
    for _ in range(2):
        with pytest.raises(UnwrapRefusedError, match="refused the PIN"):
            unwrapped(wrapper, blob)
    token.write_pin(PIN)
    with pytest.raises(AwayError, match="would lock"):
        unwrapped(wrapper, blob)
    run("pkcs11-tool", "--module", token.module, "--login", "--pin", PIN, "--list-objects", **token.environ)
    token.end_sessions()
    assert unwrapped(wrapper, blob) == KEY


def test_a_token_that_hangs_is_no_refusal_and_writes_no_key_late(
    token: Token, rsa: Wrapper, remote: Remote, monkeypatch: pytest.MonkeyPatch
) -> None:
    away = open_wrapper(token.uri("object=rsa", remote.module))
    blob = wrap(away)
    assert unwrapped(away, blob) == KEY
    limit, late = ProviderCalls.seconds_max, bytearray(32)
    remote.signal(signal.SIGSTOP)
    monkeypatch.setattr(ProviderCalls, "seconds_max", 0.5)
    for sentence in ("did not answer in", "has not answered an earlier call yet"):
        with pytest.raises(AwayError, match=sentence):
            away.unwrap(blob, CONTEXT, memoryview(late))
    remote.signal(signal.SIGCONT)
    monkeypatch.setattr(ProviderCalls, "seconds_max", limit)

    def opens() -> bool:
        with contextlib.suppress(AwayError):
            return unwrapped(away, blob) == KEY
        return False

    wait_until(opens)
    assert late == bytes(32)
    remote.kill()
    with pytest.raises(AwayError):
        unwrapped(away, blob)


def test_a_source_of_another_form_is_refused_with_a_sentence() -> None:
    needs.library("pkcs11")
    for source in ("", "file:/x", "pkcs11:token=t;object=o", "pkcs11:token=t;object=o;type=public?module-path=/m"):
        with pytest.raises(TokenError, match=r"[a-z:]+ .{20,}"):
            open_wrapper(source)
