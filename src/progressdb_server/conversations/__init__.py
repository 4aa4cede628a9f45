"""Threads and messages: creating, reading, changing and re-encrypting them, over a store and its sealer.

Owns: which stored values a write depends on and what it stores, who may read and write a thread, and
`whole.Conversations`, the composition of the parts. Each part is given what it uses.
"""
