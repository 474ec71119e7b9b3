"""`d2m serve`: a bundle behind HTTP, as OpenAI's clients call it. FastAPI is imported by app.py."""
