"""Signing keys in real tokens, and in a cloud service that runs here."""
