"""A running store whose key service is sealed: nothing is sealed until the epoch was judged after the unseal."""

import asyncio

import pytest

from minikms import api
from minikms.api.errors import refusal
from progressdb_server.conversations import whole as room
from progressdb_server.kms.provider import SEALED
from progressdb_server.store.model import NewMessage, StoreUnavailableError
from tests.progressdb_server.store.opened_store import becomes, messages_of, opened
from tests.progressdb_server.store.sealing_provider import SealingProvider


def new(body: object, thread: str = "t") -> NewMessage:
    return NewMessage(author="ann", thread=thread, body=body)


def at_epoch(epoch: int) -> api.StatusAnswer:
    audit = api.AuditStatus(head=api.HeadStatus(1, "s1"))
    return api.StatusAnswer(status="ok", epoch=epoch, keyring_id="one", audit=audit)


class Sealable(SealingProvider):
    """A key service that may be sealed, at an epoch. A `status` waits for `answering`."""

    def __init__(self) -> None:
        super().__init__()
        self.sealed = False
        self.epoch = 5
        self.answering = asyncio.Event()
        self.answering.set()

    async def _answer(self, verb: str) -> None:
        await super()._answer(verb)
        if self.sealed:
            raise refusal("sealed", "the key service is sealed")

    async def status(self) -> api.StatusAnswer:
        self.calls["status"] += 1
        answer = api.StatusAnswer(status="sealed") if self.sealed else at_epoch(self.epoch)
        await self.answering.wait()
        return answer


@pytest.mark.parametrize("seen_by", ["a write", "a read", "a look at its epoch"])
async def test_an_older_key_service_behind_a_seal_gets_nothing_to_seal(
    seen_by: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever sees the seal first: nothing is sealed between the unseal and the next look at the epoch."""
    monkeypatch.setattr(room, "EPOCH_S", 0.001 if seen_by == "a look at its epoch" else 3600)
    monkeypatch.setattr(room, "SEALED_S", 3600)
    provider = Sealable()
    async with opened(provider=provider) as store:
        await store.start()
        await store.messages.create(new(1))
        provider.sealed = True
        if seen_by == "a look at its epoch":
            await becomes(lambda: store.sealer.halted is not None)
        else:
            provider.answering.clear()
            with pytest.raises(StoreUnavailableError, match="is sealed"):
                await (store.messages.create(new(2)) if seen_by == "a write" else messages_of(store, "t"))
        provider.sealed, provider.epoch = False, 4
        calls = provider.calls["encrypt"], provider.calls["create"]
        for thread in ("t", "another"):
            with pytest.raises(StoreUnavailableError, match="is sealed") as refused:
                await store.messages.create(new(3, thread))
            assert refused.value.retry_after_s == api.SEALED_RETRY_SECONDS
        assert (provider.calls["encrypt"], provider.calls["create"]) == calls
        assert len(await messages_of(store, "t")) == 1


async def test_a_look_that_began_before_the_seal_does_not_end_the_halt(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(room, "EPOCH_S", 0.001)
    monkeypatch.setattr(room, "SEALED_S", 3600)
    provider = Sealable()
    async with opened(provider=provider) as store:
        await store.start()
        await store.messages.create(new(1))
        provider.answering.clear()
        looks = provider.calls["status"]
        await becomes(lambda: provider.calls["status"] > looks)
        provider.sealed = True
        with pytest.raises(StoreUnavailableError):
            await store.messages.create(new(2))
        provider.sealed = False
        provider.answering.set()
        for _ in range(100):
            await asyncio.sleep(0)
        assert store.sealer.halted == SEALED


async def test_a_store_closes_in_the_turn_in_which_it_sees_a_seal() -> None:
    """The key service answers nothing then. `asyncio.wait_for` of Python 3.11 lost the cancellation there."""
    provider = Sealable()
    async with opened(provider=provider) as store:
        await store.start()
        await asyncio.sleep(0)  # the look at the epoch waits now
        provider.answering.clear()
        store.sealer.halt_sealed()


async def test_a_write_that_a_seal_overtakes_is_not_stored() -> None:
    """Its answer may come from another key service than the one that was sealed."""
    provider = Sealable()
    async with opened(provider=provider) as store:
        await store.start()
        await store.messages.create(new(1))
        provider.delay_s = 0.01
        calls = provider.calls["encrypt"]
        writing = asyncio.create_task(store.messages.create(new(2)))
        await becomes(lambda: provider.calls["encrypt"] > calls)
        provider.answering.clear()
        store.sealer.halt_sealed()
        with pytest.raises(StoreUnavailableError, match="is sealed"):
            await writing
        assert len(await messages_of(store, "t")) == 1


async def test_a_look_that_a_seal_cuts_off_halts_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """Requests in flight end with `sealed`, the look at the epoch too."""
    monkeypatch.setattr(room, "EPOCH_S", 0.001)
    monkeypatch.setattr(room, "SEALED_S", 3600)
    provider = SealingProvider()
    async with opened(provider=provider) as store:
        await store.start()

        async def cut_off() -> api.StatusAnswer:
            raise refusal("sealed", "the key service is sealed")

        provider.status = cut_off  # type: ignore[method-assign]  # from now on
        await becomes(lambda: store.sealer.halted == SEALED)


async def test_a_look_at_the_epoch_that_fails_is_made_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the reason: meanwhile nothing is sealed."""
    monkeypatch.setattr(room, "EPOCH_S", 0.001)
    provider = Sealable()
    status = provider.status

    async def defect() -> api.StatusAnswer:
        raise ZeroDivisionError

    async with opened(provider=provider) as store:
        await store.start()
        provider.status = defect  # type: ignore[method-assign]  # from now on
        await becomes(lambda: store.sealer.halted is not None)
        with pytest.raises(StoreUnavailableError, match="could not be judged"):
            await store.messages.create(new(1))
        provider.status = status  # type: ignore[method-assign]  # as before
        await becomes(lambda: store.sealer.halted is None)
        await store.messages.create(new(2))


async def test_readiness_asks_whether_the_key_service_is_still_sealed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever unseals it and asks at once must not read that it is sealed."""
    monkeypatch.setattr(room, "SEALED_S", 3600)
    provider = Sealable()
    provider.sealed = True
    async with opened(provider=provider) as store:
        await store.start()
        with pytest.raises(StoreUnavailableError, match="is sealed"):
            await store.check_writes()
        provider.sealed = False
        await store.check_writes()
        await store.messages.create(new(1))


async def test_it_goes_on_after_the_epoch_was_judged(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(room, "EPOCH_S", 3600)
    monkeypatch.setattr(room, "SEALED_S", 0.001)
    provider = Sealable()
    async with opened(provider=provider) as store:
        await store.start()
        await store.messages.create(new(1))
        provider.sealed = True
        with pytest.raises(StoreUnavailableError):
            await store.messages.create(new(2))
        provider.sealed = False
        await becomes(lambda: store.sealer.halted is None)
        await store.messages.create(new(3))
