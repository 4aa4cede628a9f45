"""RocksDB as the store's engine: the files of one process, their acknowledged log, and reading around damage."""
