"""A checkpoint of LangGraph put and read: `EncryptedSaver` against LangGraph's own `EncryptedSerializer`.

Both around the same savers, in turns, in one run. The figure is the ratio of their times.
"""

from __future__ import annotations

import contextlib
import os
import sqlite3
import statistics
import time
from pathlib import Path
from typing import Any

from bench import programs
from bench.programs import MissingProgramError
from bench.report import Row

VALUE_BYTES = 10_000
TURNS = 9
CHECKPOINTS_PER_TURN = 50
RATIO_MAX = 1.5


def checkpoint() -> list[Row]:
    """Raises MissingProgramError."""
    try:
        from langgraph.checkpoint.memory import InMemorySaver
        from langgraph.checkpoint.serde.encrypted import EncryptedSerializer
        from langgraph.checkpoint.sqlite import SqliteSaver

        from minikms_adapters.langgraph import EncryptedSaver
    except ImportError:
        raise MissingProgramError("needs the frameworks (`make frameworks`)") from None
    from minikms import Client

    with contextlib.ExitStack() as opened:
        directory = opened.enter_context(programs.workplace())
        kms = opened.enter_context(Client(opened.enter_context(programs.minikms(directory))))

        def serializer() -> Any:
            return EncryptedSerializer.from_pycryptodome_aes(key=os.urandom(32))

        def database(name: str) -> sqlite3.Connection:
            connection = sqlite3.connect(Path(directory) / name, check_same_thread=False)
            opened.callback(connection.close)
            return connection

        pairs = {
            "in memory": (InMemorySaver(serde=serializer()), EncryptedSaver(InMemorySaver(), kms)),
            "in SQLite": (
                SqliteSaver(database("serializer"), serde=serializer()),
                EncryptedSaver(SqliteSaver(database("saver")), kms),
            ),
        }
        return [_compared(name, theirs, ours) for name, (theirs, ours) in pairs.items()]


def _compared(name: str, theirs: Any, ours: Any) -> Row:
    ratios, seconds = [], []
    for turn in range(TURNS):
        took = [_seconds(saver, f"thread-{turn}") for saver in (theirs, ours)]
        ratios.append(took[1] / took[0])
        seconds.append(took[1] / CHECKPOINTS_PER_TURN)
    note = f"{statistics.median(seconds) * 1000:.2f} ms each"
    what = f"put and get of a checkpoint of 10 kB {name}, time against LangGraph's `EncryptedSerializer`"
    return Row(what, statistics.median(ratios), "×", floor=RATIO_MAX, less_is_better=True, note=note)


def _seconds(saver: Any, thread: str) -> float:
    from langgraph.checkpoint.base import empty_checkpoint

    started = time.perf_counter()
    for number in range(CHECKPOINTS_PER_TURN):
        made = empty_checkpoint()
        made["channel_values"] = {"messages": ["x" * (VALUE_BYTES // 10)] * 10}
        made["channel_versions"] = {"messages": number}
        config: Any = {"configurable": {"thread_id": thread, "checkpoint_ns": ""}}
        metadata = {"source": "loop", "step": number, "parents": {}}
        stored = saver.put(config, made, metadata, {"messages": number})
        if saver.get_tuple(stored) is None:
            raise programs.BenchError("a checkpoint that was put is missing")
    return time.perf_counter() - started
