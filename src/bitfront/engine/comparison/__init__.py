"""Several strategies compared on one space."""
