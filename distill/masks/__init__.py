"""Masked teachers: exact, nested, restored; the gate that says how far."""
