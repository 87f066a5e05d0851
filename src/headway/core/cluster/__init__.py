"""Cluster policies: which instance and rank, and when."""
