"""Threads and messages: creating, reading, changing and re-encrypting them, over a store and its sealer.

Owns: the rules of what a write relies on and becomes, who may read and write a thread, and `whole.Conversations`, the
composition of the parts. Each part is given what it uses.
"""
