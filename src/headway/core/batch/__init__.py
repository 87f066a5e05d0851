"""Batch policies: what runs in the next step of one rank."""
