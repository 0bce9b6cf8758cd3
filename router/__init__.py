"""The router: the only caller. Schedules sequences, keeps the page ledger, gates, dispatches to experts, combines.

Knows nothing of weights other than the gates', and computes nothing but gating and combining.
"""

from grokmoe.process_tuning import tune_process

tune_process()  # before a module of this package loads torch
