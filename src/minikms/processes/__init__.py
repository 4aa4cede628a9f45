"""What processes share: start, stop, Unix sockets; beside the key service configuration, TLS, HTTP, PostgreSQL."""
