"""Describes, measures, checks and converts optimizer states."""
