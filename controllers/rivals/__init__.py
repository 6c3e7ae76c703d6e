"""Controllers of other papers, and constant clocks."""
