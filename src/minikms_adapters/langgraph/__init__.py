"""LangGraph: checkpoints, with `EncryptedSaver`, and long-term memory, with `EncryptedStore`."""

from minikms_adapters.langgraph.saver import EncryptedSaver
from minikms_adapters.langgraph.store import EncryptedStore

__all__ = ["EncryptedSaver", "EncryptedStore"]
