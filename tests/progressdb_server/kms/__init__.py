"""Tests of `progressdb_server/kms`."""
