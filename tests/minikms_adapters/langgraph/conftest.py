"""Inner savers, and what every test of a saver needs: ids, and a graph whose state a person typed."""

import operator
import uuid
from typing import Annotated, Any, TypedDict

import pytest
from langchain_core.runnables import RunnableConfig
from langgraph.checkpoint.base import BaseCheckpointSaver, empty_checkpoint
from langgraph.graph import END, START, StateGraph
from langgraph.types import interrupt

TYPED = "my salary is 48,000"


class State(TypedDict):
    messages: Annotated[list[str], operator.add]
    approved: bool


def answer(state: State) -> dict[str, Any]:
    return {"messages": [f"you said: {state['messages'][-1]}"]}


def _approve(state: State) -> dict[str, Any]:
    return {"approved": interrupt(f"is this right? {state['messages'][-1]}")}


def conversation() -> StateGraph[State]:
    """Two nodes, of which the second waits for a person."""
    graph = StateGraph(State)
    graph.add_node("answer", answer)
    graph.add_node("approve", _approve)
    graph.add_edge(START, "answer")
    graph.add_edge("answer", "approve")
    graph.add_edge("approve", END)
    return graph


@pytest.fixture
def thread() -> str:
    return str(uuid.uuid4())


def config_of(thread: str, **named: str) -> RunnableConfig:
    return {"configurable": {"thread_id": thread, "checkpoint_ns": "", **named}}


def put(saver: BaseCheckpointSaver[Any], thread: str, version: int, value: object, **named: str) -> RunnableConfig:
    """One checkpoint with one channel."""
    checkpoint = empty_checkpoint()
    checkpoint["channel_values"] = {"messages": value}
    checkpoint["channel_versions"] = {"messages": version}
    metadata = {"source": "loop", "step": version, "parents": {}, "note": f"{value}"}
    return saver.put(config_of(thread, **named), checkpoint, metadata, {"messages": version})  # type: ignore[arg-type]  # has an own field


def history(saver: BaseCheckpointSaver[Any], thread: str) -> list[Any]:
    """All that a thread holds, comparable."""
    found = saver.list({"configurable": {"thread_id": thread}})
    return [(each.config, each.checkpoint, each.metadata, each.parent_config, each.pending_writes) for each in found]
