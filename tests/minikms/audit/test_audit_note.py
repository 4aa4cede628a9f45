"""Signed notes, tree checkpoints and cosignatures: published examples, and everything that is refused."""

from base64 import b64encode

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from hypothesis import given
from hypothesis import strategies as some

from minikms.audit import note
from minikms.audit.note import (
    TYPE_COSIGNATURE,
    TYPE_ED25519,
    Checkpoint,
    Note,
    NoteError,
    Signature,
    VerifierKey,
    WitnessPolicy,
    open_checkpoint,
    parse_checkpoint,
    parse_note,
    parse_vkey,
)

# The example of golang.org/x/mod/sumdb/note.
GO_VKEY = "PeterNeumann+c74f20a3+ARpc2QcUPDhMQegwxbzhKqiBfsVkmqq/LDE4izWy10TW"
GO_TEXT = "If you think cryptography is the answer to your problem,\nthen you don't know what your problem is.\n"
GO_LINE = (
    "— PeterNeumann x08go/ZJkuBS9UG/SffcvIAQxVBtiFupLLr8pAcElZInNIuGUgYN1FFYC2pZSNXgKvqfqdngotpRZb6KE6RyyBwJnAM=\n"
)
# A tree checkpoint of the public log Rekor, with an ECDSA signature.
REKOR_VKEY = (
    "rekor.sigstore.dev+c0d23d6a+AjBZMBMGByqGSM49AgEGCCqGSM49AwEHA0IABNhtmPtrWm3U1eQXBogSMdGvXwBcK5AW5i0hrZLOC96l+"
    "smGNM7nwZ4QvFK/4sueRoVj//QP22Ni4Qt9DPfkWLc="
)
REKOR_NOTE = (
    "Rekor\n798034\nf+7CoKgXKE/tNys9TTXcr/ad6U/K3xvznmzew9y6SP0=\n\n— rekor.sigstore.dev wNI9ajBEAiARInWIWyCdyG27CO6LPn"
    "Pekyw20qO0YJfoaPaowGp/XgIgc+qEHS3+GKVClgqq20uDLet7MCoTURUCRdxwWBHHufk=\n"
)
# The example of C2SP tlog-cosignature; nobody has published the keys.
COSIGNED = (
    "example.com/behind-the-sofa\n20852163\nCsUYapGGPo4dkMgIAUqom/Xajj7h2fB2MPA3j2jxq2I=\n\n"
    "— example.com/behind-the-sofa Az3grlgtzPICa5OS8npVmf1Myq/5IZniMp+ZJurmRDeOoRDe4URYN7u5/Zhcyv2q1gGzGku9nTo+zyWE+xeM"
    "cTOAYQ8=\n— witness.example.com/w1 jWbPPwAAAABkGFDLEZMHwSRaJNiIDoe9DYn/zXcrtPHeolMI5OWXEhZCB9dlrDJsX3b2oyin1nPZqhf"
    "5nNo0xUe+mbIUBkBIfZ+qnA==\n"
)
CHECKPOINT = Checkpoint("audit.example/kms", 7, bytes(range(32)))


class Key:
    def __init__(self, name: str, seed: int, kind: int = TYPE_ED25519) -> None:
        self._private = Ed25519PrivateKey.from_private_bytes(bytes([seed]) * 32)
        self.public = VerifierKey(name, kind, self._private.public_key().public_bytes_raw())

    def sign(self, text: str, time: int = 0) -> Signature:
        if self.public.type == TYPE_ED25519:
            return note.sign(self.public, self._private.sign(text.encode()))
        signed = self._private.sign(note.cosigned_message(text, time))
        return note.sign(self.public, time.to_bytes(8, "big") + signed)


LOG = Key("audit.example/kms", 1)
WITNESSES = [Key(f"witness.example/w{number}", number, TYPE_COSIGNATURE) for number in (2, 3, 4)]
POLICY = WitnessPolicy((LOG.public,), tuple(witness.public for witness in WITNESSES), 2)


def cosigned(*times: int) -> Note:
    text = CHECKPOINT.text()
    signed = [witness.sign(text, time) for witness, time in zip(WITNESSES, times, strict=False)]
    return Note(text, (LOG.sign(text), *signed))


def test_the_example_of_go_verifies() -> None:
    key = parse_vkey(GO_VKEY)
    parsed = parse_note((GO_TEXT + "\n" + GO_LINE).encode())
    assert key.text() == GO_VKEY
    assert parsed.text == GO_TEXT
    assert list(parsed.signed_by([key])) == [key]
    assert parsed.encode() == (GO_TEXT + "\n" + GO_LINE).encode()


