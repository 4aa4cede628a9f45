"""What every process needs of the operating system: files, syncs, locks, clocks, threads, logs, service manager.

No module here knows a key, a verb or a format of the key service.
"""
