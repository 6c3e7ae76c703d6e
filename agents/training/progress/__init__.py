"""What training tells while it runs, and its curves afterwards."""
