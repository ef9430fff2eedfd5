"""Checks of arguments, random draws, and files that are written whole."""

__all__ = ["arguments", "files", "randomness"]
