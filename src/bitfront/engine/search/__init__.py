"""A search from its first candidate to its tested front."""
