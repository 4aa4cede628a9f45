"""A root key under the transit engine of another miniKMS: a real gateway and daemon. What Vault and OpenBao answer is
replayed, from their documentation and sources.
"""

import base64
import json
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from minikms_tokens import AwayError, TokenError, UnwrapRefusedError, open_wrapper
from minikms_tokens.wrapping import ProviderCalls
from tests.harness.callers import Caller
from tests.harness.gateways import POLICY, Pair
from tests.harness.ports import free_port
from tests.minikms_gateway.transit.vault import ISSUER, transit_pair
from tests.minikms_tokens.replay import Replay, reply, without_key
from tests.minikms_tokens.wrappers import CONTEXT, KEY, unwrapped, wrap

BLOB = b"\x01vault:v1:aGVsbG8="
TOKEN = "hvs.CAESIJ-a-token-of-the-tests"


# --- another miniKMS -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pair() -> Iterator[Pair]:
    with transit_pair() as made:
        yield made


def make_key(pair: Pair, name: str, **members: object) -> None:
    with pair.gateway.caller(pair.client()) as caller:
        assert caller.post(f"/v1/transit/keys/{name}", members).status == 200


def source(pair: Pair, directory: Path, name: str, files: str = "") -> str:
    """`files`: else those of a client certificate."""
    cert, key = pair.client().write(directory)
    files = files or f"cert-file={cert}&key-file={key}"
    return (
        f"vault-transit:https://localhost:{pair.gateway.port}/v1/transit?ca-file={pair.gateway.ca_file}&{files}#{name}"
    )


def test_another_minikms_opens_a_root_key_for_a_certificate(pair: Pair, tmp_path: Path) -> None:
    for name, members in (("root", {}), ("derived", {"derived": True})):
        make_key(pair, name, **members)
        wrapper = open_wrapper(source(pair, tmp_path, name))
        blob = wrap(wrapper)
        assert blob.startswith(b"\x01vault:v1:") and KEY not in base64.b64decode(blob[10:])
        assert unwrapped(open_wrapper(source(pair, tmp_path, name)), blob) == KEY
        for context, changed in (("kr_other", blob), (CONTEXT, blob[:40] + b"AAAA" + blob[44:])):
            with pytest.raises(UnwrapRefusedError, match="refuses: cipher: message authentication failed"):
                unwrapped(wrapper, changed, context)
        with pytest.raises(UnwrapRefusedError, match="encryption key not found"):
            unwrapped(open_wrapper(source(pair, tmp_path, "unknown")), blob)
    for wrong in (b"", b"\x02" + blob[1:], blob[1:], blob + b"\n", b"\x01vault:v1:"):
        with pytest.raises(AwayError, match="no wrapped key of a transit engine"):
            unwrapped(wrapper, wrong)


def test_a_token_is_read_anew_at_each_call(pair: Pair, tmp_path: Path) -> None:
    make_key(pair, "by-token")
    token_file = tmp_path / "token"
    wrapper = open_wrapper(source(pair, tmp_path, "by-token", f"token-file={token_file}"))
    token_file.write_text(ISSUER.token() + "\n")
    token_file.chmod(0o640)
    blob = wrap(wrapper)
    token_file.write_text(ISSUER.token(exp=1))
    with pytest.raises(UnwrapRefusedError, match="permission denied"):
        unwrapped(wrapper, blob)
    token_file.write_text(ISSUER.token())
    assert unwrapped(wrapper, blob) == KEY


