"""Changes of the members of a keyring: the hosts of a replicated key service.

Owns: which host may be added, the entries that come and go with it, and the form of its request. Invariants: as in
`minikms.keys.keyring`: each change is a pure function from one body to the next. The ids of a host and
of its slot are never used again. It must never trust the name in a request: only the digest, which people compare,
shows which host made it (`minikms.crypto.slots.Newcomer`).
"""

from __future__ import annotations

import re
from typing import Final

from minikms import api
from minikms.api.base64 import decode_canonical, encode_text
from minikms.api.errors import ConflictError, InvalidRequestError
from minikms.crypto.hpke import PUBLIC_KEY_BYTES
from minikms.crypto.roots import FINGERPRINT_HEX_CHARS
from minikms.crypto.slots import COMMITMENT_BYTES, SEALED_BYTES, Newcomer
from minikms.keys import root_slots
from minikms.keys.keyring import PROVIDER, Body, Member, next_epoch

FIRST_ID: Final = "m1"
"""The id of the host on which the keyring was made. No slot that comes with a host has number 1."""
INVITATION_FORMAT: Final = "minikms-invitation"
_FINGERPRINT: Final = re.compile(rf"[0-9a-f]{{{FINGERPRINT_HEX_CHARS}}}", re.ASCII)


def member_id_for(slot_id: str) -> str:
    """The id of the host that comes with this slot."""
    return f"m{slot_id[1:]}"


def newcomer(request: api.AddReplicaRequest) -> Newcomer:
    """What a slot is made of. Raises InvalidRequestError, TooLargeError for what is no request of a host."""
    if (
        api.SLOT_ID_PATTERN.fullmatch(request.slot_id) is None
        or request.member_id != member_id_for(request.slot_id)
        or api.MEMBER_NAME_PATTERN.fullmatch(request.name) is None
        or _FINGERPRINT.fullmatch(request.fingerprint) is None
        or PROVIDER.fullmatch(request.provider) is None
    ):
        raise InvalidRequestError("this is no request of `minikms replica join`")
    return Newcomer(
        request.keyring_id,
        request.slot_id,
        request.fingerprint,
        _decoded(request.commitment, COMMITMENT_BYTES, "commitment"),
        _decoded(request.public_key, PUBLIC_KEY_BYTES, "public_key"),
        _decoded(request.sealed_auth, SEALED_BYTES, "sealed_auth"),
    )


def _decoded(text: str, size: int, what: str) -> bytes:
    data = decode_canonical(text, size, what)
    if len(data) != size:
        raise InvalidRequestError(f"{what} has {size} bytes")
    return data


def request(new: Newcomer, name: str, provider: str) -> api.AddReplicaRequest:
    return api.AddReplicaRequest(
        keyring_id=new.keyring_id,
        member_id=member_id_for(new.slot_id),
        name=name,
        slot_id=new.slot_id,
        fingerprint=new.fingerprint,
        provider=provider,
        commitment=encode_text(new.commitment),
        public_key=encode_text(new.public_key),
        sealed_auth=encode_text(new.sealed_auth),
    )


def check_takes(body: Body, name: str, slot_id: str, fingerprint: str) -> None:
    """Checks that a host of this name may be added, with this root key and this slot. Raises ConflictError."""
    root_slots.check_takes(body, fingerprint)
    if len(body.members) >= api.MEMBERS_MAX:
        raise ConflictError(f"the key service has {api.MEMBERS_MAX} hosts: remove one first")
    if any(member.name == name for member in body.members):
        raise ConflictError(f"a host of the key service has the name {name} already; choose another one")
    number = int(slot_id[1:])
    used = {slot.slot_id for slot in body.slots} | {root.slot_id for root in body.revoking}
    used |= {one for member in body.members for one in (member.slot_id, f"s{member.member_id[1:]}")}
    if slot_id in used or slot_id != f"s{number}" or not 1 < number <= body.epoch + 1:
        raise ConflictError("the invitation is used already, or of another keyring: make a new one, and join again")


def begun(body: Body, name: str, slot_id: str, *, at: str) -> Body:
    """Makes this the first host of several; its audit log stays that of the body."""
    first = Member(FIRST_ID, name, slot_id, at, body.key_version)
    return next_epoch(body, at=at, members=(first,))


def alone(body: Body, member_id: str, *, at: str) -> Body:
    """The body of one host, whose audit log is that of the member; the one of the body if there is no such member."""
    audit = body.audit_of(member_id)
    return next_epoch(body, at=at, members=(), audit_keys=audit.audit_keys, audit_origin=audit.audit_origin)
