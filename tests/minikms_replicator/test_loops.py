"""The loops of a replicator over a real PostgreSQL: what is committed, who serves, and what follows."""

from tests.minikms_replicator.fake_member import Member, content, key_id
from tests.minikms_replicator.rig import fresh, replicating, until


async def test_a_member_fills_empty_tables_and_another_one_follows(database: str) -> None:
    url = await fresh(database)
    first, second = Member("m1", begins=True), Member("m2")
    async with replicating(url, first, second):
        await until(lambda: first.mode == "serving")
        first.change(1, 2, 3)
        first.change(keyring=b"keyring")
        first.change(4, destroyed=(2,))
        await until(lambda: second.number == 3)
        assert second.files == {key_id(one): content(one) for one in (1, 3, 4)} == first.files
        assert second.tombstones == first.tombstones
        assert second.keyring == b"keyring"
        assert second.mode == "following"
        await until(lambda: {one.member_id for one in second.members} == {"m1", "m2"})
