"""Hosts: what surrounds a policy and gives it time.

Each has a `driver.py`, the only file there that calls a policy.
"""
