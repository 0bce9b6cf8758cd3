"""How cost grows, along one axis at a time, and whether it grows in a straight line.

line: a straight line through points, and how far they are from it. axes: what is varied and what is measured at each
value. models: random models of any size. memory: what processes hold. report: the tables.
"""
