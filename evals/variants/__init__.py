"""Variants of a task out of its distribution: wordings, corrupted pictures, sizes."""
