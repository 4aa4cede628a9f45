"""The commands in the documents are executed."""
