"""A process with 20 agents, each in a thread of LangGraph: `agents_program.py SOCKET DATABASE`.

Each turn that was stored becomes a line `agent turn` on standard output. It ends when its standard input does, once
every agent has finished its turn.
"""

import contextlib
import sqlite3
import sys
import threading

from langgraph.checkpoint.sqlite import SqliteSaver
from langgraph.graph import END, START, StateGraph

from minikms import Client
from minikms_adapters.langgraph import EncryptedSaver
from tests.minikms_adapters.langgraph.conftest import TYPED, State, answer

AGENTS = 20
PATIENCE_S = 60.0
"""Of the client while the key service restarts."""


def main(socket: str, database: str) -> None:
    stopping = threading.Event()
    failed: list[BaseException] = []
    connection = sqlite3.connect(database, check_same_thread=False)
    with contextlib.closing(connection), Client(socket, wait_s=PATIENCE_S, timeout_s=PATIENCE_S) as kms:
        saver = EncryptedSaver(SqliteSaver(connection), kms)
        graph = StateGraph(State).add_node("answer", answer).add_edge(START, "answer").add_edge("answer", END)
        compiled = graph.compile(checkpointer=saver)

        def talk(agent: int) -> None:
            turn = 0
            try:
                while not stopping.is_set():
                    said: State = {"messages": [f"{TYPED}, turn {turn}"], "approved": False}
                    compiled.invoke(said, {"configurable": {"thread_id": f"agent-{agent}"}})
                    sys.stdout.write(f"{agent} {turn}\n")
                    sys.stdout.flush()
                    turn += 1
            except BaseException as error:
                failed.append(error)
                raise

        threads = [threading.Thread(target=talk, args=(agent,)) for agent in range(AGENTS)]
        for thread in threads:
            thread.start()
        for command in sys.stdin:
            if command == "stop\n":
                stopping.set()
                for thread in threads:
                    thread.join()
                sys.stdout.write("failed\n" if failed else "stopped\n")
                sys.stdout.flush()


if __name__ == "__main__":
    main(*sys.argv[1:])
