"""Streaming metrics; they know no network."""
