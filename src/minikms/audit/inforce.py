"""Which audit key is in force, as the lines of a log tell it.

Owns: the verifier's rules 8 and 9: signatures, changes of the key, and where a known version must have taken over.
Invariant: whatever a line claims, a key becomes one in force only with a finding, or because a key that was in force
signed for it, or because the verifier was given it. It must never judge a MAC: that is for `sequence`.
"""

from __future__ import annotations

from minikms.audit import chain
from minikms.audit.chain import base64_bytes, base64_text
from minikms.audit.record import Event, Facts
from minikms.audit.signer import PUBLIC_KEY_BYTES, SIGNATURE_BYTES, signature_is_valid
from minikms.audit.verdict import Found, Trust


class KeyInForce:
    """version: 0 where no line has told it. public_key: None where that is not known."""

    def __init__(self, trust: Trust, found: Found) -> None:
        self._trust = trust
        self._found = found
        self.version = 0
        self.public_key: bytes | None = None

    def begin(self, event: Event) -> None:
        """Take over what the log's first line names."""
        public_key = base64_bytes(event.facts.get("public_key"), PUBLIC_KEY_BYTES)
        if public_key is None or public_key not in self._trust.public_keys:
            self._found("foreign", event.seq, "the log names a public key that is not the trusted one")
            public_key = None
        self._use(event, whole_number(event.facts, "key"), public_key)

    def begin_within(self, event: Event) -> None:
        """The same from a signed line: it names a version, and its signature will tell the public key."""
        self._use(event, whole_number(event.facts, "key"), None)

    def signed(self, event: Event) -> bool:
        """Rule 8. Where no line has named the public key yet, any trusted one will do, and is in force from here on."""
        signature = base64_bytes(event.facts["signature"], SIGNATURE_BYTES) or b""
        message = chain.signed_message(event)
        keys = self._trust.public_keys if self.public_key is None else (self.public_key,)
        for key in keys:
            if signature_is_valid(key, signature, message):
                self.public_key = key
                return True
        self._found("signature", event.seq, f"line {event.seq} has a signature that the public key does not confirm")
        return False

    def change(self, event: Event) -> None:
        """Rule 9, for an `audit_key` line that has its facts."""
        version = whole_number(event.facts, "next_key")
        public_key = base64_bytes(event.facts["next_public_key"], PUBLIC_KEY_BYTES)
        if version <= self.version or public_key is None:
            self._found("altered", event.seq, f"line {event.seq} does not name a next audit key")
            return
        if version in self._trust.mac_keys and public_key not in self._trust.public_keys:
            text = f"line {event.seq} names a public key that is not the one of audit key version {version}"
            self._found("foreign", event.seq, text)
        since = self._trust.since.get(version)
        if since is not None and (event.seq - 1, event.facts["previous_sig"]) != (since.seq, base64_text(since.sig)):
            text = f"line {event.seq} changes the audit key where version {version} did not take over"
            self._found("foreign", event.seq, text)
        self._use(event, version, public_key)

    def end(self, last_seq: int) -> None:
        """Where the log ends under an earlier key, it is not the one that the newest took over."""
        newest = max(self._trust.since, default=0)
        if self.version < newest:
            text = (
                f"the log ends under audit key version {self.version}, though version {newest} took over after line "
                f"{self._trust.since[newest].seq}: lines are missing, or a start has to complete the change"
            )
            self._found("truncated", last_seq, text)

    def _use(self, event: Event, version: int, public_key: bytes | None) -> None:
        self.version, self.public_key = version, public_key
        if version < 1:
            self._found("foreign", event.seq, f"line {event.seq} names no audit key version")
        elif self._trust.mac_keys and version not in self._trust.mac_keys:
            self._found("foreign", event.seq, f"line {event.seq} names audit key version {version}, which is not known")


def whole_number(facts: Facts, name: str) -> int:
    """A fact that must be an integer; 0 where it is none."""
    value = facts.get(name)
    return value if isinstance(value, int) else 0
