"""Cuts and ships transformers students."""
