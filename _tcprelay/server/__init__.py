"""The rooms of the relay server."""
