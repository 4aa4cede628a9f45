"""minikms-unlock: root keys that the key service can't fetch itself.

A process of its own, which gets a root key, hands it to the daemon over a Unix socket, and ends. So the key process
contains neither the slow derivation of a root key nor code for devices and networks. Invariants: root key and
passphrase are in locked memory and zeroed after use; the process is hardened before it asks for a secret. It must never
import the rooms of the key service that open keys or store them.
"""
