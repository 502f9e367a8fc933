"""How well a model does: texts, the tasks of lm-evaluation-harness, the published tables."""
