"""How far the planner is from what `grokmoe up` does here: measured once, then fitted to a part and the rest predicted.

configurations: what is measured. measuring: how. measurements: the file of it.
"""
