"""Defaults of a simulated day of a cluster; light, so that the command line can show them."""

BOTH_TIERS = "tier 1 + EcoFreq, slack"
DAY_RPS = 46.0  # 4 million requests a day
DAY_ALPHA = 0.3  # headroom over the load of the window before; assumed
DAY_MARGIN = 0.2  # fraction of each bound that tier 2 keeps back over a day; assumed
