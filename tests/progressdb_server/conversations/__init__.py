"""Tests of `progressdb_server.conversations`."""
