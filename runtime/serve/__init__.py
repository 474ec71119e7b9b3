"""A bundle behind HTTP (`d2m serve`), or behind NVIDIA Triton Inference Server.

A JSON body of OpenAI's images API enters, images in base64 leave. In reading order:

server.py            the process: its socket, uvicorn, what SIGTERM means
connections.py       how many connections are open, how long they may be silent
guard.py             before every route: host, API key, one line of log
app.py               the routes
stream.py            an answer as events: how far it is, then the images
image_request.py     a body, checked: what enters the queue
service.py           the pipeline, the queue before it and the threads behind it
jobs.py              the queue
generate_threads.py  the threads, each with a batch of like requests
batch.py             what is equal in a batch, its one call, what it runs of the model
batch_invariance.py  from how many rows on an image's bits do not depend on its batch
metrics.py           /metrics for Prometheus
page.py              the page on /
triton.py            the same behind NVIDIA Triton: batch.py and batch_invariance.py, no HTTP
"""
