"""The rooms of the relay client."""
