"""What looks at a model from outside: plans, benchmarks, layouts."""
