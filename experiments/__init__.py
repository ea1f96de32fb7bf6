"""Experiments: one module for each question, run as ``python -m experiments.NAME``."""
