"""GPT-Neo and GPT-2 as pure functions of parameters, tokens and a cache."""
