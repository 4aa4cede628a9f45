"""LangGraph: checkpoints, with `EncryptedSaver`."""

from minikms_adapters.langgraph.saver import EncryptedSaver

__all__ = ["EncryptedSaver"]
