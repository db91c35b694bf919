"""Trains transformers students window by window."""
