"""Adapters for the ecosystems that models come from. Each is optional and imports no other."""
