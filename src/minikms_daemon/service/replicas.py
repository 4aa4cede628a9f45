"""The verbs that add a host to the key service, and remove one.

Owns: what they check, change and record. Invariants: a host's root key never comes here: its slot is made from the
public part. The slot, the member and the first key of its audit log come in one change of the keyring, and the slot and
the member go in one. With a pin file, root has named the request of a new host there, by its digest. It must never
remove the host that serves.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import msgspec

from minikms import api
from minikms.api.errors import ConflictError, DecryptionError, NotFoundError
from minikms.audit import Event
from minikms.custody.vault import Permit
from minikms.keys import keyring, members, root_slots
from minikms.keys.keyring import Body, Member
from minikms.memory.arena import fill_random
from minikms.platform.clock import HOUR_NS, now_ns, now_rfc3339, rfc3339
from minikms_daemon.service.base import another_line
from minikms_daemon.service.keks import KekVerbs
from minikms_daemon.service.roots import check_another_was_tested


@dataclass(eq=False, repr=False, kw_only=True)
class ReplicaVerbs:
    """What `keks` has of a run serves these verbs too; its pin file names the hosts that may be added."""

    keks: KekVerbs
    seals: Callable[[], int]

    def __post_init__(self) -> None:
        self._audit = self.keks.table.audit
        self.keks.table.now(api.INVITE_REPLICA, self.invite)
        self.keks.table.later(api.ADD_REPLICA, self.add, durable=True)
        self.keks.table.later(api.REMOVE_REPLICA, self.remove, durable=True)

    def invite(self, request: api.Request, event: Event) -> api.ReplicaInvitation:
        """The invitation of a new host, for which nothing is kept."""
        body = self.keks.vault.keyring.body
        slot_id = root_slots.next_slot_id(body)
        public_key = self.keks.vault.unlocked.invitation_key()
        return api.ReplicaInvitation(
            members.INVITATION_FORMAT,
            body.keyring_id,
            members.member_id_for(slot_id),
            slot_id,
            public_key,
            self.seals(),
        )

    async def add(self, request: api.AddReplicaRequest, event: Event, permit: Permit) -> api.ReplicaAnswer:
        """Adds a host, from the request that it has made."""
        new = members.newcomer(request)
        if new.keyring_id != self.keks.vault.keyring.body.keyring_id:
            raise ConflictError("the request is for another keyring: make an invitation here, and join with it")
        if self.keks.pin is not None:
            self.keks.pin.check_host(new.fingerprint, new.digest)
        unlocked = self.keks.vault.unlocked
        answer = api.ReplicaAnswer(request.member_id, request.name, new.slot_id, new.fingerprint)
        await self._begin(event, answer)

        def add(body: Body) -> Body:
            permit()
            members.check_takes(body, request.name, new.slot_id, new.fingerprint)
            at = now_rfc3339()
            try:
                slot = unlocked.make_slot_for(new, request.provider, at=at)
            except DecryptionError:
                raise ConflictError(
                    "the request was altered, or a root key was removed since its invitation was made: make a new one"
                ) from None
            audit = unlocked.make_member_audit(fill_random, at=at)
            member = Member(request.member_id, request.name, new.slot_id, at, body.key_version, audit)
            return keyring.next_epoch(body, at=at, slots=(*body.slots, slot), members=(*body.members, member))

        event.facts["epoch"] = (await self.keks.vault.keyring.change(add)).epoch
        return answer

    async def remove(self, request: api.MemberRequest, event: Event, permit: Permit) -> api.ReplicaAnswer:
        """Removes a host and the root key that it joined with."""
        member_id = request.member_id
        if member_id == self.keks.vault.unlocked.member_id:
            raise ConflictError("the host that serves can't be removed: run `minikms replica promote` on another first")
        answer = self._removed(self.keks.vault.keyring.body, member_id)

        def chosen(body: Body) -> tuple[str, ...]:
            nonlocal answer
            permit()
            answer = self._removed(body, member_id)
            if not answer.fingerprint:
                return ()
            slot_id, at_ns, audit = answer.slot_id, now_ns(), self.keks.vault.unlocked.audit
            root_slots.check_removes(body, (slot_id,), audit)
            root_slots.check_pace(audit, now=rfc3339(at_ns), hour_ago=rfc3339(at_ns - HOUR_NS))
            check_another_was_tested(body, slot_id)
            return (slot_id,)

        def without(body: Body) -> Body:
            permit()
            return keyring.next_epoch(body.without_member(member_id), at=now_rfc3339())

        chosen(self.keks.vault.keyring.body)
        await self._begin(event, answer)
        try:
            await self.keks.removal.remove(chosen, member_id=member_id)
            if not answer.fingerprint:
                await self.keks.vault.keyring.change(without)
        finally:
            self.keks.ensure_running()  # after an error too: the slot may be gone
        event.facts["epoch"] = self.keks.vault.keyring.body.epoch
        return answer

    async def _begin(self, event: Event, host: api.ReplicaAnswer) -> None:
        event.facts |= {name: value for name, value in msgspec.structs.asdict(host).items() if value}
        line = another_line(event, "begun")
        line.facts |= event.facts
        await self._audit.add_written(line, durable=True)

    def _removed(self, body: Body, member_id: str) -> api.ReplicaAnswer:
        """The host, with the fingerprint of its root key; empty if that was removed before. Raises NotFoundError."""
        member = body.member(member_id)
        if member is None:
            raise NotFoundError("no host has this id; `minikms replica list` (GET /replica) shows them")
        slot = body.slot(member.slot_id)
        return api.ReplicaAnswer(member_id, member.name, member.slot_id, "" if slot is None else slot.fingerprint)
