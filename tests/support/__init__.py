"""Fixtures, builders and servers that tests share."""
