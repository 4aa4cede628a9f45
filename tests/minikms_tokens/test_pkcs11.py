"""Keys in a real PKCS#11 token: SoftHSM in this process, and behind p11-kit's server, which can be away."""

import contextlib
import os
import re
import signal
import subprocess
import sys
import traceback
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.ec import ECDSA, EllipticCurvePublicKey
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import load_der_public_key

from minikms_tokens import Signer, TokenError, open_signer
from minikms_tokens.signing import TimedCalls
from tests import needs
from tests.harness.hsm import PIN, RUN_S_MAX, Remote, Token, run
from tests.harness.waiting import wait_until

OTHER_PIN = "wrong-pin-1"
MESSAGE = b"a tree checkpoint"


def is_valid(signer: Signer, signature: bytes) -> None:
    """Raises if the signature is not good, by another library than the token's."""
    if signer.algorithm == "ed25519":
        Ed25519PublicKey.from_public_bytes(signer.public_key()).verify(signature, MESSAGE)
        return
    key = load_der_public_key(signer.public_key())
    assert isinstance(key, EllipticCurvePublicKey)
    key.verify(signature, MESSAGE, ECDSA(SHA256()))


@pytest.mark.parametrize(
    ("key", "algorithm"),
    [("object=tree", "ed25519"), ("id=%02", "ecdsa-p256-sha256"), ("object=tree;id=%01", "ed25519")],
)
def test_a_key_in_a_token_signs_and_its_signature_verifies(token: Token, key: str, algorithm: str) -> None:
    signer = open_signer(token.uri(key))
    for _ in range(2):
        assert signer.algorithm == algorithm
        is_valid(signer, signer.sign(MESSAGE))
        signer.close()


def test_after_its_end_a_signer_needs_the_librarys_configuration_again(token: Token) -> None:
    """A hardened process that can't read it learns that at its first signature, not when the token was away once."""
    signer = open_signer(token.uri())
    signer.public_key()
    signer.close()
    hidden = token.conf.rename(token.conf.with_name("hidden"))
    with pytest.raises(TokenError, match="is away"):
        signer.sign(MESSAGE)
    hidden.rename(token.conf)
    is_valid(signer, signer.sign(MESSAGE))


def test_two_keys_of_one_token_sign_side_by_side(token: Token) -> None:
    """The login belongs to the process: the end of one session ends that of the other, which logs in again."""
    first, second = open_signer(token.uri()), open_signer(token.uri("object=second"))
    for _ in range(3):
        is_valid(first, first.sign(MESSAGE))
        is_valid(second, second.sign(MESSAGE))
        first.close()


def test_a_key_that_is_not_there_or_not_unique_is_refused(token: Token) -> None:
    for uri in (token.uri("object=none"), token.uri().replace("token=log", "token=none")):
        with pytest.raises(TokenError, match=r"no (private keys|PKCS#11 tokens)"):
            open_signer(uri).sign(MESSAGE)
    token.make_key("EC:edwards25519", "03", "tree")
    with pytest.raises(TokenError, match="2 private keys"):
        open_signer(token.uri()).sign(MESSAGE)
    token.make_key("EC:secp384r1", "04", "large")
    with pytest.raises(TokenError, match="neither Ed25519 nor ECDSA on P-256"):
        open_signer(token.uri("object=large")).sign(MESSAGE)


def test_a_wrong_pin_is_tried_once_until_its_file_changes(token: Token) -> None:
    """A token locks itself after a few wrong ones."""
    token.write_pin(OTHER_PIN)
    signer = open_signer(token.uri())
    for _ in range(20):
        with pytest.raises(TokenError, match="refused the PIN"):
            signer.sign(MESSAGE)
    token.write_pin(PIN)
    is_valid(signer, signer.sign(MESSAGE))


