"""GPT-Neo for meshes: load, train, evaluate, generate and plan with JAX.

    import neo_jax
    lm = neo_jax.load("EleutherAI/gpt-neo-1.3B")
    lm.generate("EleutherAI has", max_new_tokens=50)
"""

__version__ = "0.1.0"
