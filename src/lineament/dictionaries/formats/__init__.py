"""Dictionaries that other libraries wrote, read as ours; one file a format."""