def test_what_the_other_minikms_takes_back_is_refused(tmp_path: Path) -> None:
    with transit_pair() as pair:
        make_key(pair, "root")
        wrapper = open_wrapper(source(pair, tmp_path, "root"))
        blob = wrap(wrapper)
        pair.daemon.use_policy(POLICY.replace('"decrypt", "data_key", "monitor"]', '"data_key", "monitor"]'))
        with pytest.raises(UnwrapRefusedError, match="permission denied"):
            unwrapped(wrapper, blob)
        pair.daemon.use_policy(POLICY)
        assert unwrapped(wrapper, blob) == KEY
        owner: Caller = pair.daemon.caller()
        [key] = owner.get("/keys?thread_id=transit.root").body["keys"]
        for verb, body in (("retire", {}), ("destroy", {"key_id": key["key_id"]})):
            assert owner.post(f"/keys/{key['key_id']}/{verb}", body).status == 200
        with pytest.raises(UnwrapRefusedError, match="encryption key not found"):
            unwrapped(wrapper, blob)
        assert owner.post("/seal", {}).status == 200
        with pytest.raises(AwayError, match="answers with status 503"):
            unwrapped(wrapper, blob)
        pair.gateway.stop()
        with pytest.raises(AwayError, match="does not answer: ConnectionRefusedError"):
            unwrapped(wrapper, blob)


# --- replayed --------------------------------------------------------------------------------------------------------


@pytest.fixture
def replay(tmp_path: Path) -> Iterator[Replay]:
    with Replay(tmp_path) as made:
        yield made


def replayed(directory: Path, port: int, *, files: str = "", host: str = "localhost") -> str:
    token_file = directory / "token"
    token_file.write_text(TOKEN)
    token_file.chmod(0o600)
    files = files or f"token-file={token_file}&ca-file={directory / 'provider-ca.pem'}"
    return f"vault-transit:https://{host}:{port}/v1/transit?{files}#root"


@pytest.mark.parametrize(
    ("status", "errors", "kind"),
    [
        (403, ["permission denied"], UnwrapRefusedError),
        (403, ["2 errors occurred:\n\t* permission denied\n\t* invalid token\n\n"], UnwrapRefusedError),
        (400, ["encryption key not found"], UnwrapRefusedError),
        (400, ["ciphertext or signature version is disallowed by policy (too old)"], UnwrapRefusedError),
        (400, ["1 error occurred:\n\t* invalid ciphertext: unable to decrypt\n\n"], UnwrapRefusedError),
        (404, ['no handler for route "transit/decrypt/root". route entry not found.'], UnwrapRefusedError),
        (403, [], AwayError),
        (403, "permission denied", AwayError),
        (404, [], AwayError),
        (400, ["missing ciphertext to decrypt"], AwayError),
        (412, ["required index state not present"], AwayError),
        (429, ['request path "transit": rate limit quota exceeded'], AwayError),
        (500, ["encryption key not found"], AwayError),
        (503, ["Vault is sealed"], AwayError),
    ],
)
def test_only_the_engines_own_errors_are_a_refusal(
    replay: Replay, tmp_path: Path, status: int, errors: object, kind: type[TokenError]
) -> None:
    replay.answer = [reply(status, json.dumps({"errors": errors}))]
    wrapper = open_wrapper(replayed(tmp_path, replay.port))
    with pytest.raises(kind, match=rf"the transit engine (refuses: .*|answers with) ?\(?status {status}\)?$") as caught:
        unwrapped(wrapper, BLOB)
    assert caught.type is kind and TOKEN not in repr(wrapper) + str(caught.value)