def test_no_pin_is_tried_when_a_wrong_one_would_lock_the_token(token: Token, monkeypatch: pytest.MonkeyPatch) -> None:
    """SoftHSM never locks itself. It sets the flag of the first wrong PIN, which stands for that of the last here."""
    pkcs11 = needs.library("pkcs11")

    from minikms_tokens import pkcs11_token

    monkeypatch.setattr(pkcs11_token, "_LAST_TRY", pkcs11.TokenFlag.USER_PIN_COUNT_LOW)
    token.write_pin(OTHER_PIN)
    with pytest.raises(TokenError, match="refused the PIN"):
        open_signer(token.uri()).sign(MESSAGE)
    token.write_pin(PIN)
    with pytest.raises(TokenError, match="would lock the PKCS#11 token"):
        open_signer(token.uri()).sign(MESSAGE)
    run("pkcs11-tool", "--module", token.module, "--login", "--pin", PIN, "--list-objects", **token.environ)
    signer = open_signer(token.uri())
    is_valid(signer, signer.sign(MESSAGE))


def test_the_pin_is_in_no_error_repr_or_traceback(token: Token) -> None:
    token.write_pin(OTHER_PIN)
    signer = open_signer(token.uri())
    with pytest.raises(TokenError) as caught:
        signer.sign(MESSAGE)
    frames = traceback.TracebackException.from_exception(caught.value, capture_locals=True)
    shown = "".join(frames.format()) + repr(signer) + repr(vars(signer)) + repr(caught.value.__context__)
    assert OTHER_PIN not in shown
    with pytest.raises(TokenError) as refused:
        open_signer(token.uri() + f"&pin-value={PIN}")
    assert PIN not in str(refused.value) and "pin-source" in str(refused.value)


@pytest.mark.parametrize("what", ["readable by others", "missing", "a link", "too long", "a directory"])
def test_a_pin_file_that_others_could_read_or_choose_is_refused(token: Token, what: str) -> None:
    if what == "readable by others":
        token.pin_file.chmod(0o644)
    else:
        token.pin_file.unlink()
    if what == "a link":
        (token.base / "target").write_text(PIN)
        (token.base / "target").chmod(0o600)
        token.pin_file.symlink_to(token.base / "target")
    elif what == "too long":
        token.write_pin("1" * 300)
    elif what == "a directory":
        token.pin_file.mkdir()
    with pytest.raises(TokenError, match="the PIN file"):
        open_signer(token.uri()).sign(MESSAGE)


@pytest.mark.parametrize(
    "uri",
    [
        "",
        "file:/x",
        "pkcs11:",
        "pkcs11:token=t;object=o",
        "pkcs11:token=t?module-path=/m&pin-source=file:/p",
        "pkcs11:object=o?module-path=/m&pin-source=file:/p",
        "pkcs11:token=t;object=o?module-path=m&pin-source=file:/p",
        "pkcs11:token=t;object=o?module-path=/m&pin-source=/p",
        "pkcs11:token=t;object=o?module-path=/m&pin-source=file:p",
        "pkcs11:token=t;object=o?module-path=/m&pin-source=http://h/p",
        "pkcs11:token=t;token=u;object=o?module-path=/m&pin-source=file:/p",
        "pkcs11:token=t;colour=o;object=o?module-path=/m&pin-source=file:/p",
        "pkcs11:token=t;object=o;type=public?module-path=/m&pin-source=file:/p",
        "pkcs11:token=t;object=%zz?module-path=/m&pin-source=file:/p",
        "pkcs11:token=t;object=%ff?module-path=/m&pin-source=file:/p",
        "pkcs11:token=t;object=o p?module-path=/m&pin-source=file:/p",
        "pkcs11:token=t;object=o?module-path=/m%00&pin-source=file:/p",
        "pkcs11:token=t;object=" + "o" * 3000,
        "aws-kms:arn:aws:kms:eu-central-1:123456789012:alias/key",
    ],
)
def test_a_malformed_uri_is_refused_with_a_sentence(uri: str) -> None:
    needs.library("pkcs11")
    needs.library("botocore")
    with pytest.raises(TokenError) as caught:
        open_signer(uri)
    assert re.fullmatch(r"[a-zA-Z][^\n]{20,200}", str(caught.value))


# --- a token that is away --------------------------------------------------------------------------------------------


