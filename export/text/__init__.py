"""Language models that read prompts: as programs, and their chat templates as data.

decoder        Decoder-only language models as text encoders: a program of one call a layer
chat_template  A tokenizer's chat template as data: what it writes around one message
"""
