"""A better placement from the load of late, and the moves that lead to it. Pure: no network, no event loop, no clock.

settings: named limits. rates: rows per second that fade. situation: what is known. layer: the experts of one layer on
workers, and its time. packing: replicate, then pack. search: small improvements. matching: the packed sets to the
workers that have most of them. steps: an order in which nothing is ever missing. planner: all of it. pacing: when.
"""

from router.rebalancing.pacing import Pacing
from router.rebalancing.planner import Plan, make_plan
from router.rebalancing.rates import Rate, relative_costs
from router.rebalancing.settings import RebalanceSettings
from router.rebalancing.situation import Situation
from router.rebalancing.steps import Step

__all__ = ["Pacing", "Plan", "Rate", "RebalanceSettings", "Situation", "Step", "make_plan", "relative_costs"]
