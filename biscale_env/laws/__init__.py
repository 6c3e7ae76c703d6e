"""Laws of the clock rules, once.

A law says which clock a rule takes, given what it knows. The controllers feed it from
observations and a model of their own, the cluster simulator from its state and the plant's
coefficients; both call the functions of this package.
"""
