"""From candidates to their metrics."""
