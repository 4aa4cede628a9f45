"""What the message server may ask of a key service: the security bridge.

Owns: the provider protocol, its two implementations (remote: miniKMS over its socket; local: in this process, for
development only) and the supervisor of a spawned miniKMS. Invariant: no raw key ever enters this process with the
remote provider. It must never fall back to storing plaintext.
"""
