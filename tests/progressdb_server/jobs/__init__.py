"""Tests of `progressdb_server/jobs`."""
