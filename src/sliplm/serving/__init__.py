"""A split model behind OpenAI's API: who may ask how much, and one request from its body to its answer.

The server is uvicorn's, its routes are FastAPI's, the batch is `engines.transformers.batching`.  May import
`engines` and what is below it.  Begin with `app`, then `answering`; `door` is what every request passes
before it is read; `front` stands before several servers.
"""
