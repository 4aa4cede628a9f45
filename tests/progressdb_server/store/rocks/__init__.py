"""Tests of `progressdb_server/store/rocks`."""
