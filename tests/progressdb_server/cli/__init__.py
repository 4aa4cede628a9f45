"""Tests of `progressdb_server/cli`."""
