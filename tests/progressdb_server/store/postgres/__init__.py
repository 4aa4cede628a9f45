"""Tests of `progressdb_server/store/postgres`."""
