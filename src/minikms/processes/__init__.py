"""What processes share: start and stop, Unix sockets; beside the key service also files of configuration, TLS, HTTP."""