def test_an_ecdsa_signature_of_a_public_log_verifies() -> None:
    key = parse_vkey(REKOR_VKEY)
    parsed = parse_note(REKOR_NOTE.encode())
    assert list(parsed.signed_by([key])) == [key]
    assert parse_checkpoint(parsed.text).size == 798034
    changed = parse_note(REKOR_NOTE.replace("798034", "798035").encode())
    with pytest.raises(NoteError):
        changed.signed_by([key])


def test_the_example_of_the_cosignature_text_has_its_time() -> None:
    parsed = parse_note(COSIGNED.encode())
    assert [signature.name for signature in parsed.signatures] == [
        "example.com/behind-the-sofa",
        "witness.example.com/w1",
    ]
    assert note.cosigned_at(parsed.signatures[1]) == 1679315147
    assert note.cosigned_message(parsed.text, 1679315147).startswith(
        b"cosignature/v1\ntime 1679315147\nexample.com/behind-the-sofa\n20852163\n"
    )
    assert parse_checkpoint(parsed.text).text() == parsed.text


def test_a_quorum_opens_a_tree_checkpoint_and_dates_it() -> None:
    opened = open_checkpoint(cosigned(100, 300, 200).encode(), POLICY)
    assert opened.checkpoint == CHECKPOINT
    assert dict(opened.cosigned) == {f"witness.example/w{number}": 100 * at for number, at in ((2, 1), (3, 3), (4, 2))}
    assert [opened.quorum_time(quorum) for quorum in (0, 1, 2, 3, 4)] == [None, 300, 200, 100, None]


def test_a_tree_checkpoint_without_its_quorum_is_refused() -> None:
    with pytest.raises(NoteError, match="1 cosignatures of the 2"):
        open_checkpoint(cosigned(100).encode(), POLICY)
    assert open_checkpoint(cosigned().encode(), WitnessPolicy((LOG.public,))).cosigned == ()


def test_every_key_of_the_log_must_have_signed() -> None:
    second = Key("audit.example/kms", 9)
    policy = WitnessPolicy((LOG.public, second.public))
    with pytest.raises(NoteError, match="no signature by the log's key"):
        open_checkpoint(cosigned().encode(), policy)
    both = cosigned().with_signatures([second.sign(CHECKPOINT.text())])
    assert open_checkpoint(both.encode(), policy).checkpoint == CHECKPOINT


def test_a_wrong_signature_of_a_known_key_refuses_the_note() -> None:
    for signer in (LOG, WITNESSES[0]):
        for changed in (b"", bytes(64), bytes(72), bytes(73)):
            wrong = note.sign(signer.public, changed or b"x")
            damaged = Note(
                CHECKPOINT.text(),
                tuple(
                    wrong if signer.public.is_named_by(each) else each for each in cosigned(100, 200, 300).signatures
                ),
            )
            with pytest.raises(NoteError, match="is not valid"):
                open_checkpoint(damaged.encode(), POLICY)


def test_a_signature_of_an_unknown_key_changes_nothing() -> None:
    # The name of a known key with another id, and its id with another name.
    others = [Signature(LOG.public.name, b"1234", b"x"), Signature("other.example", LOG.public.key_id, b"x")]
    added = cosigned(100, 200).with_signatures(others)
    assert open_checkpoint(added.encode(), POLICY).checkpoint == CHECKPOINT


def test_a_cosignature_counts_for_its_text_and_time_alone() -> None:
    other = Checkpoint(CHECKPOINT.origin, 8, CHECKPOINT.root).text()
    text = CHECKPOINT.text()
    genuine = WITNESSES[0].sign(text, 100)
    backdated = note.sign(WITNESSES[0].public, (101).to_bytes(8, "big") + genuine.value[8:])
    assert WITNESSES[0].public.verifies(text, genuine)
    assert not WITNESSES[0].public.verifies(other, genuine)
    assert not WITNESSES[0].public.verifies(text, backdated)
    late = note.sign(WITNESSES[0].public, b"\xff" * 8 + genuine.value[8:])
    assert note.cosigned_at(late) is None
    assert not WITNESSES[0].public.verifies(text, late)


def test_a_log_key_is_no_witness() -> None:
    with pytest.raises(NoteError, match="type"):
        parse_vkey(LOG.public.text(), (TYPE_COSIGNATURE,))


