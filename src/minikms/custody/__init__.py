"""What touches disk: atomic files, the DEK store, the keyring file, use leases, root providers, rotation.

Owns: the data directory's contents. Invariants: a file is replaced whole or not at all, and is durable before anybody
is told; every change of several files can be interrupted at any system call and resumes by itself; one bad file never
stops the others. It must never write key material unwrapped, nor name a path in an error that reaches a client.
"""
