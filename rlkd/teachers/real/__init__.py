"""Computes and caches the signals of transformers teachers."""
