"""Root keys sealed by a TPM in software, and which of its answers are refusals."""

import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from minikms_tokens import AwayError, TokenError, UnwrapRefusedError, open_wrapper, tpm2
from tests import needs
from tests.harness.tpm import Tpm
from tests.minikms_tokens.wrappers import KEY, unwrapped, wrap

UNSEAL = "e613137076524bde487533865884e9732ebee3aacb095d94a6de492ec06c46fa"
"""PolicyCommandCode(TPM2_Unseal), as a TPM computes it."""
PUBLIC = f"004e 0008 000b 00000492 0020 {UNSEAL} 0010 0020"
SAMPLE = bytes.fromhex(f"01 {64 * '0'} {PUBLIC} {64 * '5'} 0004 01020304")
"""Version, digest of the PCRs, TPM2B_PUBLIC, TPM2B_PRIVATE (of no TPM)."""
UNIQUE, PRIVATE = 33 + 48, 33 + 80
"""Where what only the TPM can check begins."""
STORAGE_KEY = ["-G", "ecc256:aes128cfb", "-u", "-", "-a"]
STORAGE_KEY += ["decrypt|restricted|fixedtpm|fixedparent|sensitivedataorigin|userwithauth|noda"]


@pytest.fixture(autouse=True)
def patience(monkeypatch: pytest.MonkeyPatch) -> None:
    """The machine may be slow."""
    monkeypatch.setattr(tpm2, "PROVIDER_SECONDS_MAX", 240.0)


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Tpm]:
    """For tests that change nothing in it."""
    tpm = Tpm(tmp_path_factory.mktemp("tpm"))
    yield tpm
    tpm.stop()


@pytest.fixture
def own(tmp_path: Path) -> Iterator[Tpm]:
    tpm = Tpm(tmp_path)
    yield tpm
    tpm.stop()


def flipped(blob: bytes, at: int) -> bytes:
    return blob[:at] + bytes([blob[at] ^ 1 << at % 8]) + blob[at + 1 :]


def test_a_sealed_key_opens_and_leaves_nothing_in_the_tpm(shared: Tpm) -> None:
    wrapper = open_wrapper(shared.source())
    blob = wrap(wrapper)
    assert blob[:UNIQUE] == SAMPLE[:UNIQUE] and len(blob) == PRIVATE + 2 + int.from_bytes(blob[PRIVATE:][:2])
    assert unwrapped(open_wrapper(shared.source()), blob) == KEY not in blob
    assert shared.left() == b""


def test_a_key_sealed_under_pcrs_has_the_policy_that_the_tpm_computes(shared: Tpm, tmp_path: Path) -> None:
    pcrs, policy = "sha384:0,2,8,23", tmp_path / "policy"
    blob = wrap(open_wrapper(shared.source(f"pcrs={pcrs}")))
    shared.tool("createpolicy", "--policy-pcr", "-l", pcrs, "-L", str(policy))
    shared.tool("flushcontext", "-l")
    assert tpm2.policy_of(pcrs, blob[1:33]) == policy.read_bytes() == blob[UNIQUE - 36 :][:32]
    assert unwrapped(open_wrapper(shared.source(f"pcrs={pcrs}")), blob) == KEY


def test_the_parent_is_the_standard_storage_root_key(own: Tpm, tmp_path: Path) -> None:
    """A key that was sealed without a handle opens under the handle at which that parent was stored."""
    made = str(tmp_path / "parent")
    own.tool("createprimary", "-C", "o", *STORAGE_KEY, "-c", made, data=bytes(64))
    own.tool("evictcontrol", "-C", "o", "-c", made, "0x81000001")
    blob = wrap(open_wrapper(own.source()))
    assert unwrapped(open_wrapper(own.source("parent=0x81000001")), blob) == KEY
    with pytest.raises(UnwrapRefusedError, match="no key at the handle"):
        unwrapped(open_wrapper(own.source("parent=0x81000002")), blob)


def test_no_cut_or_changed_blob_reaches_the_tpm() -> None:
    """But those whose change only the TPM can see."""
    assert tpm2.parse_blob(SAMPLE, "") == (SAMPLE[33:PRIVATE], SAMPLE[PRIVATE:])
    changed = [flipped(SAMPLE, at) for at in (*range(UNIQUE), PRIVATE, PRIVATE + 1)]
    for wrong in (*changed, *(SAMPLE[:size] for size in range(len(SAMPLE))), SAMPLE + b"\0", bytes(16 * 1024)):
        with pytest.raises(AwayError):
            tpm2.parse_blob(wrong, "")


