"""Attaches exits, masks and adapters to transformers models."""
