"""Tasks, scorers, parity, latency and the report."""
