"""Bitfront."""
