"""PostgreSQL as the store's engine, for several servers (docs/several-servers.md). It needs its driver, an extra."""