def test_a_changed_sealed_object_opens_nothing(shared: Tpm) -> None:
    blob = wrap(open_wrapper(shared.source()))
    for at in (UNIQUE, PRIVATE + 40, len(blob) - 1):
        with pytest.raises(UnwrapRefusedError, match="the TPM does not open this wrapped key"):
            unwrapped(open_wrapper(shared.source()), flipped(blob, at))
    assert shared.left() == b""


@pytest.mark.parametrize(
    ("attributes", "policy", "sentence"),
    [
        ("00000490", UNSEAL, "fixedTPM and fixedParent have to be set"),
        ("00000482", UNSEAL, "fixedTPM and fixedParent have to be set"),
        ("000004d2", UNSEAL, "userWithAuth has to be clear"),
        ("00000492", 64 * "0", "has another policy"),
        ("00000412", UNSEAL, "is not one that was made here"),
    ],
)
def test_an_object_of_other_attributes_is_refused(attributes: str, policy: str, sentence: str) -> None:
    needs.program("tpm2_unseal")
    blob = SAMPLE.hex().replace("00000492", attributes).replace(UNSEAL, policy)
    with pytest.raises(AwayError, match=sentence):
        unwrapped(open_wrapper("tpm2:"), bytes.fromhex(blob))


def test_pcrs_are_those_of_the_source_and_none_else() -> None:
    """A blob for other PCRs, or for none, is not opened by a source that names them, nor the other way round."""
    values = {pcrs: bytes(32) if not pcrs else bytes(range(32)) for pcrs in ("", "sha256:0", "sha256:0,7", "sha384:0")}
    for own, digest in values.items():
        policy = tpm2.policy_of(own, digest)
        blob = SAMPLE[:1] + digest + SAMPLE[33:].replace(bytes.fromhex(UNSEAL), policy)
        for pcrs in values:
            if pcrs == own:
                tpm2.parse_blob(blob, pcrs)
                continue
            with pytest.raises(AwayError, match="has another policy"):
                tpm2.parse_blob(blob, pcrs)


def test_a_sealed_object_that_holds_no_key_gives_none(shared: Tpm, tmp_path: Path) -> None:
    """As anyone who may use the TPM can make one. Their key of 32 bytes would open: the pin is compared with it."""
    parent, public, private, policy = (str(tmp_path / name) for name in ("parent", "public", "private", "policy"))
    Path(policy).write_bytes(bytes.fromhex(UNSEAL))
    shared.tool("createprimary", "-C", "o", *STORAGE_KEY, "-c", parent, data=bytes(64))
    made = ("-u", public, "-r", private, "-L", policy, "-a", "fixedtpm|fixedparent|adminwithpolicy|noda")
    shared.tool("create", "-C", parent, "-i", "-", *made, data=KEY[:31])
    blob = SAMPLE[:33] + Path(public).read_bytes() + Path(private).read_bytes()
    with pytest.raises(AwayError, match="no root key"):
        unwrapped(open_wrapper(shared.source()), blob)


# --- which outcomes are refusals -------------------------------------------------------------------------------------


def restart(tpm: Tpm) -> None:
    tpm.stop()
    tpm.start()


OUTCOMES: list[tuple[Callable[[Tpm], object], type[TokenError] | None, str]] = [
    (lambda tpm: tpm.tool("pcrextend", "9:sha256=" + 64 * "a"), None, ""),
    (lambda tpm: tpm.tool("pcrextend", "16:sha256=" + 64 * "a"), UnwrapRefusedError, "the PCRs of the TPM"),
    (restart, None, ""),
    (lambda tpm: tpm.tool("changeauth", "-c", "o", "abc"), AwayError, "asks for a password"),
    (lambda tpm: tpm.tool("clear"), UnwrapRefusedError, "the TPM was cleared"),
    (lambda tpm: tpm.tool("hierarchycontrol", "-C", "p", "shEnable", "clear"), AwayError, "failed with 0x185$"),
    (lambda tpm: tpm.stop(), AwayError, "the TPM is away: tpm2_createprimary failed$"),
]


