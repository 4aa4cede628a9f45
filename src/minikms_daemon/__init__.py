"""The process that holds the keys: the key service that answers on a Unix socket.

Owns what no other process loads. What other programs share with it, such as `minikms.custody`, is in `minikms`; nothing
there imports this package. `embedded` is the same service inside another process, for development and tests.
"""
