"""Measurements of this project against what it replaces and against the limits of the machine."""
