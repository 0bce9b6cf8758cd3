"""A worker of several ranks: one leader, which a router talks to, and followers that do what it does.

meeting: how ranks find each other, and make sure that they fit. orders: what the leader tells. leader: steps of the
engine, told as they go; a heartbeat. follower: does as it is told. processes: followers on the leader's host, as its
children. ending: a worker whose ranks are out of step ends.
"""
