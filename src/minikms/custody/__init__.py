"""The data directory: atomic files, DEK files, the keyring file, rotation, backups.

Owns: the content of the data directory, except the audit log, and where that log lies. Invariants: a file is replaced
whole or not at all, and is durable before the caller gets an answer; every change of several files can be interrupted
at any system call, and the next start completes it; a damaged file never affects other keys. It must never write key
material unwrapped, nor put a path into an error that reaches a client.
"""
