"""What a step takes of a machine that need not be there: stages from a topology to a report."""

from neo_jax.tools.plan.explanation import explain as explain
