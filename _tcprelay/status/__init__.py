"""What a relay tells of itself: the status, for people and for machines."""
