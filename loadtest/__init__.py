"""Load tests of a grokmoe service, through its SDK: schedules, inputs, load processes, metrics, reports."""
