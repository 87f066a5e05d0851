"""What policies learn from reports. Belief, not truth: nothing here sees `headway.model`."""
