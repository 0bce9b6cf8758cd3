"""Where the time of a step goes, leg by leg, fused and split, and beside each leg the least it could take here.

work: what a step must read, multiply and send. floors: how long that takes at the limits of this machine. loads: what
is run, and the meter. topologies: what it runs on. recording: what it costs to know all this. report: the tables.
"""
