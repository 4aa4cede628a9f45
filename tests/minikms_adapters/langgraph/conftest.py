"""Inner savers, and what every test of a saver needs: ids, and a graph whose state a person typed."""

from __future__ import annotations

import operator
import uuid
from typing import Annotated, Any, TypedDict

import pytest
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
