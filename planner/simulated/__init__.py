"""A planned cluster, worker by worker and layer by layer, on a simulated clock.

The router's own code decides: its scheduler and page ledger which steps there are, its placement which holder of an
expert is asked, its dispatch which rows go where, and where they go when a worker is lost. Simulated are the workers,
the network and the time they take, which is that of the formulas (planner/step_time.py).

clock: time, and what does one thing after another. routing: which experts tokens go to. step_costs: what a step takes
where. expert_worker, pool: experts, and who of them is asked. flight: one step. attention_worker, cell, world: a router
with its attention workers, and all of them; surroundings: what the lesser see of the greater. requests: what came.
failures: who is lost when. scenario, run, outcome, results: what is asked, done and
found.
"""
