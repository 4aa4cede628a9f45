"""The ProgressDB message server: threads and messages, each thread encrypted under a key that only miniKMS holds."""
