"""A root key under clevis: with real tang servers, and servers in their place that answer anything."""

import base64
import contextlib
import json
import re
import subprocess
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from minikms_tokens import AwayError, clevis, open_wrapper, programs
from tests import needs
from tests.harness.ports import free_port
from tests.harness.waiting import WAIT_S_MAX, listens, wait_until
from tests.minikms_tokens.replay import Replay, drip, reply
from tests.minikms_tokens.wrappers import KEY, NO_KEYS, unwrapped, wrap

HUGE = [reply(200, bytes(8))[:-8].replace(b"Length: 8", b"Length: 999999999999"), *[b"[" * (1 << 20)] * 1024]
"""A gigabyte."""


class Tang:
    """A tang server with two keys. `config`: its pin and configuration, as clevis takes them."""

    def __init__(self, directory: Path) -> None:
        self._tangd, self._jose = needs.program("/usr/libexec/tangd"), needs.program("jose")
        self._keys = directory / "keys"
        self._keys.mkdir()
        self.port = free_port()
        signing, self._exchange = self._new_key("ES512"), self._new_key("ECMR")
        self.config: dict[str, Any] = {"url": f"http://127.0.0.1:{self.port}", "thp": signing.stem}
        self.start()

    def _new_key(self, algorithm: str) -> Path:
        made = self._keys / "new"
        run(self._jose, "jwk", "gen", "-i", json.dumps({"alg": algorithm}), "-o", str(made))
        thumbprint = run(self._jose, "jwk", "thp", "-a", "S256", "-i", str(made)).decode()
        return made.rename(self._keys / f"{thumbprint}.jwk")

    def start(self) -> None:
        command = [self._tangd, "-l", "-p", str(self.port), str(self._keys)]
        self.process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        wait_until(lambda: listens(self.port))

    def stop(self) -> None:
        self.process.kill()
        self.process.wait()

    @contextlib.contextmanager
    def stopped(self) -> Iterator[None]:
        self.stop()
        try:
            yield
        finally:
            self.start()

    @contextlib.contextmanager
    def without_key(self) -> Iterator[None]:
        moved = self._exchange.rename(self._keys.parent / "moved")
        try:
            yield
        finally:
            moved.rename(self._exchange)


def run(*command: str, given: bytes = b"") -> bytes:
    return subprocess.run(command, input=given, capture_output=True, check=True).stdout


@pytest.fixture(scope="module")
def tangs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Tang, Tang]]:
    """Each test leaves both running."""
    needs.program("clevis")
    both = Tang(tmp_path_factory.mktemp("tang")), Tang(tmp_path_factory.mktemp("tang"))
    yield both
    for one in both:
        one.stop()


@pytest.fixture
def tang(tangs: tuple[Tang, Tang]) -> Tang:
    return tangs[0]


@pytest.fixture(autouse=True)
def patience(monkeypatch: pytest.MonkeyPatch) -> None:
    """clevis starts some forty programs, which a busy machine does slowly."""
    monkeypatch.setattr(clevis, "PROVIDER_SECONDS_MAX", WAIT_S_MAX)


def source(directory: Path, pin: str, config: object) -> str:
    path = directory / "clevis.conf"
    path.write_text(f"{pin} {json.dumps(config)}\n")
    path.chmod(0o644)
    return f"clevis:{path}"


def test_a_root_key_opens_while_its_tang_server_answers(tmp_path: Path, tang: Tang) -> None:
    wrapper = open_wrapper(source(tmp_path, "tang", tang.config))
    blob = wrap(wrapper)
    assert blob.count(b".") == 4 and unwrapped(wrapper, blob) == KEY
    assert run(needs.program("clevis"), "decrypt", given=blob) == KEY
    with tang.stopped():
        with pytest.raises(AwayError, match="clevis encrypt failed: its server or TPM is away"):
            wrap(wrapper)
        with pytest.raises(AwayError, match="clevis decrypt failed"):
            unwrapped(wrapper, blob)
    assert unwrapped(wrapper, blob) == KEY
    with tang.without_key(), pytest.raises(AwayError, match="has the key no longer"):
        unwrapped(wrapper, blob)


def test_a_server_that_another_key_signs_for_is_not_trusted(tmp_path: Path, tangs: tuple[Tang, Tang]) -> None:
    config = tangs[0].config | {"thp": tangs[1].config["thp"]}
    with pytest.raises(AwayError, match="clevis encrypt failed"):
        wrap(open_wrapper(source(tmp_path, "tang", config)))


