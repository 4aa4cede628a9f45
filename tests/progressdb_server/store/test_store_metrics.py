"""What the store tells a Prometheus scrape."""

import asyncio

from prometheus_client import CollectorRegistry, generate_latest

from progressdb_server.conversations.whole import Conversations
from progressdb_server.metrics import Histogram
from progressdb_server.store.model import NewMessage
from tests.progressdb_server.store.opened_store import messages_of, with_store


def test_groups_batches_and_cache_are_counted() -> None:
    async def run(store: Conversations) -> str:
        registry = CollectorRegistry()
        registry.register(store.metrics)
        await store.messages.create(NewMessage(author="ann", thread="t", body=0))
        await asyncio.gather(*[store.messages.create(NewMessage(author="ann", thread="t", body=n)) for n in range(20)])
        await messages_of(store, "t")
        return generate_latest(registry).decode()

    text = with_store(run)
    for line in (
        'progressdb_store_group_writes_bucket{le="1.0"} 1.0',
        'progressdb_store_group_writes_bucket{le="32.0"} 2.0',
        "progressdb_store_group_writes_sum 21.0",
        "progressdb_store_commit_seconds_count 2.0",
        'progressdb_store_decrypt_records_bucket{le="+Inf"} 1.0',
        'progressdb_store_thread_cache_total{result="miss"} 3.0',
        "progressdb_store_failures_total 0.0",
        "progressdb_store_queued_writes 0.0",
        "progressdb_store_available 1.0",
    ):
        assert line in text.splitlines(), line


def test_a_value_on_a_bound_counts_below_it() -> None:
    histogram = Histogram((1, 2))
    for value in (0, 1, 1.5, 2, 3):
        histogram.add(value)
    assert histogram.buckets() == [("1.0", 2), ("2.0", 4), ("+Inf", 5)]
    assert histogram.sum == 7.5
