"""How many different features does a network hold? Channels that are interchangeable, merged without data."""
