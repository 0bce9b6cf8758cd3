"""A guard of hot paths that no busy machine can upset: counts of calls, operations, bytes and messages, and times as
multiples of a product of matrices that is timed in turns with them.

paths: what is guarded. counting, timing: how. baseline: what was found before, and what is held against it.
"""
