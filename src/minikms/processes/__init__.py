"""What processes share: start and stop; of those beside the key service configuration files, TLS, HTTP exchanges."""
