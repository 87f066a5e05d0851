"""What decides: policies, what they believe, and the words they are spoken to in.

Pure: no clock, no global random number, no IO, no logging, no third party. `now` is an argument.
"""
