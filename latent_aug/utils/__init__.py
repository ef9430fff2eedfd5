"""Checks of arguments, random draws, hashes, and files that are written whole."""

__all__ = ["arguments", "files", "hashing", "randomness"]