def test_a_request_has_the_token_and_the_context_twice(
    replay: Replay, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And goes to the engine itself, whatever proxy the environment names."""
    monkeypatch.setenv("HTTPS_PROXY", f"http://127.0.0.1:{free_port()}")
    replay.answer = [answer(KEY)]
    assert unwrapped(open_wrapper(replayed(tmp_path, replay.port)), BLOB) == KEY
    [request] = replay.requests
    head, _, body = request.partition(b"\r\n\r\n")
    assert head.startswith(b"POST /v1/transit/decrypt/root HTTP/1.1\r\n")
    assert f"X-Vault-Token: {TOKEN}".encode() in head.split(b"\r\n")
    bound = base64.b64encode(CONTEXT.encode()).decode()
    assert json.loads(body) == {"ciphertext": "vault:v1:aGVsbG8=", "associated_data": bound, "context": bound}


def answer(key: bytes) -> bytes:
    return reply(200, json.dumps({"data": {"plaintext": base64.b64encode(key).decode()}}))


WITHOUT_KEY = {
    **without_key(answer),
    "no base64": ([reply(200, '{"data": {"plaintext": "%%%%"}}')], "no root key"),
    "redirect": ([reply(307, "", "Location: /v1/transit/decrypt/root")], "answers with status 307"),
}


@pytest.mark.parametrize("name", WITHOUT_KEY)
def test_an_answer_that_holds_no_root_key_is_away(
    replay: Replay, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    replay.answer, why = WITHOUT_KEY[name]
    if why == "did not answer in":
        monkeypatch.setattr(ProviderCalls, "seconds_max", 0.5)
    with pytest.raises(AwayError, match=f"^the transit engine .*{why}"):
        unwrapped(open_wrapper(replayed(tmp_path, replay.port)), BLOB)
    assert len(replay.requests) == 1


def test_only_a_verified_engine_can_refuse(replay: Replay, tmp_path: Path) -> None:
    (other := tmp_path / "other").mkdir()
    with Replay(other, name="vault.example") as wrong_name:
        for server in (wrong_name, replay):
            server.answer = [reply(403, '{"errors": ["permission denied"]}')]
            with pytest.raises(AwayError, match=r"does not answer: SSLCertVerificationError"):
                unwrapped(open_wrapper(replayed(other, server.port)), BLOB)
            assert server.requests == []


def test_a_file_that_others_could_have_written_or_read_is_not_used(replay: Replay, tmp_path: Path) -> None:
    replay.answer = [answer(KEY)]
    wrapper = open_wrapper(replayed(tmp_path, replay.port))
    token, ca = tmp_path / "token", replay.ca_file
    for path, mode, why in (
        (token, 0o604, "the token file .* can be read by other users: chown root:minikms-unlock and chmod 640"),
        (token, 0o620, "nobody else may write it: chown root:minikms-unlock and chmod 640"),
        (ca, 0o646, "the file of CAs .* must belong to root"),
    ):
        path.chmod(mode)
        with pytest.raises(AwayError, match=why):
            unwrapped(wrapper, BLOB)
        path.chmod(0o600)
    for content, why in (("", "has no token"), ("a\r\nX-Other: b", "has no token"), ("x" * 20_000, "no regular file")):
        token.write_text(content)
        with pytest.raises(AwayError, match=why):
            unwrapped(wrapper, BLOB)
    token.rename(tmp_path / "moved")
    token.symlink_to(tmp_path / "moved")
    with pytest.raises(AwayError, match="can't be read"):
        unwrapped(wrapper, BLOB)
    token.unlink()
    os.mkfifo(token, 0o600)
    with pytest.raises(AwayError, match="no regular file"):
        unwrapped(wrapper, BLOB)
    assert replay.requests == []


@pytest.mark.parametrize(
    "wrong",
    [
        "http://h/v1/transit?ca-file=/c&token-file=/t#k",
        "https://u:p@h/v1/transit?ca-file=/c&token-file=/t#k",
        "https://h/v1/transit?token-file=/t#k",
        "https://h/v1/transit?ca-file=/c#k",
        "https://h/v1/transit?ca-file=/c&cert-file=/t#k",
        "https://h/v1/transit?ca-file=/c&token-file=/t&token-file=/t#k",
        "https://h/v1/transit?ca-file=c&token-file=/t#k",
        "https://h/v1/transit?ca-file=/c&token-file=/t#../k",
        "https://h/v1/../sys?ca-file=/c&token-file=/t#k",
        "https://h/v1/transit?ca-file=/c&token-file=/t",
        "https://h/v1/transit?ca-file=/c&token-file=/t&token=secret#k",
    ],
)
def test_a_source_of_another_form_is_refused_without_being_shown(wrong: str) -> None:
    with pytest.raises(TokenError, match="is followed by https://HOST:PORT/v1/MOUNT") as caught:
        open_wrapper(f"vault-transit:{wrong}")
    assert "secret" not in str(caught.value)
