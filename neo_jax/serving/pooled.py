"""Answers that are made of one vector a text: embeddings, and labels."""

import base64
import contextlib
from typing import Any

import numpy as np

from neo_jax.serving.jobs import PromptFound
from neo_jax.serving.reading_bodies import ClassifyBody, EmbeddingBody
from neo_jax.serving.replies import aside, head, usage
from neo_jax.serving.requests import Prepared, classify_jobs, embedding_jobs
from neo_jax.serving.service import Service
from neo_jax.text.classify import classification


async def embed(service: Service, body: EmbeddingBody) -> dict[str, Any]:
    """Answers /v1/embeddings."""
    name = service.name(body.model)
    work = await aside(sum(map(len, body.input)), embedding_jobs, service, body)
    entries = []
    for index, vector in enumerate(await _pooled(service, work)):
        if body.normalize:
            vector = vector / max(float(np.linalg.norm(vector)), 1e-12)
        values: Any = vector.tolist()
        if body.encoding_format == "base64":
            values = base64.b64encode(vector.astype("<f4").tobytes()).decode()
        entries.append({"object": "embedding", "index": index, "embedding": values})
    return {"object": "list", "data": entries, "model": name, "usage": usage(work.prompt_tokens)}


async def classify(service: Service, body: ClassifyBody) -> dict[str, Any]:
    """Answers /classify as vLLM does."""
    name = service.name(body.model)
    work = await aside(sum(map(len, body.input)), classify_jobs, service, body)
    own = service.lm.config.head
    # Every device has the whole head, also where several processes hold the model.
    kernel = np.asarray(service.lm.params[own.kind]["kernel"].addressable_data(0), np.float32)
    entries = []
    for index, vector in enumerate(await _pooled(service, work)):
        found = classification(kernel @ vector, own)
        numbers = found.probabilities if body.use_activation else found.logits
        entries.append(
            {
                "index": index,
                "label": found.label,
                "probs": numbers.tolist(),
                "num_classes": len(own.labels),
            }
        )
    fields = head("classify", "list", name)
    return {**fields, "data": entries, "usage": usage(work.prompt_tokens, 0)}


async def _pooled(service: Service, work: Prepared) -> list[np.ndarray]:
    """Returns the vector of each text, float32 [D]; raises as `Service.run`."""
    found: dict[int, np.ndarray] = {}
    async with contextlib.aclosing(service.run(work.jobs)) as news:
        async for index, new in news:
            if isinstance(new, PromptFound) and new.pooled is not None:
                found[index] = new.pooled.astype(np.float32)
    return [found[index] for index in range(len(work.jobs))]
