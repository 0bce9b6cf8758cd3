"""The load test beside AIPerf, at the same time, on one server.

server: what both load. aiperf, ours: the tools. hop: what the gateway between AIPerf and the server adds. figures: what
is compared, and how sure that is. report: the table.
"""
