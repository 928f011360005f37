"""Many candidates through one graph, each distinct state of a node computed once."""
