"""Engines behind the attention interface: one engine, one file or folder."""
