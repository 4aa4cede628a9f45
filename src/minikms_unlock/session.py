"""One root key in a hardened process, from the prompt to the text that the daemon gets.

Owns: hardening the process, the prompt for a passphrase, and the order of both. Invariants: the process is hardened
before a secret is typed, and has one thread then; passphrase and root key lie in the arena; the hexadecimal text of the
root key lies in one buffer of its final size, which is zeroed when the request is made, and the request when its last
byte is sent. It must never show a secret.
"""

from __future__ import annotations

import hmac
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

from minikms.api.errors import StartError
from minikms.client.calls import OneTimeKey
from minikms.client.connecting import OVERFLOW_UID_FILE
from minikms.crypto import roots
from minikms.crypto.aead import scrub
from minikms.memory import SLOT_BYTES, SecretArena, harden, hex_encode_into, interpreter_paths, zero
from minikms.memory.terminal import opened_terminal, read_secret
from minikms_unlock.passphrase import PASSPHRASE_BYTES_MAX, PASSPHRASE_BYTES_MIN, Parameters, derive_into

_LINE_SLOTS = -(-(PASSPHRASE_BYTES_MAX + 1) // SLOT_BYTES)


class RootText:
    """The root key as the daemon takes it: 64 hex characters in `text`. `fingerprint` is no secret."""

    def __init__(self, text: OneTimeKey, fingerprint: str) -> None:
        self.text = text
        self.fingerprint = fingerprint

    def __repr__(self) -> str:
        return f"RootText(fingerprint={self.fingerprint!r})"


@contextmanager
def root_of_passphrase(parameters: Parameters, *, new: bool) -> Iterator[RootText]:
    """Asks for the passphrase, twice if it is `new`, and derives the root key. The text is zeroed at the end.

    It hardens the process until its end. Raises InvalidRequestError, and StartError, for example without a terminal.
    """
    with ExitStack() as cleaning:
        terminal = cleaning.enter_context(opened_terminal())  # before: a hardened process may not change its modes
        keys = cleaning.enter_context(SecretArena(1))
        line = cleaning.enter_context(SecretArena(_LINE_SLOTS))
        again = cleaning.enter_context(SecretArena(_LINE_SLOTS))
        # Root keeps its capabilities: without them it could not connect to a socket that is another user's alone.
        harden(keys, read=[*interpreter_paths(), OVERFLOW_UID_FILE], write=[], keep_capabilities=True)
        passphrase = line.allocate_whole()
        size = _typed(terminal, "Passphrase: ", passphrase, new=new)
        if new:
            repeated = again.allocate_whole()
            _typed(terminal, "The same again: ", repeated, new=True)
            if not hmac.compare_digest(passphrase, repeated):
                raise StartError("the two passphrases differ; nothing was done")
            zero(repeated)
        with keys.allocate() as root:
            derive_into(passphrase[:size], parameters, root.view)
            zero(passphrase)
            with text_of(root.view) as text:
                fingerprint = roots.fingerprint(root.view)
                root.release()
                scrub()
                yield RootText(text, fingerprint)


@contextmanager
def text_of(root: memoryview) -> Iterator[OneTimeKey]:
    """The text of a root key, zeroed at the end."""
    text = OneTimeKey(2 * SLOT_BYTES)
    try:
        with memoryview(text) as view:
            hex_encode_into(root, view)
        yield text
    finally:
        text[:] = bytes(len(text))


def _typed(terminal: int, prompt: str, passphrase: memoryview, *, new: bool) -> int:
    """The size of what was typed. A line of the wrong size is refused."""
    size = read_secret(terminal, prompt, [passphrase])
    if size > PASSPHRASE_BYTES_MAX:
        raise StartError(f"a passphrase has at most {PASSPHRASE_BYTES_MAX} bytes")
    if size == 0 or (new and size < PASSPHRASE_BYTES_MIN):
        raise StartError(
            f"a passphrase has at least {PASSPHRASE_BYTES_MIN} bytes, such as six words that dice chose: who has the "
            "keyring file can try passphrases"
        )
    return size
