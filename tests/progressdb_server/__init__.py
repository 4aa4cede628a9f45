"""Tests of `progressdb_server`."""
