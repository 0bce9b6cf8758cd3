"""Grafana dashboards, one module each; `deploy/make_dashboards.py` writes them into the chart."""
