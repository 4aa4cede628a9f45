"""Tests that take minutes: `make torture`."""
