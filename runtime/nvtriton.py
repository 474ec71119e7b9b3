# model.py of Triton repositories that older versions exported imports this.
from runtime.serve.triton import Model as Model
