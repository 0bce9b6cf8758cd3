"""What all dashboards have in common: data source and namespace to choose, panels, and how queries are written."""

from __future__ import annotations

from collections.abc import Sequence

from grafana_foundation_sdk.builders import dashboard as dashboards
from grafana_foundation_sdk.builders import prometheus, stat, timeseries
from grafana_foundation_sdk.builders.common import VizLegendOptions
from grafana_foundation_sdk.models.common import LegendDisplayMode, LegendPlacement
from grafana_foundation_sdk.models.dashboard import DataSourceRef, VariableRefresh

SOURCE = DataSourceRef(type_val="prometheus", uid="${datasource}")
SCOPE = 'namespace=~"$namespace"'
"""In every selector, so that one Grafana can show several installations."""


HEIGHT = 8

Query = tuple[str, str]
"""PromQL and legend."""


def selector(metric: str, more: str = "") -> str:
    """A metric's series in the chosen namespaces. more: further matchers."""
    return f"{metric}{{{SCOPE}{', ' + more if more else ''}}}"


def rate(metric: str, more: str = "") -> str:
    """Per second, over what Grafana finds fitting."""
    return f"rate({selector(metric, more)}[$__rate_interval])"


def total(metric: str, by: str = "", more: str = "") -> str:
    """Sum of rates, by labels."""
    return f"sum{_by(by)} ({rate(metric, more)})"


def quantile(share: float, metric: str, by: str = "", more: str = "") -> str:
    """Of a histogram, by labels."""
    labels = f"le, {by}" if by else "le"
    return f"histogram_quantile({share}, sum by ({labels}) ({rate(metric + '_bucket', more)}))"


def quantiles(metric: str) -> list[Query]:
    """Median and tail of a histogram."""
    return [(quantile(share, metric), f"{share:.0%}") for share in (0.5, 0.95, 0.99)]


def mean(metric: str, by: str = "") -> str:
    """Of a histogram, by labels."""
    return f"sum{_by(by)} ({rate(metric + '_sum')}) / sum{_by(by)} ({rate(metric + '_count')})"


def _by(labels: str) -> str:
    return f" by ({labels})" if labels else ""


def chart(title: str, text: str, unit: str, queries: Sequence[Query], width: int = 8) -> timeseries.Panel:
    """A time series. text: what one sees in it. unit: Grafana's name."""
    legend = VizLegendOptions().display_mode(LegendDisplayMode.LIST).placement(LegendPlacement.BOTTOM).show_legend(True)
    panel = timeseries.Panel().title(title).description(text).unit(unit).min(0).legend(legend).fill_opacity(8)
    for place, (expression, name) in enumerate(queries):
        panel = panel.with_target(_query(expression, name, place))
    return panel.datasource(SOURCE).span(width).height(HEIGHT)


def number(title: str, text: str, unit: str, expression: str, width: int = 4) -> stat.Panel:
    """One value, as it is now."""
    panel = stat.Panel().title(title).description(text).unit(unit).with_target(_query(expression, "", 0))
    return panel.datasource(SOURCE).span(width).height(4)


def _query(expression: str, legend: str, place: int) -> prometheus.Dataquery:
    query = prometheus.Dataquery().expr(expression).ref_id(chr(ord("A") + place)).datasource(SOURCE)
    return query.legend_format(legend) if legend else query


def new_dashboard(name: str, title: str, text: str) -> dashboards.Dashboard:
    """An empty one. name: part of its uid, which links and bookmarks keep."""
    namespace = (
        dashboards.QueryVariable("namespace")
        .label("Namespace")
        .datasource(SOURCE)
        .query("label_values(grokmoe_build_info, namespace)")
        .refresh(VariableRefresh.ON_TIME_RANGE_CHANGED)
        .include_all(True)
        .all_value(".*")
        .multi(True)
    )
    return (
        dashboards.Dashboard(title)
        .uid(f"grokmoe-{name}")
        .description(text)
        .tags(["grokmoe"])
        .refresh("15s")
        .time("now-1h", "now")
        .timezone("browser")
        .with_variable(dashboards.DatasourceVariable("datasource").label("Data source").type("prometheus"))
        .with_variable(namespace)
        .link(dashboards.DashboardLink("grokmoe").tags(["grokmoe"]).type("dashboards").as_dropdown(True))
    )


def row(title: str) -> dashboards.Row:
    """A heading."""
    return dashboards.Row(title)
