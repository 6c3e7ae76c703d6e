"""Learning from recorded data alone: Minari data sets in, a plain network out."""
