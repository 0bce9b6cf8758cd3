"""Composition roots and the `grokmoe` command. The only package that knows all roles."""

from grokmoe.process_tuning import tune_process

tune_process()  # before a module of this package loads torch