def test_after_a_token_was_away_a_later_call_connects_again(token: Token, remote: Remote) -> None:
    signer = open_signer(token.uri("object=second", remote.module))
    for _ in range(2):
        is_valid(signer, signer.sign(MESSAGE))
        remote.kill()
        for _ in range(2):
            with pytest.raises(TokenError, match="PKCS#11 token"):
                signer.sign(MESSAGE)
        remote.start()
    is_valid(signer, signer.sign(MESSAGE))


def test_a_token_that_restarted_between_two_calls_is_not_noticed(token: Token, remote: Remote) -> None:
    signer = open_signer(token.uri("object=second", remote.module))
    is_valid(signer, signer.sign(MESSAGE))
    remote.kill()
    remote.start()
    is_valid(signer, signer.sign(MESSAGE))


def test_a_token_that_hangs_holds_up_no_call_for_long(
    token: Token, remote: Remote, monkeypatch: pytest.MonkeyPatch
) -> None:
    signer = open_signer(token.uri("object=second", remote.module))
    is_valid(signer, signer.sign(MESSAGE))
    monkeypatch.setattr(TimedCalls, "seconds_max", 0.5)
    remote.signal(signal.SIGSTOP)
    with pytest.raises(TokenError, match="did not answer in"):
        signer.sign(MESSAGE)
    with pytest.raises(TokenError, match="has not answered an earlier call yet"):
        signer.sign(MESSAGE)
    remote.signal(signal.SIGCONT)
    monkeypatch.setattr(TimedCalls, "seconds_max", RUN_S_MAX)

    def signs() -> bool:
        with contextlib.suppress(TokenError):
            is_valid(signer, signer.sign(MESSAGE))
            return True
        return False

    wait_until(signs)


def test_a_key_that_was_replaced_under_its_name_is_refused(token: Token) -> None:
    pkcs11 = needs.library("pkcs11")

    signer = open_signer(token.uri())
    is_valid(signer, signer.sign(MESSAGE))
    signer.close()
    tool = ("pkcs11-tool", "--module", token.module, "--token-label", "log", "--login", "--pin", PIN)
    for kind in ("privkey", "pubkey"):
        run(*tool, "--delete-object", "--type", kind, "--label", "tree", **token.environ)
    token.make_key("EC:edwards25519", "01", "tree")
    pkcs11.unload(token.module)
    with pytest.raises(TokenError, match="another key than before"):
        signer.sign(MESSAGE)


# --- another user ----------------------------------------------------------------------------------------------------

SIGN = """
import sys
from minikms_tokens import TokenError, open_signer
try:
    print(open_signer(sys.argv[1]).sign(b"x").hex())
except TokenError as error:
    sys.exit(str(error))
"""


def test_a_user_signs_only_with_a_token_that_it_may_use(public: Path) -> None:
    """The PIN file and the token belong to that user; a third one reads neither."""
    owner, third = 45_678, 45_679
    needs.interpreter_for(owner)
    token = Token(public)
    for path in public.rglob("*"):
        os.chown(path, owner, owner)

    def sign_as(uid: int) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-c", SIGN, token.uri()],
            capture_output=True,
            text=True,
            timeout=RUN_S_MAX,
            check=False,
            user=uid,
            group=uid,
            extra_groups=[],
            cwd="/",
            env={**os.environ, **token.environ},
        )

    good = sign_as(owner)
    assert (good.returncode, len(good.stdout.strip())) == (0, 128), good
    refused = sign_as(third)
    assert refused.returncode == 1 and PIN not in refused.stderr
    assert refused.stderr.startswith(("no PKCS#11 tokens match", "the PIN file", "the PKCS#11 token")), refused


# --- the time limit --------------------------------------------------------------------------------------------------


def test_what_a_library_says_is_not_in_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails() -> None:
        raise ValueError(PIN)

    with pytest.raises(TokenError) as caught:
        TimedCalls("the token").call(fails)
    assert str(caught.value) == "the token failed: ValueError"
    assert caught.value.__context__ is None
