"""The message server's side of the key service.

Owns: what the server calls of it (`provider`), the supervisor of a spawned miniKMS, and the move of a root key out of
the environment. Invariant: with the remote provider no raw key ever enters this process. It must never fall back to
storing plaintext.
"""
