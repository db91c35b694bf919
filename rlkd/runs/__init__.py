"""Runs whole experiments in a run folder: train, compare, distil, resume, verify."""
