"""Tests of `progressdb_server/http`."""
