"""Reads and writes files safely: limits, strict JSON, whole writes, journals, checkpoints, locks."""
