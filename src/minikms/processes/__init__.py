"""What the processes beside the key service share: configuration files, TLS contexts, HTTP exchanges."""
