"""Supervised data: reading, checking, filtering, mixing, splitting and tokenising rows."""
