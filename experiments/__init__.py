"""One script per published number; what they gave is in LOG.md, negative results included."""