def test_what_the_tpm_itself_says_is_a_refusal_and_nothing_else(own: Tpm) -> None:
    wrapper = open_wrapper(own.source("pcrs=sha256:0,16"))
    blob = wrap(wrapper)
    for act, error, sentence in OUTCOMES:
        act(own)
        if error is None:
            assert unwrapped(wrapper, blob) == KEY
            continue
        with pytest.raises(error, match=sentence) as caught:
            unwrapped(wrapper, blob)
        assert type(caught.value) is error


def test_a_blob_of_another_tpm_is_refused(shared: Tpm, own: Tpm) -> None:
    with pytest.raises(UnwrapRefusedError, match="another TPM sealed it"):
        unwrapped(open_wrapper(own.source()), wrap(open_wrapper(shared.source())))
    assert own.left() == b""


def test_a_tpm_that_hangs_is_no_refusal(own: Tpm, monkeypatch: pytest.MonkeyPatch) -> None:
    own.process.send_signal(signal.SIGSTOP)
    monkeypatch.setattr(tpm2, "PROVIDER_SECONDS_MAX", 1.5)
    monkeypatch.setattr(tpm2, "FLUSH_SECONDS_MAX", 0.5)
    with pytest.raises(AwayError, match="tpm2_createprimary did not end in time"):
        unwrapped(open_wrapper(own.source()), SAMPLE)


def test_without_a_device_the_tpm_is_away() -> None:
    needs.program("tpm2_unseal")
    with pytest.raises(AwayError, match=r"the TPM is away: tpm2_createprimary failed$"):
        unwrapped(open_wrapper("tpm2:?tcti=device:/nowhere/tpmrm0"), SAMPLE)


@pytest.mark.parametrize(
    "source",
    [
        "tpm2:x",
        "tpm2:?",
        "tpm2:?pcrs=sha1:0",
        "tpm2:?pcrs=sha256:",
        "tpm2:?pcrs=sha256:2,0",
        "tpm2:?pcrs=sha256:0,0",
        "tpm2:?pcrs=sha256:08",
        "tpm2:?pcrs=sha256:24",
        "tpm2:?parent=0x40000001",
        "tpm2:?parent=0x81000001&parent=0x81000001",
        "tpm2:?tcti=cmd:sh",
        "tpm2:?tcti=device:/dev/tpm0 x",
        "tpm2:?colour=1",
    ],
)
def test_a_malformed_source_is_refused_with_a_sentence(source: str) -> None:
    needs.program("tpm2_unseal")
    with pytest.raises(TokenError, match="tpm2:"):
        open_wrapper(source)


# --- where the key is seen -------------------------------------------------------------------------------------------

ROUND_TRIP = """
import os, sys
from minikms_tokens import open_wrapper, tpm2
tpm2.PROVIDER_SECONDS_MAX = 240.0
key, into = bytearray(os.urandom(32)), bytearray(32)
wrapper = open_wrapper(sys.argv[1])
wrapper.unwrap(wrapper.wrap(memoryview(key), "kr_0"), "kr_0", memoryview(into))
assert key == into
print(key.hex())
"""


def test_the_key_is_seen_in_pipes_and_nowhere_else(shared: Tpm, tmp_path: Path) -> None:
    """Not in arguments, environment or files of the tools, nor on the way to the TPM, which is a socket here."""
    trace = tmp_path / "trace"
    command = [needs.program("strace"), "-f", "-y", "-v", "-xx", "-s", "8192", "-o", str(trace)]
    command += ["-e", "trace=execve,write,writev,pwrite64,sendto,sendmsg,openat"]
    command += [sys.executable, "-c", ROUND_TRIP, shared.source("pcrs=sha256:0")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=True, env=os.environ)
    key = bytes.fromhex(done.stdout).decode("latin-1")
    lines = [re.sub(r"\\x(..)", lambda found: chr(int(found[1], 16)), line) for line in trace.read_text().splitlines()]
    seen = [line for line in lines if key in line]
    assert len(seen) == 2 and all(re.match(r"\d+ +write\(\d+<pipe:", line) for line in seen), seen
    assert sum('"/usr/bin/tpm2_unseal"' in line and "execve(" in line for line in lines) == 1
    made = [line for line in lines if "openat(" in line and "O_CREAT" in line and "/proc/self/fd/" not in line]
    assert not made, made
