"""Tests of `progressdb_server/api`."""
