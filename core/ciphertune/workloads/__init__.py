"""Real models with real data that need no network: what the demo, the benchmarks and the tests train."""