def test_one_of_two_shares_is_enough_if_the_file_says_so(tmp_path: Path, tangs: tuple[Tang, Tang]) -> None:
    config = {"t": 1, "pins": {"tang": [one.config for one in tangs]}}
    wrapper = open_wrapper(source(tmp_path, "sss", config))
    blob = wrap(wrapper)
    with tangs[0].stopped():
        assert unwrapped(wrapper, blob) == KEY
    others = [config | {"t": 2}, {"t": 1, "pins": {"tang": tangs[0].config}}, {"t": 1, "pins": {"tang": []}}]
    for other in others:
        with pytest.raises(AwayError, match=r"is no JWE of clevis under|has one line, such as"):
            unwrapped(open_wrapper(source(tmp_path, "sss", other)), blob)


# --- a wrapped key of an attacker's choice ---------------------------------------------------------------------------

TANG_HEADER: dict[str, Any] = {
    "alg": "ECDH-ES",
    "clevis": {"pin": "tang", "tang": {"adv": {"keys": []}, "url": "http://tang.example"}},
    "enc": "A256GCM",
    "epk": {"crv": "P-521", "kty": "EC", "x": "AA", "y": "AA"},
    "kid": "a" * 43,
}
TPM2: dict[str, Any] = {
    "hash": "sha256", "jwk_priv": "AO4", "jwk_pub": "AE4", "key": "ecc", "pcr_bank": "sha256", "pcr_ids": "0,2",
}  # fmt: skip
"""As clevis 20 writes it, with a shorter key."""


def jwe(header: object) -> bytes:
    text = header if isinstance(header, str) else json.dumps(header)
    return base64.urlsafe_b64encode(text.encode()).rstrip(b"=") + b"..aaaa.aaaa.aaaa"


def tpm2(**members: str) -> bytes:
    return jwe({"alg": "dir", "clevis": {"pin": "tpm2", "tpm2": TPM2 | members}, "enc": "A256GCM"})


def tang_jwe(**members: object) -> bytes:
    return jwe(TANG_HEADER | members)


def shares(*jwes: bytes) -> bytes:
    inner = {"jwe": [one.decode() for one in jwes], "p": "AA", "t": 1}
    return jwe({"alg": "dir", "clevis": {"pin": "sss", "sss": inner}, "enc": "A256GCM"})


