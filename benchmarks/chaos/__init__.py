"""Faults at random times under load, and what clients saw of them. `python -m benchmarks.chaos --help`.

child: how a process is started inside a network namespace, or with its log on a full disk.
node: one process at a fixed address; cluster: all of them; network: namespaces that can be cut off.
proxy: stands between router and worker and spoils answers; spoil: how an answer is spoilt.
load: streams, checked token by token; waits: how long clients waited.
faults: what is done to a node; campaign: faults under load; resources: memory, descriptors, threads; report: tables.
"""
