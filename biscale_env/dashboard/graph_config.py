"""How every graph of the dashboard behaves in a browser."""

from typing import Final

from dash import dcc

GRAPH_CONFIG: Final[dcc.Graph.Config] = {"displaylogo": False, "responsive": True}
