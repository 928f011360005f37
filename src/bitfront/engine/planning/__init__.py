"""From a configuration to a checked plan of a search."""
