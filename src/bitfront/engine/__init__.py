"""The engine: evaluator, store, loop, front, and the run that comes out of them."""
