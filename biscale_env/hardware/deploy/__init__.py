"""A deployment: machines, instances, a router, and what runs beside them."""