def test_a_newer_cosignature_takes_the_place_of_the_older() -> None:
    newer = cosigned(100, 200).with_signatures([WITNESSES[0].sign(CHECKPOINT.text(), 900)])
    assert len(newer.signatures) == 3
    assert dict(open_checkpoint(newer.encode(), POLICY).cosigned)["witness.example/w2"] == 900


@pytest.mark.parametrize(
    "policy",
    [
        WitnessPolicy(()),
        WitnessPolicy((LOG.public, Key("other.example", 9).public)),
        WitnessPolicy((LOG.public,), (WITNESSES[0].public, WITNESSES[0].public), 2),
        WitnessPolicy((LOG.public,), (WITNESSES[0].public, Key("again.example", 2, TYPE_COSIGNATURE).public), 2),
        WitnessPolicy((LOG.public,), (WITNESSES[0].public,), 2),
        WitnessPolicy((LOG.public,), (WITNESSES[0].public,), 0),
        WitnessPolicy((LOG.public,), (), -1),
    ],
)
def test_a_policy_that_counts_a_key_twice_or_none_is_refused(policy: WitnessPolicy) -> None:
    with pytest.raises(NoteError):
        policy.check()


def test_a_verifier_key_with_one_wrong_character_is_refused() -> None:
    for genuine in (GO_VKEY, REKOR_VKEY, WITNESSES[0].public.text()):
        parse_vkey(genuine)
        for at in range(len(genuine)):
            changed = genuine[:at] + ("x" if genuine[at] != "x" else "y") + genuine[at + 1 :]
            if "rekor" in genuine and at < genuine.index("+"):
                continue  # the id of an ECDSA key does not depend on its name
            with pytest.raises(NoteError):
                parse_vkey(changed)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\n\n",
        b"text\n",
        b"text\n\n",
        b"\n\n" + GO_LINE.encode(),
        GO_TEXT.encode() + GO_LINE.encode(),
        (GO_TEXT + "\n" + GO_LINE).encode()[:-1],
        (GO_TEXT + "\n" + GO_LINE + "\n").encode(),
        (GO_TEXT + "\n" + GO_LINE + "x\n").encode(),
        (GO_TEXT + "\n- PeterNeumann AAAAAAAA\n").encode(),
        (GO_TEXT + "\n— Peter+Neumann AAAAAAAA\n").encode(),
        (GO_TEXT + "\n— Peter\u2003Neumann AAAAAAAA\n").encode(),
        (GO_TEXT + "\n—  AAAAAAAA\n").encode(),
        (GO_TEXT + "\n— PeterNeumann AAAA\n").encode(),
        (GO_TEXT + "\n— PeterNeumann AAAAAAB=\n").encode(),
        (GO_TEXT + "\n— PeterNeumann AAAAAAAA=\n").encode(),
        (GO_TEXT + "\t\n" + GO_LINE).encode(),
        (GO_TEXT + "\r\n\n" + GO_LINE).encode(),
        b"\xff\n\n" + GO_LINE.encode(),
        (GO_TEXT + "\n" + GO_LINE * (note.SIGNATURES_COUNT_MAX + 1)).encode(),
        b"x" * note.NOTE_BYTES_MAX + b"\n\n" + GO_LINE.encode(),
    ],
)
def test_bytes_that_are_no_note_are_refused(content: bytes) -> None:
    with pytest.raises(NoteError):
        parse_note(content)


@pytest.mark.parametrize(
    "text",
    ["", "a\n1\n", "a\n01\nX\n", "a\n-1\nX\n", "a\n1_0\nX\n", "a\n9223372036854775808\nX\n", "a\n1\nXX\n",
     "a\n1\nX\n\nb\n", "\n1\nX\n", "a\n٣\nX\n"],
)  # fmt: skip
def test_a_text_that_is_no_tree_checkpoint_is_refused(text: str) -> None:
    with pytest.raises(NoteError):
        parse_checkpoint(text.replace("X\n", b64encode(bytes(32)).decode() + "\n"))


@given(some.binary(max_size=300))
def test_any_bytes_are_a_note_with_one_encoding_or_none(content: bytes) -> None:
    try:
        parsed = parse_note(b"audit.example\n\n" + content)
    except NoteError:
        return
    assert parse_note(parsed.encode()) == parsed


@given(some.text(max_size=80))
def test_any_text_is_refused_as_a_verifier_key(text: str) -> None:
    with pytest.raises(NoteError):
        parse_vkey(text)
