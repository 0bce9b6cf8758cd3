"""What a cluster will do before it is bought: memory, time of a step, latencies under a load, workers, price.

Pure: no network, no torch. docs/scaling.md has the formulas.

what there is   model_size: what a model weighs. device, presets: where it is computed. layout: which card holds what.
                memory: whether it fits. cluster: all that is planned
a step          shape: what it computes. costs: how far from their roofs its parts are; costs_file: on disk; measured,
                fitting, log_fit: from measurements. attention_time, experts_time, step_time: leg by leg
a load          arrivals. bounds: throughput without a clock. simulation: the router's own scheduler on a simulated
                clock; forecast: what clients see of it. search: the cheapest cluster that holds
in and out      settings, command, tables, as_json, helm_values
"""
