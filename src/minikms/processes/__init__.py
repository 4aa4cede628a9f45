"""What the processes share: start and stop; beside the key service configuration files, TLS, HTTP exchanges."""