FOREIGN = {
    "another server": tang_jwe(clevis={"pin": "tang", "tang": {"adv": {"keys": []}, "url": "http://evil.example"}}),
    "two servers": jwe(json.dumps(TANG_HEADER).replace('"url"', '"url": "http://evil.example", "url"')),
    "a pin beside": tang_jwe(clevis=TANG_HEADER["clevis"] | {"null": {}}),
    "another pin": tang_jwe(clevis={"pin": "null", "null": {}}),
    "a program as pin": tang_jwe(clevis={"pin": "../sh", "../sh": {}}),
    "a path in kid": tang_jwe(kid="../adv"),
    "a command in crv": tang_jwe(epk=TANG_HEADER["epk"] | {"crv": 'P-521","x":"'}),
    "compressed": tang_jwe(zip="DEF"),
    "a TPM": tpm2(),
    "shares": shares(tang_jwe()),
    "shares of shares": shares(shares(tang_jwe())),
    "no JWE": b"\xff" * 64,
    "no JSON": jwe("{" * 5_000),
    "no object": jwe([]),
    "too long": tang_jwe() + b"a" * (16 * 1024),
    "six parts": tang_jwe() + b".aaaa",
    "a line more": tang_jwe() + b"\n",
    "another form of base64": tang_jwe().replace(b".", b"B.", 1),
    "nothing": b"",
}


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The commands that would have run."""
    needs.program("clevis")
    commands: list[Any] = []

    def run(command: Sequence[str], **_: object) -> programs.Ended:
        commands.append(command[-1])
        return programs.Ended(1, b"", 0, b"")

    monkeypatch.setattr(programs, "run", run)
    return commands


@pytest.mark.parametrize("blob", FOREIGN.values(), ids=list(FOREIGN))
def test_clevis_is_not_run_for_what_another_configuration_wrapped(
    tmp_path: Path, asked: list[Any], blob: bytes
) -> None:
    config = {"url": "http://tang.example", "thp": "b" * 43}
    wrapper = open_wrapper(source(tmp_path, "tang", config))
    with pytest.raises(AwayError, match="is no JWE of clevis under the pin and configuration"):
        unwrapped(wrapper, blob)
    assert asked == []
    with pytest.raises(AwayError, match="clevis decrypt failed"):
        unwrapped(wrapper, tang_jwe())
    assert asked == ["decrypt"]


def test_a_tpm_has_the_pcrs_of_the_file(tmp_path: Path, asked: list[Any]) -> None:
    wrapper = open_wrapper(source(tmp_path, "tpm2", {"pcr_bank": "sha256", "pcr_ids": "0,2"}))
    for blob in (tpm2(pcr_ids="0"), tpm2(pcr_bank="sha1"), tpm2(hash="sha1"), tpm2(pcr_ids="", pcr_bank="")):
        with pytest.raises(AwayError, match="is no JWE of clevis under"):
            unwrapped(wrapper, blob)
    assert asked == []
    with pytest.raises(AwayError, match="clevis decrypt failed"):
        unwrapped(wrapper, tpm2())


@pytest.mark.parametrize(
    "content",
    [
        "", "tang", "null {}", 'tang {"url": "http://h"}', 'tang {"url": "http://h", "thp": "any"}',
        'tang {"url": "http://h", "thp": "THP", "adv": "/adv"}', 'tang {"url": "file:///k", "thp": "THP"}',
        'tang {"url": "http://h", "thp": "THP", "thp": "THP"}', 'tpm2 {"pcr_ids": "7"}', "tpm2 []",
        'sss {"t": 1, "pins": {"sss": {"t": 1, "pins": {"tpm2": {}}}}}', 'sss {"t": 0, "pins": {"tpm2": {}}}',
    ],
)  # fmt: skip
def test_a_file_without_a_whole_configuration_is_refused(tmp_path: Path, asked: list[Any], content: str) -> None:
    name = source(tmp_path, "tang", {})
    (tmp_path / "clevis.conf").write_text(content.replace("THP", "b" * 43))
    for act in (wrap, lambda wrapper: unwrapped(wrapper, tang_jwe())):
        with pytest.raises(AwayError, match="has one line, such as tang"):
            act(open_wrapper(name))
    (tmp_path / "clevis.conf").chmod(0o666)
    with pytest.raises(AwayError, match="nobody else may write it"):
        wrap(open_wrapper(name))
    assert asked == []


# --- a server of an attacker's choice --------------------------------------------------------------------------------


@pytest.mark.parametrize("parts", [HUGE, drip(), [reply(200, "<html>")], [reply(200, "[" * 99)], [b""]])
def test_a_server_in_the_place_of_tang_is_away(
    tmp_path: Path, tang: Tang, monkeypatch: pytest.MonkeyPatch, parts: Iterable[bytes]
) -> None:
    """The whole answer is kept by a shell, whose memory is bounded."""
    wrapper = open_wrapper(source(tmp_path, "tang", tang.config))
    blob = wrap(wrapper)
    is_endless = not isinstance(parts, list)
    if is_endless:
        monkeypatch.setattr(clevis, "PROVIDER_SECONDS_MAX", 2.0)
    with tang.stopped(), Replay(tmp_path, tang.port, tls=False) as server:
        server.answer = parts
        with pytest.raises(AwayError, match=r"^clevis (did not end in time|decrypt failed)"):
            unwrapped(wrapper, blob)
        assert is_endless or [request[:10] for request in server.requests] == [b"POST /rec/"]


@pytest.mark.parametrize("key", ["31 bytes", "33 bytes", "zeros"])
def test_what_is_no_root_key_is_not_given(tmp_path: Path, tang: Tang, key: str) -> None:
    blob = run(needs.program("clevis"), "encrypt", "tang", json.dumps(tang.config), given=NO_KEYS[key])
    with pytest.raises(AwayError, match=r"no root key|gave more than 32 bytes"):
        unwrapped(open_wrapper(source(tmp_path, "tang", tang.config)), blob)


def test_no_program_that_clevis_starts_has_the_key_in_an_argument(
    tmp_path: Path, tang: Tang, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor in its environment or a file: none is made."""
    strace, prlimit, log = needs.program("strace"), needs.program("prlimit"), tmp_path / "log"
    traced = tmp_path / "prlimit"
    traced.write_text(
        f'#!/bin/sh\nexec {strace} -f -A -o {log} -v -s 65536 -e trace=execve,/open,creat {prlimit} "$@"\n'
    )
    traced.chmod(0o755)
    find = programs.find
    monkeypatch.setattr(
        programs, "find", lambda name, package: str(traced) if name == "prlimit" else find(name, package)
    )
    wrapper = open_wrapper(source(tmp_path, "tang", tang.config))
    assert unwrapped(wrapper, wrap(wrapper)) == KEY
    text = log.read_text()
    assert 'clevis", "decrypt"' in text and len(re.findall(r"execve\(.*jose", text)) > 10
    assert not [line for line in text.splitlines() if "O_CREAT" in line and "/dev/null" not in line]
    assert KEY.hex() not in text and base64.urlsafe_b64encode(KEY).decode().rstrip("=") not in text
