"""BiScale's prefill controller: one MPC problem, three solvers."""
