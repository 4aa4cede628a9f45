"""An agent whose memory has its keys in miniKMS: `python examples/agent_memory.py`.

The example starts a key service, and a fake model that repeats each message, on this machine; no account is needed. The
agent talks in two threads, and deletes one. The example then prints the audit lines of both threads, and what a backup
of the deleted thread gives.
"""

from __future__ import annotations

import contextlib
import http.client
import http.server
import json
import sqlite3
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

from langgraph.checkpoint.sqlite import SqliteSaver
from langgraph.graph import START, MessagesState, StateGraph

from minikms import Client
from minikms_adapters import DestroyedRecordError
from minikms_adapters.langgraph import EncryptedSaver


class Model(http.server.BaseHTTPRequestHandler):
    """Repeats the last message."""

    def do_POST(self) -> None:
        said = json.loads(self.rfile.read(int(self.headers["Content-Length"])))["messages"][-1]
        body = json.dumps({"content": f"You said: {said}"}).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        """Keeps the output to what the example shows."""


def ask(port: int, state: MessagesState) -> MessagesState:
    connection = http.client.HTTPConnection("127.0.0.1", port)
    with contextlib.closing(connection):
        connection.request("POST", "/", json.dumps({"messages": [str(each.content) for each in state["messages"]]}))
        answer = json.loads(connection.getresponse().read())
    return {"messages": [("ai", answer["content"])]}  # type: ignore[list-item]  # LangGraph makes a message of it


def run(directory: Path, port: int) -> None:
    socket, database = str(directory / "kms.sock"), directory / "agent.sqlite"
    with contextlib.closing(sqlite3.connect(database, check_same_thread=False)) as connection, Client(socket) as kms:
        saver = EncryptedSaver(SqliteSaver(connection), kms)
        graph = StateGraph(MessagesState).add_node("ask", lambda state: ask(port, state)).add_edge(START, "ask")
        agent = graph.compile(checkpointer=saver)
        for thread, text in (("ada", "My salary is 48,000."), ("bob", "I am allergic to penicillin.")):
            state = agent.invoke({"messages": [("user", text)]}, {"configurable": {"thread_id": thread}})
            print(f"{thread}: {text}\n  the agent: {state['messages'][-1].content}")
        stored = b"".join(each.read_bytes() for each in directory.glob("agent.sqlite*"))
        print(f"\nin the database: {len(stored)} bytes, 'salary' {stored.count(b'salary')} times")

        with contextlib.closing(sqlite3.connect(":memory:", check_same_thread=False)) as backup:
            connection.backup(backup)
            receipts = saver.delete_thread("bob")
            print(f"bob's thread is deleted: key {receipts[0].key_id} is {receipts[0].state}")
            try:
                EncryptedSaver(SqliteSaver(backup), kms).get_tuple({"configurable": {"thread_id": "bob"}})
            except DestroyedRecordError as error:
                print(f"bob's thread from a backup: {error}")
        remembered = agent.get_state({"configurable": {"thread_id": "ada"}}).values["messages"][0].content
        print(f"ada's thread is still there: {remembered}")

    print("\nthe audit log:")
    for line in (directory / "kms" / "minikms-audit.log").read_text().splitlines():
        event = json.loads(line)["event"]
        if event.get("key_id"):
            print(" ", event["type"], event["key_id"], event.get("thread_id", ""))


def main() -> None:
    with contextlib.ExitStack() as opened:
        directory = Path(opened.enter_context(tempfile.TemporaryDirectory()))
        command = [sys.executable, "-m", "minikms", "--socket", str(directory / "kms.sock"), "--dev"]
        command += ["--data-dir", str(directory / "kms")]
        service = opened.enter_context(subprocess.Popen(command, stderr=subprocess.DEVNULL))  # noqa: S603 - no shell; our own
        opened.callback(service.terminate)
        with Client(str(directory / "kms.sock"), wait_s=60) as kms:
            kms.health()
        model = opened.enter_context(http.server.ThreadingHTTPServer(("127.0.0.1", 0), Model))
        threading.Thread(target=model.serve_forever, daemon=True).start()
        opened.callback(model.shutdown)
        run(directory, model.server_port)


if __name__ == "__main__":
    main()
