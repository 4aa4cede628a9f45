"""miniKMS: a local, hardened key service. Start reading at `minikms.service`."""
