"""Trials on disk, and a run folder read back. Imports nothing that trains or evaluates."""
